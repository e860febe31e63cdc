"""Kills one of two processes at random moments of a run: the other must end with status 3 and a line that says so.

    python -m tests.kill_processes --kills=20 -- --config=quickstart

starts what stands after the `--` on two processes of this machine, waits until both have come together, kills one of
them with SIGKILL after a random time, and waits for the other. Each kill prints a line, with the seconds that the other
needed to notice; the exit status is 1 if one of them did not end as promised.
"""

import argparse
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from metajax.watch import LOST

_PATIENCE = 600  # seconds: far more than any promise


def start(arguments, workdir, index, port):
  place = [f'--coordinator=127.0.0.1:{port}', '--num_processes=2', f'--process_id={index}']
  return subprocess.Popen(
    [sys.executable, '-m', 'metajax.main', *arguments, f'--workdir={workdir}', *place],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def connected(port):
  """Whether process 1 is connected to process 0, from the kernel's table of connections."""
  states = Path('/proc/net/tcp').read_text().splitlines()[1:]
  return sum(row.split()[2].endswith(f':{port:04X}') and row.split()[3] == '01' for row in states) > 0


def kill_once(arguments, folder, victim, seconds):
  """Returns whether the other process ended as promised, and a line about it."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  run = [start(arguments, folder, index, port) for index in range(2)]
  try:
    deadline = time.monotonic() + _PATIENCE
    while not connected(port):
      if time.monotonic() > deadline or any(process.poll() is not None for process in run):
        raise RuntimeError('the two processes did not come together')
      time.sleep(0.05)
    time.sleep(seconds)
    run[victim].kill()
    since = time.monotonic()
    other = run[1 - victim]
    _, errors = other.communicate(timeout=_PATIENCE)
    taken = time.monotonic() - since
  finally:
    for process in run:
      process.kill()
  promised = other.returncode == LOST and f'metajax: process {victim} of 2' in errors
  moment = f'process {victim} killed {seconds:.1f} s after both had come together'
  ending = f'the other ended after {taken:.1f} s with status {other.returncode}'
  return promised, f'{moment}: {ending}' + ('' if promised else f', and not as promised:\n{errors}')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--longest', type=float, default=20, help='seconds after which a process is killed at the latest')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('arguments', nargs='+')
  options = parser.parse_args()
  rng, failures = random.Random(options.seed), 0
  for number in range(options.kills):
    victim, seconds = rng.randrange(2), rng.uniform(0, options.longest)
    with tempfile.TemporaryDirectory() as folder:
      promised, line = kill_once(options.arguments, folder, victim, seconds)
    failures += not promised
    print(f'{number + 1}: {line}', flush=True)
  print(f'{options.kills - failures} of {options.kills} ended as promised')
  return 1 if failures else 0


if __name__ == '__main__':
  sys.exit(main())

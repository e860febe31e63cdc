"""Kills a run at random moments and starts it again, until it has ended as often as asked: the end must be the same.

    python -m tests.kill_and_resume --kills=20 -- --config=configs/quickstart.py --config.total_steps=200

runs what stands after the `--` once without disturbance, then again and again with SIGKILL at random moments, and
compares final parameters, optimiser state, metrics.jsonl and test.json, bit for bit.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from metajax import writer


def run(arguments, workdir, kill=None):
  """Runs metajax; returns whether it was killed before its end.

  `kill` is when, (lines of metrics.jsonl to wait for, seconds after them): most of a short run is its start, so moments
  of a clock would hardly ever be after a checkpoint.
  """
  command = [sys.executable, '-m', 'metajax.main', *arguments, f'--workdir={workdir}']
  with tempfile.TemporaryFile('w+') as output:
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    while kill and process.poll() is None:
      if lines_written(workdir) >= kill[0]:
        time.sleep(kill[1])
        process.kill()
        process.wait()
        return True
      time.sleep(0.005)
    if process.wait():
      output.seek(0)
      raise RuntimeError(f'exit status {process.returncode}: {output.read()}')
  return False


def lines_written(workdir):
  path = Path(workdir) / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def outcome(workdir):
  """What a run leaves that must not depend on interruptions: arrays of its last checkpoint, metrics, test result.

  Metrics are lines of JSON, without the times.
  """
  steps = [int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]
  state = ocp.StandardCheckpointer().restore((workdir / 'checkpoints' / str(max(steps)) / 'state').absolute())
  arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
  test = json.loads((workdir / 'test.json').read_text())
  del test['seconds']
  metrics = ''.join(
    json.dumps({name: value for name, value in record.items() if name not in writer.TIMES}) + '\n'
    for record in writer.read(workdir)
  )
  return {'steps': sorted(steps), 'arrays': arrays, 'metrics': metrics, 'test': test}


def differences(a, b):
  """What differs between two outcomes."""
  found = [name for name in ('steps', 'metrics', 'test') if a[name] != b[name]]
  for name in a['arrays'].keys() | b['arrays'].keys():
    x, y = a['arrays'].get(name), b['arrays'].get(name)
    if x is None or y is None or x.tobytes() != y.tobytes():
      found.append(name)
  return found


def check(arguments, folder, kills, seed=0):
  """Runs undisturbed, then with kills; yields a line about each finished run, raises if one differs."""
  rng, folder = random.Random(seed), Path(folder)
  start = time.monotonic()
  run(arguments, folder / 'undisturbed')
  seconds = time.monotonic() - start
  expected = outcome(folder / 'undisturbed')
  lines = expected['metrics'].count('\n')
  yield f'undisturbed: {seconds:.1f} s, checkpoints {expected["steps"]}'
  killed = attempt = 0
  while killed < kills:
    workdir, moments = folder / f'killed-{attempt}', []
    attempt += 1
    while killed < kills:
      moment = rng.randrange(lines), rng.uniform(0, seconds / lines)
      if not run(arguments, workdir, moment):
        break
      killed += 1
      moments.append(lines_written(workdir))
    else:
      run(arguments, workdir)
    if found := differences(expected, outcome(workdir)):
      raise AssertionError(f'{workdir}: killed after {moments} of {lines} lines, and these differ: {found}')
    yield f'{workdir.name}: killed after {moments} of {lines} lines, then the same end, bit for bit'


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('arguments', nargs='+')
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    for line in check(options.arguments, folder, options.kills, options.seed):
      print(line, flush=True)


if __name__ == '__main__':
  main()

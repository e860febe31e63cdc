"""Time from the command to the end of the first meta-update: with nothing compiled before, and in the runs after it.

python -m benchmarks.first_step [--config=FILE[:ARGS]] [--data_dir=DIR] [--repeat=3] [--json=FILE]

Each run is a process of its own, stopped after its first meta-update. Converted tables are taken from the cache as they
are (a run before makes the one that is missing); compiled programs go to a folder that is empty for every cold run, and
that the warm run after it finds as that one left it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from metajax.data.table import cache_dir


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/quickstart.py')
  parser.add_argument('--data_dir')
  parser.add_argument('--repeat', type=int, default=3)
  parser.add_argument('--json', type=Path)
  arguments = parser.parse_args()
  command = [sys.executable, '-m', 'metajax.main', f'--config={arguments.config}', '--mode=train']
  command += [f'--data_dir={arguments.data_dir}'] if arguments.data_dir else []
  seconds_to_first_step(command, cache_dir())  # converts the data
  seconds = {'cold': [], 'warm': []}
  for _ in range(arguments.repeat):
    with tempfile.TemporaryDirectory() as cache:
      for table in cache_dir().glob('*/manifest.json'):
        (Path(cache) / table.parent.name).symlink_to(table.parent.absolute())
      for name, times in seconds.items():
        times.append(seconds_to_first_step(command, cache))
        print(f'{name}: {times[-1]:.2f} s', flush=True)
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  print(
    f'{arguments.config}: cold {medians["cold"]:.2f} s, warm {medians["warm"]:.2f} s (medians of {arguments.repeat}), '
    f'warm / cold {medians["warm"] / medians["cold"]:.2f}'
  )
  if arguments.json:
    result = {'config': arguments.config, 'seconds': seconds, 'medians': medians}
    arguments.json.write_text(json.dumps(result, indent=2) + '\n')


def seconds_to_first_step(command, cache):
  """Starts `command` in a new workdir and waits for its first meta-update, whose metrics it writes."""
  with tempfile.TemporaryDirectory() as folder:
    metrics = Path(folder) / 'run' / 'metrics.jsonl'
    start = time.perf_counter()
    process = subprocess.Popen(
      [*command, f'--workdir={metrics.parent}', '--config.total_steps=1', '--config.log_every=1'],
      env={**os.environ, 'METAJAX_CACHE': str(cache)},
      stdout=subprocess.DEVNULL,
    )
    try:
      while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
          raise RuntimeError(f'{" ".join(process.args)} ended before its first meta-update')
        time.sleep(0.005)
      return time.perf_counter() - start
    finally:
      process.kill()
      process.wait()


if __name__ == '__main__':
  main()

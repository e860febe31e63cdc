"""The share of its time that training waits for data.

python -m benchmarks.input [--json=FILE] [--budget=MB] [--seconds=SECONDS] [--tiered] [--folder=FOLDER]

Trains on random images with the loop's own pieces: the source of episodes, the prefetching thread, the compiled
meta-update, and metrics looked at two steps late. Three tables: one on the device; the same mapped into memory on the
host, its images gathered ahead; and one larger than a device budget, 256 MB unless given, which therefore lies on the
host. On the last also a network so small that a step takes milliseconds, as on an accelerator. The files are not in
the page cache at the start. With --tiered there is one table instead, as large as tiered-ImageNet's, 16.5 GB, of which
a minute of training comes upon few images twice: it reads nearly all from the disk, as if memory were smaller than the
table.

- `waiting`: time that the loop spends in the queue for its next batch, over all time. Since steps are dispatched
  without waiting for their results, the device may have up to two steps left to do meanwhile: it is idle for want of
  data at most this share. Waiting for the device happens elsewhere, where metrics are looked at, and does not count.
- `batch`: what the thread takes to make one batch, with nothing beside it: drawing the episodes, gathering their
  images, and putting them on the device. As long as a step takes longer, the loop need not wait. Two lines about one
  table ask for the same batches: in the second they come from the page cache.
"""

import argparse
import contextlib
import functools
import itertools
import json
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import synthetic
from metajax import config as config_lib
from metajax import evaluate, keys, parallel, train
from metajax import experiment as experiment_lib
from metajax.data import episodes, pipeline
from metajax.progress import Progress

_WARM_UP = 5  # steps before time is taken: compiling, and filling the queue
_BATCHES = 20  # made with nothing beside them
_OMNIGLOT = dict(size=28, channels=1, classes=1623, images=32_460)
_MINI = dict(size=84, channels=3, classes=64, images=38_400)
_TIERED = dict(size=84, channels=3, classes=608, images=779_165)
_SMALL = ['--config.model.name=mlp', '--config.model.hidden=(8,)', '--config.algorithm.inner_steps=1']
_CASES = (  # name, config, table, placement (none: by its size), overrides of the config
  ('Omniglot', 'maml_omniglot', _OMNIGLOT, 'device', []),
  ('Omniglot', 'maml_omniglot', _OMNIGLOT, 'host', []),
  ('mini-ImageNet', 'maml_mini', _MINI, None, []),
  ('mini, small net', 'maml_mini', _MINI, None, _SMALL),
)
_TIERED_CASES = (
  ('tiered-ImageNet', 'maml_mini', _TIERED, 'host', []),
  ('tiered, small net', 'maml_mini', _TIERED, 'host', _SMALL),
)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--json', type=Path)
  parser.add_argument('--budget', type=int, default=256)
  parser.add_argument('--seconds', type=float, default=20)
  parser.add_argument('--tiered', action='store_true')
  parser.add_argument('--folder', help='where the tables are written, and deleted in the end')
  arguments = parser.parse_args()
  parallel.use_cores(4)  # as a run does; the smallest meta-batch below has so many tasks
  results = []
  print('table                size  placement  device holds     batch       step   waiting')
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    for name, path, table, placement, overrides in _TIERED_CASES if arguments.tiered else _CASES:
      images = synthetic.load(folder, **table)['train'].images
      placement = placement or episodes.place(images, arguments.budget * 10**6)
      config = config_lib.load(f'configs/{path}.py').to_dict()
      kept = {k: config['data'][k] for k in ('way', 'shot', 'query_shot', 'tasks')}
      config['data'] = {'name': 'benchmarks.synthetic', 'placement': placement, **table, **kept}
      config = config_lib.override(config_lib.complete(config), overrides)
      result = {'table': name, 'bytes': images.nbytes, 'placement': placement}
      result |= measure(config, folder, arguments.seconds)
      results.append(result)
      print(
        f'{name:17} {images.nbytes / 1e6:5.0f} MB  {placement:9}  {result["device_bytes"] / 1e6:9.1f} MB  '
        f'{1e3 * result["batch_seconds"]:5.1f} ms  {1e3 * result["step_seconds"]:6.1f} ms  '
        f'{100 * result["waiting"]:6.3f} %',
        flush=True,
      )
  if arguments.json:
    arguments.json.write_text(json.dumps(results, indent=2) + '\n')


def measure(config, data_dir, seconds):
  """Trains for so many seconds; returns what the table above shows."""
  experiment = experiment_lib.make(config, data_dir, ('train',))
  source, tasks = experiment.sources['train'], config.data.tasks
  chunk = parallel.chunk_size(config.chunk, tasks, evaluate.elements(source))
  step_fn = parallel.over_devices(functools.partial(train.train_step, experiment=experiment, tasks=tasks), donate=True)
  state = parallel.replicate(train.init_state(experiment, config.seed))
  constants = experiment.resident, parallel.replicate(keys.from_seed(config.seed))

  def make_batch(step):
    return parallel.lay_out(source.sample((step - 1) * tasks, tasks), tasks, chunk)

  start = time.perf_counter()
  for step in range(_BATCHES):
    jax.block_until_ready(make_batch(10**6 + step))  # not the batches that the loop will ask for
  batch_seconds = (time.perf_counter() - start) / _BATCHES

  waits, device_bytes = [], 0
  progress = Progress(config.total_steps, 0, tasks)
  in_flight = train.InFlight(progress, writer=None, log_every=0)
  with contextlib.closing(pipeline.prefetch(make_batch, itertools.count(1), waits.append)) as batches:
    for step, local in batches:
      state, metrics = step_fn(state, constants, local)
      in_flight.add(step, metrics, stop=False)
      if step == _WARM_UP:
        device_bytes = sum(x.nbytes for x in jax.live_arrays())
        in_flight.settle()
        waits.clear()
        start = time.perf_counter()
      elif step > _WARM_UP and time.perf_counter() > start + seconds:
        break
    in_flight.settle()
    elapsed = time.perf_counter() - start
  return {
    'tasks': tasks,
    'steps': len(waits),
    'device_bytes': device_bytes,
    'batch_seconds': batch_seconds,
    'step_seconds': elapsed / len(waits),
    'waiting': sum(waits) / elapsed,
  }


if __name__ == '__main__':
  main()

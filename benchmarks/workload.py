"""What the benchmarks time: shapes of few-shot problems, their data and weights, and metajax's programs for them."""

import argparse
import functools
import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax import evaluate, keys, losses, optimizers, parallel, system, train
from metajax import experiment as experiment_lib
from metajax.algorithms import maml
from metajax.data.episodes import Source
from metajax.models import conv4
from metajax.types import Episode, Examples
from metajax.weighting import uniform


class Workload(NamedTuple):
  """MAML on Conv4 with max pooling; `name` is the shape's in tables and JSON files."""

  name: str
  image: tuple  # height, width, channels
  width: int  # filters of every convolution
  way: int = 5
  shot: int = 1
  query_shot: int = 15
  inner_steps: int = 5
  inner_lr: float = 0.01
  tasks: int = 4  # in a meta-batch


SHAPES = {
  'omniglot': Workload('omniglot', image=(28, 28, 1), width=64),
  'mini': Workload('mini', image=(84, 84, 3), width=32),
}


def add_options(parser):
  """Adds --shape and one option for every field of a Workload; `from_options` reads them."""
  parser.add_argument('--shape', default=','.join(SHAPES), help='shapes to start from: omniglot, mini or both')
  parser.add_argument('--image', type=_image, help='HxWxC')
  for name in ('width', 'way', 'shot', 'query_shot', 'inner_steps', 'tasks'):
    parser.add_argument(f'--{name}', type=int)
  parser.add_argument('--inner_lr', type=float)
  parser.add_argument('--json', type=Path, help='file for the results')


def from_options(options):
  """The workloads asked for; what differs from a shape's own values becomes part of its name.

  To be called before JAX is first used: as in a run of metajax, each core becomes a device.
  """
  changed = {k: v for k in Workload._fields if (v := getattr(options, k, None)) is not None}
  suffix = ','.join(f'{k}={"x".join(map(str, v)) if k == "image" else v}' for k, v in changed.items())
  name = (lambda shape: f'{shape}:{suffix}') if changed else str
  works = [SHAPES[shape]._replace(name=name(shape), **changed) for shape in options.shape.split(',')]
  parallel.use_cores(min(work.tasks for work in works))
  return works


def numbers(text):
  """'1,5' as (1, 5), for options that are lists."""
  return tuple(map(int, text.split(',')))


def _image(text):
  size = tuple(map(int, text.split('x')))
  if len(size) != 3:
    raise argparse.ArgumentTypeError(f'{text!r} is not HxWxC')
  return size


def useful_flops(workload, order):
  """Floating-point operations of one meta-update that no formulation can do without: 2 for each multiply-add.

  Only convolutions and head count, each as `forward` = 2 * 9 * c_in * c_out * pixels (the head 2 * features * way) per
  image, zero padding included; normalisation, pooling, optimiser and whatever is computed twice do not. With the input
  given, the first layer needs no input gradient, so its factors are the lower ones:

  - query, loss and gradient: output, kernel gradient, input gradient: 3 `forward` (first layer 2);
  - inner step, first order: the same, 3 (2), and nothing of it is differentiated again;
  - inner step, second order: each of these products is differentiated in both of its factors, so 3 + 6 = 9; of the
    first layer's two products only the factor that is not the input, so 2 + 2 = 4.
  """
  h, w, features = workload.image
  first, rest = 0, 0
  for i in range(4):
    forward = 2 * 9 * features * workload.width * h * w
    first, rest = (forward, rest) if i == 0 else (first, rest + forward)
    h, w, features = h // 2, w // 2, workload.width
  rest += 2 * h * w * features * workload.way
  query = 3 * rest + 2 * first
  inner = 9 * rest + 4 * first if order == 2 else query
  per_class = workload.inner_steps * workload.shot * inner + workload.query_shot * query
  return workload.tasks * workload.way * per_class


def draw_episodes(workload, seed=0):
  """A meta-batch of normal noise around a mean image for each class: an Episode of NumPy arrays (tasks, ...)."""
  rng = np.random.default_rng(seed)
  tasks, way = workload.tasks, workload.way
  means = rng.standard_normal((tasks, way, 1, *workload.image))

  def examples(shot):
    images = means + rng.standard_normal((tasks, way, shot, *workload.image))
    targets = np.broadcast_to(np.arange(way, dtype=np.int32)[:, None], (tasks, way, shot))
    return Examples(np.float32(images).reshape(tasks, way * shot, *workload.image), targets.reshape(tasks, -1))

  class_ids = np.broadcast_to(np.arange(way, dtype=np.int32), (tasks, way))
  return Episode(examples(workload.shot), examples(workload.query_shot), class_ids)


def make_experiment(workload, *, order=2, weighting=None, **settings):
  """The workload as training knows it; its episodes are ready arrays on the device, over and over again.

  `settings` are further ones of `maml.make`.
  """
  episodes = draw_episodes(workload)
  source = Source(
    sample=lambda start, count: np.arange(start, start + count) % workload.tasks,
    decode=lambda resident, rows: jax.tree.map(lambda x: x[rows], resident),
    resident=episodes,
    num_classes=workload.way,
  )
  algorithm = maml.make(
    conv4.make(workload.way, width=workload.width),
    inner_steps=workload.inner_steps,
    inner_lr=workload.inner_lr,
    first_order=order == 1,
    **settings,
  )
  return experiment_lib.Experiment(
    splits={},
    sources={'train': source, 'test': source},
    resident=parallel.replicate(episodes),
    objective=losses.CLASSIFICATION,
    algorithm=algorithm,
    phases=experiment_lib.make_phases(algorithm, group=1),
    weighting=weighting or uniform.make(),
    tx=optimizers.make(1),
    evaluation=algorithm,
    example=np.zeros(episodes.support.inputs.shape[1:], np.float32),
  )


class TrainStep:
  """The real train step, compiled as `train.train` does; each call is one meta-update.

  Of the workload's own episodes, or of those of a `source`.
  """

  def __init__(self, workload, source=None, **settings):
    experiment = make_experiment(workload, **settings)
    if source:
      experiment = experiment._replace(sources={'train': source}, resident=parallel.replicate(source.resident))
    source = experiment.sources['train']
    self.chunk = parallel.chunk_size('auto', workload.tasks, evaluate.elements(source))
    step = functools.partial(train.train_step, experiment=experiment, tasks=workload.tasks)
    self._inputs = (
      (experiment.resident, parallel.replicate(keys.from_seed(0))),
      parallel.lay_out(source.sample(0, workload.tasks), workload.tasks, self.chunk),
    )
    self.state = parallel.replicate(train.init_state(experiment, seed=0))
    start = time.perf_counter()
    self._compiled = parallel.over_devices(step, donate=True).lower(self.state, *self._inputs).compile()
    self.compile_s = time.perf_counter() - start

  @property
  def temp_mb(self):
    """Megabytes that the program needs besides its arguments and results, by XLA's account, on all devices."""
    return jax.local_device_count() * self._compiled.memory_analysis().temp_size_in_bytes / 1e6

  def __call__(self):
    """Returns seconds and metrics of one meta-update."""
    start = time.perf_counter()
    self.state, metrics = jax.block_until_ready(self._compiled(self.state, *self._inputs))
    return time.perf_counter() - start, {k: np.asarray(v, np.float64).tolist() for k, v in metrics.items()}


def in_pairs(step, plain, rounds):
  """Times a TrainStep in turns with another: its median, and median and quartiles of its time over the other's."""
  pairs = []
  for number in range(rounds + 1):
    # Which comes first changes, since the second finds the other's data in the cache.
    pair = [step()[0], plain()[0]] if number % 2 else [plain()[0], step()[0]][::-1]
    if number:
      pairs.append(pair)
  pairs = np.array(pairs)
  low, ratio, high = np.percentile(pairs[:, 0] / pairs[:, 1], [25, 50, 75])
  return {'step_ms': 1e3 * np.median(pairs[:, 0]), 'ratio': ratio, 'ratio_quartiles': [low, high]}


def matmul(n=2048):
  """The ceiling: a function that times one (n, n) float32 matrix product, and its operations."""
  x = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), jnp.float32)
  product = jax.jit(lambda x: jnp.matmul(x, x, precision='highest')).lower(x).compile()

  def seconds():
    start = time.perf_counter()
    jax.block_until_ready(product(x))
    return time.perf_counter() - start

  return seconds, 2 * n**3


def spread(seconds):
  """Median and quartiles in milliseconds, as fields of a row."""
  low, median, high = np.percentile(1e3 * np.asarray(seconds), (25, 50, 75))
  return {'step_ms': median, 'step_ms_quartiles': [low, high], 'steps': len(seconds)}


def environment():
  """What numbers depend on besides the code: versions, device, cores, date."""
  return {
    'jax': jax.__version__,
    'python': platform.python_version(),
    'device': f'{jax.local_device_count()} x {jax.devices()[0].device_kind}',
    'processor': _processor(),
    'cores': system.cores(),
    'date': time.strftime('%Y-%m-%d'),
  }


def write_json(path, *, rows, works, **fields):
  """Writes results, the settings behind each shape's name and the environment; nothing if `path` is None."""
  if path:
    settings = {work.name: work._asdict() for work in works}
    results = {**fields, 'rows': rows, 'workloads': settings, 'environment': environment()}
    path.write_text(json.dumps(results, indent=2) + '\n')


def _processor():
  try:
    with open('/proc/cpuinfo') as lines:
      return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor()

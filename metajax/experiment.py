"""What a run consists of: data, model, algorithm, weighting and optimiser, as a config names them."""

import contextlib
import site
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import config as config_lib
from metajax import evaluate, heads, keys, losses, optimizers, parallel, processes
from metajax.checkpoint import KEEP_BEST
from metajax.data import episodes, hard_tasks, identity, table
from metajax.errors import UserError, first_line
from metajax.types import Algorithm, Phase, TaskWeighting


class Experiment(NamedTuple):
  """What a config stands for: the only place that reads its groups."""

  splits: dict  # {split: ClassTable or Functions}
  sources: dict  # {split: episodes.Source}
  resident: Any  # what all of them keep on the devices
  objective: losses.Objective
  algorithm: Algorithm
  phases: tuple[Phase, ...]  # of training: at least one, with losses of one task, which may be a group of episodes
  weighting: TaskWeighting
  tx: optax.GradientTransformation
  evaluation: Algorithm  # the algorithm with evaluation's inner steps
  example: Any  # an input batch to initialise with
  hard: hard_tasks.HardTasks | None = None  # None where all tasks of training are random


_NO_HEAD_C = None, 1.0  # the second in configs that runs kept when it was the default
_COUNTS = (
  *('data.tasks', 'data.group', 'data.shot', 'data.query_shot'),
  *('eval.episodes', 'eval.val_episodes'),
)
_COUNTS_OR_ZERO = (
  *('seed', 'total_steps', 'log_every', 'eval_every', 'checkpoint_every'),
  *('data.batch', 'data.hard_updates', 'eval.seed', 'eval.ensemble'),
)


def make(config, data_dir, needed=('train', 'test'), *, validated=True, kept=None):
  """Loads the data and builds what the config names.

  Args:
    config: complete.
    data_dir: where archives of data sets lie.
    needed: the splits that the data must have; evaluation needs 'test' alone.
    validated: whether there are episodes of its val split too, if it has one; evaluation needs none, and that split may
      be too small for evaluation's way.
    kept: the identity of the run's data, see `data.identity.describe`, which this data must have; None for a new run.
  """
  for name in (*_COUNTS, *_COUNTS_OR_ZERO):
    value, least = config_lib.get(config, name), int(name in _COUNTS)
    if not isinstance(value, int) or value < least:
      raise UserError(f'config.{name} = {value!r}: a whole number from {least} on is needed')
  if config.eval.ensemble > KEEP_BEST:
    raise UserError(f'config.eval.ensemble = {config.eval.ensemble}: only the {KEEP_BEST} best checkpoints are kept')
  splits = load_splits(config, data_dir, needed, validated=validated, kept=kept)
  if config.eval.ensemble and validated and 'val' not in splits:
    raise UserError(f'config.eval.ensemble: {config.data.name} has no val split to choose by: add one, or set it to 0')

  used = {*needed, 'train', *(['val'] if validated else [])}
  sources = make_sources(config, {split: data for split, data in splits.items() if split in used})
  if 'train' not in splits:  # evaluation needs it for nothing but shapes
    splits['train'], sources['train'] = splits[needed[0]], sources[needed[0]]
  shapes = jax.eval_shape(sources['train'].decode, sources['train'].resident, sources['train'].sample(0, 1))
  targets = shapes.query.targets
  regression = jnp.issubdtype(targets.dtype, jnp.floating)
  objective = losses.REGRESSION if regression else losses.CLASSIFICATION
  model = config_lib.build(config, 'model', targets.shape[-1] if regression else config.data.way)
  for_evaluation = {k: config.eval[k] for k in config_lib.OF_INNER_LOOP if config.eval[k] is not None}
  for name in for_evaluation:
    if name not in config.algorithm:
      raise UserError(f'config.eval.{name}: {config.algorithm.name} has no such setting')
  if config.eval.inner_lr is not None and config.algorithm.get('learned_lr', 'no') != 'no':
    raise UserError('config.eval.inner_lr: step sizes are learned, and evaluation has no others')
  way = config.data.way if config.eval.way is None else config.eval.way
  classes = len(kept['train']) if kept and 'train' in kept else sources['train'].num_classes
  supplied = {'objective': objective, 'num_classes': classes}
  algorithm = config_lib.build(
    config, 'algorithm', model, way=classes if config.data.batch else config.data.way, **supplied
  )
  try:
    evaluation = config_lib.build(config, 'algorithm', model, way=way, **supplied, **for_evaluation)
  except UserError as error:  # not of training's settings
    raise UserError(str(error).replace('config.algorithm:', 'config.eval:', 1)) from error
  if config.eval.head:
    evaluation = with_head(config, evaluation, objective, way)
  elif config.eval.head_c not in _NO_HEAD_C or not config.eval.head_normalize:
    raise UserError('config.eval.head_c and head_normalize are of the head that config.eval.head names: name one')
  example = np.zeros(shapes.support.inputs.shape[1:], np.float32)
  with explained(f'config.model: {config.model.name} does not take inputs {example.shape[1:]}'):
    jax.eval_shape(lambda example: algorithm.init(keys.from_seed(0), example), example)
  if evaluated := [split for split in ('val', 'test') if split in sources]:
    rehearse(evaluation._replace(init=algorithm.init), objective, sources[evaluated[0]], example, way)
  if not algorithm.episodic:
    sources['train'] = make_source(config, splits['train'], 'train', merged=True)
  elif config.data.batch:
    raise UserError(
      f'config.data.batch = {config.data.batch}: {config.algorithm.name} learns from episodes; set it to 0'
    )
  if config.data.random_updates != 10 and not config.data.hard_updates:
    raise UserError('config.data.random_updates is for hard tasks: choose data.hard_updates as well')
  tx = config_lib.call(optimizers.make, config, 'optimizer', config.total_steps)
  sources['train'] = episodes.grouped(sources['train'], config.data.group)
  return Experiment(
    splits=splits,
    sources=sources,
    resident=parallel.replicate(sources['train'].resident),
    objective=objective,
    algorithm=algorithm,
    phases=make_phases(algorithm, config.data.group, config.optimizer.only),
    weighting=config_lib.build(
      config,
      'weighting',
      tasks=config.data.tasks,
      tx=tx,
      num_classes=classes,
      superclass_ids=superclass_ids(splits['train']),
    ),
    tx=tx,
    evaluation=evaluation,
    example=example,
    hard=make_hard(config, splits['train'], sources['train']) if config.data.hard_updates else None,
  )


def load_splits(config, data_dir, needed, *, validated, kept):
  """The data of each split; arguments and errors as in `make`."""
  splits = processes.first_then_others(lambda: config_lib.build(config, 'data', str(data_dir)))
  for split, data in splits.items():
    if isinstance(data, table.ClassTable):
      table.check(data, f'config.data: the {split} split of {config.data.name}')
  splits, notes = identity.settle(splits, kept or {}, {*needed, 'val'} if validated else needed)
  for note in notes if processes.is_first() else ():
    print(f'{config.data.name}: {note}')
  for split in needed:
    if split not in splits:
      hint = ', or use --mode=train' if split == 'test' and 'train' in needed else ''
      raise UserError(f'config.data: {config.data.name} has no {split} split: add one{hint}')
  found = identity.describe(splits)
  if processes.from_first(lambda: found) != found:
    raise UserError(f'config.data: {config.data.name} has other classes or images here than on process 0')
  return table.share(splits)


def with_head(config, algorithm, objective, way):
  """The algorithm with the head that `config.eval` names, fitted to its embedding, in place of its own adaptation."""
  if objective is not losses.CLASSIFICATION:
    raise UserError('config.eval.head: heads are of classes, and regression has none')
  if algorithm.embedding is None:
    raise UserError(f'config.eval.head: {config.algorithm.name} with these settings has no embedding to fit a head to')
  if config.eval.head_c not in _NO_HEAD_C and config.eval.head not in heads.WITH_C:
    raise UserError(f'config.eval.head_c: {config.eval.head} has no c, only {" and ".join(heads.WITH_C)} have one')
  try:
    head = heads.make(config.eval.head, c=config_lib.head_c(config), normalize=config.eval.head_normalize)
  except UserError as error:
    raise UserError(f'config.eval.head: {error}') from error
  adapt, predict = heads.learner(head, algorithm.embedding, way)
  return algorithm._replace(adapt=adapt, predict=predict, trajectory=None, predict_along=None)


def make_hard(config, table, source):
  """Hard tasks of the training split, see `data.hard_tasks`."""
  data = config.data
  if data.batch or data.group > 1 or not source.num_classes:
    raise UserError(
      'config.data.hard_updates: hard tasks are classification episodes, one by one: batch = 0, group = 1'
    )
  return hard_tasks.make(
    table,
    way=data.way,
    images=data.shot + data.query_shot,
    tasks=data.tasks,
    random_updates=data.random_updates,
    hard_updates=data.hard_updates,
  )


def rehearse(algorithm, objective, source, example, way):
  """Goes through an evaluation with shapes alone: better now than after hours of training.

  Args:
    algorithm: of evaluation, with the `init` of training.
    objective: what is reported.
    source: of the episodes.
    example: inputs to initialise with.
    way: classes of an episode.

  Raises:
    UserError: it fails, or the network has fewer outputs than `way`.
  """

  def evaluation(example, resident, batch):
    rng = keys.from_seed(0)  # here: outside it would be compiled
    params, model_state = algorithm.init(rng, example)
    episode = jax.tree.map(lambda x: x[0], source.decode(resident, batch))
    adapted = algorithm.adapt(params, model_state, episode.support, rng)
    outputs = algorithm.predict(params, model_state, adapted, episode.query.inputs)
    return outputs, evaluate.score(objective, outputs, episode.query.targets)

  with explained('config: the learner cannot be evaluated'):
    outputs, _ = jax.eval_shape(evaluation, example, source.resident, source.sample(0, 1))
  if objective is not losses.REGRESSION and way > outputs.shape[-1]:
    raise UserError(f'config.eval.way = {way}, but the network was trained with {outputs.shape[-1]} outputs')


@contextlib.contextmanager
def explained(where):
  """Turns an error in the code of a model or an algorithm into one line, with its place if that is a user's file."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_A_USERS)]
    place = f' ({own[-1].filename}, line {own[-1].lineno})' if own else ''
    raise UserError(f'{where}: {type(error).__name__}: {first_line(error)}{place}') from error


# Where the code of metajax and of installed packages lies.
_NOT_A_USERS = str(Path(__file__).parent), *site.getsitepackages(), str(Path(contextlib.__file__).parent)


def superclass_ids(data):
  """Each class's superclass, (classes,) int32 counted from 0 in the order of their names; None without such."""
  names = getattr(data, 'superclasses', ())
  return np.unique(names, return_inverse=True)[1].astype(np.int32) if len(names) else None


def make_phases(algorithm, group, only=()):
  """The phases of training on tasks of `group` episodes each, which have a leading axis then; one if it has none.

  Their losses have no derivatives but by what `optimizers.learned` says, so that nothing is computed for the rest.
  """

  def of_group(loss):
    def group_loss(params, model_state, episodes, rng, step):
      rngs = jax.random.split(rng, group)
      losses, aux = jax.vmap(loss, (None, None, 0, 0, None))(params, model_state, episodes, rngs, step)
      return losses, jax.tree.map(lambda x: x.mean(axis=0), aux)

    return group_loss if group > 1 else loss

  def without_step(loss):
    return lambda params, model_state, episode, rng, step: loss(params, model_state, episode, rng)

  def of_learned(loss):
    return lambda params, *args, **options: loss(optimizers.held(params, only), *args, **options)

  if group > 1 and algorithm.group_loss:
    phases = (Phase(0, without_step(algorithm.group_loss)),)
  else:
    phases = algorithm.phases or (Phase(0, without_step(algorithm.loss)),)
    phases = tuple(phase._replace(loss=of_group(phase.loss)) for phase in phases)
  return tuple(phase._replace(loss=of_learned(phase.loss)) for phase in phases)


def make_sources(config, splits):
  """Episodes of every split."""
  return {split: make_source(config, data, split) for split, data in splits.items()}


def make_source(config, data, split, *, merged=False):
  """Episodes of a split; those of validation and test are of evaluation's way and shot, and have its seed.

  If `merged` there is no support set, see `episodes.make_source`, or there are batches in place of episodes.
  """
  training = split == 'train'
  sizes = {k: config.data[k] for k in ('way', 'shot', 'query_shot')}
  if training and config.data.batch:
    sizes.update(shot=1, query_shot=1)  # episodes are for their images' shapes alone, however few there are of a class
  elif not training:
    sizes.update({k: config.eval[k] for k in sizes if config.eval[k] is not None})
  return episodes.make_source(
    data,
    split,
    **sizes,
    merged=merged,
    batch=config.data.batch if merged else 0,
    seed=config.seed if training else config.eval.seed,
    placement=config.data.placement,
    augment=(config.data if training else config.eval).augment,
    normalize=config.data.normalize,
  )

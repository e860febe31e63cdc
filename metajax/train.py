"""Training: one meta-update, and the loop. As a command, `python -m metajax.train`, it is `metajax train`."""

import collections
import contextlib
import functools
import signal
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import config as config_lib
from metajax import evaluate, history, keys, optimizers, outer_loop, parallel, processes
from metajax import experiment as experiment_lib
from metajax import workdir as workdir_lib
from metajax.checkpoint import Checkpoints, mismatches
from metajax.data import identity, pipeline
from metajax.errors import UserError
from metajax.profiling import Profile
from metajax.progress import Progress, readable
from metajax.writer import Writer


class TrainState(NamedTuple):
  """Arrays only, and all that a checkpoint holds."""

  step: Any
  params: Any
  model_state: Any
  opt_state: Any
  weighting: Any
  hard: Any = ()  # classes that `data.hard_tasks` has collected, () where no tasks are hard


_OF_HARD_TASKS = np.uint32(2**32 - 1)  # folded into the step's key, in which tasks count from 0


def train_step(state, constants, local, *, experiment, tasks, phase=0):
  """One meta-update on a meta-batch; pure, compiled by `parallel.over_devices`.

  Args:
    state: TrainState.
    constants: (resident, rng), the same in every step.
    local: this device's part of the meta-batch, see `parallel.lay_out`.
    experiment: what is trained.
    tasks: in the meta-batch.
    phase: which of training's phases it is in.

  Returns:
    the next state; metrics, scalars and vectors.
  """
  weighting, tx = experiment.weighting, experiment.tx
  loss = functools.partial(experiment.phases[phase].loss, step=state.step)
  resident, rng = constants
  rng_tasks, rng_weighting = jax.random.split(jax.random.fold_in(rng, state.step))
  if hard := experiment.hard:
    positions, batch = local
    rngs = jax.vmap(outer_loop.task_rngs, (None, 0))(jax.random.fold_in(rng_tasks, _OF_HARD_TASKS), positions)
    local = positions, jax.vmap(hard.redraw, (None, None, 0, 0))(state.hard, state.step, batch, rngs)
  episodes_of = functools.partial(experiment.sources['train'].decode, resident)
  meta_batch = dict(episodes=episodes_of, local=local, rng=rng_tasks, tasks=tasks)

  classes = parallel.gather_tasks(jax.vmap(lambda batch: query_classes(episodes_of(batch)))(local[1]), tasks)
  if weighting.from_losses:
    now = outer_loop.task_losses(loss, state.params, state.model_state, **meta_batch)
    coefficients = weighting.from_losses(state.weighting, now, classes)
  else:
    coefficients = weighting.coefficients(state.weighting, classes)
  trials = weighting.trials and weighting.trials(state.weighting, rng_weighting)
  grads, model_state, task_losses, metrics = outer_loop.gradient(
    loss, state.params, state.model_state, coefficients=coefficients, trials=trials, **meta_batch
  )
  tried = ()
  if trials is not None:
    trial_grads, grads = jax.tree.map(lambda g: g[1:], grads), jax.tree.map(lambda g: g[0], grads)
    tried = (
      outer_loop.trial_losses(loss, tx, state.opt_state, state.params, state.model_state, trial_grads, **meta_batch),
    )
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  weights, weight_metrics = weighting.update(state.weighting, task_losses, classes, rng_weighting, *tried)
  collected = state.hard
  if hard:
    if metrics['accuracy'].shape != classes.shape:
      raise UserError('config.data.hard_updates: the algorithm has no accuracy of each query')
    collected = hard.collect(collected, state.step, classes, metrics['accuracy'], task_losses)
  state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    model_state={**state.model_state, **model_state},
    opt_state=opt_state,
    weighting=weights,
    hard=collected,
  )
  # An accuracy is of each query; of other vectors the entries mean different things.
  metrics = {name: x.mean() if name == 'accuracy' else x.mean(axis=0) for name, x in metrics.items()}
  return state, {'loss': task_losses.mean(), 'grad_norm': optax.tree.norm(grads), **metrics, **weight_metrics}


def query_classes(episodes):
  """The training split's class of every query, (tasks, query) int32, from a meta-batch; 0 in regression."""
  class_ids, targets = episodes.class_ids, episodes.query.targets
  if class_ids.shape[-1] == 0:
    return jnp.zeros((len(targets), targets.size // len(targets) // targets.shape[-1]), jnp.int32)
  return jnp.take_along_axis(class_ids, targets, axis=-1).reshape(len(targets), -1)


def init_state(experiment, seed):
  """The state before the first meta-update, a function of the seed alone."""

  def init(rng):
    rng_params, rng_weighting = jax.random.split(rng)
    params, model_state = experiment.algorithm.init(rng_params, experiment.example)
    return TrainState(
      step=jnp.int32(0),
      params=params,
      model_state=model_state,
      opt_state=experiment.tx.init(params),
      weighting=experiment.weighting.init(rng_weighting),
      hard=experiment.hard.init() if experiment.hard else (),
    )

  return jax.jit(init)(keys.from_seed(seed))


def run(config, workdir, *, data_dir, mode='train_and_eval'):
  """Trains and evaluates; goes on where the workdir's last run stopped.

  Of several processes (see `processes.start`) each calls this; process 0 alone touches the workdir.

  Args:
    config: complete, see `config.complete`.
    workdir: folder of the run.
    data_dir: where archives of data sets lie.
    mode: 'train', 'eval' or 'train_and_eval'.

  Raises:
    UserError: see the message.
  """
  with processes.on_first(workdir_lib.locked, workdir):
    settled = processes.from_first(lambda: config_lib.to_json(workdir_lib.settle_config(workdir, config, mode)))
    config = config_lib.from_json(settled)
    needed = {'train': ('train',), 'eval': ('test',), 'train_and_eval': ('train', 'test')}[mode]
    kept = processes.from_first(lambda: workdir_lib.read_data(workdir))
    experiment = experiment_lib.make(
      config, data_dir, needed, validated=mode != 'eval', kept=kept['splits'] if kept else None
    )
    with contextlib.closing(processes.on_first(Checkpoints, workdir)) as checkpoints:
      if mode != 'eval':
        with _stop_on_sigterm() as stop:
          train(config, experiment, workdir, checkpoints, stop)
          stopped = parallel.anywhere(stop.is_set())
      from metajax import report  # only now: the first meta-update need not wait for the import of matplotlib

      if mode != 'eval':
        if processes.is_first():
          report.draw_training(workdir)
        if stopped:
          return
      if mode != 'train':
        report.test(config, experiment, load(checkpoints, experiment, config), workdir, checkpoints)


def train(config, experiment, workdir, checkpoints, stop):
  """The loop: from the last checkpoint, or from nothing, to `config.total_steps` or where validation ends it."""
  history.check(config, experiment.sources)
  if experiment.hard and isinstance(experiment.sources['train'].resident, tuple):
    raise UserError(
      'config.data.hard_updates: the device draws hard tasks, but the table of images, '
      f'{experiment.splits["train"].images.nbytes / 1e9:.1f} GB, lies on the host; where the device has room for it, '
      'set config.data.placement=device'
    )
  profile = Profile(config.profile if processes.is_first() else '', config.total_steps, workdir)
  state = init_state(experiment, config.seed)
  steps = processes.from_first(checkpoints.steps)
  if steps and steps[0] > config.total_steps:
    raise UserError(f'{workdir} is at step {steps[0]} already, beyond config.total_steps = {config.total_steps}')

  def restore():
    restored, damaged = checkpoints.restore_first_sound(steps, state)
    checkpoints.set_aside(damaged)
    return restored

  if steps:
    state = processes.arrays_from_first(restore, state)
  elif config.init_from:
    state = start_from(config.init_from, state, experiment.algorithm.adopt, config)
  processes.on_first(workdir_lib.keep_config, workdir, config)
  processes.on_first(workdir_lib.keep_data, workdir, identity.describe(experiment.splits), config.init_from)
  processes.on_first(warn_of_seen, workdir)
  state = parallel.replicate(state)
  done, total, tasks = int(state.step), config.total_steps, config.data.tasks
  if done >= total:
    if steps:
      print(f'{workdir} is trained to step {done} already')
    else:
      checkpoints.save(state)
      print(f'config.total_steps = 0: {workdir} stays as it begins')
    return
  scores, patience = processes.from_first(lambda: history.scores(workdir, config, done)), config.stop_patience
  if history.exhausted(scores, patience):
    print(f'{workdir} ended early, at step {done} of {total}: no better validation in {patience} evaluations')
    return
  processes.on_first(workdir_lib.forget_test, workdir)

  source = experiment.sources['train']
  chunk = parallel.chunk_size(config.chunk, tasks, evaluate.elements(source))
  first, count = parallel.own_tasks(tasks, chunk)

  def make_batch(step):
    return parallel.lay_out(source.sample((step - 1) * tasks + first, count), tasks, chunk)

  step_fns = [
    parallel.over_devices_with_flag(
      functools.partial(train_step, experiment=experiment, tasks=tasks, phase=i), donate=True
    )
    for i in range(len(experiment.phases))
  ]
  constants = experiment.resident, parallel.replicate(keys.from_seed(config.seed))
  validate = validation(config, experiment)
  with (
    contextlib.closing(processes.on_first(Progress, total, done, tasks, checkpoints.seconds(done))) as progress,
    contextlib.closing(processes.on_first(Writer, workdir, done, checkpoints.records(done))) as writer,
    contextlib.closing(profile),
    contextlib.closing(pipeline.prefetch(make_batch, range(done + 1, total + 1), progress.waited)) as batches,
  ):
    progress.say(f'training {workdir} from step {done}: {describe(state)}')
    if not config.init_from and 'frozen' in state.model_state:
      progress.say('the frozen network has random weights: config.init_from names a run with trained ones')
    if validate is None:
      progress.say('no validation split: the last checkpoint will be the one to test')
    if (start := experiment.phases[-1].start) >= total:
      progress.say(f'training ends before its last phase, which would begin after {start} meta-updates')
    if config.profile and done >= profile.last:
      progress.say(f'config.profile = {config.profile}: these meta-updates are done already and will not be traced')
    in_flight = InFlight(progress, writer, config.log_every)
    for step, local in batches:
      phase, start = sum(later.start < step for later in experiment.phases[1:]), time.perf_counter()
      try:
        (state, metrics), stopping = profile.step(step, step_fns[phase], state, constants, local, stop.is_set())
        if phase and experiment.phases[phase].start == step - 1:
          progress.pause(time.perf_counter() - start)
          progress.say(f'meta-update {step} began the next phase of training, which was compiled first')
        in_flight.add(step, metrics, stopping)
        evaluating = due(step, config.eval_every) or step == total
        if not (evaluating or due(step, config.checkpoint_every) or in_flight.stop):
          continue
        in_flight.settle()
      except FloatingPointError as error:
        raise _diverged(error, checkpoints) from None

      start, seconds, score = time.perf_counter(), progress.seconds(), None
      if evaluating and validate:
        summary = validate(state)
        if not np.isfinite(summary['loss']):
          raise _diverged(step, checkpoints)
        writer.write(step, 'val', summary, time=seconds)
        progress.say(f'step {step}/{total}: val {readable(summary)}')
        score = history.score(summary)
        if due(step, config.eval_every):  # another one at the end is no part of the history: the end may move
          scores.append(score)
          state = after_validation(state, scores, config.optimizer, progress)
      writer.sync()  # metrics first: a checkpoint without its metrics could not be resumed exactly
      checkpoints.save(state, score, seconds, writer.records)
      progress.pause(time.perf_counter() - start)
      if in_flight.stop:
        progress.say(f'stopped at step {step}, checkpoint saved: run the same command again to resume')
        return
      if step < total and history.exhausted(scores, patience):
        progress.say(f'no better validation in {patience} evaluations: training ends at step {step} of {total}')
        return


def warn_of_seen(workdir):
  """Prints which test classes are not new to a run."""
  kept = workdir_lib.read_data(workdir)
  if seen := identity.seen_in_training(kept):
    print(f'not new to the run: {len(seen)} of {len(kept["splits"]["test"])} test classes, {identity.some(seen)}')


def after_validation(state, scores, optimizer, progress):
  """The state with the step size's factor by the scores of validation, the last one new; as it is without 'plateau'."""
  if optimizer.schedule != 'plateau':
    return state
  before, after = (
    history.plateau_factor(known, optimizer.plateau_factor, optimizer.plateau_patience)
    for known in (scores[:-1], scores)
  )
  if after == before:
    return state
  progress.say(f'validation is on a plateau: step size times {after:g}')
  return parallel.replicate(optimizers.with_factor(state, after))


def start_from(workdir, state, adopt=None, config=None):
  """The state with the best weights of another run; optimiser and task weighting stay as they are.

  Where the other run's learner keeps its network apart ('embedding') and is of another kind than this one, the network
  and its running averages are taken, without whatever else was learned.

  Args:
    workdir: of that run; it is only read.
    state: of this run, before the first meta-update.
    adopt: of its algorithm.
    config: of this run; if given, a line says in which settings its network or images are others than that run's.

  Raises:
    UserError: there are no weights, or they are not those of this run's network.
  """

  like = {'params': state.params, 'model_state': state.model_state}

  def read():
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
      if not (steps := checkpoints.steps()):
        raise UserError(f'config.init_from: there is no trained run in {workdir}')
      params, model_state = checkpoints.best_weights()
    found, part = {'params': params, 'model_state': model_state}, ''
    if 'embedding' in params and mismatches(found, like):
      if adopt is None:
        raise UserError(
          f'config.init_from: {workdir} has a network for another algorithm to begin with, but this one, with its '
          'settings, can only begin with weights of its own kind'
        )
      statistics = {name: x for name, x in model_state.items() if name == 'batch_stats'}
      params, model_state = adopt(*like.values(), params['embedding'], statistics)
      found, part = {'params': params, 'model_state': model_state}, ', its network'
    if differing := mismatches(found, like):
      more = f'; and {len(differing) - 8} more' if len(differing) > 8 else ''
      raise UserError(
        f'config.init_from: {workdir} has weights of another network: {"; ".join(differing[:8])}{more}. '
        'Choose the same model, algorithm and way'
      )
    step, kept = steps[0], workdir_lib.read_config(workdir)
    at = f', which is at step {step} of {kept.total_steps}: it is not trained to its end'
    unfinished = '' if history.finished(workdir, kept, step) else at
    print(f'initial weights: the best of {workdir}{part}{unfinished}')
    if config and (others := _differing(config, kept)):
      print(f'its network or images were others: {"; ".join(others)}')
    return jax.tree.map(lambda x, like: np.asarray(x, like.dtype), found, like)

  return state._replace(**processes.arrays_from_first(read, like))


# Of settings that leave the shapes of weights as they are: those of images; those of training alone.
_OF_IMAGES = 'data.size', 'data.crop', 'data.normalize'
_WITHOUT = {'data.crop': 0.0, 'data.normalize': 'none'}  # what a data set without such a setting does
_OF_TRAINING = 'model.dropout', 'model.block_size', 'model.ramp', 'model.dtype'


def _differing(config, other):
  """How the network and images of another config differ: ['model.pool = True, here False', ...]."""

  def value(config, name):
    group, setting = name.split('.')
    return config[group].get(setting, _WITHOUT.get(name))

  names = config_lib.differences(config, other)
  names = [n for n in names if n in _OF_IMAGES or (n.startswith('model.') and n not in _OF_TRAINING)]
  values = [(name, value(other, name), value(config, name)) for name in names]
  return [
    f'{name} = {there!r}, here {here!r}' for name, there, here in values if None not in (there, here) and there != here
  ]


_MUST_BE_FINITE = {'loss', 'grad_norm', 'pair', 'weights', 'weights_quantiles'}


class InFlight:
  """Metrics of steps that the device may still be working on; looked at late, so that the loop does not wait."""

  _AHEAD = 2  # steps that the host may be ahead of the device

  def __init__(self, progress, writer, log_every):
    self._progress, self._writer, self._log_every = progress, writer, log_every
    self._steps = collections.deque()
    self.stop = False  # whether a step that is settled was told to be among the last, the same on all processes

  def add(self, step, metrics, stop):
    self._steps.append((step, metrics, stop))
    self.settle(keep=0 if stop is True else self._AHEAD)  # only a process on its own knows at once

  def settle(self, keep=0):
    """Waits for all but the last `keep` steps, shows and writes their metrics.

    Raises:
      FloatingPointError: one's loss, gradient or task weights are not finite; its text is the step.
    """
    while len(self._steps) > keep:
      step, metrics, stop = self._steps.popleft()
      metrics, stop = jax.device_get((metrics, stop))
      self.stop = self.stop or bool(stop)
      if not all(np.isfinite(metrics[name]).all() for name in metrics.keys() & _MUST_BE_FINITE):
        raise FloatingPointError(step)
      self._progress.update(step, metrics)
      if due(step, self._log_every):
        self._writer.write(step, 'train', metrics, **(self._progress.log(step, metrics) or {}))


def validation(config, experiment):
  """A function of the state that summarises the validation episodes; None if the data has no such split."""
  if 'val' not in experiment.sources:
    return None
  evaluate_fn = evaluate.make(
    experiment.evaluation,
    experiment.objective,
    experiment.sources['val'],
    episodes=config.eval.val_episodes,
    seed=config.eval.seed,
    chunk=config.chunk,
  )
  return lambda state: evaluate.summarise(evaluate_fn(state.params, state.model_state, experiment.resident))


def load(checkpoints, experiment, config, last=False):
  """The state of the best checkpoint by validation; the latest, where nothing was validated, or with `last`."""
  like = jax.eval_shape(functools.partial(init_state, experiment, config.seed))

  def restore():
    if not (steps := checkpoints.steps() if last else checkpoints.best_steps()):
      raise UserError(f'{checkpoints.directory} holds no checkpoint yet: train first')
    return checkpoints.restore_first_sound(steps, like)[0]

  return parallel.replicate(processes.arrays_from_first(restore, like))


def due(step, every):
  """Whether something done every so many steps is to be done now; never, if `every` is 0."""
  return every > 0 and step % every == 0


def describe(state):
  """'112,005 parameters, 1 cpu device(s)', and of how many processes."""
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  of = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
  return f'{parameters:,} parameters, {jax.device_count()} {jax.devices()[0].device_kind} device(s){of}'


def _diverged(step, checkpoints):
  def message():
    steps = checkpoints.steps()
    good = f'the last good checkpoint is of step {steps[0]}' if steps else 'there is no checkpoint before it'
    return (
      f'training diverged: loss, gradient or task weights are not finite at step {step}; {good} in '
      f'{checkpoints.directory}. Try, in a new --workdir, a smaller config.optimizer.learning_rate, '
      'config.optimizer.clip=10, with an inner loop a smaller config.algorithm.inner_lr, or, if tasks are weighted, a '
      'smaller config.weighting.gain'
    )

  return UserError(processes.from_first(message))


@contextlib.contextmanager
def _stop_on_sigterm():
  """Turns SIGTERM into an event that the loop looks at in every step."""
  stop = threading.Event()
  try:
    previous = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
  except ValueError:  # signals can be handled in the main thread alone: elsewhere SIGTERM stays as it is
    yield stop
    return
  try:
    yield stop
  finally:
    signal.signal(signal.SIGTERM, previous)


if __name__ == '__main__':
  from metajax import main

  sys.exit(main.main())

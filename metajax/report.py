"""What a finished run has to show: the test, `test.json`, figures, and one line for a person."""

import functools
import hashlib
import itertools
import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from metajax import config as config_lib
from metajax import evaluate, heads, losses, networks, parallel, processes, system, writer
from metajax import workdir as workdir_lib
from metajax.data import episodes, identity
from metajax.errors import UserError, optional
from metajax.files import write_atomically
from metajax.progress import readable

_NOTES = 20  # at most so many on what the data set lacks; its manifest has all
# Settings of the data that say nothing of which test episodes there are: what training alone sees, what stands in the
# protocol by itself, and in which form the network gets to see the same examples.
_NO_PROTOCOL = (
  *('group', 'name', 'path', 'way', 'shot', 'query_shot', 'tasks', 'placement', 'augment', 'normalize', 'oracle'),
  *('train_per_class', 'batch', 'hard_updates', 'random_updates'),
)

# What of the protocol is no setting, but found when a run is evaluated.
FOUND = ('batch_norm', 'dataset_notes', 'test_data')


def test(config, experiment, state, workdir, checkpoints):
  """Evaluates `state` on the test episodes; process 0 writes the results and figures, and prints the test line.

  They are `test_episodes.json`, see `episode_results`, `test.json` and the figures of the test, in a folder of the
  protocol's own, `tests/<NAME>`; the workdir has copies of the last test's. With `eval.last` and `eval.ensemble` both
  files have the numbers of the last checkpoint, see `evaluate_last`, and of the ensemble, see `evaluate_ensemble`,
  besides, and their lines stand before that of `state`.
  """
  each, start = circumstances(config, experiment, state), time.perf_counter()
  folder = Path(workdir) / 'tests' / _name(config, each)
  test_fn = make_test(config, experiment, folder)
  values = test_fn(state)
  seconds = time.perf_counter() - start
  of_last, last_step = evaluate_last(config, checkpoints, test_fn, state, values)
  of_ensemble, members = evaluate_ensemble(config, experiment, checkpoints, state)
  if not processes.is_first():
    return

  each |= _of_each_episode(values)
  faced, summary = each['protocol'], evaluate.summarise(values)
  classification = 'accuracy' in summary
  result = _after_last_step(summary)
  result |= {'episodes': faced['episodes'], 'way': faced['way'] if classification else None}
  result |= {'shot': faced['shot'], 'query_shot': faced['query_shot']}
  result |= {name: each.get(name) for name in ('inner_steps', 'head', 'head_c', 'head_normalize', 'mirror')}
  if classification:
    result['batch_norm'] = faced['batch_norm']
    result['classes'] = experiment.sources['test'].num_classes
  result |= {
    'split': 'test',
    'dataset': faced['dataset'],
    'dataset_notes': faced['dataset_notes'][:_NOTES] or None,
    'test_data': faced['test_data'],
    'classes_seen_in_training': identity.seen_in_training(workdir_lib.read_data(workdir)) or None,
    'algorithm': config.algorithm.name,
    'model': config.model.name,
    'checkpoint_step': each['checkpoint_step'],
    'seconds': round(seconds, 2),
    'seed': config.seed,
    'episode_seed': faced['episode_seed'],
    'augment': faced['augment'] or None,
    'environment': system.environment(),
  }
  for prefix, others, which in (
    ('last_', of_last, {'last_checkpoint_step': last_step}),
    ('ensemble_', of_ensemble, {'ensemble_checkpoints': members}),
  ):
    if others:
      each |= {**_of_each_episode(others, prefix), **which}
      result |= {prefix + name: value for name, value in _after_last_step(evaluate.summarise(others)).items()} | which
  if summary['loss'].ndim:
    result['by_inner_step'] = {name: value.tolist() for name, value in summary.items()}
  result = {name: value for name, value in result.items() if value is not None}

  folder.mkdir(parents=True, exist_ok=True)
  for place in (folder, Path(workdir)):
    write_atomically(place / 'test_episodes.json', json.dumps(each) + '\n')
    write_atomically(place / 'test.json', json.dumps(result, indent=2) + '\n')
  for partial in folder.glob('partial-*'):
    partial.unlink()
  if drawing := figures():
    draw(drawing, experiment, state, result, folder)
    _copy_figures(folder, Path(workdir) / 'figures')
    writer.add_figures(workdir)
    print(f'figures: {Path(workdir) / "figures"}')
  if of_last:
    print(last_line(result))
  if members:
    print(ensemble_line(result))
  print(test_line(result), flush=True)


def _name(config, each):
  """The name of a protocol's folder, for people, with digits that tell apart what it does not say."""
  faced = each['protocol']
  parts = [f'{faced["way"]}-way'] if faced['way'] else []
  parts += [f'{faced["shot"]}-shot', f'{faced["episodes"]}-episodes', *filter(None, [each['head']])]
  everything = json.dumps([each, config.eval.last, config.eval.ensemble], sort_keys=True)
  digits = hashlib.blake2b(everything.encode(), digest_size=4).hexdigest()
  return '_'.join([*parts, f'step-{each["checkpoint_step"]}', digits])


@optional('figures of the last test')
def _copy_figures(folder, to):
  """Copies a test's figures, in place of those of the test before."""
  to.mkdir(exist_ok=True)
  for name in ('inner_steps.png', 'episode.png', 'regression.png'):
    (to / name).unlink(missing_ok=True)
    if (folder / name).exists():
      shutil.copyfile(folder / name, to / name)


def make_test(config, experiment, folder=None):
  """Compiles the test.

  Args:
    config: complete.
    experiment: of the config.
    folder: where an interrupted test leaves what it has, and resumes; None for nowhere.

  Returns:
    test(state) -> {metric: (episodes,) float32, or (episodes, inner steps + 1) where the algorithm has an inner loop to
    watch}, of a TrainState on the devices; it raises UserError where a loss is not finite.
  """
  evaluate_fn = evaluate.make(
    experiment.evaluation,
    experiment.objective,
    experiment.sources['test'],
    episodes=config.eval.episodes,
    seed=config.eval.seed,
    chunk=config.chunk,
    trajectory=experiment.evaluation.trajectory is not None,
  )

  def test(state):
    weights = state.params, state.model_state
    partial = processes.on_first(evaluate.Partial, folder, weights) if folder else None
    return _finite(evaluate_fn(*weights, experiment.resident, partial))

  return test


def evaluate_last(config, checkpoints, test_fn, best, values):
  """Evaluates the last checkpoint that can be read on the test episodes.

  Args:
    config: complete; without `eval.last` nothing is done.
    checkpoints: of the run; of several processes all call this, and process 0 alone has them.
    test_fn: see `make_test`.
    best: TrainState that was evaluated.
    values: what came of it, which serves again where `best` is the last.

  Returns:
    what `test_fn` returns; the step of the checkpoint. Empty and None where it is not asked for.

  Raises:
    UserError: no checkpoint can be read, or a loss is not finite.
  """
  if not config.eval.last:
    return {}, None
  restored = processes.arrays_from_first(lambda: checkpoints.restore_first_sound(checkpoints.steps(), best)[0], best)
  step = int(restored.step)
  return (values if step == int(best.step) else test_fn(parallel.replicate(restored))), step


def evaluate_ensemble(config, experiment, checkpoints, like):
  """Evaluates the ensemble of the best `config.eval.ensemble` checkpoints by validation on the test episodes.

  Those that cannot be read are passed over; where fewer are left, a line says that the ensemble is of these. Their
  states are on the host and on the devices one after the other.

  Args:
    config: complete.
    experiment: of the config.
    checkpoints: of the run; of several processes all call this, and process 0 alone has them.
    like: TrainState of the run.

  Returns:
    {metric: (episodes,) float32}, see `evaluate.ensemble`; the members' steps, the best first. Both empty where no
    ensemble is asked for, or no checkpoint was validated.

  Raises:
    UserError: a loss is not finite.
  """
  if not (wanted := config.eval.ensemble):
    return {}, []
  outputs_fn = evaluate.make_outputs(
    experiment.evaluation,
    experiment.sources['test'],
    episodes=config.eval.episodes,
    seed=config.eval.seed,
    chunk=config.chunk,
  )
  members = []

  def results():
    for step, params, model_state in _best_members(checkpoints, like, wanted):
      members.append(int(step))
      yield outputs_fn(params, model_state, experiment.resident)

  values = evaluate.ensemble(experiment.objective, results())
  if len(members) < wanted and processes.is_first():
    of = f'the ensemble is of {"these" if len(members) > 1 else "this"}' if members else 'there is no ensemble'
    print(f'config.eval.ensemble = {wanted}, but validated checkpoints that can be read: {len(members)}; {of}')
  return (_finite(values), members) if members else ({}, [])


def _best_members(checkpoints, like, count):
  """Yields the step, params and model state, on the devices, of the best `count` validated checkpoints."""
  fields = like.step, like.params, like.model_state
  states = processes.on_first(lambda: itertools.islice(checkpoints.restore_validated(like), count))
  read = []

  def read_next():
    read[:] = [(state.step, state.params, state.model_state) for state in itertools.islice(states, 1)]
    return bool(read)

  while processes.from_first(read_next):
    yield parallel.replicate(processes.arrays_from_first(read.pop, fields))


def _finite(values):
  if not np.isfinite(values['loss']).all():
    raise UserError(
      'the test diverged: a loss is not finite. With an inner loop, try a smaller config.eval.inner_lr, or fewer '
      'inner_steps'
    )
  return values


def protocol(config):
  """The settings that decide which test episodes a run faces and what it is given of them.

  Of a setting that lists splits, such as Omniglot's `rotations`, the test split alone counts.

  Returns:
    a flat dict of JSON's types.
  """
  settings = {name: value for name, value in config.data.items() if name not in _NO_PROTOCOL}
  for name, value in settings.items():
    if isinstance(value, tuple) and set(value) <= {'train', 'val', 'test'}:
      settings[name] = [split for split in value if split == 'test']
  of_test = {
    'dataset': config.data.name,
    **{f'data.{name}': value for name, value in settings.items()},
    **{name: _chosen(config, 'data', name) for name in ('way', 'shot', 'query_shot')},
    'split': 'test',
    'episodes': config.eval.episodes,
    'episode_seed': config.eval.seed,
    'augment': config.eval.augment,
  }
  return json.loads(json.dumps(of_test))  # as it comes back from a file


def adaptation(config):
  """How a run adapts in evaluation: its inner loop's settings and its head.

  None for those that there are not, 'learned' for step sizes that are.
  """
  of_head = 'head', 'head_c', 'head_normalize'
  if config.eval.head:
    found = {
      'head': config.eval.head,
      'head_c': config_lib.head_c(config),
      'head_normalize': config.eval.head_normalize,
    }
  else:
    found = {name: _chosen(config, 'algorithm', name) for name in config_lib.OF_INNER_LOOP}
    if config.algorithm.get('learned_lr', 'no') != 'no':
      found['inner_lr'] = 'learned'
    if config.algorithm.get('head'):
      found |= {'head': config.algorithm.head, 'head_c': config.algorithm.get('head_c'), 'head_normalize': True}
    if config.algorithm.get('mirror'):
      found['mirror'] = True
  if found.get('head') not in heads.WITH_C:
    found['head_c'] = None
  return dict.fromkeys((*config_lib.OF_INNER_LOOP, *of_head, 'mirror')) | found


def _chosen(config, group, name):
  return config[group].get(name) if config.eval[name] is None else config.eval[name]


def circumstances(config, experiment, state):
  """All that decides the numbers of a test, besides the weights of the checkpoint.

  Args:
    config: complete.
    experiment: of the config.
    state: TrainState to be evaluated.

  Returns:
    a dict of JSON's types: 'protocol', what `protocol` returns and besides what `FOUND` names: 'batch_norm' (None in
    regression), 'dataset_notes', all that the data set lacks, and 'test_data', the fingerprint of its test classes
    (None without images); what `adaptation` returns; and 'checkpoint_step'.
  """
  regression = experiment.objective is losses.REGRESSION
  batch_norm = config.algorithm.get('batch_norm') if networks.changing(state.model_state) else 'no'
  data = experiment.splits['test']
  found = {
    'batch_norm': None if regression else batch_norm,
    'dataset_notes': list(getattr(data, 'notes', ())),
    'test_data': identity.fingerprint(identity.describe({'test': data}).get('test')),
  }
  return {'protocol': {**protocol(config), **found}, **adaptation(config), 'checkpoint_step': int(state.step)}


def episode_results(config, experiment, state, values):
  """What `test_episodes.json` holds: a dict of JSON's types.

  It is what `circumstances` returns, and 'accuracy' (fractions), in regression 'loss', of each episode after the last
  inner step, a list as long as there are episodes; `values` are what `make_test`'s function returns.
  """
  return {**circumstances(config, experiment, state), **_of_each_episode(values)}


def _of_each_episode(values, prefix=''):
  """{'PREFIXaccuracy', in regression 'PREFIXloss': of each episode after the last inner step, a list}."""
  quantity = 'accuracy' if 'accuracy' in values else 'loss'
  return {prefix + quantity: values[quantity].reshape(len(values[quantity]), -1)[:, -1].tolist()}


def _after_last_step(summary):
  return {name: float(value[-1] if value.ndim else value) for name, value in summary.items()}


def test_line(result):
  """The last line of an evaluation, from the contents of `test.json`."""
  shot = f'{result["shot"]}-shot'
  protocol = [f'{result["way"]}-way {shot}' if 'way' in result else shot, f'{result["episodes"]} episodes']
  if 'head' in result:
    c = f' of c = {result["head_c"]:g}' if 'head_c' in result else ''
    protocol.append(f'{result["head"].replace("_", " ")} head{c}')
    if not result['head_normalize']:
      protocol.append('features of any length')
  if 'mirror' in result:
    protocol.append('mirrored support')
  if 'batch_norm' in result:
    protocol.append(f'{result["batch_norm"]} batch norm')
  if 'dataset_notes' in result:
    protocol.append('incomplete data set')
  if seen := result.get('classes_seen_in_training'):
    protocol.append(f'{len(seen)} of {result["classes"]} classes seen in training')
  if 'augment' in result:
    protocol.append(f'augmented by {" and ".join(result["augment"])}')
  protocol.append(f'checkpoint {result["checkpoint_step"]}')
  return f'test: {_number(result)} ({", ".join(protocol)})'


def last_line(result):
  """The line of the last checkpoint, which stands above that of the best, from the contents of `test.json`."""
  return f'last checkpoint: {_number(result, "last_")} (checkpoint {result["last_checkpoint_step"]}; protocol as below)'


def ensemble_line(result):
  """The line of an ensemble, which stands above the last, from the contents of `test.json`."""
  members = result['ensemble_checkpoints']
  steps = f'checkpoint{"s"[: len(members) > 1]} {", ".join(map(str, members))}'
  return f'ensemble of {len(members)}: {_number(result, "ensemble_")} ({steps}; protocol as below)'


def _number(result, prefix=''):
  """'98.71 % ± 0.21 %', or 'mean squared error 0.5000 ± 0.2500'."""
  name = 'accuracy' if 'accuracy' in result else 'loss'
  number = readable({name: result[prefix + name], f'{name}_ci95': result[f'{prefix}{name}_ci95']})
  return number.replace('accuracy ', '').replace('loss', 'mean squared error')


@functools.cache
def figures():
  """The module that draws; without matplotlib None, after a line that says so once."""
  with optional('figures'):
    return system.package('metajax.figures', 'drawing figures')


@optional('figures of training')
def draw_training(workdir):
  """Draws the learning curves, and task weights, inner step sizes and the steps' importance where there are any.

  They go into the TensorBoard events as well. A figure that cannot be drawn costs a line, and so in `draw`.
  """
  if not (drawing := figures()):
    return
  config, records = workdir_lib.read_config(workdir), writer.read(workdir)
  for name, draw_figure in {
    'learning_curves.png': functools.partial(drawing.learning_curves, names=_curve_names(config)),
    'task_weights.png': drawing.task_weights,
    'inner_lr.png': drawing.inner_lr,
    'loss_importance.png': drawing.loss_importance,
  }.items():
    with optional(name):
      draw_figure(Path(workdir) / 'figures' / name, records)
  writer.add_figures(workdir)


def _curve_names(config):
  """What the curves of training and validation are called: with the way, where it is not the same."""
  names = ['meta-train', 'meta-validation']
  ways = ['all classes' if config.data.batch else f'{config.data.way}-way', f'{_chosen(config, "data", "way")}-way']
  return names if ways[0] == ways[1] else [f'{name}, {way}' for name, way in zip(names, ways, strict=True)]


def draw(figures, experiment, state, result, folder):
  """Draws, by the module `figures`, the inner loop's gain, and one test episode or a few regression tasks.

  There is no figure of an episode whose inputs are no images, or of tasks that are no curves.
  """
  quantity = 'accuracy' if 'accuracy' in result else 'loss'
  if steps := result.get('by_inner_step'):
    with optional('inner_steps.png'):
      values, ci95 = np.array(steps[quantity]), np.array(steps[f'{quantity}_ci95'])
      figures.inner_steps(folder / 'inner_steps.png', values, ci95, quantity=quantity, way=result.get('way'))
  if quantity == 'loss':
    with optional('regression.png'):
      if curves := _curves(experiment, state, result['shot']):
        figures.regression_curves(folder / 'regression.png', curves)
    return
  with optional('episode.png'):
    episode, outputs = _predictor(experiment, state, experiment.sources['test'])(0)
    if episode.support.inputs.ndim == 4:  # (n, h, w, c)
      names = [experiment.splits['test'].names[k] for k in episode.class_ids]
      predictions = outputs[-1].argmax(axis=-1)
      figures.episode_grid(folder / 'episode.png', episode.support, episode.query, predictions, names=names)


def _curves(experiment, state, shot, tasks=4, points=200):
  """Support points, the true function and the adapted ones on a few test tasks, for `figures.regression_curves`.

  There are none where a task is no curve: with several outputs, or inputs that differ in more than the first number.
  """
  dense = episodes.make_source(experiment.splits['test'], 'test', way=None, shot=shot, query_shot=points, seed=0)
  predict = _predictor(experiment, state, dense)
  curves = []
  for number in range(tasks):
    episode, outputs = predict(number)
    inputs, targets = episode.query
    if inputs.ndim != 2 or targets.shape[1:] != (1,) or np.ptp(inputs[:, 1:], axis=0).any():
      return []
    order = np.argsort(inputs[:, 0])
    curves.append(
      {
        'x_support': episode.support.inputs[:, 0],
        'y_support': episode.support.targets[:, 0],
        'x': inputs[order, 0],
        'y': targets[order, 0],
        'predictions': {
          step: outputs[step][order, 0] for step in sorted({0, min(1, len(outputs) - 1), len(outputs) - 1})
        },
      }
    )
  return curves


def _predictor(experiment, state, source):
  """A function of an episode's number, compiled once, that returns NumPy arrays.

  They are the episode, and the query outputs (steps + 1, n, ...) along the inner loop, (1, n, ...) without one.
  """

  @jax.jit
  def predict(params, model_state, resident, batch):
    episode = jax.tree.map(lambda x: x[0], source.decode(resident, batch))
    return episode, evaluate.along(experiment.evaluation, params, model_state, episode, jax.random.key(0))

  def predict_number(number):
    batch = source.sample(number, 1)
    return jax.device_get(predict(state.params, state.model_state, experiment.resident, batch))

  return predict_number

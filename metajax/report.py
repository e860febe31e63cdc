"""What a finished run has to show: the test, `test.json`, figures, and one line for a person."""

import json
import time
from pathlib import Path

import jax
import numpy as np

from metajax import evaluate, figures, processes, writer
from metajax.data import episodes
from metajax.errors import UserError
from metajax.files import write_atomically
from metajax.progress import readable

_NOTES = 20  # at most so many on what the data set lacks; its manifest has all


def test(config, experiment, state, workdir):
  """Evaluates `state` on the test episodes; process 0 writes `test.json` and figures, and prints the test line."""
  source = experiment.sources['test']
  along = experiment.evaluation.trajectory is not None
  evaluate_fn = evaluate.make(
    experiment.evaluation,
    experiment.objective,
    source,
    episodes=config.eval.episodes,
    seed=config.eval.seed,
    chunk=config.chunk,
    trajectory=along,
  )
  start = time.perf_counter()
  values = evaluate_fn(state.params, state.model_state, experiment.resident)
  seconds = time.perf_counter() - start
  summary = evaluate.summarise(values)

  if not np.isfinite(summary['loss']).all():
    raise UserError('the test diverged: a loss is not finite. Try a smaller config.eval.inner_lr or inner_steps')
  if not processes.is_first():
    return

  classification = 'accuracy' in summary
  names = ('way', 'shot', 'query_shot') if classification else ('shot', 'query_shot')
  protocol = {name: config.data[name] if config.eval[name] is None else config.eval[name] for name in names}
  steps = config.algorithm.get('inner_steps') if config.eval.inner_steps is None else config.eval.inner_steps
  result = {name: float(value[-1] if along else value) for name, value in summary.items()}
  result |= {'episodes': config.eval.episodes, **protocol, 'inner_steps': steps}
  if classification:
    result['batch_norm'] = config.algorithm.get('batch_norm') if state.model_state else 'no'
    result['classes'] = source.num_classes
  result |= {
    'split': 'test',
    'dataset': config.data.name,
    'dataset_notes': list(getattr(experiment.splits['test'], 'notes', ())[:_NOTES]) or None,
    'algorithm': config.algorithm.name,
    'model': config.model.name,
    'checkpoint_step': int(state.step),
    'seconds': round(seconds, 2),
    'seed': config.seed,
    'episode_seed': config.eval.seed,
    'augment': list(config.eval.augment) or None,
  }
  if along:
    result['by_inner_step'] = {name: value.tolist() for name, value in summary.items()}
  result = {name: value for name, value in result.items() if value is not None}

  write_atomically(Path(workdir) / 'test.json', json.dumps(result, indent=2) + '\n')
  draw(experiment, state, result, Path(workdir) / 'figures')
  print(f'figures: {Path(workdir) / "figures"}')
  print(test_line(result), flush=True)


def test_line(result):
  """The last line of an evaluation, from the contents of `test.json`."""
  shot = f'{result["shot"]}-shot'
  protocol = [f'{result["way"]}-way {shot}' if 'way' in result else shot, f'{result["episodes"]} episodes']
  if 'batch_norm' in result:
    protocol.append(f'{result["batch_norm"]} batch norm')
  if 'dataset_notes' in result:
    protocol.append('incomplete data set')
  if 'augment' in result:
    protocol.append(f'augmented by {" and ".join(result["augment"])}')
  protocol.append(f'checkpoint {result["checkpoint_step"]}')
  name = 'accuracy' if 'accuracy' in result else 'loss'
  number = readable({name: result[name], f'{name}_ci95': result[f'{name}_ci95']})
  number = number.replace('accuracy ', '').replace('loss', 'mean squared error')
  return f'test: {number} ({", ".join(protocol)})'


def draw_training(workdir):
  """Draws the learning curves."""
  figures.learning_curves(Path(workdir) / 'figures' / 'learning_curves.png', writer.read(workdir))


def draw(experiment, state, result, folder):
  """Draws the inner loop's gain, and one test episode or a few regression tasks."""
  quantity = 'accuracy' if 'accuracy' in result else 'loss'
  if steps := result.get('by_inner_step'):
    values, ci95 = np.array(steps[quantity]), np.array(steps[f'{quantity}_ci95'])
    figures.inner_steps(folder / 'inner_steps.png', values, ci95, quantity=quantity, way=result.get('way'))
  if quantity == 'accuracy':
    episode, outputs = _predictor(experiment, state, experiment.sources['test'])(0)
    predictions = outputs[-1][:, : result['way']].argmax(axis=-1)
    figures.episode_grid(folder / 'episode.png', episode.support, episode.query, predictions, way=result['way'])
  else:
    figures.regression_curves(folder / 'regression.png', _curves(experiment, state, result['shot']))


def _curves(experiment, state, shot, tasks=4, points=200):
  """Support points, the true function and the adapted ones on a few test tasks, for `figures.regression_curves`."""
  dense = episodes.make_source(experiment.splits['test'], 'test', way=None, shot=shot, query_shot=points, seed=0)
  predict = _predictor(experiment, state, dense)
  curves = []
  for number in range(tasks):
    episode, outputs = predict(number)
    order = np.argsort(episode.query.inputs[:, 0])
    curves.append(
      {
        'x_support': episode.support.inputs[:, 0],
        'y_support': episode.support.targets[:, 0],
        'x': episode.query.inputs[order, 0],
        'y': episode.query.targets[order, 0],
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
  algorithm = experiment.evaluation

  @jax.jit
  def predict(params, model_state, resident, batch):
    episode = jax.tree.map(lambda x: x[0], source.decode(resident, batch))
    rng = jax.random.key(0)

    def outputs(adapted):
      return algorithm.predict(params, model_state, adapted, episode.query.inputs)

    if algorithm.trajectory is None:
      return episode, outputs(algorithm.adapt(params, model_state, episode.support, rng))[None]
    return episode, jax.vmap(outputs)(algorithm.trajectory(params, model_state, episode.support, rng))

  def predict_number(number):
    batch = source.sample(number, 1)
    return jax.device_get(predict(state.params, state.model_state, experiment.resident, batch))

  return predict_number

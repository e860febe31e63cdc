"""Logistic regression on the support features of many tasks: metajax, batched, beside scikit-learn, task by task.

python -m benchmarks.heads [--json=FILE] [--shape=5x5,5x1,20x5] [--tasks=600] [--features=640] [--rounds=5] [...]

A shape is way x shot. Features are what a rectifier leaves of normal noise around a mean for each class, of length 1.
Both fit a head to each task's support features and predict its queries' classes, and take turns. metajax's
compilation is reported apart; it scales the features itself. scikit-learn (lbfgs, tol 1e-4) gets one BLAS thread and
float64: with more threads it takes longer on matrices of this size, with float32 no less time.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.linear_model
import threadpoolctl

from benchmarks import workload
from metajax import heads
from metajax.types import Episode, Examples


class Shape(NamedTuple):
  """What is fitted."""

  name: str
  way: int
  shot: int
  query_shot: int
  features: int
  tasks: int
  spread: float  # of class means, over that of a class
  c: float


def draw_episodes(shape, seed=0):
  """Features of all tasks, (tasks, n, features), as an Episode of NumPy arrays."""
  rng = np.random.default_rng(seed)
  means = shape.spread * rng.standard_normal((shape.tasks, shape.way, 1, shape.features), np.float32)

  def examples(shot):
    x = rng.standard_normal((shape.tasks, shape.way, shot, shape.features), np.float32)
    x = np.maximum(x + means, 0).reshape(shape.tasks, -1, shape.features)
    targets = np.broadcast_to(np.repeat(np.arange(shape.way, dtype=np.int32), shot), x.shape[:2])
    return Examples(x / np.linalg.norm(x, axis=-1, keepdims=True), targets)

  return Episode(examples(shape.shot), examples(shape.query_shot), np.zeros((shape.tasks, shape.way), np.int32))


def by_metajax(shape, episodes, chunk):
  """A function that predicts all queries' classes (tasks, n), and the seconds that it took to compile."""
  head = heads.make('logistic_regression', c=shape.c)

  def predict(episode):
    linear = head.fit(*episode.support, shape.way)
    return jnp.argmax(head.outputs(linear, episode.query.inputs), axis=-1)

  episodes = jax.device_put(episodes)
  start = time.perf_counter()
  compiled = jax.jit(lambda x: jax.lax.map(predict, x, batch_size=chunk)).lower(episodes).compile()
  return lambda: np.asarray(compiled(episodes)), time.perf_counter() - start


def by_sklearn(shape, episodes):
  """A function that does the same."""
  tasks = [[np.float64(x) for x in (support, query)] for support, query in zip(*_inputs(episodes), strict=True)]
  targets = episodes.support.targets

  def predict():
    with threadpoolctl.threadpool_limits(1):
      fit = sklearn.linear_model.LogisticRegression(C=shape.c, max_iter=1000).fit
      return np.stack([fit(support, y).predict(query) for (support, query), y in zip(tasks, targets, strict=True)])

  return predict


def _inputs(episodes):
  return episodes.support.inputs, episodes.query.inputs


def measure(shape, chunk, rounds):
  """Times both in turns.

  Args:
    shape: Shape.
    chunk: tasks that metajax takes at once.
    rounds: timed pairs.

  Returns:
    a row, a dictionary.
  """
  episodes = draw_episodes(shape)
  metajax, compile_s = by_metajax(shape, episodes, chunk)
  turns = {'metajax': metajax, 'scikit-learn': by_sklearn(shape, episodes)}
  predictions, seconds = {}, {name: [] for name in turns}
  metajax()
  for _ in range(rounds):
    for name, turn in turns.items():
      start = time.perf_counter()
      predictions[name] = turn()
      seconds[name].append(time.perf_counter() - start)
  ours, theirs = (np.array(values) for values in seconds.values())
  low, ratio, high = np.percentile(theirs / ours, (25, 50, 75))
  return {
    'shape': shape.name,
    'seconds': {name: np.median(values) for name, values in seconds.items()},
    'compile_s': compile_s,
    'ratio': ratio,
    'ratio_quartiles': [low, high],
    'accuracy': {name: np.mean(predicted == episodes.query.targets) for name, predicted in predictions.items()},
    'equal_predictions': np.mean(predictions['metajax'] == predictions['scikit-learn']),
  }


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--shape', default='5x5,5x1,20x5', help='way x shot')
  parser.add_argument('--tasks', type=int, default=600)
  parser.add_argument('--features', type=int, default=640)
  parser.add_argument('--query_shot', type=int, default=15)
  parser.add_argument('--spread', type=float, default=0.25, help='of class means, over that of a class')
  parser.add_argument('--c', type=float, default=3.0)
  parser.add_argument('--chunk', type=int, default=10, help='tasks that metajax takes at once')
  parser.add_argument('--rounds', type=int, default=5, help='timed pairs of each')
  parser.add_argument('--json', type=Path, help='file for the results')
  options = parser.parse_args(argv)
  settings = {k: v for k, v in vars(options).items() if k in Shape._fields}
  shapes = [Shape(name, *map(int, name.split('x')), **settings) for name in options.shape.split(',')]
  rows = []
  print(
    'shape  metajax, s  compiling, s  scikit-learn, s  ratio (quartiles)      accuracies, %    equal predictions, %'
  )
  for shape in shapes:
    row = measure(shape, options.chunk, options.rounds)
    rows.append(row)
    low, high = row['ratio_quartiles']
    ours, theirs = row['seconds'].values()
    accuracies = ', '.join(f'{100 * value:.2f}' for value in row['accuracy'].values())
    print(
      f'{row["shape"]:5}  {ours:10.3f}  {row["compile_s"]:12.1f}  {theirs:15.2f}  {row["ratio"]:.1f} ({low:.1f} - '
      f'{high:.1f})  {accuracies}  {100 * row["equal_predictions"]:.2f}',
      flush=True,
    )
  workload.write_json(options.json, works=shapes, rows=rows)


if __name__ == '__main__':
  main()

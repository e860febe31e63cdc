"""Compares evaluation's throughput with training's: adapting and predicting beside the meta-update, taking turns.

python -m benchmarks.evaluation [--json=FILE] [--shape=omniglot,mini] [--episodes=20] [...]
"""

import argparse
import time

import numpy as np

from benchmarks import workload
from metajax import evaluate, parallel, train


def measure(work, orders, episodes, rounds):
  """Times both on the same shapes and inner steps.

  Args:
    work: Workload.
    orders: of training: 2, 1 or both.
    episodes: of one evaluation; at most 100 are one dispatch.
    rounds: meta-updates of each order, and evaluations.

  Returns:
    {'training, order 2' and so on: tasks per second}.
  """
  experiment = workload.make_experiment(work)
  evaluate_fn = evaluate.make(
    experiment.evaluation, experiment.objective, experiment.sources['test'], episodes=episodes, seed=0
  )
  steps = {order: workload.TrainStep(work, order=order) for order in orders}
  state = parallel.replicate(train.init_state(experiment, seed=0))

  def evaluation():
    start = time.perf_counter()
    evaluate_fn(state.params, state.model_state, experiment.resident)
    return time.perf_counter() - start

  turns = {f'training, order {order}': (work.tasks, lambda step=step: step()[0]) for order, step in steps.items()}
  turns['evaluation'] = episodes, evaluation
  seconds = {name: [] for name in turns}
  for number in range(rounds + 1):
    for name, (_, turn) in turns.items():
      took = turn()
      if number:  # the first evaluation compiles
        seconds[name].append(took)
  return {name: tasks / np.median(seconds[name]) for name, (tasks, _) in turns.items()}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  workload.add_options(parser)
  parser.add_argument('--order', type=workload.numbers, default=(2, 1), help='of training: 2, 1 or both')
  parser.add_argument('--episodes', type=int, default=20, help='of one evaluation')
  parser.add_argument('--rounds', type=int, default=10, help='timed turns of each')
  options = parser.parse_args(argv)
  works = workload.from_options(options)
  rows = []
  for work in works:
    rates = measure(work, options.order, options.episodes, options.rounds)
    ratio = rates['evaluation'] / max(rate for name, rate in rates.items() if name != 'evaluation')
    rows.append({'shape': work.name, 'tasks_per_second': rates, 'evaluation_to_training': ratio})
    readable = ', '.join(f'{name} {rate:.1f}' for name, rate in rates.items())
    print(f'{work.name}: tasks/s: {readable}; evaluation / faster training {ratio:.2f}', flush=True)
  workload.write_json(options.json, works=works, rows=rows)


if __name__ == '__main__':
  main()

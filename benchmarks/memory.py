"""Compares the temporary memory of MAML's meta-update: checkpointed second order, second order, first order.

python -m benchmarks.memory [--json=FILE] [--shape=omniglot,mini] [--steps=1,5,10,20] [--meta_batches=4,16,64] [...]

Programs are compiled, not run: the numbers are XLA's account of what they need besides arguments and results.
"""

import argparse

from benchmarks import workload

VARIANTS = {  # column: settings of the algorithm
  'second order, checkpointed': {'order': 2, 'checkpoint': True},
  'second order': {'order': 2},
  'first order': {'order': 1},
}


def measure(work):
  """Temporary megabytes by column, and how much checkpointed second order needs for each byte of first order."""
  memory = {name: workload.TrainStep(work, **variant).temp_mb for name, variant in VARIANTS.items()}
  checkpointed, _, first = memory.values()
  return {
    'shape': work.name,
    'inner_steps': work.inner_steps,
    'tasks': work.tasks,
    'temp_mb': memory,
    'checkpointed_to_first_order': checkpointed / first,
  }


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  workload.add_options(parser)
  parser.add_argument('--steps', type=workload.numbers, default=(1, 5, 10, 20), help='inner steps to go through')
  parser.add_argument('--meta_batches', type=workload.numbers, default=(4, 16, 64), help='tasks to go through')
  options = parser.parse_args(argv)
  works, rows = workload.from_options(options), []
  print(f'{"shape":20}  steps  tasks  {"  ".join(VARIANTS)}  ratio of first and last (MB)')
  for work in works:
    varied = [work._replace(inner_steps=steps) for steps in options.steps]
    varied += [work._replace(tasks=tasks) for tasks in options.meta_batches]
    for one in dict.fromkeys(varied):
      rows.append(row := measure(one))
      cells = '  '.join(f'{mb:{len(name)}.1f}' for name, mb in row['temp_mb'].items())
      ratio = row['checkpointed_to_first_order']
      print(f'{one.name:20}  {one.inner_steps:5}  {one.tasks:5}  {cells}  {ratio:.2f}', flush=True)
  workload.write_json(options.json, works=works, rows=rows)


if __name__ == '__main__':
  main()

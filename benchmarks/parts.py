"""What each part of MAML++, and Meta-SGD, costs: the meta-update with it beside MAML's, in pairs.

python -m benchmarks.parts [--json=FILE] [--shape=omniglot,mini] [--parts=multi_step,...] [--rounds=20] [...]

The multi-step loss and first order are for the epochs in which they are on; a schedule costs nothing.
"""

import argparse

from benchmarks import workload

PARTS = {
  'maml': {},
  'multi_step': {'multi_step_epochs': 1},
  'first_order': {'order': 1},
  'per_step_norm': {'per_step_norm': True},
  'lslr': {'learned_lr': 'tensor_step'},
  'mamlpp': {'multi_step_epochs': 1, 'per_step_norm': True, 'learned_lr': 'tensor_step'},
  'meta_sgd': {'learned_lr': 'element'},
}


def measure(work, names, rounds):
  """Times meta-updates in turns, each beside one of MAML that leaves normalisation's parameters to the outer loop.

  Args:
    work: Workload.
    names: of parts.
    rounds: timed pairs.

  Returns:
    {name: what `workload.in_pairs` returns, with 'temp_mb' and 'memory_ratio'}.
  """
  plain, rows = workload.TrainStep(work, adapt_norm=False), {}
  for name in names:
    step = workload.TrainStep(work, adapt_norm=False, **PARTS[name])
    memory = {'temp_mb': step.temp_mb, 'memory_ratio': step.temp_mb / plain.temp_mb}
    rows[name] = {**workload.in_pairs(step, plain, rounds), **memory}
  return rows


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  workload.add_options(parser)
  parser.add_argument('--parts', default=','.join(PARTS), help='which; maml tells the noise')
  parser.add_argument('--rounds', type=int, default=20, help='timed pairs of each')
  options = parser.parse_args(argv)
  works = workload.from_options(options)
  rows = []
  for work in works:
    for name, row in measure(work, options.parts.split(','), options.rounds).items():
      rows.append({'shape': work.name, 'part': name, **row})
      low, high = row['ratio_quartiles']
      print(
        f'{work.name}: {name} {row["step_ms"]:.1f} ms, {row["ratio"]:.3f} ({low:.3f} - {high:.3f}) times maml; '
        f'{row["temp_mb"]:.1f} MB, {row["memory_ratio"]:.2f} times'
      )
  workload.write_json(options.json, works=works, rows=rows)


if __name__ == '__main__':
  main()

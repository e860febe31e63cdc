"""What task weighting costs: the meta-update with each weighting beside that without, in pairs.

python -m benchmarks.weighting [--json=FILE] [--shape=omniglot,mini] [--weightings=spsa,...] [--rounds=20] [...]
"""

import argparse

from benchmarks import workload
from metajax import optimizers
from metajax.weighting import gradient, spsa, spsa_look_ahead, spsa_per_class, spsa_track, uniform

WEIGHTINGS = {
  'uniform': lambda work: uniform.make(),
  'spsa': lambda work: spsa.make(tasks=work.tasks, normalize_every=100),
  'spsa_track': lambda work: spsa_track.make(tasks=work.tasks, normalize_every=100),
  'spsa_per_class': lambda work: spsa_per_class.make(num_classes=4112),  # as many as Omniglot has with rotations
  'gradient': lambda work: gradient.make(tasks=work.tasks, tx=optimizers.make(1)),
  'spsa_look_ahead': lambda work: spsa_look_ahead.make(tasks=work.tasks),
}


def measure(work, names, order, rounds):
  """Times meta-updates in turns, each beside one without weighting.

  Args:
    work: Workload.
    names: of weightings.
    order: 2 or 1.
    rounds: timed pairs.

  Returns:
    {name: {'step_ms': median, 'ratio': quartiles and median of a step's time over that of the step beside it}}.
  """
  plain = workload.TrainStep(work, order=order)
  steps = {name: workload.TrainStep(work, order=order, weighting=WEIGHTINGS[name](work)) for name in names}
  return {name: workload.in_pairs(step, plain, rounds) for name, step in steps.items()}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  workload.add_options(parser)
  parser.add_argument('--weightings', default=','.join(WEIGHTINGS), help='which; uniform tells the noise')
  parser.add_argument('--order', type=int, default=2, choices=(1, 2))
  parser.add_argument('--rounds', type=int, default=20, help='timed pairs of each')
  options = parser.parse_args(argv)
  works = workload.from_options(options)
  rows = []
  for work in works:
    for name, row in measure(work, options.weightings.split(','), options.order, options.rounds).items():
      rows.append({'shape': work.name, 'order': options.order, 'weighting': name, **row})
      low, high = row['ratio_quartiles']
      print(f'{work.name}: {name} {row["step_ms"]:.1f} ms, {row["ratio"]:.3f} ({low:.3f} - {high:.3f}) times uniform')
  workload.write_json(options.json, works=works, rows=rows)


if __name__ == '__main__':
  main()

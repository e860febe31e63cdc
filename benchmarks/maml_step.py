"""Times one MAML meta-update of metajax beside the same work written in other ways, taking turns step by step.

python -m benchmarks.maml_step [--torch_python=PATH] [--json=FILE] [--shape=omniglot,mini] [--order=2,1] [...]
"""

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import rivals, workload

IMPLEMENTATIONS = ('metajax', 'torch_loop', 'torch_vmap', 'jax_vmap_conv')
LOSS_TOLERANCE = 1e-4  # relative, of the first step: all compute in float32
NORM_TOLERANCE = 1e-3  # of its gradient, which loses more digits
_REST = 0.02  # seconds between turns: threads of the one before may still be spinning in wait of work


class Metajax:
  """metajax's train step, with the manners of a `Rival`."""

  def __init__(self, step):
    self._step = step
    self.greeting = {'ready': True, 'compile_s': step.compile_s, 'chunk': step.chunk, **step()[1]}

  def ask(self, command):
    if command == 'memory':
      return {'peak_mb': self._step.temp_mb}
    return {'seconds': self._step()[0]}

  def close(self):
    pass


def measure(work, order, implementations, *, rounds, limit_s, torch_python, matmul):
  """Times all implementations of one workload.

  Args:
    work: Workload.
    order: 2, or 1 for first-order MAML.
    implementations: names.
    rounds: steps of each; fewer of one whose steps have taken `limit_s` seconds altogether.
    limit_s: seconds that a rival may take for compiling, and for one step.
    torch_python: interpreter with PyTorch.
    matmul: timed once a round, returns seconds.

  Returns:
    rows, dictionaries; seconds of the matrix products.
  """
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    inputs = Path(folder) / 'inputs.npz'
    step = workload.TrainStep(work, order=order)
    rivals.write_inputs(inputs, workload.draw_episodes(work), step.state.params)
    contestants = {}
    for name in implementations:
      if name == 'metajax':
        contestants[name] = Metajax(step)
      else:
        contestants[name] = rivals.Rival(name, inputs, work, order, torch_python=torch_python, limit_s=limit_s)
        stack.callback(contestants[name].close)
    check_agreement({name: c.greeting for name, c in contestants.items() if 'ready' in c.greeting})

    seconds, products = {name: [] for name in contestants}, []
    for _ in range(rounds):
      products.append(matmul())
      for name, contestant in contestants.items():
        if sum(seconds[name]) < limit_s:
          time.sleep(_REST)
          if answer := contestant.ask('step'):
            seconds[name].append(answer['seconds'])
    rows = [row(work, order, name, c, seconds[name], limit_s) for name, c in contestants.items()]
  rates = {r['implementation']: r['tasks_per_second'] for r in rows if not r['timed_out']}
  fastest = max((rate for name, rate in rates.items() if name in rivals.TORCH), default=None)
  for r in rows:
    rate = rates.get(r['implementation'])
    r['ratio_to_fastest_torch'] = rate / fastest if rate and fastest else None
  return rows, products


def check_agreement(greetings):
  """Compares the first steps of {implementation: greeting} with that of the first.

  Raises:
    ValueError: a loss or a gradient norm differs, so what is timed is not the same work.
  """
  first, reference = next(iter(greetings.items()), (None, None))
  for name, greeting in greetings.items():
    for key, tolerance in (('loss', LOSS_TOLERANCE), ('grad_norm', NORM_TOLERANCE)):
      if not np.isclose(greeting[key], reference[key], rtol=tolerance, atol=0):
        raise ValueError(f'{key} of the first step: {greeting[key]} by {name}, {reference[key]} by {first}')


def row(work, order, name, contestant, seconds, limit_s):
  """One implementation's result."""
  result = {'shape': work.name, 'implementation': name, 'order': order, 'timed_out': not seconds}
  result |= {k: v for k, v in contestant.greeting.items() if k not in ('ready', 'compiled')}
  if not seconds:
    bound = {'tasks_per_second': None, 'tasks_per_second_below': work.tasks / limit_s}
    return {**result, **bound, 'step_ms': None, 'temp_mb': None, 'gflops': None}
  median = np.median(seconds)
  return {
    **result,
    **workload.spread(seconds),
    'tasks_per_second': work.tasks / median,
    'temp_mb': (contestant.ask('memory') or {}).get('peak_mb'),
    'gflops': workload.useful_flops(work, order) / median / 1e9,
  }


def table(rows):
  """The rows as text to read."""
  head = ('shape', 'order', 'implementation', 'tasks/s', 'step ms (quartiles)', 'of peak', 'MB', 'compile s', 'ratio')
  lines = [head]
  for r in rows:
    timing = (
      ('< {:.3g}'.format(r['tasks_per_second_below']), 'over the limit', '')
      if r['timed_out']
      else (
        f'{r["tasks_per_second"]:.2f}',
        '{:.1f} ({:.1f} - {:.1f})'.format(r['step_ms'], *r['step_ms_quartiles']),
        f'{r["share_of_peak"]:.1%}',
      )
    )
    rest = (_number(r['temp_mb']), _number(r.get('compile_s')), _number(r['ratio_to_fastest_torch'], 2))
    lines.append((r['shape'], str(r['order']), r['implementation'], *timing, *rest))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join('  '.join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _number(value, digits=1):
  return '-' if value is None else f'{value:.{digits}f}'


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  workload.add_options(parser)
  parser.add_argument('--order', type=workload.numbers, default=(2, 1), help='2, 1 or both')
  parser.add_argument('--implementations', default=','.join(IMPLEMENTATIONS), help='also torch_compile')
  parser.add_argument('--rounds', type=int, default=10, help='timed steps of each implementation')
  parser.add_argument('--limit_s', type=float, default=120, help='seconds for compiling, and for one step')
  parser.add_argument('--torch_python', help='interpreter with PyTorch; without it there are no rows of torch')
  options = parser.parse_args(argv)
  # Programs of several processes share a GPU: none may take all of its memory.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

  implementations = options.implementations.split(',')
  if not options.torch_python:
    implementations = [name for name in implementations if name not in rivals.TORCH]
    print('no --torch_python: without rows of PyTorch')
  works = workload.from_options(options)
  matmul, flops = workload.matmul()
  matmul()
  rows, products = [], []
  for work in works:
    for order in options.order:
      some, more = measure(
        work,
        order,
        implementations,
        rounds=options.rounds,
        limit_s=options.limit_s,
        torch_python=options.torch_python,
        matmul=matmul,
      )
      rows, products = rows + some, products + more
  peak = flops / np.median(products) / 1e9
  for r in rows:
    r['share_of_peak'] = r['gflops'] and r['gflops'] / peak
  print(table(rows))
  print(f'2048 x 2048 float32 product: {peak:.0f} GFLOP/s; ratio: to the fastest PyTorch of that shape and order')
  workload.write_json(options.json, matmul_gflops=peak, works=works, rows=rows)


if __name__ == '__main__':
  main()

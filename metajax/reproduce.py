"""Trains the baselines that papers have published, and tabulates their numbers beside ours.

metajax reproduce --list                                    the cells, with their commands and hours
metajax reproduce CELL ... [--seeds=0,1,2] [--data_dir=DIR] run cells, one after the other, and keep their results
metajax reproduce --table                                   what was published and what we found, as Markdown

  CELL        as --list names it, or a pattern such as 'quickdraw20-*'
  --seeds     of the runs; 0 by default
  --workdir   each run has a folder here; runs/reproduce by default
  --results   where the results go, results/CELL/seed0.json; by default those of the checkout
  --data_dir  where archives of data sets lie or go; $METAJAX_DATA, else ~/metajax_data

Each run is an ordinary one of `metajax train`: run the same command again, and finished runs are skipped and others
resume.

example: metajax reproduce 'quickdraw20-*' --seeds=0,1
"""

import contextlib
import fnmatch
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from metajax import cli, compare, sweep
from metajax import config as config_lib
from metajax import workdir as workdir_lib
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError, first_line
from metajax.files import write_atomically


class Cell(NamedTuple):
  """A published number and the run that should reproduce it."""

  name: str
  config: str  # NAME[:ARGS]
  published: float  # accuracy, percent
  source: str
  hours: float  # of two CPU cores, about
  ci95: float | None = None  # as published
  overrides: tuple[str, ...] = ()  # '--config.KEY=VALUE'
  start: str = ''  # the cell whose run of the same seed has the initial weights


_FFL = 'Fast Forward Labs (2020), the last checkpoint'
_MTM = "MTM's log (Boiarov et al. 2021)"
_BERTINETTO = 'Bertinetto et al. (2019)'

CELLS = (
  *(
    Cell(f'quickdraw20-maml-{way}w{shot}s', f'quickdraw:way={way},shot={shot},drawings=20', number, _FFL, hours)
    for way, shot, number, hours in (
      (5, 1, 59.36, 0.1),
      (5, 5, 76.95, 0.2),
      (5, 10, 77.29, 0.3),
      (10, 1, 42.58, 0.1),
      (10, 5, 58.23, 0.3),
      (10, 10, 60.60, 0.6),
    )
  ),
  Cell('cifar_fs-maml-5w1s', 'mtm_maml:data=cifar_fs,way=5,shot=1', 58.9, _BERTINETTO, 2.0, 1.9),
  *(
    Cell(
      f'cifar_fs-maml-{way}w{shot}s', f'mtm_maml:data=cifar_fs,way={way},shot={shot}', number, _BERTINETTO, hours, ci95
    )
    for way, shot, number, ci95, hours in ((5, 5, 71.5, 1.0, 4.0), (2, 1, 82.8, 2.7, 1.0), (2, 5, 88.3, 1.1, 2.0))
  ),
  *(
    Cell(f'fc100-maml-5w{shot}s', f'mtm_maml:data=fc100,way=5,shot={shot}', number, _MTM, hours)
    for shot, number, hours in ((1, 35.1, 1.0), (5, 47.2, 2.0))
  ),
)


@cli.command
def main(argv):
  """Runs a command line; returns the exit status."""
  cli.set_up()
  options, patterns = parse(argv)
  if options.table:
    print(table(CELLS, options.results), flush=True)
  elif options.list or not patterns:
    width = max(len(cell.name) for cell in CELLS)
    for cell in CELLS:
      done = 'done' if read(options.results, cell) else ''
      print(f'{cell.name:{width}}  {cell.hours:4g} h  {done:4}  metajax train {shlex.join(arguments(cell))}')
  else:
    return run(find(patterns), options)
  return 0


def parse(argv):
  """Splits a command line into flags with their defaults filled in, and patterns of cells' names."""
  values = flags.FlagValues()
  for name, default in (('workdir', 'runs/reproduce'), ('results', str(shipped())), ('data_dir', None)):
    flags.DEFINE_string(name, default, '', flag_values=values)
  flags.DEFINE_list('seeds', '0', '', flag_values=values)
  for name in ('list', 'table'):
    flags.DEFINE_bool(name, False, '', flag_values=values)
  patterns = cli.parse_flags(values, argv, __doc__)
  if not all(seed.isdecimal() for seed in values.seeds):
    raise UserError(f'command line: --seeds takes whole numbers from 0 on, such as --seeds=0,1,2, not {values.seeds}')
  return values, patterns


def shipped():
  """The folder of results: that of the checkout, else one in the working folder."""
  root = Path(__file__).parent.parent
  return root / 'results' if (root / 'pyproject.toml').exists() else Path('results')


def find(patterns):
  """The cells that any of some patterns names, in their own order.

  Raises:
    UserError: a pattern names none.
  """
  names = [cell.name for cell in CELLS]
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      raise UserError(f'command line: there is no cell {pattern!r}; `metajax reproduce --list` names them')
  return [cell for cell in CELLS if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)]


def run(cells, options):
  """Runs cells and keeps the results of those that are finished; returns the exit status."""
  status = 0
  for seed in options.seeds:
    for cell in cells:
      [run] = planned = [_plan(cell, int(seed), options)]
      outcomes, stopped = sweep.run(planned)
      if stopped:
        print('metajax: stopped; run the same command again to resume', file=sys.stderr)
        return sweep.STOPPED
      if outcomes:
        print(f'metajax: {cell.name} is not finished: {outcomes[run.name]}', file=sys.stderr)
        status = 1
      else:
        keep(options.results, cell, int(seed), run.workdir)
  return status


def arguments(cell, seed=0, start=''):
  """What follows `metajax train` in the command of a cell: all but the folders."""
  return [
    f'--config={cell.config}',
    *cell.overrides,
    *([f'--config.seed={seed}'] if seed else []),
    *([f'--config.init_from={start}'] if start else []),
  ]


def _plan(cell, seed, options):
  """The cell's run as a `sweep.Cell`."""
  folder = Path(options.workdir)
  name, start = f'{cell.name}-seed{seed}', str(folder / f'{cell.start}-seed{seed}') if cell.start else ''
  given = arguments(cell, seed, start)
  config = config_lib.override(config_lib.load(cell.config), config_lib.overrides(given))
  workdir = str(folder / name)
  workdir_lib.settle_config(workdir, config, 'train_and_eval')
  folders = [f'--workdir={workdir}', f'--data_dir={cli.data_folder(options.data_dir)}']
  return sweep.Cell(name, cell.name, workdir, [*given, *folders], config)


def keep(results, cell, seed, workdir):
  """Copies what a finished run has found to results/CELL/seedK.json."""
  test = json.loads((Path(workdir) / 'test.json').read_text())
  with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
    steps = checkpoints.steps()[0]
    hours = checkpoints.seconds(steps) / 3600
  found = {'command': f'metajax train {shlex.join(arguments(cell, seed))}', 'steps': steps, 'hours': round(hours, 3)}
  path = Path(results) / cell.name / f'seed{seed}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, json.dumps({**found, 'test': test}, indent=1) + '\n')
  print(f'result: {path}', flush=True)


def read(results, cell):
  """The results of a cell by seed: {seed: what `keep` has written}.

  Raises:
    UserError: a file cannot be read.
  """
  found = {}
  for path in sorted((Path(results) / cell.name).glob('seed*.json')):
    try:
      found[int(path.stem.removeprefix('seed'))] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
      raise UserError(f'{path} cannot be read ({first_line(error)}): restore or remove it') from None
  return dict(sorted(found.items()))


def table(cells, results):
  """The published numbers beside ours, as Markdown."""
  head = ('cell', 'published, %', 'ours, %', 'seeds', 'meta-updates', 'hours', 'machine', 'commit', 'source')
  lines = [head, ('---',) + ('---:',) * 5 + ('---',) * 3]
  for cell in cells:
    published = f'{cell.published:g}' + (f' ± {cell.ci95:g}' if cell.ci95 else '')
    found = read(results, cell)
    ours = _ours(found) if found else ('-', '-', '-', f'not run: about {cell.hours:g} h', '-', '-')
    lines.append((f'`{cell.name}`', published, *ours, cell.source))
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _ours(found):
  tests = [each['test'] for each in found.values()]
  accuracy = 100 * np.mean([test['accuracy'] for test in tests])
  if len(tests) > 1:  # of the seeds' means, by Student's t
    ci95 = 100 * compare.over_seeds(np.array([test['accuracy'] for test in tests]))
  else:  # over the test episodes
    ci95 = 100 * tests[0]['accuracy_ci95']
  machines, commits = (
    ', '.join(dict.fromkeys(str(test['environment'][name]) for test in tests)) for name in ('machine', 'commit')
  )
  return (
    f'{accuracy:.2f} ± {ci95:.2f}',
    ', '.join(map(str, found)),
    ', '.join(dict.fromkeys(f'{each["steps"]:,}' for each in found.values())),
    f'{np.mean([each["hours"] for each in found.values()]):.2g}',
    machines,
    commits,
  )


if __name__ == '__main__':
  sys.exit(main())

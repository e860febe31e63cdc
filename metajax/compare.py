"""Compares trained runs on the same fixed test episodes.

metajax compare RUN RUN ... [--markdown=FILE] [--csv=FILE] [--figure=FILE.png]

  RUN          DIR, NAME=DIR, or NAME=DIR1,DIR2,DIR3 for several seeds of one method: workdirs, a row of the table;
               the others are compared with the first
  --episodes   how many test episodes; by default as many as the runs' configs say
  --config.eval.KEY=VALUE   evaluate all runs with another setting, such as --config.eval.head=ridge
  --last       compare the runs' last checkpoints instead of their best by validation; then without ensembles
  --data_dir   where archives of data sets lie or go; $METAJAX_DATA, else ~/metajax_data
  --mixed      compare runs of different protocols too: episodes, way, shot, batch norm and so on
  --markdown   write the table as Markdown
  --csv        write fractions in full precision, and the protocol
  --figure     draw means and differences

What a run's tests left in tests/ is read; where none of them fits, the checkpoint is evaluated. Nothing in the
workdirs is changed, so a run may be training still. Ensembles that were tested are compared with each other.

The intervals, 1.96 std / sqrt(episodes), cover the choice of test episodes and not the randomness of training: another
seed may well fall outside. Differences are taken on each episode, which is as hard for one run as for the other, and
are therefore known better than either mean. For several seeds an episode's values are averaged first; how much the
seeds themselves differ is told by the standard deviation of their means, with n - 1, and by the 95 % interval that
Student's t makes of it: it is where the mean over many seeds would lie.

example: metajax compare maml=runs/a0,runs/a1 protonet=runs/b0,runs/b1 --markdown=table.md
"""

import contextlib
import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import special

from metajax import cli, evaluate, history, parallel, report, system, train
from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import workdir as workdir_lib
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError, first_line
from metajax.files import write_atomically

# What of the protocol leaves an episode's classes and images as they are.
_NOT_OF_EPISODES = ('batch_norm', 'augment', 'checkpoints')


class Run(NamedTuple):
  """One workdir."""

  workdir: str
  config: Any
  protocol: dict  # see `report.episode_results`; and 'checkpoints', 'last', unless it is of the best one
  quantity: str  # 'accuracy' or 'loss'
  values: np.ndarray  # (episodes,) float32
  checkpoint_step: int
  latest_step: int | None  # None without checkpoints
  ensemble: np.ndarray | None = None  # (episodes,) float32, of several checkpoints at once,
  members: int = 0  # and how many these are


class Row(NamedTuple):
  """One method: means over episodes, and the half widths of their 95 % intervals. None where there is nothing."""

  name: str
  runs: list[Run]
  mean: float
  ci95: float
  difference: float | None = None  # to the first row
  difference_ci95: float | None = None
  paired: bool | None = None  # whether the difference is one on the same episodes
  seeds_ci95: float | None = None  # of the seeds' means: half width by Student's t,
  seeds_std: float | None = None  # and standard deviation
  seedwise: float | None = None  # mean over seeds of the differences between the k-th seeds
  seedwise_std: float | None = None
  ensemble: float | None = None
  ensemble_ci95: float | None = None
  ensemble_seeds_ci95: float | None = None
  ensemble_difference: float | None = None  # to the first row's ensembles, on the same episodes where `paired`
  ensemble_difference_ci95: float | None = None


@cli.command
def main(argv):
  """Runs a command line; returns the exit status."""
  cli.set_up()
  options, named, overrides = parse(argv)
  configs = {folder: _config(folder, overrides) for folders in named.values() for folder in folders}
  parallel.use_cores(min(config.eval.episodes for config in configs.values()))
  settings = {folder: report.protocol(config) for folder, config in configs.items()}
  _check(settings, named, options.mixed)  # before anything is evaluated
  runs = {folder: read(folder, config, options.data_dir, options.last) for folder, config in configs.items()}
  _check({folder: run.protocol for folder, run in runs.items()}, named, options.mixed)
  rows = compare({name: [runs[folder] for folder in folders] for name, folders in named.items()})
  for file, write in ((options.markdown, write_markdown), (options.csv, write_csv), (options.figure, _draw)):
    if file:
      save(file, write, rows)
  print(as_text(rows), flush=True)
  return 0


def parse(argv):
  """Splits a command line: flags with defaults, {name: workdirs} in the order of the rows, overrides of configs."""
  overrides = config_lib.overrides(argv)
  for override in overrides:
    if not config_lib.key_of(override).startswith('eval.'):
      raise UserError(f'command line: {override}: the runs are trained, only settings of config.eval can be others')
  values = flags.FlagValues()
  for name in ('data_dir', 'markdown', 'csv', 'figure'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  flags.DEFINE_integer('episodes', None, '', lower_bound=1, flag_values=values)
  for name in ('mixed', 'last'):
    flags.DEFINE_bool(name, False, '', flag_values=values)
  rest = cli.parse_flags(values, [arg for arg in argv if arg not in overrides], __doc__)
  if values.figure and not values.figure.endswith('.png'):
    raise UserError(f'command line: --figure={values.figure}: the name of a PNG file ends in .png')
  if values.figure:
    system.package('metajax.figures', 'command line: --figure')
  named, seen = {}, {}
  for argument in rest:
    name, folders = _name_and_folders(argument)
    for folder in folders:
      if (place := Path(folder).resolve()) in seen:
        raise UserError(f'command line: {folder} is the same folder as {seen[place]}: name it once')
      seen[place] = folder
    if name in named:
      raise UserError(f'command line: two runs are called {name}: name them, as in NAME={folders[0]}')
    named[name] = folders
  if len(named) < 2:
    raise UserError('command line: at least two workdirs are needed, as in metajax compare runs/a runs/b')
  values.data_dir = cli.data_folder(values.data_dir)
  if values.episodes is not None:
    overrides.append(f'--config.eval.episodes={values.episodes}')
  return values, named, overrides


def _name_and_folders(argument):
  """Reads DIR, NAME=DIR or NAME=DIR1,DIR2; folders may have '=' and ',' in their names, as default workdirs do."""
  name, equals, text = argument.partition('=')
  if Path(argument).is_dir() or not equals or '/' in name:
    return Path(argument).resolve().name, [argument]
  pieces, folders = [os.path.expanduser(piece) for piece in text.split(',')], []
  while pieces:  # the longest that is a folder, else up to the next comma
    lengths = range(len(pieces), 0, -1)
    length = next((k for k in lengths if Path(','.join(pieces[:k])).is_dir()), 1)
    folders.append(','.join(pieces[:length]))
    pieces = pieces[length:]
  if not name or '' in folders:
    raise UserError(f'command line: {argument!r} is none of DIR, NAME=DIR and NAME=DIR1,DIR2')
  return name, folders


def _config(folder, overrides):
  if not (Path(folder) / 'config.json').exists():
    raise UserError(f'{folder} holds no run (no config.json): train first, or name another folder')
  return config_lib.override(workdir_lib.read_config(folder), overrides)


def read(folder, config, data_dir, last=False):
  """A run's values on its test episodes, from `test_episodes.json` or by evaluating its best checkpoint.

  Args:
    folder: the workdir.
    config: its config, complete; `eval.episodes` may be another number.
    data_dir: where archives of data sets lie.
    last: whether its last checkpoint takes the place of the best; then without an ensemble.

  Returns:
    Run.

  Raises:
    UserError: it is untrained, or cannot be evaluated.
  """
  with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
    steps = checkpoints.steps()
    ranked = steps if last else checkpoints.best_steps()
    result, why_not = _stored(folder, config, ranked[0] if ranked else None, last)
    if result is None:
      if not ranked:
        raise UserError(f'{folder} holds no checkpoint to evaluate, and {why_not}: train first')
      print(f'{folder}: {why_not}: evaluating its {"last" if last else "best"} checkpoint', flush=True)
      try:
        kept = workdir_lib.read_data(folder)
        splits = kept['splits'] if kept else None
        experiment = experiment_lib.make(config, data_dir, ('test',), validated=False, kept=splits)
        state = train.load(checkpoints, experiment, config, last)
        values = report.make_test(config, experiment)(state)
      except UserError as error:
        raise UserError(f'{folder}: {error}') from error
      result = report.episode_results(config, experiment, state, values)
  quantity, episodes = _quantity(result), config.eval.episodes
  members = [] if last else result.get('ensemble_checkpoints', [])
  return Run(
    folder,
    config,
    {**result['protocol'], 'episodes': episodes, **({'checkpoints': 'last'} if last else {})},
    quantity,
    np.array(result[quantity][:episodes], np.float32),
    result['checkpoint_step'],
    steps[0] if steps else None,
    np.array(result[f'ensemble_{quantity}'][:episodes], np.float32) if members else None,
    len(members),
  )


def _stored(folder, config, wanted_step, last=False):
  """What a test of a run has left that fits, one with an ensemble before one without; or None and why none will do.

  Arguments as for `_read_test`.
  """
  latest, others = Path(folder) / 'test_episodes.json', sorted(Path(folder).glob('tests/*/test_episodes.json'))
  found = [_read_test(path, config, wanted_step, last) for path in (latest, *others)]
  fitting = [stored for stored, _ in found if stored is not None]
  fitting.sort(key=lambda stored: not stored.get('ensemble_checkpoints'))
  return (fitting[0], None) if fitting else found[0]


def _read_test(path, config, wanted_step, last=False):
  """What a `test_episodes.json` holds, or None and why it will not do.

  With `last`, what it has of the last checkpoint stands in place of the best's; where it has nothing of that, the best
  may be the last.
  """
  try:
    stored = json.loads(path.read_text())
    faced, quantity = dict(stored['protocol']), _quantity(stored)
    if last and 'last_checkpoint_step' in stored:
      stored |= {name: stored[f'last_{name}'] for name in (quantity, 'checkpoint_step')}
    for name in (quantity, *([f'ensemble_{quantity}'] if stored.get('ensemble_checkpoints') else [])):
      values = np.array(stored[name], np.float32)
      if values.shape != (faced['episodes'],) or not np.isfinite(values).all():
        raise ValueError('not one number for each episode')
    found = [faced.pop(name) for name in report.FOUND if name in faced]
    step, adaptation = int(stored['checkpoint_step']), {name: stored.get(name) for name in report.adaptation(config)}
  except FileNotFoundError:
    return None, 'there is no test_episodes.json'
  except (OSError, ValueError, KeyError, TypeError) as error:
    return None, f'test_episodes.json is damaged ({type(error).__name__}: {first_line(error)})'
  if len(found) < len(report.FOUND):
    return None, 'test_episodes.json is of an older version'
  wanted = {**report.protocol(config), **report.adaptation(config)}
  stale = [name for name in differing([wanted, {**faced, **adaptation}]) if name != 'episodes']
  if stale:
    return None, f'test_episodes.json is of another {" and ".join(stale)}'
  if len(values) < config.eval.episodes:  # of more, the first are the same ones
    return None, f'test_episodes.json has {len(values)} of {config.eval.episodes} episodes'
  if wanted_step is None and last and 'last_checkpoint_step' not in stored:
    return None, 'test_episodes.json says nothing of the last checkpoint'
  if wanted_step not in (None, step):
    which = 'last' if last else 'best'
    return None, f'test_episodes.json is of checkpoint {step}, and now {wanted_step} is the {which}'
  return stored, None


def _quantity(result):
  return 'accuracy' if 'accuracy' in result else 'loss'


def _check(protocols, named, mixed):
  """Raises UserError where the protocols {folder: protocol} may not be compared."""
  if not mixed:
    _refuse(protocols, '; --mixed compares nevertheless')
  for name, folders in named.items():
    _refuse({folder: protocols[folder] for folder in folders}, f': they cannot be one row, {name}')


def _refuse(protocols, hint):
  faults = []
  for key in differing(protocols.values()):
    folders = {}
    for folder, protocol in protocols.items():
      folders.setdefault(_brief(protocol.get(key)), []).append(folder)
    if key == 'test_data':
      each = [' and '.join(same) for same in folders.values()]
      faults.append(f'the test classes or their images are not the same in {", ".join(each)}')
      continue
    faults.append(f'{key} is ' + ', but '.join(f'{value} in {" and ".join(each)}' for value, each in folders.items()))
  if faults:
    raise UserError(f'the protocols differ: {"; ".join(faults)}{hint}')


def differing(protocols):
  """The keys whose values are not the same in all protocols, in their order."""
  protocols = list(protocols)
  keys = dict.fromkeys(key for protocol in protocols for key in protocol)
  return [key for key in keys if any(protocol.get(key) != protocols[0].get(key) for protocol in protocols)]


def _brief(value):
  text = json.dumps(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def compare(methods):
  """Compares methods on their test episodes.

  Args:
    methods: {name: [Run]}, the runs of one name on the same episodes.

  Returns:
    [Row], the first of which the others are compared with.

  Raises:
    UserError: one's accuracy would be compared with another's loss.
  """
  _one_quantity(methods)
  first = next(iter(methods.values()))
  seedwise = len(first) > 1 and all(len(runs) == len(first) for runs in methods.values())
  return [
    _row(name, runs) if runs is first else _compared(_row(name, runs), first, seedwise)
    for name, runs in methods.items()
  ]


def summarise(methods):
  """Like `compare`, without differences: the methods may be of different protocols.

  Raises:
    UserError: also where the runs of one name are.
  """
  _one_quantity(methods)
  protocols = {run.workdir: run.protocol for runs in methods.values() for run in runs}
  _check(protocols, {name: [run.workdir for run in runs] for name, runs in methods.items()}, mixed=True)
  return [_row(name, runs) for name, runs in methods.items()]


def _one_quantity(methods):
  quantities = {runs[0].quantity: name for name, runs in methods.items()}
  if len(quantities) > 1:
    raise UserError(f'accuracy ({quantities["accuracy"]}) cannot be compared with loss ({quantities["loss"]})')


def _row(name, runs):
  means = _seeds(runs)
  row = Row(name, runs, *_interval(_episodes(runs)), seeds_ci95=over_seeds(means))
  if len(runs) > 1:
    row = row._replace(seeds_std=means.std(ddof=1))
  if ensembles := _ensembles(runs):
    mean, ci95 = _interval(_episodes(ensembles))
    row = row._replace(ensemble=mean, ensemble_ci95=ci95, ensemble_seeds_ci95=over_seeds(_seeds(ensembles)))
  return row


def _compared(row, first, seedwise):
  """The row with what there is to say of its differences to the runs `first`."""
  runs = row.runs
  paired = set(differing([first[0].protocol, runs[0].protocol])) <= set(_NOT_OF_EPISODES)
  difference, ci95 = _difference(runs, first, paired)
  row = row._replace(difference=difference, difference_ci95=ci95, paired=paired)
  if (ensembles := _ensembles(runs)) and (of_first := _ensembles(first)):
    difference, ci95 = _difference(ensembles, of_first, paired)
    row = row._replace(ensemble_difference=difference, ensemble_difference_ci95=ci95)
  if seedwise:
    differences = _seeds(runs) - _seeds(first)
    row = row._replace(seedwise=differences.mean(), seedwise_std=differences.std(ddof=1))
  return row


def _difference(runs, first, paired):
  """Mean of the differences to the runs `first`, and half the width of its 95 % interval."""
  if paired:
    return _interval(_episodes(runs) - _episodes(first))
  (mean, ci95), (first_mean, first_ci95) = _interval(_episodes(runs)), _interval(_episodes(first))
  return mean - first_mean, np.hypot(ci95, first_ci95)


def _ensembles(runs):
  """The runs with their ensembles' values in place of their own; nothing where one of them has no ensemble."""
  if any(run.ensemble is None for run in runs):
    return []
  return [run._replace(values=run.ensemble) for run in runs]


def _episodes(runs):
  """(episodes,) float64, averaged over the seeds."""
  return np.mean([run.values for run in runs], axis=0, dtype=np.float64)


def _seeds(runs):
  """(seeds,) float64, averaged over the episodes."""
  return np.array([run.values.mean(dtype=np.float64) for run in runs])


def over_seeds(values):
  """Half the width of the 95 % interval by Student's t; None of a single seed."""
  n = len(values)
  return special.stdtrit(n - 1, 0.975) * values.std(ddof=1) / np.sqrt(n) if n > 1 else None


def _interval(values):
  summary = evaluate.summarise({'mean': values})
  return summary['mean'], summary['mean_ci95']


def as_text(rows):
  """The protocol, an aligned table and what there is to note about it."""
  table = _table(rows)
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = [
    '  '.join([line[0].ljust(widths[0]), *(cell.rjust(k) for cell, k in zip(line[1:], widths[1:], strict=True))])
    for line in table
  ]
  return '\n'.join([protocol_line(rows), '', *lines, *(['', *notes(rows)] if notes(rows) else [])])


def protocol_line(rows):
  """What all rows have in common, such as 'omniglot, 5-way, 1-shot, 1 query a class, 600 episodes, test split'."""
  protocols = [row.runs[0].protocol for row in rows]
  common = {key: value for key, value in protocols[0].items() if key not in differing(protocols)}
  of_class = ' a class' if rows[0].runs[0].quantity == 'accuracy' else ''
  queries = 'query' if common.get('query_shot') == 1 else 'queries'
  parts = {
    'dataset': '{}',
    'way': '{}-way',
    'shot': '{}-shot',
    'query_shot': f'{{}} {queries}{of_class}',
    'episodes': '{} episodes',
    'split': '{} split',
    'batch_norm': '{} batch norm',
    'episode_seed': 'episode seed {}',
    'checkpoints': '{} checkpoints',
  }
  line = [text.format(common[key]) for key, text in parts.items() if common.get(key) is not None]
  if common.get('augment'):
    line.append(f'augmented by {" and ".join(common["augment"])}')
  if common.get('dataset_notes'):
    line.append('incomplete data set')
  line += [f'{key}={_brief(value)}' for key, value in common.items() if key.startswith('data.')]
  return ', '.join(line)


def notes(rows):
  """Sentences for under the table."""
  lines = []
  if any(row.paired is False for row in rows):
    lines.append(
      f'* unpaired: not the same episodes as {rows[0].name}; half the interval is sqrt(a² + b²) of the two intervals'
    )
  sizes = {run.workdir: run.members for row in rows if row.ensemble is not None for run in row.runs}
  if len(set(sizes.values())) > 1:
    lines.append(f'ensembles are of different sizes: {", ".join(f"{size} in {run}" for run, size in sizes.items())}')
  for row in rows:
    for run in row.runs:
      if run.latest_step is not None and not history.finished(run.workdir, run.config, run.latest_step):
        at = f'step {run.latest_step} of {run.config.total_steps}'
        lines.append(f'{row.name}: {run.workdir} is not trained to its end ({at})')
    others = {key for run in row.runs for key in config_lib.differences(row.runs[0].config, run.config)}
    others -= {'seed', 'init_from'}  # each seed starts from a baseline of its own
    if others:
      lines.append(f'{row.name}: its runs differ in more than their seeds: {", ".join(sorted(others))}')
  adaptations = {row.name: report.adaptation(row.runs[0].config) for row in rows}
  for name in sorted(set().union(*adaptations.values())):
    if len({found.get(name) for found in adaptations.values()}) > 1:
      values = ', '.join(f'{row} {found.get(name)}' for row, found in adaptations.items())
      lines.append(f'{name} of the test differ: {values}')
  return lines


def _table(rows):
  """The cells of the table, the heads first."""
  quantity = rows[0].runs[0].quantity
  scale, unit = (100, ' %') if quantity == 'accuracy' else (1, '')
  digits = 2 if quantity == 'accuracy' else 4

  def number(value, spread=None, sign='', separator='±'):
    if value is None:
      return '-'
    text = f'{scale * value:{sign}.{digits}f}{unit}'
    return text if spread is None else f'{text} {separator} {number(spread)}'

  def difference(row, value, spread):
    return number(value, spread, '+') + ' *' * (row.paired is False and value is not None)

  def half(value):
    return '-' if value is None else f'± {number(value)}'

  columns = {
    'run': [row.name for row in rows],
    'seeds': [str(len(row.runs)) for row in rows],
  }
  for key in differing(row.runs[0].protocol for row in rows):
    columns[key] = [_brief(row.runs[0].protocol.get(key)) for row in rows]
  shown = quantity if quantity == 'accuracy' else 'mean squared error'
  more = {  # a column that has something for a row at least
    f'difference to {rows[0].name}': [difference(row, row.difference, row.difference_ci95) for row in rows],
    '95 % over seeds': [half(row.seeds_ci95) for row in rows],
    'std of seeds': [number(row.seeds_std) for row in rows],
    'difference, seed by seed': [number(row.seedwise, row.seedwise_std, '+', 'std') for row in rows],
    f'ensemble {shown}': [number(row.ensemble, row.ensemble_ci95) for row in rows],
    f'difference of ensembles to {rows[0].name}': [
      difference(row, row.ensemble_difference, row.ensemble_difference_ci95) for row in rows
    ],
    'ensemble, 95 % over seeds': [half(row.ensemble_seeds_ci95) for row in rows],
  }
  columns[shown] = [number(row.mean, row.ci95) for row in rows]
  columns |= {head: cells for head, cells in more.items() if set(cells) != {'-'}}
  return list(zip(*([head, *cells] for head, cells in columns.items()), strict=True))


def write_markdown(path, rows):
  """The protocol, the table and its notes as Markdown."""
  head, *lines = ([cell.replace('|', r'\|') for cell in line] for line in _table(rows))
  table = [head, ['---', *['---:'] * (len(head) - 1)], *lines]
  text = [protocol_line(rows), '', *(f'| {" | ".join(line)} |' for line in table)]
  text += [line for note in notes(rows) for line in ('', note.replace('*', r'\*', 1))]
  write_atomically(path, '\n'.join(text) + '\n')


def write_csv(path, rows):
  """Fractions in full precision, workdirs, and the protocol; a field is empty where there is nothing."""
  quantity = rows[0].runs[0].quantity
  keys = dict.fromkeys(key for row in rows for key in row.runs[0].protocol)
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  numbers = {
    quantity: 'mean',
    f'{quantity}_ci95': 'ci95',
    **{name: name for name in Row._fields[Row._fields.index('difference') :]},
  }
  writer.writerow(['run', 'seeds', *numbers, 'workdirs', 'checkpoint_steps', *keys])
  for row in rows:
    values = [getattr(row, field) for field in numbers.values()]
    of_runs = [[run.workdir for run in row.runs], [run.checkpoint_step for run in row.runs]]
    protocol = [row.runs[0].protocol.get(key) for key in keys]
    protocol = [json.dumps(value) if isinstance(value, list) else value for value in protocol]
    writer.writerow([row.name, len(row.runs), *values, *map(json.dumps, of_runs), *protocol])
  write_atomically(path, file.getvalue())


def _draw(path, rows):
  system.package('metajax.figures', '--figure').comparison(
    path,
    [row.name for row in rows],
    *zip(*((row.mean, row.ci95) for row in rows), strict=True),
    *zip(*((row.difference, row.difference_ci95) for row in rows[1:]), strict=True),
    paired=[row.paired for row in rows[1:]],
    quantity=rows[0].runs[0].quantity,
  )


def save(path, write, rows):
  """Calls `write(path, rows)`, in a folder that may be new.

  Raises:
    UserError: the file cannot be written.
  """
  try:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, rows)
  except OSError as error:
    raise UserError(f'cannot write {path} ({error.strerror}): name another file') from error


if __name__ == '__main__':
  sys.exit(main())

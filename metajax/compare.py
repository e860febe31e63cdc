"""Compares trained runs on the same fixed test episodes.

python -m metajax.compare RUN RUN ... [--markdown=FILE] [--csv=FILE] [--figure=FILE.png]

  RUN          DIR, NAME=DIR, or NAME=DIR1,DIR2,DIR3 for several seeds of one method: workdirs, a row of the table;
               the others are compared with the first
  --episodes   how many test episodes; by default as many as the runs' configs say
  --data_dir   where archives of data sets lie or go; $METAJAX_DATA, else ~/metajax_data
  --mixed      compare runs of different protocols too: episodes, way, shot, batch norm and so on
  --markdown   write the table as Markdown
  --csv        write fractions in full precision, and the protocol
  --figure     draw means and differences

What a run's test left in test_episodes.json is read; where it does not fit, the best checkpoint is evaluated. Nothing
in the workdirs is changed, so a run may be training still.

The intervals, 1.96 std / sqrt(episodes), cover the choice of test episodes and not the randomness of training: another
seed may well fall outside. Differences are taken on each episode, which is as hard for one run as for the other, and
are therefore known better than either mean. For several seeds an episode's values are averaged first; how much the
seeds themselves differ is told by the standard deviation of their means, with n - 1, and by the 95 % interval that
Student's t makes of it: it is where the mean over many seeds would lie.
"""

import contextlib
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import special

from metajax import config as config_lib
from metajax import evaluate, figures, history, parallel, report, train
from metajax import experiment as experiment_lib
from metajax import workdir as workdir_lib
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError, first_line
from metajax.files import write_atomically
from metajax.main import data_folder, explaining, set_up

_NOT_OF_EPISODES = ('batch_norm', 'augment')  # what of the protocol leaves an episode's classes and images as they are


class Run(NamedTuple):
  """One workdir."""

  workdir: str
  config: Any
  protocol: dict  # see `report.episode_results`
  quantity: str  # 'accuracy' or 'loss'
  values: np.ndarray  # (episodes,) float32
  checkpoint_step: int
  latest_step: int | None  # None without checkpoints
  # Quantity and half width of a test of several checkpoints at once, and how many these are.
  ensemble: tuple[float, float, int] | None = None


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
  ensemble: float | None = None  # mean over seeds
  ensemble_ci95: float | None = None  # over episodes: mean of the seeds' own, at least as wide as that of their mean
  ensemble_seeds_ci95: float | None = None


@explaining
def main(argv):
  """Runs a command line; returns the exit status."""
  set_up()
  options, named = parse(argv)
  configs = {folder: _config(folder, options.episodes) for folders in named.values() for folder in folders}
  parallel.use_cores(min(config.eval.episodes for config in configs.values()))
  settings = {folder: report.protocol(config) for folder, config in configs.items()}
  _check(settings, named, options.mixed)  # before anything is evaluated
  runs = {folder: read(folder, config, options.data_dir) for folder, config in configs.items()}
  _check({folder: run.protocol for folder, run in runs.items()}, named, options.mixed)
  rows = compare({name: [runs[folder] for folder in folders] for name, folders in named.items()})
  for file, write in ((options.markdown, write_markdown), (options.csv, write_csv), (options.figure, _draw)):
    if file:
      save(file, write, rows)
  print(as_text(rows), flush=True)
  return 0


def parse(argv):
  """Splits a command line into flags with their defaults filled in, and {name: workdirs} in the order of the rows."""
  values = flags.FlagValues()
  for name in ('data_dir', 'markdown', 'csv', 'figure'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  flags.DEFINE_integer('episodes', None, '', lower_bound=1, flag_values=values)
  flags.DEFINE_bool('mixed', False, '', flag_values=values)
  flags.DEFINE_bool('help', False, '', short_name='h', flag_values=values)
  try:
    rest = values(argv)[1:]
  except flags.Error as error:
    raise UserError(f'command line: {first_line(error)}') from None
  if values.help:
    print(__doc__, flush=True)
    sys.exit(0)
  if values.figure and not values.figure.endswith('.png'):
    raise UserError(f'command line: --figure={values.figure}: the name of a PNG file ends in .png')
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
    raise UserError('command line: two workdirs at least are needed, as in python -m metajax.compare runs/a runs/b')
  values.data_dir = data_folder(values.data_dir)
  return values, named


def _name_and_folders(argument):
  """Reads DIR, NAME=DIR or NAME=DIR1,DIR2; folders may have '=' and ',' in their names, as default workdirs do."""
  name, equals, text = argument.partition('=')
  if Path(argument).is_dir() or not equals or '/' in name:
    return Path(argument).resolve().name, [argument]
  pieces, folders = text.split(','), []
  while pieces:  # the longest that is a folder, else up to the next comma
    lengths = range(len(pieces), 0, -1)
    length = next((k for k in lengths if Path(','.join(pieces[:k])).is_dir()), 1)
    folders.append(','.join(pieces[:length]))
    pieces = pieces[length:]
  if not name or '' in folders:
    raise UserError(f'command line: {argument!r} is none of DIR, NAME=DIR and NAME=DIR1,DIR2')
  return name, folders


def _config(folder, episodes):
  if not (Path(folder) / 'config.json').exists():
    raise UserError(f'{folder} holds no run (no config.json): train first, or name another folder')
  config = workdir_lib.read_config(folder)
  return config if episodes is None else config_lib.override(config, [f'--config.eval.episodes={episodes}'])


def read(folder, config, data_dir):
  """A run's values on its test episodes, from `test_episodes.json` or by evaluating its best checkpoint.

  Args:
    folder: the workdir.
    config: its config, complete; `eval.episodes` may be another number.
    data_dir: where archives of data sets lie.

  Returns:
    Run.

  Raises:
    UserError: it is untrained, or cannot be evaluated.
  """
  with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
    steps, best = checkpoints.steps(), checkpoints.best_steps()
    result, why_not = _stored(folder, config, best[0] if best else None)
    ensemble = result and _ensemble(folder, config, result)
    if result is None:
      if not best:
        raise UserError(f'{folder} holds no checkpoint to evaluate, and {why_not}: train first')
      print(f'{folder}: {why_not}: evaluating its best checkpoint', flush=True)
      try:
        experiment = experiment_lib.make(config, data_dir, ('train', 'test'))
        state = train.load_best(checkpoints, experiment, config)
        values = report.make_test(config, experiment)(state)
      except UserError as error:
        raise UserError(f'{folder}: {error}') from error
      result = report.episode_results(config, experiment, state, values)
  quantity = _quantity(result)
  return Run(
    folder,
    config,
    {**result['protocol'], 'episodes': config.eval.episodes},
    quantity,
    np.array(result[quantity][: config.eval.episodes], np.float32),
    result['checkpoint_step'],
    steps[0] if steps else None,
    ensemble,
  )


def _stored(folder, config, best_step):
  """What `test_episodes.json` holds, or None and why it will not do."""
  path = Path(folder) / 'test_episodes.json'
  try:
    stored = json.loads(path.read_text())
    faced, values = dict(stored['protocol']), np.array(stored[_quantity(stored)], np.float32)
    if values.shape != (faced['episodes'],) or not np.isfinite(values).all():
      raise ValueError('not one number for each episode')
    for name in report.FOUND:
      del faced[name]
    step, adaptation = int(stored['checkpoint_step']), {name: stored.get(name) for name in report.adaptation(config)}
  except FileNotFoundError:
    return None, 'there is no test_episodes.json'
  except (OSError, ValueError, KeyError, TypeError) as error:
    return None, f'test_episodes.json is damaged ({type(error).__name__}: {first_line(error)})'
  wanted = {**report.protocol(config), **report.adaptation(config)}
  stale = [name for name in differing([wanted, {**faced, **adaptation}]) if name != 'episodes']
  if stale:
    return None, f'test_episodes.json is of another {" and ".join(stale)}'
  if len(values) < config.eval.episodes:  # of more, the first are the same ones
    return None, f'test_episodes.json has {len(values)} of {config.eval.episodes} episodes'
  if best_step not in (None, step):
    return None, f'test_episodes.json is of checkpoint {step}, and now {best_step} is the best'
  return stored, None


def _ensemble(folder, config, stored):
  """What `Run` holds of an ensemble, from `test.json`; None without one, or if it is of other episodes."""
  name = f'ensemble_{_quantity(stored)}'
  try:
    result = json.loads((Path(folder) / 'test.json').read_text())
    same = (result['episodes'], result['checkpoint_step']) == (config.eval.episodes, stored['checkpoint_step'])
    found = float(result[name]), float(result[f'{name}_ci95']), len(result['ensemble_checkpoints'])
    return found if same else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


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
  row = Row(name, runs, *_interval(_episodes(runs)), seeds_ci95=_over_seeds(means))
  if len(runs) > 1:
    row = row._replace(seeds_std=means.std(ddof=1))
  if all(run.ensemble for run in runs):
    values, halves, _ = np.array([run.ensemble for run in runs]).T
    row = row._replace(ensemble=values.mean(), ensemble_ci95=halves.mean(), ensemble_seeds_ci95=_over_seeds(values))
  return row


def _compared(row, first, seedwise):
  """The row with what there is to say of its differences to the runs `first`."""
  runs = row.runs
  paired = set(differing([first[0].protocol, runs[0].protocol])) <= set(_NOT_OF_EPISODES)
  if paired:
    difference, difference_ci95 = _interval(_episodes(runs) - _episodes(first))
  else:
    first_mean, first_ci95 = _interval(_episodes(first))
    difference, difference_ci95 = row.mean - first_mean, np.hypot(row.ci95, first_ci95)
  row = row._replace(difference=difference, difference_ci95=difference_ci95, paired=paired)
  if seedwise:
    differences = _seeds(runs) - _seeds(first)
    row = row._replace(seedwise=differences.mean(), seedwise_std=differences.std(ddof=1))
  return row


def _episodes(runs):
  """(episodes,) float64, averaged over the seeds."""
  return np.mean([run.values for run in runs], axis=0, dtype=np.float64)


def _seeds(runs):
  """(seeds,) float64, averaged over the episodes."""
  return np.array([run.values.mean(dtype=np.float64) for run in runs])


def _over_seeds(values):
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
  sizes = {run.workdir: run.ensemble[2] for row in rows if row.ensemble is not None for run in row.runs}
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
    f'difference to {rows[0].name}': [
      number(row.difference, row.difference_ci95, '+') + ' *' * (row.paired is False) for row in rows
    ],
    '95 % over seeds': [half(row.seeds_ci95) for row in rows],
    'std of seeds': [number(row.seeds_std) for row in rows],
    'difference, seed by seed': [number(row.seedwise, row.seedwise_std, '+', 'std') for row in rows],
    f'ensemble {shown}': [number(row.ensemble, row.ensemble_ci95) for row in rows],
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
  figures.comparison(
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

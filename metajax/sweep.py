"""Runs a grid of experiments one after the other, and shows over seeds what came of it.

metajax sweep --config=NAME[:ARGS] --over KEY=VALUE,VALUE ... [--workdir=DIR] [--data_dir=DIR]
  [--config.KEY=VALUE ...] [--print | --slurm | --cell=K | --table] [--markdown=FILE] [--csv=FILE]

  --over      the grid: every combination of these values is a cell, a run of metajax.main. A KEY with a dot, such as
              algorithm.inner_lr, or one that every config has at its top, such as seed, is a setting; any other is a
              shorthand of the config file, such as shot. Commas within brackets or quotes belong to the value:
              "data.augment=('flip','crop'),()" are two. A value may bring others that go with it, each after a +:
              algorithm.name=maml+algorithm.inner_lr=0.1,protonet has an inner_lr for maml alone
  --workdir   each cell has a folder here, named by its values; runs/<config>[-<args>] by default
  --print     show the command of each cell, and do nothing
  --slurm     show the command that makes it a Slurm array, a task for each cell (launch/ is in the repository)
  --cell      run this one alone, counted from 0
  --table     show what is finished, and run nothing
  --markdown  write the table as Markdown
  --csv       write fractions in full precision, and the protocol

--config, --data_dir and --config.KEY are those of `metajax train`, and the same for every cell. All cells are looked at
before the first starts. Run again, finished cells are skipped and others resume. A failed cell is reported, and the
next one starts. Several sweeps may share a grid: each takes only cells that no other is running. SIGTERM saves the
running cell, and stops. The exit status is 0 if all cells are finished, 1 if some are not.

Rows of the table are cells that differ in their seed alone; see `metajax compare`, whose command line stands below it.

example: metajax sweep --config=maml_omniglot --over seed=0,1,2 shot=1,5
"""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from metajax import cli, compare, history, parallel
from metajax import config as config_lib
from metajax import workdir as workdir_lib
from metajax.errors import UserError

_INSTEAD = ('print', 'slurm', 'cell', 'table')  # what may be asked for instead of running the grid
STOPPED = 128 + signal.SIGTERM  # exit status


class Cell(NamedTuple):
  """One run of the grid."""

  name: str  # 'shot=1,seed=0', whatever the order on the command line; also its folder's
  row: str  # the name without the seed
  workdir: str
  arguments: list[str]  # of `metajax.main`
  config: Any  # complete


@cli.command
def main(argv):
  """Runs a command line; returns the exit status."""
  cli.set_up()
  options, axes, fixed = parse(argv)
  cells = plan(axes, options.config, options.workdir, options.data_dir, fixed)
  if options.print:
    print('\n'.join(map(command, cells)), flush=True)
  elif options.slurm:
    print(slurm_command(argv, len(cells)), flush=True)
  elif options.cell is not None:
    _become(cells, options.cell)
  elif options.table:
    show(cells, options)
  else:
    return run_and_show(cells, options)
  return 0


def parse(argv):
  """Splits a command line into flags with their defaults filled in, the axes of the grid, and the overrides."""
  fixed = config_lib.overrides(argv)
  values = flags.FlagValues()
  for name in ('config', 'workdir', 'data_dir', 'markdown', 'csv'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name in ('print', 'slurm', 'table'):
    flags.DEFINE_bool(name, False, '', flag_values=values)
  flags.DEFINE_integer('cell', None, '', lower_bound=0, flag_values=values)
  flags.DEFINE_multi_string('over', [], '', flag_values=values)
  rest = cli.parse_flags(values, [arg for arg in argv if arg not in fixed], __doc__)
  if not values.config:
    raise UserError('command line: --config=NAME is missing, such as --config=quickstart')
  if not values.over:
    raise UserError('command line: --over KEY=VALUE,VALUE is missing, such as --over seed=0,1,2 shot=1,5')
  asked = [f'--{name}' for name in _INSTEAD if values[name].value is not values[name].default]
  if len(asked) > 1 or (asked not in ([], ['--table']) and (values.markdown or values.csv)):
    asked += [f'--{name}' for name in ('markdown', 'csv') if values[name].value]
    raise UserError(f'command line: {" and ".join(asked)} do not go together')
  values.workdir = values.workdir or cli.default_workdir(values.config)
  return values, _axes([*values.over, *rest], values.config, fixed), fixed


def _axes(texts, config, fixed):
  """Reads the axes of the grid; nothing may be named twice, or be given for all cells as well."""
  given = {config_lib.key_of(arg) for arg in fixed}
  given |= {item.partition('=')[0] for item in config_lib.split_spec(config)[1].split(',')}
  axes, taken = [], set()
  for text in texts:
    key, _, values = text.partition('=')
    pieces = [split_values(f'{key}={value}', _MORE) for value in split_values(values)]
    axis = [[piece.partition('=')[::2] for piece in each] for each in pieces]
    for choice in axis:
      if not all(re.fullmatch(r'\w+(\.\w+)*', key) and value for key, value in choice):
        raise UserError(f'command line: --over takes KEY=VALUE,VALUE, such as seed=0,1,2, not {text!r}')
      keys = [key for key, _ in choice]
      for key in keys:
        if key in taken or keys.count(key) > 1:
          raise UserError(f'command line: --over has {key} twice: leave one out')
        if key in given:
          raise UserError(f'command line: {key} is given for all cells, and again in --over: leave one out')
    taken.update(key for choice in axis for key, _ in choice)
    axes.append([dict(choice) for choice in axis])
  return axes


_MORE = r'\+(?=[\w.]+=)'  # between a value and the settings that go with it


def split_values(text, separator=','):
  """Splits wherever the pattern of a separator matches, but not within brackets or quotes."""
  values, depth, quote = [''], 0, ''
  separator = re.compile(separator)
  for place, character in enumerate(text):
    if depth == 0 and not quote and separator.match(text, place):
      values.append('')
      continue
    values[-1] += character
    if character in '\'"' and quote in ('', character):
      quote = '' if quote else character
    elif not quote:
      depth += (character in '([{') - (character in ')]}')
  return values


def plan(axes, config, workdir, data_dir=None, fixed=()):
  """Makes the cells of a grid, the last axis changing fastest, and looks at each.

  Args:
    axes: for each axis its choices, each {key: value} as text; a key is a setting or a shorthand, see `is_setting`.
    config: NAME[:ARGS] or FILE[:ARGS] of all cells.
    workdir: cells are folders in it.
    data_dir: as it was given, or None.
    fixed: '--config.KEY=VALUE' of all cells.

  Returns:
    [Cell].

  Raises:
    UserError: a config that cannot be made, two cells that are one, a folder that is another run's.
  """
  path, args = config_lib.split_spec(config)
  cells, seen, folders = [], {}, {}
  for choices in itertools.product(*axes):
    chosen = {key: value for choice in choices for key, value in choice.items()}
    order = sorted(chosen, key=lambda key: (key == 'seed', key))
    items = [f'{key}={_as_name(chosen[key])}' for key in order]
    name, row = (','.join(i for i, key in zip(items, order, strict=True) if key != left) for left in (None, 'seed'))
    shorthands = ','.join([*filter(None, [args]), *(f'{k}={v}' for k, v in chosen.items() if not is_setting(k))])
    overrides = [*fixed, *(f'--config.{k}={v}' for k, v in chosen.items() if is_setting(k))]
    spec, folder = path + (f':{shorthands}' if shorthands else ''), str(Path(workdir) / name)
    if len(os.fsencode(name)) > 255:
      raise UserError(f'command line: --over: {name[:60]}... is too long for the name of a folder: choose other values')
    try:
      complete = config_lib.override(config_lib.load(spec), overrides)
      workdir_lib.settle_config(folder, complete, 'train_and_eval')
    except UserError as error:
      raise UserError(f'cell {name}: {error}{_hint(axes, path)}') from error
    if (twin := seen.setdefault(config_lib.to_json(complete), name)) is not name:
      raise UserError(f'command line: --over: {twin} and {name} are the same run, with not a setting that differs')
    if (twin := folders.setdefault(folder, chosen)) is not chosen:
      values, others = (', '.join(each.values()) for each in (twin, chosen))
      raise UserError(f'command line: --over: {values} and {others} would share {folder}')
    folder_of_data = [f'--data_dir={data_dir}'] if data_dir else []
    arguments = [f'--config={spec}', f'--workdir={folder}', *folder_of_data, *overrides]
    cells.append(Cell(name, row or Path(workdir).resolve().name, folder, arguments, complete))
  return cells


def is_setting(key):
  """Whether a key of the grid is a setting of the config, rather than a shorthand of the config file."""
  return '.' in key or key in config_lib.TOP_LEVEL


def _as_name(value):
  """A value as part of a folder's name: without brackets and quotes, '-' for whatever else is unusual there."""
  return re.sub(r'[^\w.,=+-]+', '-', re.sub(r'[()\[\]{}\'" ]', '', value)).strip(',') or 'none'


def _hint(axes, path):
  """The settings that those may have meant who left out the group."""
  try:
    config = config_lib.load(path)
  except UserError:
    return ''
  groups = [group for group in config if hasattr(config[group], 'keys')]
  keys = dict.fromkeys(key for axis in axes for choice in axis for key in choice if not is_setting(key))
  meant = [f'{group}.{key}' for key in keys for group in groups if key in config[group]]
  return f'; settings of such a name are {", ".join(meant)}' if meant else ''


def command(cell):
  """The command line that runs a cell, to be pasted into a shell."""
  return f'python -m metajax.main {shlex.join(cell.arguments)}'


def slurm_command(argv, cells):
  """The command line that submits the grid as a Slurm array, whose task k is cell k."""
  arguments = shlex.join(arg for arg in argv[1:] if not re.match(r'--?slurm(=|$)', arg))
  array = f'--array=0-{cells - 1} --nodes=1 --ntasks-per-node=1 --gres=gpu:1'
  return f'sbatch {array} launch/slurm.sbatch {arguments}'


def finished(cell):
  """Whether a cell, whose folder `plan` found to be its own, is trained to its end and tested."""
  folder = Path(cell.workdir)
  steps = [int(path.name) for path in (folder / 'checkpoints').glob('[0-9]*') if path.name.isdigit()]
  # A test alone is no proof: one of an unfinished run may have been asked for.
  if not (folder / 'test.json').exists() or not steps or not history.finished(folder, cell.config, max(steps)):
    return False
  return workdir_lib.read_config(folder).total_steps == cell.config.total_steps


def _become(cells, number):
  """Lets one cell's run take the place of this process, so that signals and exit status are its own."""
  if number >= len(cells):
    raise UserError(f'command line: --cell={number}: the cells are 0 to {len(cells) - 1}')
  cell = cells[number]
  print(f'{cell.name}: {"finished already" if finished(cell) else command(cell)}', flush=True)
  if not finished(cell):
    os.execv(sys.executable, _process(cell))


def _process(cell):
  return [sys.executable, '-m', 'metajax.main', *cell.arguments]


def run_and_show(cells, options):
  """Runs the grid and shows its table; returns the exit status."""
  outcomes, stopped = run(cells)
  if stopped:
    print('metajax: stopped; run the same command again to resume', file=sys.stderr)
    return STOPPED
  print()
  show(cells, options)
  left = [cell for cell in cells if not finished(cell)]  # another sweep may have finished what it was at
  for cell in left:
    print(f'metajax: cell {cell.name} is not finished: {outcomes[cell.name]}', file=sys.stderr)
  return 1 if left else 0


def run(cells):
  """Runs cells, each in a process of its own.

  Returns:
    {name: what became of it} for those that are not finished, and whether SIGTERM came in between.
  """
  outcomes, process, stopped = {}, None, False

  def stop(number, frame):
    nonlocal stopped
    stopped = True
    if process:
      process.terminate()  # it saves

  previous = signal.signal(signal.SIGTERM, stop)
  try:
    for number, cell in enumerate(cells, 1):
      if stopped:
        break
      heading = f'[{number}/{len(cells)}] {cell.name}: '
      try:
        # Not the run's own lock, for that must be free when the run starts.
        with workdir_lib.locked(cell.workdir, '.sweep.lock'):
          if finished(cell):
            print(f'{heading}finished already', flush=True)
            continue
          print(f'{heading}{command(cell)}', flush=True)
          process = subprocess.Popen(_process(cell))
          if stopped:  # just before there was a process to tell
            process.terminate()
          status = _wait(process)
          if not finished(cell):
            outcomes[cell.name] = _ending(status)
      except UserError as error:  # another sweep is at it
        outcomes[cell.name] = str(error)
      if cell.name in outcomes and not stopped:
        print(f'{heading}{outcomes[cell.name]}', flush=True)
    return outcomes, stopped
  finally:
    signal.signal(signal.SIGTERM, previous)


def _wait(process):
  try:
    return process.wait()
  except KeyboardInterrupt:  # Ctrl-C tells all processes of a terminal
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:  # it was not from a terminal
      process.terminate()
      process.wait()
    raise


def _ending(status):
  if status < 0:
    return f'killed by {signal.Signals(-status).name}'
  return f'exit status {status}' if status else 'stopped before its end'


def show(cells, options):
  """Prints the table of the cells that are finished, and writes the files that are asked for."""
  done = [cell for cell in cells if finished(cell)]
  print(f'{len(done)} of {len(cells)} cells are finished', flush=True)
  if not done:
    return
  parallel.use_cores(min(cell.config.eval.episodes for cell in done))
  data_dir, methods = cli.data_folder(options.data_dir), {}
  for cell in done:
    methods.setdefault(cell.row, []).append(compare.read(cell.workdir, cell.config, data_dir))
  rows = compare.summarise(methods)
  for file, write in ((options.markdown, compare.write_markdown), (options.csv, compare.write_csv)):
    if file:
      compare.save(file, write, rows)
  print(f'\n{compare.as_text(rows)}', flush=True)
  if len(rows) > 1:
    print(f'\ndifferences: {compare_command(rows, options.data_dir)}', flush=True)


def compare_command(rows, data_dir=None):
  """The command line that compares the rows with the first on the same episodes."""
  arguments = [f'{row.name.replace("=", ":")}={",".join(run.workdir for run in row.runs)}' for row in rows]
  if compare.differing(row.runs[0].protocol for row in rows):
    arguments.insert(0, '--mixed')
  if data_dir:
    arguments.append(f'--data_dir={data_dir}')
  return f'python -m metajax.compare {shlex.join(arguments)}'


if __name__ == '__main__':
  sys.exit(main())

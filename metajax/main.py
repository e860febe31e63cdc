"""Trains and evaluates what a config file describes.

python -m metajax.main --config=FILE[:ARGS] [--workdir=DIR] [--mode=MODE] [--data_dir=DIR] [--config.KEY=VALUE ...]

  --config       config file, and its shorthands: configs/maml_omniglot.py:way=20,shot=1
  --workdir      folder of the run; runs/<config>[-<args>] by default. Run again, it goes on where it stopped
  --mode         train, eval or train_and_eval (default); eval needs only --workdir
  --data_dir     where archives of data sets lie or go; $METAJAX_DATA, else ~/metajax_data
  --config.KEY   any setting of the config, such as --config.algorithm.inner_steps=3

Several processes as one run, each with the same command (under Slurm and Open MPI they find one another):

  --coordinator    HOST:PORT, where process 0 listens
  --num_processes  how many there are
  --process_id     which of them this is, 0 to num_processes - 1
"""

import errno
import functools
import logging
import os
import sys
import traceback
from pathlib import Path

import jax
from absl import flags
from absl import logging as absl_logging

from metajax import config as config_lib
from metajax import parallel, processes, train, workdir
from metajax.data import table
from metajax.errors import NO_ROOM, UserError, first_line


def main(argv=None):
  """Runs a command line; returns the exit status: 2 with one line on stderr for what a user can mend."""
  set_up()
  try:
    options, overrides = parse(sys.argv if argv is None else argv)
    if place := processes.find_place(options.coordinator, options.num_processes, options.process_id):
      processes.start(place)

    def read_config():
      config = config_lib.load(options.config) if options.config else workdir.read_config(options.workdir)
      return config_lib.to_json(config_lib.override(config, overrides))

    config = config_lib.from_json(processes.from_first(read_config))
    if not place:
      parallel.use_cores(config.eval.episodes if options.mode == 'eval' else config.data.tasks)
    train.run(config, options.workdir, data_dir=options.data_dir, mode=options.mode)
    processes.finish()
    return 0
  except (Exception, KeyboardInterrupt) as error:
    status, line = explain(error)
    processes.fail(status, line or traceback.format_exc(), by_device=isinstance(error, jax.errors.JaxRuntimeError))
    if line is None:
      raise
    print(line, file=sys.stderr)
    return status


def set_up():
  """What every command that compiles begins with: how to log, and where compiled programs are kept."""
  logging.basicConfig(format='%(message)s', stream=sys.stdout, force=True)
  logging.getLogger('metajax').setLevel(logging.INFO)
  absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs the tracebacks of errors that it raises as well
  # A program that was compiled once is read from disk when a run is started again; a run has few, so all are kept.
  jax.config.update('jax_compilation_cache_dir', str(table.cache_dir() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_REMEDIES = {**dict.fromkeys(NO_ROOM, 'make room'), **dict.fromkeys(_ACCESS, 'make it accessible')}


def explain(error):
  """The exit status for an error, and one line for what a user can mend; None where only the traceback will do."""
  if isinstance(error, UserError):
    return 2, f'metajax: {error}'
  if isinstance(error, OSError) and error.errno in _REMEDIES:
    return 2, f'metajax: {error}: {_REMEDIES[error.errno]}, then run the same command again to go on'
  if isinstance(error, KeyboardInterrupt):
    return 130, 'metajax: interrupted; run the same command again to go on from the last checkpoint'
  return 1, None


def explaining(main):
  """Makes of a `main` of an argv a command: of sys.argv by default, its errors the exit status and a line on stderr."""

  @functools.wraps(main)
  def command(argv=None):
    try:
      return main(sys.argv if argv is None else argv)
    except BrokenPipeError:  # whoever reads has seen enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    except (Exception, KeyboardInterrupt) as error:
      status, line = explain(error)
      if line is None:
        raise
      print(line, file=sys.stderr)
      return status

  return command


def parse(argv):
  """Splits a command line into flags with their defaults filled in, and the overrides of the config."""
  overrides = config_lib.overrides(argv)
  values = flags.FlagValues()
  for name in ('config', 'workdir', 'data_dir', 'coordinator'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name in ('num_processes', 'process_id'):
    flags.DEFINE_integer(name, None, '', flag_values=values)
  flags.DEFINE_enum('mode', 'train_and_eval', ['train', 'eval', 'train_and_eval'], '', flag_values=values)
  flags.DEFINE_bool('help', False, '', short_name='h', flag_values=values)
  try:
    rest = values([arg for arg in argv if arg not in overrides])[1:]
  except flags.Error as error:
    raise UserError(f'command line: {first_line(error)}') from None
  if values.help:
    print(__doc__)
    sys.exit(0)
  if rest:
    raise UserError(f'command line: do not know what to do with {rest[0]!r}; settings are --config.KEY=VALUE')
  if not values.config and not (values.mode == 'eval' and values.workdir):
    raise UserError('command line: --config=FILE is missing, such as --config=configs/quickstart.py')
  if not values.workdir:
    values.workdir = default_workdir(values.config)
  values.data_dir = data_folder(values.data_dir)
  return values, overrides


def default_workdir(config):
  """runs/<config>[-<args>] for the config FILE[:ARGS]."""
  path, _, arg = config.partition(':')
  return str(Path('runs') / (Path(path).stem + (f'-{arg}' if arg else '')))


def data_folder(given=None):
  """Where archives of data sets lie or go: what --data_dir says, else $METAJAX_DATA, else ~/metajax_data."""
  return os.path.expanduser(given or os.environ.get('METAJAX_DATA') or '~/metajax_data')


if __name__ == '__main__':
  sys.exit(main())

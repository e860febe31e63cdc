"""The command line: `metajax COMMAND`, and what its commands share."""

import ast
import contextlib
import difflib
import errno
import functools
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
from pathlib import Path

from absl import flags
from absl import logging as absl_logging

import metajax
from metajax.errors import NO_ROOM, UserError, first_line

COMMANDS = {  # name -> its module, which has main(argv), and what it does
  'train': ('metajax.main', 'train a learner and test it, or resume a run'),
  'eval': ('metajax.eval', 'test a trained run again, also with other settings'),
  'compare': ('metajax.compare', 'compare trained runs on the same test episodes'),
  'sweep': ('metajax.sweep', 'run a grid of experiments and tabulate it over seeds'),
  'reproduce': ('metajax.reproduce', 'train the published baselines, and tabulate their numbers beside ours'),
  'data': ('metajax.data.__main__', 'download, convert, list and check data sets'),
}
_USAGE = """metajax: few-shot meta-learning in JAX.

usage: metajax COMMAND [ARGUMENTS]

{commands}

  metajax COMMAND --help  what a command takes, with examples
  metajax --version       versions of metajax, Python and JAX

example: metajax train --config=quickstart
"""


def main(argv=None):
  """Runs `metajax COMMAND ARGUMENTS`; returns the exit status."""
  name, *rest = (sys.argv if argv is None else argv)[1:] or ['--help']
  if name in COMMANDS:
    return importlib.import_module(COMMANDS[name][0]).main([f'metajax {name}', *rest])
  return _without_command(name)


def command(function):
  """Makes a command of `function(argv, **options) -> exit status`.

  By default argv is sys.argv. Errors that a user can mend are one line.
  """

  @functools.wraps(function)
  def run(argv=None, **options):
    with lasting_streams():
      try:
        status = function(sys.argv if argv is None else argv, **options)
        sys.stdout.flush()
        return status
      except (Exception, KeyboardInterrupt) as error:
        status, line = explain(error)
        if line is None:
          raise
        print(line, file=sys.stderr)
        return status

  return run


@contextlib.contextmanager
def lasting_streams():
  """Within, nothing ends because nobody reads what it prints: a closed stream, or a pipe whose reader has gone away.

  A run may take days, and all that it finds is in files.
  """
  for number in (1, 2):  # else the next file that is opened would get what libraries print
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)
  with (
    contextlib.redirect_stdout(_Lasting(sys.stdout or open(os.devnull, 'w'))),
    contextlib.redirect_stderr(_Lasting(sys.stderr or open(os.devnull, 'w'), whole=False)),
  ):
    yield


class _Lasting:
  """A text stream that turns into a sink when its reader goes away, be it a terminal that is closed.

  Args:
    stream: to print to.
    whole: whether it is an error, now and whenever something more is printed, if a file cannot hold all of it: a table
      must not be cut off in silence. Of errors that cannot be printed there is nobody to tell.
  """

  def __init__(self, stream, whole=True):
    self._stream, self._error = stream, None
    self._whole = whole and not stream.isatty()

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    self._attempt(self._stream.write, text)
    return len(text)

  def flush(self):
    self._attempt(self._stream.flush)

  def _attempt(self, function, *args):
    try:
      function(*args)
    except OSError as error:  # what Python still holds goes nowhere, too
      os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
      if self._whole and not isinstance(error, BrokenPipeError):
        self._error = OSError(error.errno, error.strerror, 'standard output')
    if self._error:  # again and again: logging passes over it
      raise self._error


@command
def _without_command(name):
  """What `metajax NAME` prints where NAME is no command."""
  if name in ('-h', '--help', 'help'):
    width = max(map(len, COMMANDS))
    print(
      _USAGE.format(commands='\n'.join(f'  {name:{width}}  {does}' for name, (_, does) in COMMANDS.items())), end=''
    )
  elif name == '--version':
    print(f'metajax {metajax.__version__}, Python {platform.python_version()}, jax {importlib.metadata.version("jax")}')
  else:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f'did you mean {close[0]!r}?' if close else f'commands are {", ".join(COMMANDS)}'
    raise UserError(f'command line: there is no command {name!r}; {hint}')
  return 0


def parse_flags(values, argv, usage):
  """Reads flags from a command line; prints `usage` and exits if it asks for --help.

  Args:
    values: absl FlagValues in which the flags are defined.
    argv: the command line; the first argument is the program.
    usage: str, or a function that returns it.

  Returns:
    the arguments that are no flags.

  Raises:
    UserError: an unknown flag, or a value that it cannot take.
  """
  flags.DEFINE_bool('help', False, '', short_name='h', flag_values=values)
  try:
    rest = values([*argv[:1], *map(_expand_home, argv[1:])])[1:]
  except flags.Error as error:
    raise UserError(f'command line: {first_line(error)}') from None
  if values.help:
    print((usage() if callable(usage) else usage).rstrip(), flush=True)
    sys.exit(0)
  return rest


def _expand_home(argument):
  """FLAG=~/FOLDER as FLAG=HOME/FOLDER: a shell expands ~ only where a word begins with it."""
  flag, equals, value = argument.partition('=')
  return f'{flag}={os.path.expanduser(value)}' if equals else argument


def log_plainly():
  """Has metajax's log lines printed as they are."""
  logging.basicConfig(format='%(message)s', stream=sys.stdout, force=True)
  logging.raiseExceptions = False  # a line that cannot be printed is no reason for a traceback
  logging.getLogger('metajax').setLevel(logging.INFO)


def set_up():
  """What every command that compiles begins with: how to log, and where compiled programs are kept."""
  import jax  # only here, to keep help and errors quick

  from metajax.data import table

  log_plainly()
  absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs the tracebacks of errors that it raises as well
  # A program that was compiled once is read from disk when a run is started again; a run has few, so all are kept.
  jax.config.update('jax_compilation_cache_dir', str(table.cache_dir() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)  # a folder in the place of a file, or the other way round
_REMEDIES = {
  **dict.fromkeys(NO_ROOM, 'make room'),
  **dict.fromkeys(_ACCESS, 'make it accessible'),
  **dict.fromkeys(_IN_THE_WAY, 'move it out of the way'),
}


def explain(error):
  """The exit status for an error, and one line where a user can mend it; None where only the traceback will do."""
  if isinstance(error, UserError):
    return 2, f'metajax: {error}'
  if isinstance(error, OSError) and error.errno in _REMEDIES:
    return 2, f'metajax: {error}: {_REMEDIES[error.errno]}, then run the same command again to resume'
  if isinstance(error, KeyboardInterrupt):
    return 130, 'metajax: interrupted; run the same command again to resume from the last checkpoint'
  return 1, None


def data_folder(given=None):
  """Where archives of data sets lie or go: what --data_dir says, else $METAJAX_DATA, else ~/metajax_data."""
  return os.path.expanduser(given or os.environ.get('METAJAX_DATA') or '~/metajax_data')


def default_workdir(config):
  """runs/<config>[-<args>] for the config NAME[:ARGS] or FILE[:ARGS]."""
  from metajax.config import split_spec

  path, arg = split_spec(config)
  return str(Path('runs') / (Path(path).stem + (f'-{arg}' if arg else '')))


def list_configs():
  """A line for each shipped config: its name, and what the first line of its docstring says before a parenthesis."""
  from metajax.config import shipped

  summaries = {}
  for name, path in shipped().items():
    with contextlib.suppress(OSError, ValueError, SyntaxError):  # a file that somebody is still writing
      text = ast.get_docstring(ast.parse(path.read_text('utf-8'))) or ''
      summaries[name] = text.split('\n')[0].split(' (')[0].rstrip('.:,')
  width = max(map(len, summaries))
  return '\n'.join(f'  {name:{width}}  {summary}' for name, summary in summaries.items())

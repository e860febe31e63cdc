"""The error that a user can cause, as opposed to a bug; and those that a run survives."""

import contextlib
import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
  """What is wrong, where, and what to do about it, in one line.

  `main.py` prints the message without a traceback and exits with status 2; used as a library it is an ordinary
  exception.
  """


def first_line(error):
  """An exception's message, cut to one line."""
  return (str(error).strip() or type(error).__name__).split('\n')[0][:300]


@contextlib.contextmanager
def optional(what):
  """Prints a line in place of any exception: for figures and whatever else no result depends on.

  Args:
    what: is missing then.
  """
  try:
    yield
  except Exception as error:  # whatever it is
    kind = '' if isinstance(error, UserError | OSError) else f'{type(error).__name__}: '
    print(f'no {what}: {kind}{first_line(error)}')

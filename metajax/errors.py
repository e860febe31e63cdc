"""The error that a user can cause, as opposed to a bug."""

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

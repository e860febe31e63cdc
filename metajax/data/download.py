"""Downloads, checked and resumed."""

import concurrent.futures
import contextlib
import errno
import hashlib
import html
import http.client
import itertools
import logging
import os
import pathlib
import re
import shutil
import socket
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import NamedTuple

from metajax.data.table import locked
from metajax.errors import NO_ROOM, UserError, first_line

_log = logging.getLogger(__name__)

_TIMEOUT = 30  # seconds without a byte
_SLOWEST = 1000  # bytes a second; less than that over `_TIMEOUT` seconds is a stall too
_WAITS = (1, 5, 20)  # seconds before a mirror is asked again
_PATIENCE = 60  # seconds; a mirror that asks to wait longer is not asked again
_PROGRESS = 1 << 20  # bytes; once as many have arrived, the waits begin anew
_BLOCK = 1 << 16  # bytes
_BUSY = (408, 429, 500, 502, 503, 504)


class Remote(NamedTuple):
  """A file to download.

  Attributes:
    name: what it is called here.
    urls: mirrors, in order.
    sha256: hexadecimal; '' where none is published.
    md5: hexadecimal; counts where there is no `sha256`.
    size: in bytes; None where none is published, then the server's word counts. Hash or size must be given.
  """

  name: str
  urls: tuple[str, ...]
  sha256: str = ''
  md5: str = ''
  size: int | None = None


def google_drive(file_id):
  """The addresses at which Google Drive has a file: mirrors for `Remote`."""
  return (
    f'https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t',
    f'https://drive.google.com/uc?export=download&confirm=t&id={file_id}',
  )


class _Failed(Exception):
  """Why a mirror did not do.

  Attributes:
    again: whether the same mirror may do if asked again, `wait` seconds later at the earliest.
    browser: whether it may do in a browser.
  """

  def __init__(self, reason, *, again=False, wait=0, browser=False):
    super().__init__(reason)
    self.again, self.wait, self.browser = again, wait, browser


def fetch(remote, folder):
  """Downloads a file from the first of several mirrors that has it; of several processes one does.

  What arrives is kept in `<name>.part`, which the next mirror or a later call continues. The file gets its name only
  when size and hash are right. Where the file system has no locks, each call has a part of its own, removed in the end.

  Args:
    remote: Remote.
    folder: where to put it; need not exist. A file already there is left as it is.

  Returns:
    pathlib.Path of the file.

  Raises:
    UserError: no mirror has the file, or it cannot be written.
    ValueError: no mirror is given, or neither hash nor size.
  """
  if not remote.urls or not (remote.sha256 or remote.md5 or remote.size is not None):
    raise ValueError(f'{remote.name} has no mirror, or neither hash nor size')
  path = pathlib.Path(folder, remote.name)
  partial = path.with_name(path.name + '.part')
  try:
    if path.exists():
      return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      alone = stack.enter_context(locked(partial))
      if path.exists():  # another process was first, and we may have opened a new part since
        partial.unlink(missing_ok=True)
        return path
      if not alone:  # nobody else may write to ours, nor can anybody continue it
        partial = path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')
        stack.callback(partial.unlink, missing_ok=True)
      part = _Part(stack.enter_context(open(partial, 'a+b')), remote)
      failures = _try_mirrors(part, remote)
      if part.is_whole():
        part.sync()
        partial.replace(path)
        return path
      # An empty part stays as well: another process may be waiting for its lock.
  except OSError as error:
    room = 'make room there, or ' if error.errno in NO_ROOM else ''
    raise UserError(
      f'cannot write {path}: {error.strerror or error}; {room}choose another folder with --data_dir'
    ) from error
  reasons = '; '.join(f'{urllib.parse.urlsplit(url).netloc}: {error}' for url, error in failures.items())
  best = next((url for url, error in failures.items() if error.browser), next(iter(failures)))
  raise UserError(
    f'cannot download {remote.name} ({reasons}): open {best} in a browser, sign in if it asks, and put the file at '
    f'{path}, or run again to resume'
  )


class _Part:
  """The file that grows, its size in bytes and the hash of what it holds: nothing is read twice."""

  def __init__(self, file, remote):
    self._file, self._remote = file, remote
    self.kind, self._hash = ('sha256', remote.sha256) if remote.sha256 else ('md5', remote.md5)
    self._digest = hashlib.new(self.kind, usedforsecurity=False)
    file.seek(0)
    while block := file.read(1 << 20):
      self._digest.update(block)
    self.size = file.tell()

  def append(self, block):
    self._file.write(block)
    self._digest.update(block)
    self.size += len(block)

  def clear(self):
    self._file.truncate(0)
    self._digest = hashlib.new(self.kind, usedforsecurity=False)
    self.size = 0

  def is_whole(self):
    """Whether size and hash are those published."""
    right_size = self.size == self._remote.size if self._remote.size is not None else self.size > 0
    return right_size and (not self._hash or self._digest.hexdigest() == self._hash.lower())

  def check_room(self, total):
    """Raises OSError where the rest of `total` bytes will not fit on the disk."""
    missing, usage = total - self.size, shutil.disk_usage(self._file.fileno())
    if missing > usage.free and usage.total:  # some file systems do not know
      raise OSError(errno.ENOSPC, f'{missing / 1e6:.1f} MB more are needed, {usage.free / 1e6:.1f} MB are free')

  def sync(self):
    self._file.flush()
    os.fsync(self._file.fileno())


def _try_mirrors(part, remote):
  """Completes `part`, if any mirror will do. Returns url -> why it did not do."""
  failures = {}
  for url in remote.urls:
    url = urllib.parse.quote(url, safe=string.punctuation)  # blanks, and what is not ASCII
    try:
      _insist(url, part, remote)
      break
    except _Failed as error:
      failures[url] = error
      _log.warning('%s not downloaded from %s: %s', remote.name, url, error)
  return failures


def _insist(url, part, remote):
  """Completes `part` from one mirror, asked again where that may help."""
  if not (remote.sha256 or remote.md5):  # nothing would tell whether a part is of this mirror's file
    part.clear()
  furthest, waits = part.size, iter(_WAITS)
  while not part.is_whole():
    try:
      _ask(url, part, remote)
    except _Failed as error:
      if part.size >= furthest + _PROGRESS:
        furthest, waits = part.size, iter(_WAITS)
      wait = next(waits, None)
      if wait is None or not error.again:
        raise
      wait = max(wait, error.wait)
      _log.info('%s: %s; asking again in %d s', url, error, wait)
      time.sleep(wait)


def _ask(url, part, remote):
  """Completes `part` by one request."""
  from tqdm import tqdm  # only here, to keep importing this quick

  if remote.size is not None and part.size >= remote.size:  # but it is not the file
    part.clear()
  request = urllib.request.Request(url, headers={'User-Agent': 'metajax'})
  if part.size:
    request.add_header('Range', f'bytes={part.size}-')
  try:
    response = _open(request)
  except _Failed as error:
    if part.size and getattr(error.__cause__, 'code', None) == 416:  # the mirror's file is not that long
      part.clear()
      raise _Failed('does not resume', again=True) from error
    raise
  with response:
    length, blocks = response.length, _receive(response)  # newer Pythons count `length` down
    beginning = next(blocks, b'')
    total = _check(response, length, beginning, part, remote)
    resumed = part.size > 0
    _log.info('downloading %s (%s)', url, 'size unknown' if total is None else f'{total / 1e6:.1f} MB')
    with tqdm(total=total, initial=part.size, desc=remote.name, unit='B', unit_scale=True, disable=None) as progress:
      for block in itertools.chain([beginning], blocks):
        if total is not None and part.size + len(block) > total:
          raise _Failed(f'has more than {total} bytes')
        part.append(block)
        progress.update(len(block))
  if total is not None and part.size < total:
    raise _Failed(f'ended after {part.size} of {total} bytes', again=True)
  if not part.is_whole():
    reason = f'has {part.size} bytes with a wrong {part.kind.upper()}'
    part.clear()
    raise _Failed(reason, again=resumed)  # what was there before may be to blame


def _check(response, length, beginning, part, remote):
  """Prepares `part` for an answer, once it looks right. Returns the size of the whole file, None if unknown."""
  _refuse_page(response, beginning)
  if response.status == 206:
    span = re.match(rf'bytes {part.size}-\d+/(\d+|\*)', response.headers.get('Content-Range', ''))
    if not span:
      part.clear()
      raise _Failed('does not resume', again=True)
    length = None if span[1] == '*' else int(span[1])
  elif response.status != 200:
    raise _Failed(f'HTTP {response.status} {response.reason}')
  total = length if remote.size is None else remote.size
  if length not in (None, total):
    raise _Failed(f'has {length} bytes, not {total}')
  if response.status == 200:
    part.clear()
  if total is not None:
    part.check_room(total)
  return total


def _open(request):
  """`urlopen`, in a thread: its own timeout knows no end of names looked up, redirects and headers byte by byte."""

  def work():
    try:
      opened.set_result(urllib.request.urlopen(request, timeout=_TIMEOUT))
    except Exception as error:
      opened.set_exception(error)

  opened = concurrent.futures.Future()
  threading.Thread(target=work, name='download', daemon=True).start()
  with _network():
    return opened.result(4 * _TIMEOUT)  # enough to try a few addresses of the host


def _receive(response):
  """Yields blocks of bytes as they arrive."""
  left = response.length  # None if unknown; `read1` need not stop there by itself
  block, waited, received = b'', 0, 0
  while left != 0:
    start = time.monotonic()
    with _network():
      arrived = response.read1(_BLOCK if left is None else min(left, _BLOCK))
    if not arrived:
      break
    waited, received = waited + time.monotonic() - start, received + len(arrived)
    if waited >= _TIMEOUT:
      if received < _SLOWEST * waited:
        raise _Failed(f'is too slow ({received} bytes in {waited:.0f} s)', again=True)
      waited, received = 0, 0
    left = None if left is None else left - len(arrived)
    block += arrived
    if len(block) >= _BLOCK:
      yield block
      block = b''
  yield block


def _refuse_page(response, beginning):
  """Raises where a server excuses itself to a human; Google Drive has pages for quota, virus scan and sign-in."""
  kind = response.headers.get('Content-Type', '').lower()
  if 'html' in kind or beginning[:100].lstrip().lower().startswith((b'<!doctype html', b'<html')):
    title = re.search(r'<title>(.*?)</title>', beginning.decode(errors='replace'), re.DOTALL | re.IGNORECASE)
    title = ' '.join(html.unescape(title[1]).split())[:80] if title else ''
    raise _Failed(f'is a web page{f" {title!r}" if title else ""}, not the file', browser=True)


@contextlib.contextmanager
def _network():
  """Makes `_Failed` of all that can go wrong on the network, so that any other OSError concerns the file."""
  try:
    yield
  except urllib.error.HTTPError as error:
    wait = error.headers.get('Retry-After', '')
    wait = int(wait) if wait.isdecimal() else 0
    reason = f'HTTP {error.code} {first_line(error.reason)}' + (f', asks to wait {wait} s' if wait else '')
    again = error.code in _BUSY and wait <= _PATIENCE
    error.close()
    raise _Failed(reason, again=again, wait=wait, browser=error.code in (401, 403)) from error
  except (http.client.HTTPException, OSError) as error:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
      raise _Failed(f'no answer for {_TIMEOUT} s', again=True) from error
    reason = getattr(cause, 'strerror', None) or first_line(cause)
    if isinstance(cause, socket.gaierror) or getattr(cause, 'errno', None) == errno.ENETUNREACH:
      reason += ' (no network?)'
    again = isinstance(cause, (ConnectionResetError, ConnectionAbortedError, http.client.IncompleteRead))
    raise _Failed(reason, again=again) from error

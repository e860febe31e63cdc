"""Downloads, checked and resumed."""

import hashlib
import http.client
import logging
import os
import pathlib
import urllib.error
import urllib.parse
import urllib.request

from metajax.data.table import locked
from metajax.errors import UserError

_log = logging.getLogger(__name__)

_TIMEOUT = 30  # seconds without a byte
_BLOCK = 1 << 16  # bytes


class _Failed(Exception):
  """Why one mirror did not do."""


def fetch(urls, path, *, sha256, size):
  """Downloads a file from the first of several mirrors that has it; of several processes one does.

  What arrives is kept in `<path>.part`, which the next mirror or a later call continues. The file gets its name only
  when size and hash are right.

  Args:
    urls: mirrors, in order.
    path: where to put the file; a file already there is left as it is.
    sha256: hexadecimal.
    size: in bytes.

  Raises:
    UserError: no mirror has the file, or it cannot be written.
  """
  path = pathlib.Path(path)
  part = path.with_name(path.name + '.part')
  reasons = []
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(part):
      if path.exists():  # another process was first, and we may have opened a new `part` since
        part.unlink(missing_ok=True)
        return
      for url in urls:
        try:
          _fetch_from(url, part, sha256, size)
          part.rename(path)
          return
        except _Failed as error:
          reasons.append(f'{urllib.parse.urlsplit(url).netloc}: {error}')
          _log.warning('%s not downloaded from %s', path.name, reasons[-1])
      if not part.stat().st_size:
        part.unlink()
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error.strerror or error}; make room there, or choose another folder with --data_dir'
    ) from error
  raise UserError(f'cannot download {path.name} ({"; ".join(reasons)}): get it from {urls[0]} and put it at {path}')


def _fetch_from(url, part, sha256, size):
  """Completes `part` from one mirror."""
  from tqdm import tqdm  # only here, to keep importing this quick

  _log.info('downloading %s (%.1f MB)', url, size / 1e6)
  with open(part, 'a+b') as file:
    start = file.seek(0, os.SEEK_END)
    if start < size:
      with tqdm(total=size, desc=url.rpartition('/')[2], unit='B', unit_scale=True, disable=None) as progress:
        for position, block in _receive(url, start, size):
          if position != file.tell():  # the server does not resume
            file.seek(position)
            file.truncate()
          file.write(block)
          progress.update(position + len(block) - progress.n)
      if file.tell() < size:
        raise _Failed(f'ended after {file.tell()} of {size} bytes')
    file.seek(0)
    if hashlib.file_digest(file, 'sha256').hexdigest() == sha256:
      return
    file.truncate(0)
  if start:  # what was there before may be to blame
    return _fetch_from(url, part, sha256, size)
  raise _Failed('SHA-256 is wrong')


def _receive(url, start, size):
  """Yields (position, block of bytes) from `start` on, or from 0 where the server does not resume.

  All that can go wrong on the network becomes `_Failed`, so that an OSError of the caller concerns the file.
  """
  request = urllib.request.Request(url, headers={'User-Agent': 'metajax'})
  if start:
    request.add_header('Range', f'bytes={start}-')
  try:
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
      resumed = response.status == 206 and response.headers.get('Content-Range', '').startswith(f'bytes {start}-')
      position = start if resumed else 0
      block = response.read(_BLOCK)
      kind, beginning = response.headers.get('Content-Type', ''), block[:100].lstrip().lower()
      if 'html' in kind or beginning.startswith((b'<!doctype html', b'<html')):
        raise _Failed('is a web page, not the file')
      if response.length is not None and position + len(block) + response.length != size:
        raise _Failed(f'has {position + len(block) + response.length} bytes, not {size}')
      while block:
        if position + len(block) > size:
          raise _Failed(f'has more than {size} bytes')
        yield position, block
        position += len(block)
        block = response.read(_BLOCK)
  except urllib.error.HTTPError as error:
    raise _Failed(f'HTTP {error.code} {error.reason}') from error
  except (http.client.HTTPException, OSError) as error:
    reason = getattr(error, 'reason', error)
    raise _Failed(f'no answer for {_TIMEOUT} s' if isinstance(reason, TimeoutError) else str(reason)) from error

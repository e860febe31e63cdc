"""Writing a table: decoding on all cores in bounded memory, taken up again where a process died."""

import bisect
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import time
import uuid

import numpy as np

from metajax.data import table
from metajax.data.images import FEW
from metajax.errors import UserError

_log = logging.getLogger(__name__)

_CHUNK = 64  # images per decoding job


def convert(key, classes, decode, shape, job, *, explain=lambda items: [], skip_bad=False, alone=True):
  """Writes a data set as the table `key`, decoded on all cores, and opens it.

  The table appears whole or not at all. Memory holds a few hundred images at a time; what a process that died has
  written is taken over, if it was at the same job.

  Args:
    key: folder name of the table under `cache_dir()`.
    classes: class name -> sequence of items, in the order of the table.
    decode: item -> (h, w, c) uint8; called from several threads. It raises UserError for an item that is no image.
    shape: (h, w, c).
    job: the rest of the manifest: `fingerprint` and `files` it is made of, `superclasses`, `splits` and `notes` as in
      Table.
    explain: items whose images span fewer than 16 of 256 levels -> sentences on why, which join the notes.
    skip_bad: images that do not decode are left out and listed in the notes, instead of ending the conversion.
    alone: the caller holds the table's lock (`table.locked`).

  Raises:
    UserError: an image does not decode, or the cache cannot be written.
  """
  folder = table.cache_dir() / key
  counts = [len(items) for items in classes.values()]
  manifest = {'format': table.FORMAT, 'classes': list(classes), 'images_per_class': counts, **job}
  _log.info('converting %d images of %d classes to %s', sum(counts), len(classes), folder)
  start = time.monotonic()
  # Where the file system has no locks, others may be at it too: then to each its own, and nothing is taken over.
  place = folder.with_name(f'.{key}.partial' if alone else f'.{key}.{uuid.uuid4().hex}.partial')
  with writes(folder, place):
    partial = _Partial(place, manifest, shape, skip_bad)
    if partial.items:
      _log.info('going on after %d of them', partial.items)
    items = _Joined(classes.values())
    _write(partial, items, decode, key, skip_bad)
    left_out = np.searchsorted(np.cumsum(counts), [index for index, _ in partial.bad], side='right')
    manifest['images_per_class'] = np.subtract(counts, np.bincount(left_out, minlength=len(counts))).tolist()
    faint = explain([items[index] for index in partial.faint()])
    manifest['notes'] = [*manifest['notes'], *(f'left out: {reason}' for _, reason in partial.bad), *faint]
    manifest['bytes'], manifest['sha256'] = partial.finish()
    manifest['digests'] = partial.digests(manifest['images_per_class'])
    partial.become(folder, manifest)
    _log.info('converted %d images in %.1f s', partial.rows, time.monotonic() - start)
    return table.open_folder(folder)


@contextlib.contextmanager
def writes(folder, *partial):
  """Turns what goes wrong with the disk of the cache into a UserError, and removes what was half written."""
  try:
    yield
  except OSError as error:
    for place in partial:
      shutil.rmtree(place, ignore_errors=True)
    raise UserError(
      f'cannot write converted images to {folder}: {error.strerror or error}; '
      'make room there, or set METAJAX_CACHE to a folder that can be written'
    ) from error


class _Partial:
  """A table in the making: a folder with `images.npy`, `job.json`, and `steps.jsonl`, what has been done so far.

  Plain writes rather than a memory map: on a full disk they raise an error, where a memory map kills the process.
  """

  def __init__(self, folder, job, shape, skip_bad):
    self.items = self.rows = 0  # done, and written: the rest of them are bad
    self.bad = []  # (item's number, reason)
    self._folder, self.shape = folder, shape
    job = json.dumps([job, shape])
    # Who does not want images left out does not go on from where some were.
    steps = list(itertools.takewhile(lambda step: skip_bad or not step[2], self._steps(job)))
    if not steps:
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(parents=True)
      (folder / 'job.json').write_text(job)
      (folder / 'images.npy').write_bytes(self._header(0))
    for self.items, self.rows, bad in steps:
      self.bad += bad
    (folder / 'steps.jsonl').write_text(''.join(json.dumps(step) + '\n' for step in steps))
    os.truncate(folder / 'images.npy', self._end(self.rows))

  def _steps(self, job):
    """What another process has done of the same job: its steps whose images are all in the file."""
    try:
      same = (self._folder / 'job.json').read_text() == job
      lines = (self._folder / 'steps.jsonl').read_text().split('\n')[:-1]  # what follows the last end is cut short
      size = (self._folder / 'images.npy').stat().st_size
      return [step for step in map(json.loads, lines) if same and self._end(step[1]) <= size]
    except (OSError, ValueError):
      return []

  def add(self, images, bad):
    """Appends a step: images (n, h, w, c), and (number, reason) of those left out."""
    with open(self._folder / 'images.npy', 'ab') as file:
      file.write(np.ascontiguousarray(images).data)
    self.items, self.rows, self.bad = self.items + len(images) + len(bad), self.rows + len(images), self.bad + bad
    with open(self._folder / 'steps.jsonl', 'a') as file:
      file.write(json.dumps([self.items, self.rows, bad]) + '\n')

  def faint(self):
    """Numbers of the items whose images span fewer than 16 of 256 levels."""
    few = []
    with open(self._folder / 'images.npy', 'rb') as file:
      file.seek(self._end(0))
      while (block := np.fromfile(file, np.uint8, _CHUNK * math.prod(self.shape))).size:
        few += (np.ptp(block.reshape(-1, *self.shape), axis=(1, 2)) < FEW).all(-1).tolist()
    return np.delete(np.arange(self.items), [index for index, _ in self.bad])[np.array(few, bool)].tolist()

  def finish(self):
    """Completes the file; its size in bytes and its SHA-256."""
    with open(self._folder / 'images.npy', 'rb+') as file:
      file.write(self._header(self.rows))
      file.flush()
      os.fsync(file.fileno())
      file.seek(0)
      return self._end(self.rows), hashlib.file_digest(file, 'sha256').hexdigest()

  def digests(self, counts):
    """See `table.digest`, of each class of the finished file."""
    images = np.load(self._folder / 'images.npy', mmap_mode='r')
    return [table.digest(part) for part in np.split(images, np.cumsum(counts)[:-1])]

  def become(self, folder, manifest):
    """Renames the finished table into place; what is there already is damaged, or older than its source."""
    for name in ('job.json', 'steps.jsonl'):
      (self._folder / name).unlink()
    (self._folder / 'manifest.json').write_text(json.dumps(manifest, indent=1))
    if folder.exists():
      old = folder.with_name(f'.{folder.name}.old')
      shutil.rmtree(old, ignore_errors=True)
      folder.rename(old)
      shutil.rmtree(old, ignore_errors=True)
    self._folder.rename(folder)

  def _header(self, rows):
    header = io.BytesIO()  # of the same length for any number of rows: NumPy leaves room
    np.lib.format.write_array_header_1_0(header, {'descr': '|u1', 'fortran_order': False, 'shape': (rows, *self.shape)})
    return header.getvalue()

  def _end(self, rows):
    return len(self._header(0)) + rows * math.prod(self.shape)


class _Joined:
  """Sequences as one. Their items may be more than fit into memory, and are asked for one by one."""

  def __init__(self, parts):
    self._parts = list(parts)
    self._ends = np.cumsum([len(part) for part in self._parts]).tolist()

  def __len__(self):
    return self._ends[-1]

  def __getitem__(self, index):
    k = bisect.bisect_right(self._ends, index)
    return self._parts[k][index - self._ends[k] + len(self._parts[k])]


def _write(partial, items, decode, label, skip_bad):
  """Decodes the items that have not been done yet."""

  def attempt(index):
    try:
      return decode(items[index])
    except UserError as error:
      if not skip_bad:
        raise
      return index, str(error)

  for results in on_cores(attempt, range(len(items)), f'converting {label}', partial.items):
    bad = [result for result in results if isinstance(result, tuple)]
    for _, reason in bad:
      _log.warning('left out: %s', reason)
    images = [result for result in results if not isinstance(result, tuple)]
    partial.add(np.stack(images) if images else np.empty((0, *partial.shape), np.uint8), bad)


def on_cores(function, items, label, done=0):
  """Calls `function(item)` for every item, on all cores, under a progress bar.

  Only a few calls are ahead of the caller, so that results do not pile up in memory.

  Args:
    function: called from several threads.
    items: a sequence.
    label: of the bar.
    done: items from the front to leave out.

  Yields:
    lists of some results, in order.
  """
  from tqdm import tqdm  # only here, to keep opening a table quick

  workers = os.cpu_count() or 1
  pending = collections.deque()
  with (
    tqdm(total=len(items), initial=done, desc=label, unit=' images', disable=None) as bar,
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
  ):

    def finished():
      results = pending.popleft().result()
      bar.update(len(results))
      return results

    try:
      for first in range(done, len(items), _CHUNK):
        chunk = items[first : first + _CHUNK]
        pending.append(pool.submit(lambda chunk=chunk: [function(item) for item in chunk]))
        if len(pending) > 2 * workers:
          yield finished()
      while pending:
        yield finished()
    finally:  # after an error, do not do what nobody wants any more
      for future in pending:
        future.cancel()

"""Converted image tables: what every image data set becomes, once per image size.

A table is the folder `<cache_dir()>/<key>/` with `images.npy` (uint8 (rows, h, w, c), sorted by class) and
`manifest.json` (class names, images per class, where they came from, what to know about them).
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import time
import uuid
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from metajax.errors import UserError

_log = logging.getLogger(__name__)

_FORMAT = 1  # of the manifest; a table of another format is made anew
_CHUNK = 64  # images per decoding job
_DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what opening a table raises that is not whole


class ClassTable(NamedTuple):
  """The classes of one split and where their images lie.

  Splits of one data set share `images` (usually a read-only memory map), so that one copy on the device serves
  training and evaluation. A class may be a rotated copy of another: it shares that one's rows and has other `turns`.
  """

  images: np.ndarray  # (rows, h, w, c) uint8, all classes of the data set, sorted by class
  starts: np.ndarray  # (classes,) int64, first row of each class of this split
  counts: np.ndarray  # (classes,) int64, images of each class
  turns: np.ndarray  # (classes,) int8, counter-clockwise quarter turns applied to the class's images
  names: tuple[str, ...]  # (classes,)


class Table(NamedTuple):
  """A converted data set as it lies on disk, before it is split."""

  images: np.ndarray  # (rows, h, w, c) uint8, a read-only memory map
  counts: np.ndarray  # (classes,) int64
  names: tuple[str, ...]  # (classes,)
  notes: tuple[str, ...]  # what deviates from the data set as published


def cache_dir():
  """Where converted tables lie: `$METAJAX_CACHE`, else `~/.cache/metajax`."""
  return pathlib.Path(os.environ.get('METAJAX_CACHE') or '~/.cache/metajax').expanduser()


def open_table(key):
  """Maps the table `key`; None if there is none, or (after a warning that names it) if it is damaged."""
  folder = cache_dir() / key
  if not os.path.isdir(folder):
    return None
  try:
    return _open(folder)
  except _DAMAGE as error:
    _log.warning('the converted table %s is damaged and will be made anew: %s', folder, error)
    return None


def convert(key, classes, decode, shape, source, *, superclasses=None, notes=()):
  """Decodes a data set into the table `key`, on all cores, and opens it.

  The table appears whole or not at all. Of several processes one converts and the others wait for it.

  Args:
    key: folder name of the table under `cache_dir()`.
    classes: class name -> sequence of items, in the order of the table.
    decode: item -> (h, w, c) uint8; called from several threads. It raises UserError for an item that is no image.
    shape: (h, w, c).
    source: for the manifest, a list of dicts such as `describe_file` and `describe_folder` make.
    superclasses: for the manifest, class name -> superclass, if there are any.
    notes: for the manifest, what deviates from the data set as published.

  Raises:
    UserError: the cache cannot be written, or the shape is empty.
  """
  if min(shape) < 1:
    raise UserError(f'images of {shape[0]} x {shape[1]} pixels: size must be 1 or more')
  folder = cache_dir() / key
  items = [item for items in classes.values() for item in items]
  manifest = {
    'format': _FORMAT,
    'classes': list(classes),
    'images_per_class': [len(items) for items in classes.values()],
    'superclasses': superclasses,
    'source': source,
    'notes': list(notes),
  }
  partial = folder.with_name(f'.{key}.{uuid.uuid4().hex}.tmp')
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f'.{key}.lock')) as alone:
      with contextlib.suppress(*_DAMAGE):
        return _open(folder)  # made while we waited
      if alone:  # then whatever lies half written was left by a process that died
        for leftover in folder.parent.glob(f'.{glob.escape(key)}.*.tmp'):
          shutil.rmtree(leftover, ignore_errors=True)
      _log.info('converting %d images of %d classes to %s', len(items), len(classes), folder)
      start = time.monotonic()
      try:
        partial.mkdir()
        manifest['bytes'], manifest['sha256'] = _write_images(partial / 'images.npy', items, decode, shape, key)
        (partial / 'manifest.json').write_text(json.dumps(manifest, indent=1))
        _move(partial, folder)
      finally:
        shutil.rmtree(partial, ignore_errors=True)
      _log.info('converted %d images in %.1f s', len(items), time.monotonic() - start)
      return _open(folder)
  except OSError as error:
    raise UserError(
      f'cannot write converted images to {folder}: {error.strerror or error}; '
      'make room there, or set METAJAX_CACHE to a folder that can be written'
    ) from error


def class_tables(table, splits):
  """Divides a table.

  Args:
    table: Table.
    splits: split -> classes, each a name or (name, counter-clockwise quarter turns).

  Returns:
    split -> ClassTable, all with the same `images`; a turned class is called `name/rot090` and so on.
  """
  index = {name: k for k, name in enumerate(table.names)}
  starts = np.cumsum(table.counts) - table.counts
  tables = {}
  for split, classes in splits.items():
    classes = [(c, 0) if isinstance(c, str) else c for c in classes]
    ids = np.array([index[name] for name, _ in classes], np.int64)
    turns = np.array([turns for _, turns in classes], np.int8)
    names = tuple(f'{name}/rot{90 * turns:03d}' if turns else name for name, turns in classes)
    tables[split] = ClassTable(table.images, starts[ids], table.counts[ids], turns, names)
  return tables


def decode_image(file, where, size, convert):
  """Reads one image.

  Args:
    file: path or binary file.
    where: what to call it in an error.
    size: side in pixels; the image is squashed to size x size (bilinear, antialiased), as the field does.
    convert: PIL image -> PIL image in the mode wanted.

  Returns:
    (size, size, 1 or 3) uint8.

  Raises:
    UserError: it does not decode.
  """
  try:
    with Image.open(file) as image:
      pixels = np.asarray(convert(image).resize((size, size), Image.Resampling.BILINEAR))
  except Exception as error:  # each of Pillow's decoders has its own
    reason = 'not an image' if isinstance(error, UnidentifiedImageError) else error
    raise UserError(f'{where} does not decode ({reason}): replace or remove it') from error
  return pixels.reshape(size, size, -1)


def describe_file(path):
  """A file as a manifest's source."""
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'path': os.path.basename(path), 'sha256': digest, 'bytes': file.tell()}


def describe_folder(folder, paths):
  """A folder's files as a manifest's source; its fingerprint changes with any file's name, size or time of change."""
  digest, total = hashlib.sha256(), 0
  for path in paths:
    stat = os.stat(path)
    total += stat.st_size
    name = str(path).removeprefix(str(folder))
    digest.update(os.fsencode(f'{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n'))
  return {
    'path': os.path.basename(os.path.normpath(folder)),
    'fingerprint': digest.hexdigest(),
    'bytes': total,
    'files': len(paths),
  }


@contextlib.contextmanager
def locked(path):
  """Holds a lock on the file `path`, after waiting for the process that has it; False where there are no locks."""
  with open(path, 'ab') as file:
    held = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.info('waiting for another process to finish with %s', path)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # some network file systems
      held = False
    yield held


def _open(folder):
  manifest = json.loads((folder / 'manifest.json').read_text())
  if manifest['format'] != _FORMAT:
    raise ValueError(f'format {manifest["format"]}, not {_FORMAT}')
  names, notes = tuple(manifest['classes']), tuple(manifest['notes'])
  counts = np.array(manifest['images_per_class'], np.int64)
  images = np.load(folder / 'images.npy', mmap_mode='r')
  fits = images.ndim == 4 and images.dtype == np.uint8 and len(images) == counts.sum() and len(names) == len(counts)
  if not fits or (folder / 'images.npy').stat().st_size != manifest['bytes']:
    raise ValueError('images.npy does not match manifest.json')
  return Table(images, counts, names, notes)


def _write_images(path, items, decode, shape, label):
  """Writes decoded items as (items, *shape) uint8; returns the file's size in bytes and its SHA-256.

  Plain writes rather than a memory map: on a full disk they raise an error, where a memory map kills the process.
  """
  from tqdm import tqdm  # only here, to keep opening a table quick

  header = io.BytesIO()
  layout = {'descr': '|u1', 'fortran_order': False, 'shape': (len(items), *shape)}
  np.lib.format.write_array_header_1_0(header, layout)
  digest = hashlib.sha256(header.getvalue())
  chunks = (items[k : k + _CHUNK] for k in range(0, len(items), _CHUNK))
  with (
    open(path, 'wb') as file,
    tqdm(total=len(items), desc=f'converting {label}', unit=' images', disable=None) as progress,
  ):
    file.write(header.getvalue())
    for images in _map_in_order(lambda chunk: np.stack([decode(item) for item in chunk]), chunks):
      file.write(images.data)
      digest.update(images.data)
      progress.update(len(images))
    file.flush()
    os.fsync(file.fileno())
    return file.tell(), digest.hexdigest()


def _map_in_order(function, jobs):
  """Like `map`, in threads, with only a few jobs ahead so that results do not pile up in memory."""
  workers = os.cpu_count() or 1
  pending = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for job in jobs:
      pending.append(pool.submit(function, job))
      if len(pending) > 2 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def _move(partial, folder):
  """Renames a finished table into place; what is there already is damaged, or by now as good as ours."""
  if folder.exists():
    damaged = partial.with_suffix('.old.tmp')
    folder.rename(damaged)
    shutil.rmtree(damaged, ignore_errors=True)
  try:
    partial.rename(folder)
  except OSError as error:
    try:  # where the file system has no locks, another process may have been first
      _open(folder)
    except _DAMAGE:
      raise error from None

"""Converted image tables: what every image data set becomes, once per image size.

A table is the folder `<cache_dir()>/<key>/` with `images.npy` (uint8 (rows, h, w, c), sorted by class) and
`manifest.json` (class names and superclasses, images per class, where they came from, what to know about them).
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import pathlib
from typing import NamedTuple

import numpy as np

from metajax import system
from metajax.errors import UserError, first_line

_log = logging.getLogger(__name__)

FORMAT = 3  # of the manifest; a table of another format is made anew


class _Older(ValueError):
  pass


class ClassTable(NamedTuple):
  """The classes of one split and where their images lie.

  Splits of one data set share `images` (usually a read-only memory map), so that one copy on the device serves
  training and evaluation. A class may be a rotated copy of another: it shares that one's rows and has other `turns`.
  """

  # (rows, ...), all classes of the data set, sorted by class: uint8, which is divided by 255, or floats. They are
  # images (h, w, c), or inputs of any other shape, which cannot be augmented.
  images: np.ndarray
  starts: np.ndarray  # (classes,) int64, first row of each class of this split
  counts: np.ndarray  # (classes,) int64, images of each class
  turns: np.ndarray  # (classes,) int8, counter-clockwise quarter turns applied to the class's images
  names: tuple[str, ...]  # (classes,)
  superclasses: tuple[str, ...] = ()  # (classes,), or none where the data set has none
  notes: tuple[str, ...] = ()  # what deviates from the data set as published
  digests: tuple[str, ...] = ()  # (classes,), see `digest`; or none where nobody has computed them yet


class Table(NamedTuple):
  """A converted data set as it lies on disk, before it is split."""

  images: np.ndarray  # (rows, h, w, c) uint8, a read-only memory map
  counts: np.ndarray  # (classes,) int64
  names: tuple[str, ...]  # (classes,)
  notes: tuple[str, ...]  # what deviates from the data set as published
  superclasses: dict  # class name -> superclass; empty where there are none
  splits: dict  # split -> class names, where the source alone knows; else empty
  fingerprint: str  # of the files that it was made of
  digests: tuple[str, ...]  # (classes,), see `digest`


def cache_dir():
  """Where converted tables lie: `$METAJAX_CACHE`, else `~/.cache/metajax`."""
  return pathlib.Path(os.environ.get('METAJAX_CACHE') or '~/.cache/metajax').expanduser()


def open_table(key):
  """Maps the table `key`; None if there is none, or (after a warning that names it) if it is not whole.

  Raises:
    UserError: it is there, and may not be read.
  """
  folder = cache_dir() / key
  if not os.path.isdir(folder):
    return None
  table, defect = _try_open(folder)
  if isinstance(table, PermissionError):
    raise UserError(
      f'the converted table {folder} {defect}: make it readable, or set METAJAX_CACHE to a folder of your own'
    )
  if defect:
    _log.warning('the converted table %s will be made anew: it %s', folder, defect)
  return table


def defect_of(folder):
  """Why the table in a folder cannot be opened; '' if it can."""
  return _try_open(folder)[1]


def _try_open(folder):
  """(Table, ''), or (None or the PermissionError, why the table in a folder cannot be opened)."""
  try:
    return open_folder(folder), ''
  except _Older as error:
    return None, str(error)
  except PermissionError as error:
    return error, f'cannot be read ({error.strerror})'
  except (OSError, ValueError, KeyError, TypeError) as error:
    return None, f'is damaged ({first_line(error)})'


def class_tables(table, splits):
  """Divides a table.

  Args:
    table: Table.
    splits: split -> classes, each (name, counter-clockwise quarter turns).

  Returns:
    split -> ClassTable, all with the same `images`; a turned class is called `name/rot090` and so on.
  """
  index = {name: k for k, name in enumerate(table.names)}
  starts = np.cumsum(table.counts) - table.counts
  tables = {}
  for split, classes in splits.items():
    ids = np.array([index[name] for name, _ in classes], np.int64)
    turns = np.array([turns for _, turns in classes], np.int8)
    names = tuple(f'{name}/rot{90 * turns:03d}' if turns else name for name, turns in classes)
    superclasses = tuple(table.superclasses[name] for name, _ in classes) if table.superclasses else ()
    digests = tuple(table.digests[k] for k in ids)
    tables[split] = ClassTable(
      table.images, starts[ids], table.counts[ids], turns, names, superclasses, table.notes, digests
    )
  return tables


def check(table, where):
  """Looks whether a ClassTable is one: whoever writes a data set of their own makes it by hand.

  Args:
    table: ClassTable.
    where: what to call it in an error.

  Raises:
    UserError: its images are of a type that nothing is said of, or its columns do not fit together.
  """
  images, classes = table.images, len(table.names)
  if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
    raise UserError(
      f'{where}: images are {images.dtype}; give uint8, which is divided by 255, or floats, which are left as they are'
    )
  for name in ('starts', 'counts', 'turns', 'superclasses', 'digests'):
    column = getattr(table, name)
    if len(column) != classes and (len(column) or name not in ('superclasses', 'digests')):
      raise UserError(f'{where}: {name} has {len(column)} entries, but there are {classes} classes')
  if table.turns.any() and (images.ndim != 4 or images.shape[1] != images.shape[2]):
    raise UserError(f'{where}: only square images (h, w, c) can be turned, not {images.shape[1:]}')
  if classes and not (table.starts.min() >= 0 and (table.starts + table.counts).max() <= len(images)):
    raise UserError(f'{where}: starts and counts reach beyond its {len(images)} images')


def share(splits):
  """Has the ClassTables of {split: data} share their images, as the devices hold one table alone.

  Raises:
    UserError: images of two splits are of different shapes or types.
  """
  tables = {split: data for split, data in splits.items() if isinstance(data, ClassTable)}
  arrays = list({id(data.images): data.images for data in tables.values()}.values())
  if len(arrays) < 2:
    return splits
  kinds = sorted({f'{images.dtype} {images.shape[1:]}' for images in arrays})
  if len(kinds) > 1:
    raise UserError(f'config.data: images of the splits are {" and ".join(kinds)}: make them alike')
  first = dict(zip(map(id, arrays), np.cumsum([0, *map(len, arrays)])[:-1], strict=True))
  joined = np.concatenate(arrays)
  return {
    **splits,
    **{s: data._replace(images=joined, starts=data.starts + first[id(data.images)]) for s, data in tables.items()},
  }


def gather(images, rows):
  """Rows of an image table: `images[rows]`.

  From a memory map that is not in memory yet, indexing would read one image after the other, each with all that the
  system reads ahead (up to some MB). Here the disk is first asked for these images alone, and for all of them at once.

  Args:
    images: (rows, h, w, c) uint8, an array or a memory map of a whole file.
    rows: (...) integers.

  Returns:
    (..., h, w, c) uint8.
  """
  if isinstance(images.base, mmap.mmap):
    system.read_ahead(images, rows)
  return images[rows]


def digest(images):
  """16 hexadecimal digits for the images of a class, (n, h, w, c): their bytes, shape and type."""
  images = np.ascontiguousarray(images)
  result = hashlib.blake2b(f'{images.dtype.str} {images.shape[1:]}'.encode(), digest_size=8)
  result.update(images.reshape(-1).view(np.uint8))
  return result.hexdigest()


def describe_file(path):
  """A file in a manifest."""
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'path': os.path.basename(path), 'sha256': digest, 'bytes': file.tell()}


def fingerprint(folder, paths):
  """What changes with any file's name, size or time of change: hexadecimal."""
  digest = hashlib.sha256()
  for path in paths:
    stat = os.stat(path)
    name = str(path).removeprefix(str(folder))
    digest.update(os.fsencode(f'{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n'))
  return digest.hexdigest()


@contextlib.contextmanager
def locked(path):
  """Holds a lock on the file `path`, after waiting for the process that has it; False where there are no locks."""
  with open(path, 'ab') as file:
    held = True
    try:
      if not system.try_lock(file):
        _log.info('waiting for another process to finish with %s', path)
        system.lock(file)
    except OSError:  # some network file systems
      held = False
    yield held


def open_folder(folder):
  """Maps the table in a folder; raises one of several errors where it is not whole."""
  manifest = json.loads((folder / 'manifest.json').read_text())
  if manifest['format'] != FORMAT:
    raise _Older(f'is of an older format ({manifest["format"]}, not {FORMAT})')
  names, notes = tuple(manifest['classes']), tuple(manifest['notes'])
  counts = np.array(manifest['images_per_class'], np.int64)
  images = np.load(folder / 'images.npy', mmap_mode='r')
  fits = images.ndim == 4 and images.dtype == np.uint8 and len(images) == counts.sum()
  fits = fits and len(names) == len(counts) == len(manifest['digests'])
  if not fits or (folder / 'images.npy').stat().st_size != manifest['bytes']:
    raise ValueError('images.npy does not match manifest.json')
  known = (manifest[name] for name in ('superclasses', 'splits', 'fingerprint'))
  return Table(images, counts, names, notes, *known, tuple(manifest['digests']))

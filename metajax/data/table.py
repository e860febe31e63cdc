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
from metajax.errors import first_line

_log = logging.getLogger(__name__)

FORMAT = 2  # of the manifest; a table of another format is made anew


class _Older(ValueError):
  pass


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
  superclasses: tuple[str, ...] = ()  # (classes,), or none where the data set has none
  notes: tuple[str, ...] = ()  # what deviates from the data set as published


class Table(NamedTuple):
  """A converted data set as it lies on disk, before it is split."""

  images: np.ndarray  # (rows, h, w, c) uint8, a read-only memory map
  counts: np.ndarray  # (classes,) int64
  names: tuple[str, ...]  # (classes,)
  notes: tuple[str, ...]  # what deviates from the data set as published
  superclasses: dict  # class name -> superclass; empty where there are none
  splits: dict  # split -> class names, where the source alone knows; else empty
  fingerprint: str  # of the files that it was made of


def cache_dir():
  """Where converted tables lie: `$METAJAX_CACHE`, else `~/.cache/metajax`."""
  return pathlib.Path(os.environ.get('METAJAX_CACHE') or '~/.cache/metajax').expanduser()


def open_table(key):
  """Maps the table `key`; None if there is none, or (after a warning that names it) if it is not whole."""
  folder = cache_dir() / key
  if not os.path.isdir(folder):
    return None
  table, defect = _try_open(folder)
  if defect:
    _log.warning('the converted table %s will be made anew: %s', folder, defect)
  return table


def defect_of(folder):
  """Why the table in a folder cannot be opened; '' if it can."""
  return _try_open(folder)[1]


def _try_open(folder):
  """(Table, '') or (None, why the table in a folder cannot be opened)."""
  try:
    return open_folder(folder), ''
  except _Older as error:
    return None, str(error)
  except (OSError, ValueError, KeyError, TypeError) as error:
    return None, f'it is damaged ({first_line(error)})'


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
    tables[split] = ClassTable(table.images, starts[ids], table.counts[ids], turns, names, superclasses, table.notes)
  return tables


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
    raise _Older(f'it is of an older format ({manifest["format"]}, not {FORMAT})')
  names, notes = tuple(manifest['classes']), tuple(manifest['notes'])
  counts = np.array(manifest['images_per_class'], np.int64)
  images = np.load(folder / 'images.npy', mmap_mode='r')
  fits = images.ndim == 4 and images.dtype == np.uint8 and len(images) == counts.sum() and len(names) == len(counts)
  if not fits or (folder / 'images.npy').stat().st_size != manifest['bytes']:
    raise ValueError('images.npy does not match manifest.json')
  return Table(images, counts, names, notes, manifest['superclasses'], manifest['splits'], manifest['fingerprint'])

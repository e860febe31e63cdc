"""Where data sets come from: a converted table, files in one of several formats, TFDS, a download."""

import contextlib
import contextvars
import functools
import glob
import json
import logging
import os
import pathlib
import shutil
import types
import uuid
from collections.abc import Callable, Mapping
from typing import NamedTuple

from metajax.data import archive, conversion, download, images, prepared, table
from metajax.errors import NO_ROOM, UserError, first_line

_log = logging.getLogger(__name__)

SPLITS = {  # as people spell them
  'train': 'train',
  'training': 'train',
  'val': 'val',
  'valid': 'val',
  'validation': 'val',
  'dev': 'val',
  'test': 'test',
  'testing': 'test',
}
IMAGENET_TERMS = "ImageNet's terms allow non-commercial research and education only"
_WARNINGS = 5  # at most so many lines on what deviates
_NAMED = 4  # at most so many classes of another size have a note of their own
_HASHED = 16  # up to so many files, the manifest has the hash of each
_CHECK = '`metajax data NAME --check`'
_NONE = types.MappingProxyType({})


class Contents(NamedTuple):
  """A data set as some files hold it, not decoded yet."""

  classes: dict  # class name -> sequence of items (see `images.File`)
  splits: Mapping = _NONE  # split -> class names, where the files alone know
  transform: Callable | None = None  # PIL image -> PIL image, ahead of everything else
  notes: tuple[str, ...] = ()  # what else deviates from the data set as published, besides numbers of images
  faults: tuple[str, ...] = ()  # what makes it unfit: no table is made of it
  # Items whose images span fewer than 16 of 256 levels -> sentences on why.
  explain: Callable = images.name_faint


class Format(NamedTuple):
  """One of the ways in which a data set lies on disk."""

  files: str  # for people: what to put into the data set's folder
  find: Callable  # folder -> paths of the files of this format, none if it is not there
  read: Callable  # (paths, scratch folder for what takes unpacking) -> Contents; raises UserError


class Prepared(NamedTuple):
  """A data set as TFDS prepares it."""

  builder: str
  read: Callable  # (folder, scratch folder) -> Contents; raises UserError


class Dataset(NamedTuple):
  """What is known about a data set."""

  name: str  # of its tables
  title: str
  formats: tuple[Format, ...]  # tried in this order
  places: tuple[str, ...] = ('',)  # where in the data folder its files are looked for, in this order
  archives: tuple[tuple[str, ...], ...] = ()  # file names of archives, in sets of which all are needed
  prepared: tuple[Prepared, ...] = ()
  downloads: tuple[download.Remote, ...] = ()
  splits: Callable | None = None  # names of classes there are -> split -> those in it; where the files do not know
  counts: Mapping = _NONE  # class name -> images, as published; empty for a data set that is nobody's
  total: int = 0  # images, where how many there are of each class is not published: `counts` then has the names alone
  superclasses: Mapping = _NONE  # class name -> superclass, where there are any
  terms: str = ''  # on which it may be used


class Found(NamedTuple):
  """The files of a data set, in some format."""

  what: str
  folder: str
  paths: list
  read: Callable  # (scratch folder) -> Contents

  def fingerprint(self):
    with _reading(self.folder):
      return table.fingerprint(self.folder, self.paths)


_skip_bad = contextvars.ContextVar('skip_bad', default=False)


@contextlib.contextmanager
def skipping_bad():
  """Within, conversions leave out images that do not decode, and list them, instead of stopping at the first."""
  token = _skip_bad.set(True)
  try:
    yield
  finally:
    _skip_bad.reset(token)


@functools.cache
def stored(name):
  """What the package knows of a data set: the content of `metajax/datasets/splits/<name>.json`."""
  return json.loads((pathlib.Path(__file__).parents[1] / 'datasets' / 'splits' / f'{name}.json').read_text())


def split_of(folder):
  """The split whose images a folder of that name holds, in small letters or capitals; None if it is of none."""
  return SPLITS.get(folder.lower())


def load(dataset: Dataset, data_dir, rendering: images.Rendering, turned=()):
  """`obtain`, and divide by the data set's splits.

  Args:
    dataset, data_dir, rendering: as for `obtain`.
    turned: splits in which the classes turned by 90, 180 and 270 degrees follow as classes of their own.

  Returns:
    split -> ClassTable, with the classes that are there; a split without any is absent.
  """
  result = obtain(dataset, data_dir, rendering)
  there, splits = set(result.names), result.splits or dataset.splits(result.names)
  splits = {split: [c for c in splits.get(split, ()) if c in there] for split in ('train', 'val', 'test')}
  splits = {s: [(c, k) for k in range(4 if s in turned else 1) for c in classes] for s, classes in splits.items()}
  return table.class_tables(result, {split: classes for split, classes in splits.items() if classes})


def obtain(dataset: Dataset, data_dir, rendering: images.Rendering):
  """The data set's table: the one that is there, else converted from the first source there is.

  Args:
    dataset: what to look for.
    data_dir: str, where its files lie or are downloaded to; need not exist.
    rendering: of the images.

  Returns:
    table.Table; of what it lacks of the data set as published, a warning tells.

  Raises:
    UserError: nothing is found and nothing can be downloaded, or what is there is damaged or another data set.
  """
  rendering.check()
  key = f'{dataset.name}-{rendering}'
  result = _current(key, dataset, data_dir)
  if result is None:
    lock = table.cache_dir() / f'.{key}.lock'
    with contextlib.ExitStack() as stack:
      with conversion.writes(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        alone = stack.enter_context(table.locked(lock))
      result = _current(key, dataset, data_dir) or _convert(key, dataset, data_dir, rendering, alone)
  what = f'{dataset.title} is not as published' if dataset.counts else dataset.title
  shown = len(result.notes) if len(result.notes) <= _WARNINGS else _WARNINGS - 1
  for note in result.notes[:shown]:
    _log.warning('%s: %s', what, note)
  if more := len(result.notes) - shown:
    _log.warning('and %d more such notes in %s', more, table.cache_dir() / key / 'manifest.json')
  return result


def _current(key, dataset, data_dir):
  """The converted table; of what may change, unless its source has changed since."""
  result = table.open_table(key)
  if result is None or (dataset.counts and not result.notes):  # published and whole
    return result
  found = locate(dataset, data_dir)
  return result if found is None or found.fingerprint() == result.fingerprint else None


def locate(dataset, data_dir):
  """The first source of a data set that is there, without reading it; None if there is none."""
  for place in dataset.places:
    folder = os.path.normpath(os.path.join(data_dir, place))
    if os.path.isdir(folder):
      if found := _in_folder(dataset, folder):
        return found
      for names in dataset.archives:
        if all(os.path.isfile(os.path.join(folder, name)) for name in names):
          paths = [os.path.join(folder, name) for name in names]
          return Found(braces(names), folder, paths, functools.partial(_read_archives, dataset, folder, paths))
  for builder, read in dataset.prepared:
    if folder := prepared.find(builder, data_dir):
      paths = sorted(str(path) for path in folder.iterdir() if path.is_file())
      return Found(f'TFDS {builder}', str(folder), paths, functools.partial(read, folder))
  return None


def outside(text, found, scratch):
  """A text in which paths of what was unpacked are told as those in the archive."""
  archives = ', '.join(os.path.basename(path) for path in found.paths)
  return text.replace(f'{scratch / "archives"}{os.sep}', f'{archives}: ')


def deviations(dataset, contents, named=_NAMED):
  """How the number of images differs from the published, in sentences.

  Args:
    dataset: source.Dataset.
    contents: of its files.
    named: up to so many classes of another size have a sentence each; more share one.
  """
  if not dataset.counts:
    return []
  counts = {c: len(items) for c, items in contents.classes.items()}
  expected, there = dataset.total or sum(dataset.counts.values()), sum(counts.values())
  fewer = [f'it has {there} of {expected} images'] if there != expected else []
  if contents.splits:  # of classes without names
    return fewer
  missing = sorted(dataset.counts.keys() - counts.keys())
  notes = [f'{len(missing)} of {len(dataset.counts)} classes are missing: {images.some(missing)}'] if missing else []
  if dataset.total:
    return notes + fewer
  odd = [c for c, count in counts.items() if count != dataset.counts.get(c, count)]
  each = [f'class {c} has {counts[c]} images, not {dataset.counts[c]}' for c in odd]
  if len(odd) > named:
    each = [f'{each[0]}, and {len(odd) - 1} more classes have other numbers than published: {images.some(odd[1:])}']
  return notes + each


def read(dataset, found, scratch):
  """Contents of a data set's files, sorted by class, without what is known not to belong to it.

  Raises:
    UserError: there is nothing in them, or classes of another data set.
  """
  with _reading(found.folder):
    contents = found.read(scratch)
    classes = {c: items for c, items in sorted(contents.classes.items()) if len(items)}
  if not classes:
    raise UserError(f'{found.paths[0]} has no images of {dataset.title}: replace it')
  named = dataset.counts and not contents.splits and not contents.faults
  if named and (strange := sorted(classes.keys() - dataset.counts.keys())):
    if dataset.counts.keys() - classes.keys():  # or else it is a larger data set, such as ILSVRC, with all of ours
      raise UserError(
        f'{found.folder} has class {strange[0]}, which is not in {dataset.title}: {len(strange)} of '
        f'its {len(classes)} classes are strange; remove them, or use data.name=folder'
      )
    classes = {c: classes[c] for c in sorted(dataset.counts)}
  return contents._replace(classes=classes)


@contextlib.contextmanager
def _reading(folder):
  """Turns what goes wrong with strangers' files into a UserError."""
  try:
    yield
  except UserError:
    raise
  except OSError as error:
    remedy = 'make room' if error.errno in NO_ROOM else 'make it readable, or remove it'
    raise UserError(f'{error.filename or folder}: {error.strerror or error}; {remedy}') from error
  except (AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError) as error:
    kind = type(error).__name__
    raise UserError(f'{folder}: a file is not in the format of its name ({kind}: {first_line(error)})') from error


def wanted(dataset, data_dir):
  """What to put where, for somebody who has not got the data set: folder -> names of files, any of which will do."""
  files = [form.files for form in dataset.formats] + [braces(names) for names in dataset.archives]
  result = {_home(dataset, data_dir): files}
  return result | {os.path.join(data_dir, 'tensorflow_datasets'): [f'TFDS {p.builder}' for p in dataset.prepared]}


def braces(names):
  """Names as a shell would write them: {train,val,test}_data.hdf5."""
  start = os.path.commonprefix(names)  # noqa: RUF071 (of characters)
  end = os.path.commonprefix([name.removeprefix(start)[::-1] for name in names])[::-1]  # noqa: RUF071
  middle = ','.join(name.removeprefix(start).removesuffix(end) for name in names)
  return f'{start}{{{middle}}}{end}' if len(names) > 1 else start


def _in_folder(dataset, folder):
  for form in dataset.formats:
    if paths := form.find(folder):
      return Found(form.files, folder, paths, functools.partial(form.read, paths))
  return None


def _read_archives(dataset, folder, paths, scratch):
  """Unpacks archives and reads what was in them, in whatever format."""
  unpacked = scratch / 'archives'
  if not unpacked.exists():  # else a process that died has done this
    archive.unpack(paths, unpacked)
  for inside in (unpacked, *sorted(unpacked.glob('*/')), *sorted(unpacked.glob('*/*/'))):
    if inside.is_dir() and (found := _in_folder(dataset, str(inside))):
      return found.read(scratch)
  raise UserError(f'{paths[0]} holds nothing that {dataset.title} is known by: replace it')


def _convert(key, dataset, data_dir, rendering, alone):
  found = locate(dataset, data_dir)
  if found is None or _is_unfinished(dataset, data_dir, found):
    _get(dataset, data_dir)
    found = locate(dataset, data_dir)
  if found is None:
    raise UserError(f'{dataset.title} was downloaded to {data_dir}, but is not found there')
  _log.info('reading %s from %s', dataset.title, found.folder)
  fingerprint = found.fingerprint()
  scratch = table.cache_dir() / f'.{key}.{fingerprint[:16]}.unpacked'
  if alone:  # nobody else is at what others have left behind
    for stale in set(table.cache_dir().glob(f'.{glob.escape(key)}.*.unpacked*')) - {scratch}:
      shutil.rmtree(stale, ignore_errors=True)
  else:
    scratch = scratch.with_name(f'.{key}.{uuid.uuid4().hex}.unpacked')
  try:
    contents = read(dataset, found, scratch)
  except UserError as error:
    shutil.rmtree(scratch, ignore_errors=True)
    raise UserError(outside(str(error), found, scratch)) from error
  if contents.faults:
    more = f' (and {len(contents.faults) - 1} more faults)' if len(contents.faults) > 1 else ''
    raise UserError(f'{contents.faults[0]}{more}; {_CHECK} lists all that is wrong')
  with _reading(found.folder):
    files = [table.describe_file(path) for path in found.paths] if len(found.paths) <= _HASHED else []
  job = {
    'source': found.what,
    'files': files,
    'fingerprint': fingerprint,
    'superclasses': {} if contents.splits else dict(dataset.superclasses),
    'splits': dict(contents.splits),
    'notes': [*contents.notes, *deviations(dataset, contents)],
  }

  skip_bad = _skip_bad.get()

  def decode(item):
    try:
      return images.pixels(item, rendering, contents.transform)
    except UserError as error:
      hint = '' if skip_bad else f'; {_CHECK} lists all such images, --skip_bad leaves them out'
      raise UserError(outside(str(error), found, scratch) + hint) from error

  def explain(items):  # published images are as they are
    return [] if dataset.counts else contents.explain(items)

  result = conversion.convert(
    key, contents.classes, decode, rendering.shape, job, explain=explain, skip_bad=skip_bad, alone=alone
  )
  shutil.rmtree(scratch, ignore_errors=True)
  return result


def _get(dataset, data_dir):
  """Downloads a data set, or has TFDS do it."""
  if dataset.terms:
    _log.warning('%s: %s', dataset.title, dataset.terms)
  if not dataset.downloads:
    return prepared.prepare(dataset.prepared[0].builder, data_dir)
  folder = _home(dataset, data_dir)
  for remote in dataset.downloads:
    if os.path.isdir(place := os.path.join(folder, remote.name)):
      raise UserError(f'{place} is a folder, where the archive of {dataset.title} should be: remove it')
  missing = [remote for remote in dataset.downloads if not os.path.exists(os.path.join(folder, remote.name))]
  sizes = [remote.size for remote in missing]
  size = f'{sum(sizes) / 1e9:.2f} GB' if all(sizes) else 'size unknown'
  _log.warning('downloading %d files of %s to %s (%s)', len(missing), dataset.title, folder, size)
  try:
    for remote in missing:
      download.fetch(remote, folder)
  except UserError as error:
    raise UserError(f'{error}; `metajax data --list` says what other files will do') from error


def _is_unfinished(dataset, data_dir, found):
  """Whether what was found is a part of the download, which was interrupted: in the midst of a file, most likely."""
  ours = [os.path.join(_home(dataset, data_dir), remote.name) for remote in dataset.downloads]
  return not set(ours).isdisjoint(found.paths) and any(os.path.exists(f'{path}.part') for path in ours)


def _home(dataset, data_dir):
  return os.path.normpath(os.path.join(data_dir, *dataset.places[:1]))

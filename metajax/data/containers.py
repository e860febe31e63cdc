"""Formats that several data sets come in: folders, HDF5 files, arrays with labels."""

import collections
import functools
import math
import os
import threading

import numpy as np

from metajax import system
from metajax.data import archive, images, prepared, unpickle
from metajax.data.source import Contents, Format, Prepared, braces, split_of
from metajax.errors import UserError, first_line

_MAX_CLASS = 1 << 30  # bytes of a class in an HDF5 file, which is read as a whole
_BLOCK = 16  # files of unknown size that are read together


def class_folders(known, inside=('',), suffix=''):
  """Folders of images, `<class>/` or `<split>/<class>/`.

  Args:
    known: class folder's name -> the class's name, or None for a folder that is none of the data set's.
    inside: folders below the data set's in which they may be.
    suffix: for people, what follows the class in a path.

  Returns:
    Format; a class in two splits is a fault.
  """

  def find(folder):
    for base in (os.path.join(folder, name) for name in inside):
      top = images.list_folders(base)
      places = [
        os.path.join(base, s, c) for s in top if split_of(s) for c in images.list_folders(os.path.join(base, s))
      ]
      places = [place for place in places if known(os.path.basename(place))]
      places = places or [os.path.join(base, c) for c in top if known(c)]
      if paths := [path for place in places for path in images.list_images(place)]:
        return paths
    return []

  def read(paths, scratch):
    del scratch
    return by_folder(paths, lambda place: known(os.path.basename(place)))

  below = ' or '.join(f'{name}/' for name in inside if name)
  return Format(
    f'images in {{train,val,test}}/<class>/ or <class>/{suffix}{below and f", also in {below}"}', find, read
  )


def by_folder(paths, known):
  """Sorts images by the folder that they are in.

  Args:
    paths: of the images.
    known: path of a folder -> the class's name.

  Returns:
    Contents; a class in two folders is a fault.
  """
  places = collections.defaultdict(list)
  for path in paths:
    places[os.path.dirname(path)].append(images.File(path))
  classes, faults = {}, []
  for place, items in places.items():
    name = known(place)
    if name in classes:
      first = os.path.dirname(classes[name][0].path)
      faults.append(f'class {name} is in {first} and in {place}: remove it from one')
      name = place
    classes[name] = items
  return Contents(classes, faults=tuple(faults))


def hdf5(names, known=lambda path: path.rpartition('/')[2]):
  """Torchmeta's HDF5 files, with an array of images (n, h, w[, c]) or of PNG or JPEG files (n,) for each class.

  Args:
    names: of the files, of which all are needed.
    known: path of an array in a file -> the class's name, or None for an array that is none of the data set's. Most
      files have it as the last part of the path.

  Returns:
    Format; a class in two files is a fault.
  """

  def find(folder):
    paths = [os.path.join(folder, name) for name in names]
    return paths if all(map(os.path.isfile, paths)) else []

  def read(paths, scratch):
    del scratch
    h5py = system.package('h5py', f'reading {paths[0]}')  # only here, to keep opening a table quick
    classes, faults = {}, []

    def add(path, key, dataset):
      if isinstance(dataset, h5py.Dataset) and (name := known(key)):
        if name in classes:
          faults.append(f'class {name} is in two of {", ".join(paths)}: replace one')
        _check(path, key, dataset)
        classes[name] = _Items(path, key, dataset.shape)

    for path in paths:
      try:
        with h5py.File(path) as file:
          file.visititems(functools.partial(add, path))  # not into other files that it links to
      except UserError:
        raise
      except Exception as error:  # whatever HDF5 finds wrong, and h5py cannot translate
        raise UserError(f'{path} is damaged or not HDF5 ({first_line(error)}): replace it') from error
    return Contents(classes, faults=tuple(faults))

  return Format(braces(list(names)), find, read)


def _check(path, key, dataset):
  """Refuses an array of an HDF5 file that is not of images, lies in other files, or is larger than what is there."""
  import h5py

  files = dataset.ndim == 1 and h5py.check_vlen_dtype(dataset.dtype) == np.uint8
  if dataset.is_virtual or dataset.external:
    fault = 'lies in other files'
  elif not files and (dataset.ndim not in (3, 4) or dataset.dtype.hasobject):
    fault = f'is {dataset.dtype} {dataset.shape}, neither images nor files'
  elif dataset.nbytes > _MAX_CLASS:
    fault = f'has {dataset.nbytes / 1e9:.1f} GB, more than a class may'
  elif dataset.chunks:
    chunks = math.prod(-(-side // part) for side, part in zip(dataset.shape, dataset.chunks, strict=True))
    fault = dataset.id.get_num_chunks() < chunks and 'is cut short'
  else:
    size = dataset.size * dataset.id.get_type().get_size()
    fault = dataset.id.get_storage_size() < size and 'is cut short'
  if fault:
    raise UserError(f'{path} is not read: {key} {fault}; replace it')


class _Items(collections.abc.Sequence):
  """The images of an array in an HDF5 file, each made when it is asked for."""

  def __init__(self, path, key, shape):
    self._rows, self._length, self._where = _Rows(path, key), shape[0], f'{key} in {path}'
    self._kind = images.Encoded if len(shape) == 1 else images.Row

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return self._kind(self._rows, range(self._length)[index], self._where)


class _Rows:
  """An array in an HDF5 file, opened when it is first asked for a row: the file is not held open in between."""

  def __init__(self, path, key):
    self._place = path, key, os.stat(path).st_mtime_ns

  def __getitem__(self, index):
    with _reading:
      return _array(*self._place)[index]


_reading = threading.Lock()  # HDF5 has one thread, and two that want the same class should read it once


@functools.lru_cache(maxsize=8)  # classes: threads are never more than a few apart
def _array(path, key, changed):
  """An array of a file that was last changed then: a file may be replaced."""
  del changed
  import h5py

  with h5py.File(path) as file:
    dataset = file[key]
    if dataset.ndim > 1:
      return dataset[()]
    files, size, most = [], 0, os.path.getsize(path)
    for start in range(0, len(dataset), _BLOCK):
      files += list(dataset[start : start + _BLOCK])
      size += sum(map(len, files[start:]))
      if size > most:  # all of them refer to the same bytes
        raise ValueError(f'{key} has more bytes than the file')
    return files


def labelled(names, load, known=lambda split, label: label if isinstance(label, str) else None):
  """A file for each split with an array of images and one of labels.

  Args:
    names: file's name -> split.
    load: (path, scratch folder) -> images (n, h, w, c) uint8 or a sequence of PNG files, labels (n,), which are
      integers or already the names of classes.
    known: (split, label) -> the class's name, or None if it cannot be known.

  Returns:
    Format; if a name cannot be known, all classes are called `<split>/<label>`. A class in two files is a fault.
  """

  def find(folder):
    paths = [os.path.join(folder, name) for name in names]
    return [path for path in paths if os.path.isfile(path)]

  def read(paths, scratch):
    contents = [(names[os.path.basename(path)], by_label(path, *load(path, scratch))) for path in paths]
    named = all(known(split, label) for split, members in contents for label in members)
    classes, splits, faults = {}, collections.defaultdict(list), []
    for split, members in contents:
      for label, items in members.items():
        name = known(split, label) if named else f'{split}/{label}'
        if name in classes:
          faults.append(f'class {name} is in two of {", ".join(paths)}: replace one')
        classes[name] = items
        splits[split].append(name)
    return Contents(classes, splits={} if named else dict(splits), faults=tuple(faults))

  return Format(braces(list(names)), find, read)


def tfds(builder, known, extra=(), transform=None):
  """What TFDS has prepared.

  Args:
    builder: TFDS's name of the data set.
    known: `prepared.Record` -> the class's name, or None for an image that is none of the data set's.
    extra: features that `known` needs besides the label.
    transform: of the images, see `Contents`.

  Returns:
    Prepared
  """

  def read(folder, scratch):
    del scratch
    classes = collections.defaultdict(list)
    for record in prepared.read(builder, folder, extra):
      if name := known(record):
        classes[name].append(record.item)
    return Contents(classes, transform=transform)

  return Prepared(builder, read)


def by_label(path, pixels, labels):
  """Sorts what a file holds by label.

  Args:
    path: of the file, to name in an error.
    pixels: images (n, h, w, c) uint8 or a sequence of PNG or JPEG files.
    labels: (n,) integers or names of classes.

  Returns:
    label -> items, in the order of the file.

  Raises:
    UserError: the labels do not match the images.
  """
  labels = np.asarray(labels)
  if labels.shape != (len(pixels),) or labels.dtype.kind not in 'iuU':
    raise UserError(f'{path} has {len(pixels)} images, but labels {labels.dtype} {labels.shape}: replace it')
  kind = images.Row if getattr(pixels, 'ndim', 1) == 4 else images.Encoded
  order = np.argsort(labels, kind='stable')
  present, starts = np.unique(labels[order], return_index=True)
  groups = zip(present.tolist(), np.split(order, starts[1:]), strict=True)
  return {label: [kind(pixels, k, path) for k in rows.tolist()] for label, rows in groups}


def load_pickle(path, scratch):
  """Images and labels of a pickle as Gidaris and Komodakis (2018) and MetaOptNet publish them, for `labelled`."""
  del scratch
  return entries(path, unpickle.load(path), data=4, labels=1)


def load_npz(path, scratch):
  """Images and labels of an archive as TADAM publishes them, for `labelled`."""
  return entries(path, npz(path, scratch), features=4, targets=1)


def npz(path, scratch):
  """The arrays of a NumPy archive, mapped into memory: name -> array."""
  folder = scratch / os.path.basename(path).removesuffix('.npz')
  if not folder.exists():
    archive.unpack([path], folder)
  return {file.stem: npy(file, path) for file in folder.glob('*.npy')}


def npy(file, path=None):
  """An array in a file, mapped into memory; in an error it is called `path`, if it was unpacked from there."""
  try:
    return np.lib.format.open_memmap(file, mode='r')
  except Exception as error:  # a header is an expression in Python, and raises whatever reading one does
    raise UserError(f'{path or file} is damaged ({first_line(error)}): replace it') from error


def entries(path, content, **kinds):
  """Checks what was read from a file, and returns some of its entries.

  Args:
    path: to name in an error.
    content: what should be a dict.
    **kinds: key -> how many dimensions the entry must have as an array; 4 are images, (n, h, w, 1 or 3) uint8.

  Raises:
    UserError: an entry is missing or of another shape.
  """
  try:
    arrays = [content[key] for key in kinds]
    for key, array, ndim in zip(kinds, arrays, kinds.values(), strict=True):
      if np.ndim(array) != ndim or (ndim == 4 and (array.dtype != np.uint8 or array.shape[3] not in (1, 3))):
        raise ValueError(f'{key} is {array.dtype} {array.shape}')
    return arrays
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise UserError(f'{path} is not in the format of its name ({error!r}): replace it') from error

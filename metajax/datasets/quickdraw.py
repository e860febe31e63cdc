"""Quick, Draw! (Google 2017): 50 million drawings of 345 kinds of things, 28 x 28, white on black. CC BY 4.0."""

import array
import collections
import collections.abc
import functools
import os

import numpy as np

from metajax.data import containers, images, prepared, source
from metajax.data.download import Remote
from metajax.errors import UserError

_URL = 'https://storage.googleapis.com/quickdraw_dataset/full/numpy_bitmap/'
_HEADER = 80  # bytes ahead of the drawings in each of Google's files
_PIXELS = 28 * 28
_OPEN = 8  # files at a time; threads are never more than a few apart


def load(
  data_dir, *, size=28, split='meta_dataset', split_seed=123, per_class=0, train_per_class=0, resample='bilinear'
):
  """Loads Quick, Draw!, with ink 255 on paper 0.

  Google's files are 39.5 GB, and the table of all drawings is as large again. With some of the files, the classes
  that they hold serve too, with a warning of what is missing; after a download that was broken off the next call goes
  on with it, until its `.part` file is removed.

  Args:
    data_dir: str; `metajax data --list` says what may lie there. Need not exist: all files are downloaded
      to it, whatever `per_class`.
    size: side in pixels.
    split: by classes,
      'meta_dataset': 241 / 52 / 52 (Triantafillou et al. 2020),
      'ffl': 207 / 69 / 69 at random by the seed, in the order drawn (Fast Forward Labs 2020, whose seed is 123).
    split_seed: of the split 'ffl', and of the drawings that are drawn.
    per_class: drawings of each class; 0 takes all. They are those of Fast Forward Labs with this seed, who took 20 or
      100, for either split: what deals the classes then draws from each class without replacement, in the order
      train, val, test of their split. Of a class that has no more, all are taken. Of what TFDS has prepared, which is
      shuffled, the first are taken instead, and a warning says so.
    train_per_class: so many of them for training classes alone; 0 takes all. They are the first of those drawn, where
      Fast Forward Labs drew anew.
    resample: Pillow's filter for another size.

  Returns:
    split -> ClassTable with images (drawings, size, size, 1); a split without any class is absent.

  Raises:
    UserError: an option is out of range; what is there is damaged or another data set; the download failed.
  """
  if split not in ('meta_dataset', 'ffl'):
    raise UserError(f'quickdraw has no split {split!r}; choose one of meta_dataset, ffl')
  for name, number in (('per_class', per_class), ('train_per_class', train_per_class)):
    if number < 0:
      raise UserError(f'{name} = {number}: drawings of each class, or 0 for all')
  if train_per_class > per_class > 0:
    raise UserError(
      f'train_per_class = {train_per_class}: there are only per_class = {per_class} drawings of each class'
    )
  if not 0 <= split_seed < 2**32:
    raise UserError(f'split_seed = {split_seed}: seeds are from 0 to {2**32 - 1}')
  tables = source.load(dataset(split, split_seed, per_class), data_dir, images.Rendering(size, 'L', resample))
  if train_per_class and 'train' in tables:
    train = tables['train']
    tables['train'] = train._replace(counts=np.minimum(train.counts, train_per_class))
  return tables


@functools.cache
def dataset(split='meta_dataset', split_seed=123, per_class=0):
  """What there is to know about Quick, Draw!, or about so many drawings of each class."""
  published = _published()
  drawn = () if not per_class else (_drawn(per_class),)
  return source.Dataset(
    name=f'quickdraw-{per_class}-seed{split_seed}' if per_class else 'quickdraw',
    title='Quick, Draw!',
    places=('quickdraw', 'quickdraw-dataset', ''),
    formats=(*drawn, source.Format('<class>.npy', _find, functools.partial(_read, per_class, split_seed))),
    prepared=(source.Prepared('quickdraw_bitmap', functools.partial(_read_tfds, per_class)),),
    downloads=tuple(
      Remote(f'{c}.npy', (f'{_URL}{c}.npy',), sha256=sha256, size=_HEADER + count * _PIXELS)
      for c, (count, sha256) in _lists()['classes'].items()
    ),
    splits=lambda names: _dealt(split_seed)[0] if split == 'ffl' else _lists()['meta_dataset'],
    counts={c: min(per_class or count, count) for c, count in published.items()},
    terms='CC BY 4.0 (Google)',
  )


def _lists():
  return source.stored('quickdraw')


def _published():
  """class -> drawings."""
  return {c: count for c, (count, _) in _lists()['classes'].items()}


def _dealt(seed):
  """Fast Forward Labs' split, split -> classes, and the generator that has dealt it."""
  files = sorted(f'{c}.npy' for c in _published())  # by which 'baseball bat' comes before 'baseball'
  generator = np.random.RandomState(seed)
  generator.shuffle(files)
  names = [file.removesuffix('.npy') for file in files]
  return {'train': names[:207], 'val': names[207:276], 'test': names[276:]}, generator


def _drawn(per_class):
  """What Fast Forward Labs' code has written for so many drawings, taken as it is."""
  form = containers.hdf5([f'{split}_data.hdf5' for split in ('train', 'val', 'test')])
  folder = f'quickdraw-{per_class}-meta'
  return form._replace(
    files=f'{folder}/{{train,val,test}}_data.hdf5', find=lambda place: form.find(os.path.join(place, folder))
  )


def _find(folder):
  names = sorted(name for name in os.listdir(folder) if name.endswith('.npy') and not name.startswith('.'))
  ours = any(_class(name) in _published() for name in names)
  return [os.path.join(folder, name) for name in names] if ours else []


def _class(path):
  return os.path.basename(path).removesuffix('.npy')


def _read(per_class, seed, paths, scratch):
  del scratch
  lengths = {path: len(_map(path)) for path in paths}
  rows = {_class(path): range(length) for path, length in lengths.items()}
  if per_class:
    splits, generator = _dealt(seed)
    for c in (c for classes in splits.values() for c in classes):
      length = len(rows[c]) if c in rows else _published()[c]  # so that a class that is missing changes no other
      rows[c] = generator.choice(length, min(length, per_class), replace=False)
  opened = functools.lru_cache(maxsize=_OPEN)(_map)  # each holds a file open, and systems allow as few as 256
  return source.Contents({_class(path): _Drawings(opened, path, rows[_class(path)]) for path in paths})


def _read_tfds(per_class, folder, scratch):
  """Drawings in the order in which TFDS shuffled them; of a limited number, the first ones."""
  del scratch
  numbers = collections.defaultdict(lambda: array.array('q'))
  unfinished = len(_published())
  for record in prepared.read('quickdraw_bitmap', folder):
    of_class = numbers[record.label]
    if not per_class or len(of_class) < per_class:
      of_class.append(record.item.number)
      unfinished -= len(of_class) == per_class
    if not unfinished:  # the rest of 50 million need not be read
      break
  notes = (
    ('the drawings are the first that TFDS has of each class, not those that the seed draws',) if per_class else ()
  )
  return source.Contents({c: _Prepared(record.item, of_class) for c, of_class in numbers.items()}, notes=notes)


def _map(path):
  """The drawings of a class, (n, 28, 28) uint8, mapped into memory."""
  try:
    rows = np.lib.format.open_memmap(path, mode='r').view(np.ndarray)
  except (EOFError, OSError, OverflowError, ValueError) as error:
    raise UserError(f'{path} is damaged or cut short ({error}): replace it') from error
  if rows.dtype != np.uint8 or rows.shape[1:] != (_PIXELS,) or not rows.flags.c_contiguous:
    order = '' if rows.flags.c_contiguous else ' by columns'
    raise UserError(f'{path} has an array {rows.dtype} {rows.shape}{order}, not uint8 (n, {_PIXELS}): replace it')
  return rows.reshape(-1, 28, 28)


class _Drawings(collections.abc.Sequence):
  """Rows of a file as items, each made when it is asked for: 50 million would not fit into memory."""

  def __init__(self, opened, path, rows):
    self._opened, self._path, self._rows = opened, path, rows

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return images.Row(self._opened(self._path), int(self._rows[index]), self._path)


class _Prepared(collections.abc.Sequence):
  """Likewise of what TFDS has prepared, by number."""

  def __init__(self, item, numbers):
    self._item, self._numbers = item, numbers

  def __len__(self):
    return len(self._numbers)

  def __getitem__(self, index):
    return self._item._replace(number=self._numbers[index])

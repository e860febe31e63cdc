"""mini-ImageNet (Vinyals et al. 2016) in the split of Ravi and Larochelle (2017): 100 ILSVRC classes of 600 images."""

import base64
import collections
import functools
import itertools
import operator
import os
import re

import numpy as np

from metajax.data import containers, images, prepared, source, unpickle
from metajax.data.download import Remote, google_drive
from metajax.errors import UserError

_PER_CLASS = 600
_WNID = re.compile(r'n\d{8}')
_FLAT = re.compile(r'(n\d{8})\d{8}\.jpe?g', re.IGNORECASE)


def load(data_dir, *, size=84, resample='bilinear', crop=0.0):
  """Loads mini-ImageNet.

  A part of the data set serves too, with a warning of what is missing. Whatever files are called, a class belongs to
  the split that Ravi and Larochelle put it in. Of ILSVRC's own class folders the 600 images on their list are taken.

  Args:
    data_dir: str; `metajax data --list` says what may lie there.
    size: side in pixels. The copies in circulation have 84 and differ in how they were made: squashed with OpenCV's
      bilinear or area filter, Pillow's Lanczos, or cropped to a square first.
    resample: Pillow's filter for images of another size.
    crop: part of the shorter side of which the central square is taken, instead of squashing; 0 takes the whole image.

  Returns:
    split -> ClassTable with images (60000, size, size, 3); a split without any class is absent.

  Raises:
    UserError: nothing is found and the download failed, or it is damaged or has classes of another data set.
  """
  rendering = images.Rendering(size, 'RGB', resample, crop)
  return source.load(dataset(), data_dir, rendering)


@functools.cache
def dataset():
  """What there is to know about mini-ImageNet."""
  return source.Dataset(
    name='mini_imagenet',
    title='mini-ImageNet',
    places=('mini_imagenet', 'miniimagenet', 'mini-imagenet', 'miniImageNet', ''),
    formats=(
      source.Format('mini-imagenet-cache-{train,val,test}.pkl', _find_caches, _read_caches),
      containers.hdf5([f'{split}_data.hdf5' for split in _lists()]),
      containers.labelled(
        {
          'miniImageNet_category_split_train_phase_train.pickle': 'train',
          'miniImageNet_category_split_val.pickle': 'val',
          'miniImageNet_category_split_test.pickle': 'test',
        },
        _load_pickle,
      ),
      containers.labelled({f'few-shot-{split}.npz': split for split in _lists()}, _load_npz),
      source.Format(_FOLDERS.files, _FOLDERS.find, _read_folders),
      source.Format('images named <wnid>%08d.jpg', _find_flat, _read_flat),
    ),
    archives=(
      ('mini-imagenet.tar.gz',),
      ('mini_imagenet_full_size.tar.bz2',),
      ('train.tar', 'val.tar', 'test.tar'),
      ('miniimagenet.zip',),
    ),
    prepared=(source.Prepared('imagenet2012', _read_tfds),),
    downloads=(
      Remote(
        'mini-imagenet.tar.gz',
        urls=google_drive('16V_ZlkW4SsnNDtnGmaBRq2OoPmUOc5mY'),
        sha256='30052347dd33f3ea3ee4a4ad65d72152bf657aac41891299dfa614a3235947ed',
      ),
    ),
    splits=lambda names: _lists(),
    counts=dict.fromkeys(_classes(), _PER_CLASS),
    terms=source.IMAGENET_TERMS,
  )


def _lists():
  """split -> wnid -> (images of the class in ILSVRC, the listed ones' ranks there as a bitmap in base 64)."""
  return source.stored('mini_imagenet')


@functools.cache
def _classes():
  return dict(itertools.chain.from_iterable(classes.items() for classes in _lists().values()))


def _load_pickle(path, scratch):
  """Gidaris and Komodakis's pickles number the classes; some copies also have the names, as `catname2label`."""
  del scratch
  content = unpickle.load(path)
  pixels, labels = containers.entries(path, content, data=4, labels=1)
  numbers = content.get('catname2label')
  labels = np.asarray(labels)
  if labels.dtype.kind in 'iu' and isinstance(numbers, dict):
    names = {number: name for name, number in numbers.items() if isinstance(number, (int, np.integer))}
    if all(names.get(label) in _classes() for label in np.unique(labels).tolist()):
      labels = np.array([names[label] for label in labels.tolist()])
  return pixels, labels


def _load_npz(path, scratch):
  """TADAM numbers the classes of a split in the order of their names."""
  pixels, labels = containers.load_npz(path, scratch)
  if pixels.shape[1] <= 32:  # TADAM's files of CIFAR-100 have the same names
    raise UserError(f'{path} has images of {pixels.shape[1]} pixels: it is of FC100, move it elsewhere')
  names = sorted(_lists()[os.path.basename(path).removeprefix('few-shot-').removesuffix('.npz')])
  if labels.dtype.kind not in 'iu' or not np.isin(labels, range(len(names))).all():
    raise UserError(
      f"{path} has labels other than 0 to {len(names) - 1}, mini-ImageNet's: if it is of FC100, move it elsewhere"
    )
  return pixels, np.array(names)[labels]


def _find_caches(folder):
  """Ren et al.'s, and learn2learn's, who write `validation`."""
  names = (f'mini-imagenet-cache-{split}.pkl' for split in ('train', 'val', 'validation', 'test'))
  return [path for path in (os.path.join(folder, name) for name in names) if os.path.isfile(path)]


def _read_caches(paths, scratch):
  del scratch
  classes, faults = {}, []
  for path in paths:
    pixels, members = containers.entries(path, unpickle.load(path), image_data=4, class_dict=0)
    for c, rows in _members(path, members).items():
      if c in classes:
        faults.append(f'class {c} is in two of {", ".join(paths)}: replace one')
      if len(rows) and not 0 <= min(rows) <= max(rows) < len(pixels):
        raise UserError(f'{path} has rows of class {c} beyond its {len(pixels)} images: replace it')
      classes[c] = [images.Row(pixels, row, path) for row in rows]
  return source.Contents(classes, faults=tuple(faults))


def _members(path, members):
  """Class name -> row numbers, as a file should have it."""
  try:
    if not all(isinstance(c, str) for c in members):
      raise TypeError('class_dict has a name that is no text')
    return {c: [operator.index(row) for row in rows] for c, rows in members.items()}
  except (AttributeError, TypeError) as error:
    raise UserError(f'{path} is not in the format of its name ({error!r}): replace it') from error


def _read_folders(paths, scratch):
  contents = _FOLDERS.read(paths, scratch)
  classes = {
    c: _listed(c, [os.path.basename(item.path) for item in items], items) for c, items in contents.classes.items()
  }
  return contents._replace(classes=classes)


def _read_tfds(folder, scratch):
  del scratch
  names, items = collections.defaultdict(list), collections.defaultdict(list)
  for record in prepared.read('imagenet2012', folder, extra=('file_name',)):
    if record.split == 'train' and record.label in _classes():
      names[record.label].append(record.extra['file_name'])
      items[record.label].append(record.item)
  return source.Contents({c: _listed(c, names[c], items[c]) for c in items})


def _listed(wnid, names, items):
  """Of a class of ILSVRC as a whole, the images whose rank by number is in Ravi and Larochelle's list."""
  numbers = [re.fullmatch(rf'{wnid}_(\d+)\.jpe?g', name, re.IGNORECASE) for name in names]
  if wnid not in _classes() or len(items) <= _PER_CLASS or not all(numbers):
    return items
  total, bitmap = _classes()[wnid]
  if len(items) != total:
    raise UserError(
      f"{items[0]} is one of {len(items)} of ILSVRC's {total} images of {wnid}: mini-ImageNet's are found by their "
      'rank among all, so complete them'
    )
  ranked = [items[k] for k in np.argsort([int(number[1]) for number in numbers])]
  return [ranked[rank - 1] for rank in _ranks(bitmap)]


def _ranks(bitmap):
  return 1 + np.flatnonzero(np.unpackbits(np.frombuffer(base64.b64decode(bitmap), np.uint8)))


def _find_flat(folder):
  for inside in ('', 'images'):
    paths = images.list_images(os.path.join(folder, inside))
    if paths := [path for path in paths if _FLAT.fullmatch(os.path.basename(path))]:
      return paths
  return []


def _read_flat(paths, scratch):
  del scratch
  classes = collections.defaultdict(list)
  for path in paths:
    classes[_FLAT.fullmatch(os.path.basename(path))[1]].append(images.File(path))
  return source.Contents(classes)


_FOLDERS = containers.class_folders(lambda name: name if _WNID.fullmatch(name) else None, inside=('', 'images', 'data'))

"""Omniglot (Lake et al. 2015): 1623 handwritten characters of 50 alphabets, 20 images each. MIT licence."""

import collections
import functools
import os
import pathlib

import numpy as np
from PIL import ImageOps

from metajax.data import containers, images, source, unpickle
from metajax.data.download import Remote
from metajax.errors import UserError

_DRAWERS = 20
_MIRRORS = (
  'https://github.com/brendenlake/omniglot/raw/master/python/',
  'https://raw.githubusercontent.com/brendenlake/omniglot/master/python/',
)


def load(data_dir, *, size=28, split='vinyals', split_seed=0, rotations=('train', 'val', 'test'), resample='bilinear'):
  """Loads Omniglot, with ink 255 on paper 0.

  Args:
    data_dir: str; `metajax data --list` says what may lie there. Need not exist: the original archives are
      downloaded to it.
    size: side in pixels.
    split: by characters,
      'vinyals': 1028 / 172 / 423 (Vinyals et al. 2016 as published by Snell et al. 2017),
      'lake': the background set of 964 as train, the evaluation set of 659 as test, no val,
      'meta_dataset': 883 / 81 / 659, the 5 smallest background alphabets as val (Triantafillou et al. 2020),
      'maml++': 1150 / 50 / 423 at random by the seed (Antoniou et al. 2019, whose configs have seed 0),
      'random': 1100 / 100 / 423 at random by the seed, as in MAML's paper, whose own draw is not known.
    split_seed: of the last two.
    rotations: the splits in which every character turned by 90, 180 and 270 degrees counts as three more classes:
      character c of C is class c, c + C, c + 2C and c + 3C. All three is the protocol of Vinyals et al. and Snell et
      al. (4112 / 688 / 1692 classes); torchmeta's descendants leave the test split unturned, which is harder.
    resample: Pillow's filter. 'bilinear', on inverted images of 8 bits, is torchmeta's; learn2learn has 'lanczos';
      what was resized as 1-bit images, as in MAML++ and in Snell et al.'s code, comes out as with 'nearest'.

  Returns:
    split -> ClassTable with images (32460, size, size, 1), and alphabets as superclasses.

  Raises:
    UserError: an option is unknown; what is there is damaged or another data set; the download failed.
  """
  if split not in _SPLITS:
    raise UserError(f'omniglot has no split {split!r}; choose one of {", ".join(_SPLITS)}')
  if unknown := set(rotations) - {'train', 'val', 'test'}:
    raise UserError(f'omniglot rotations name {sorted(unknown)}; the splits are train, val, test')
  if not 0 <= split_seed < 2**32:
    raise UserError(f'split_seed = {split_seed}: seeds are from 0 to {2**32 - 1}')
  return source.load(dataset(split, split_seed), data_dir, images.Rendering(size, 'L', resample), turned=rotations)


@functools.cache
def dataset(split='vinyals', split_seed=0):
  """What there is to know about Omniglot."""
  halves = 'images_background', 'images_evaluation'
  return source.Dataset(
    name='omniglot',
    title='Omniglot',
    places=('omniglot', 'omniglot_dataset', 'omniglot_resized', ''),
    formats=(
      _folders(*halves),
      _folders('images_all'),
      _folders('data'),
      _folders(''),
      containers.hdf5(['data.hdf5'], lambda path: path.partition('/')[2] if path.startswith(halves) else None),
      containers.labelled({f'{split}_vinyals.pkl': split for split in ('train', 'val', 'test')}, _load_cache),
      containers.labelled({f'{split}_lake.pkl': split for split in ('train', 'test')}, _load_cache),
    ),
    archives=(tuple(f'{half}.zip' for half in halves), ('omniglot.tar.gz',), ('omniglot.zip',)),
    prepared=(containers.tfds('omniglot', _of_tfds, extra=('alphabet', 'alphabet_char_id'), transform=_ink),),
    downloads=(
      _remote(halves[0], 9464212, 'ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640'),
      _remote(halves[1], 6462886, '1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee'),
    ),
    splits=lambda names: _SPLITS[split](split_seed),
    counts=dict.fromkeys(_characters(), _DRAWERS),
    superclasses={name: name.split('/')[0] for name in _characters()},
  )


def _remote(half, size, sha256):
  return Remote(f'{half}.zip', tuple(f'{mirror}{half}.zip' for mirror in _MIRRORS), sha256=sha256, size=size)


def _load_cache(path, scratch):
  """What Ren et al.'s code keeps of the images, at 28 pixels and with ink 255, and names of their classes."""
  del scratch
  pixels, labels, names = containers.entries(path, unpickle.load(path), images=4, labels=1, label_str=1)
  if pixels.shape[1:] != (28, 28, 1) or not np.isin(labels, np.arange(len(names))).all():
    raise UserError(f'{path} has images {pixels.shape[1:]} or labels without a name: replace it')
  names = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
  names = [name if '/' in name else '/'.join(name.rsplit('_', 1)) for name in names]
  return pixels, np.array(names)[labels]


def _of_tfds(record):
  """The class of an image that TFDS has prepared; its other splits, `small1` and `small2`, repeat some of these."""
  if record.split in ('train', 'test'):
    return f'{record.extra["alphabet"]}/character{record.extra["alphabet_char_id"] + 1:02d}'


def _ink(image):
  """Black on white becomes 255 on 0."""
  return ImageOps.invert(image.convert('L'))


def _folders(*tops):
  """Images in `<top>/<alphabet>/<character>/`, of all the tops."""

  def find(folder):
    def alphabets(top):  # without a folder of their own, they lie among all that the data folder has
      return images.list_folders(os.path.join(folder, top)) if top else sorted(_lists()['alphabets'])

    found = [
      [f'{a}/{c}' for a in alphabets(top) for c in images.list_folders(os.path.join(folder, top, a))] for top in tops
    ]
    if not all(_characters().keys() & set(names) for names in found):
      return []
    return [
      path
      for top, names in zip(tops, found, strict=True)
      for c in names
      for path in images.list_images(os.path.join(folder, top, c))
    ]

  def read(paths, scratch):
    del scratch
    contents = containers.by_folder(paths, lambda place: '/'.join(pathlib.PurePath(place).parts[-2:]))
    return contents._replace(transform=_ink)

  return source.Format(
    'images in ' + ' and '.join(os.path.join(top, '<alphabet>/<character>/') for top in tops), find, read
  )


def _lists():
  return source.stored('omniglot')


@functools.cache
def _characters():
  """Name of each character, `Alphabet/characterNN` -> its number 1..1623 in the original files."""
  alphabets = _lists()['alphabets']  # name -> number of its first character, how many it has
  return {f'{a}/character{k + 1:02d}': first + k for a, (first, count) in alphabets.items() for k in range(count)}


def _listed(kind, seed):
  """A published split: split -> sorted names of its characters."""
  del seed
  members = collections.defaultdict(list)  # a split lists characters, or alphabets for all of theirs
  for name in _characters():
    members[name] = [name]
    members[name.split('/')[0]].append(name)
  return {split: sorted(c for entry in entries for c in members[entry]) for split, entries in _lists()[kind].items()}


def _dealt(order, *ends):
  """Splits of the sorted characters in an order, with ends at these places."""
  names = sorted(_characters())
  parts = np.split(order, ends)
  return {split: sorted(names[k] for k in part) for split, part in zip(('train', 'val', 'test'), parts, strict=True)}


def _maml_plus_plus(seed):
  """MAML++'s `data.py`: the seed draws a seed, which shuffles all characters; cut at 70.9 % and 74.0 %."""
  order = np.arange(1623, dtype=np.int32)
  np.random.RandomState(np.random.RandomState(seed).randint(1, 999999)).shuffle(order)
  return _dealt(order, 1150, 1200)


_SPLITS = {
  **{kind: functools.partial(_listed, kind) for kind in ('vinyals', 'lake', 'meta_dataset')},
  'maml++': _maml_plus_plus,
  'random': lambda seed: _dealt(np.random.default_rng(seed).permutation(1623), 1100, 1200),
}

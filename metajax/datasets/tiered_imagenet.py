"""tiered-ImageNet (Ren et al. 2018): 608 ILSVRC classes of 732 to 1300 images, split by 34 superclasses."""

import collections
import functools
import os
import pathlib
import re

import numpy as np

from metajax.data import containers, images, source, unpickle
from metajax.data.download import Remote, google_drive
from metajax.errors import UserError

_WNID = re.compile(r'n\d{8}')


def load(data_dir, *, size=84, resample='bilinear', crop=0.0):
  """Loads tiered-ImageNet: 351 / 97 / 160 classes of 448695 / 124261 / 206209 images.

  A part of the data set serves too, with a warning of what is missing. Whatever files are called, a class belongs to
  the split that Ren et al. put it in. Only MetaOptNet's files, whose labels are numbers without names, have their own
  classes, called `train/0` and so on, without superclasses.

  All come out as RGB. PNG files are that by themselves; so are the arrays `*_images.npy`, which Pillow decoded. The
  arrays `*_images.npz`, of Ren et al.'s code and of MetaOptNet, were decoded by OpenCV and are BGR: they are turned
  around, as Chen et al.'s Meta-Baseline does. An archive of that name made in another way would come out as BGR.

  Args:
    data_dir: str; `metajax data --list` says what may lie there. Need not exist: 12.9 GB are downloaded.
    size: side in pixels. All copies in circulation have 84; ILSVRC's own class folders serve for more.
    resample: Pillow's filter for images of another size.
    crop: part of the shorter side of which the central square is taken, instead of squashing; 0 takes the whole image.

  Returns:
    split -> ClassTable with images (779165, size, size, 3), which for size 84 take 16.5 GB of the disk, and the first
    of the superclass's names, such as `passerine`; a split without any class is absent.

  Raises:
    UserError: nothing is found and the download failed, or it is damaged or has classes of another data set.
  """
  rendering = images.Rendering(size, 'RGB', resample, crop)
  return source.load(dataset(), data_dir, rendering)


@functools.cache
def dataset():
  """What there is to know about tiered-ImageNet."""
  return source.Dataset(
    name='tiered_imagenet',
    title='tiered-ImageNet',
    places=('tiered_imagenet', 'tiered-imagenet', 'tieredimagenet', 'tieredImageNet', ''),
    formats=(
      _arrays('{}_images_png.pkl', _load_encoded),
      _arrays('tiered-imagenet-{}_images_png.pkl', _load_encoded),
      containers.hdf5([f'{split}_data.hdf5' for split in _lists()], _known),
      _arrays('{}_images.npz', _load_npz),
      _arrays('{}_images.npy', _load_npy),
      containers.class_folders(lambda name: name if _WNID.fullmatch(name) else None, suffix=', of ILSVRC too'),
    ),
    archives=(('tiered-imagenet.tar',), ('tiered_imagenet.tar',)),
    prepared=(
      containers.tfds('imagenet2012', lambda r: r.label if r.split == 'train' and r.label in _classes() else None),
    ),
    downloads=(
      Remote(
        'tiered-imagenet.tar',
        urls=google_drive('1g1aIDy2Ar_MViF2gDXFYDBTR-HYecV07'),
        md5='e07e811b9f29362d159a9edd0d838c62',
      ),
    ),
    splits=lambda names: {s: [c for g in groups.values() for c in g['classes']] for s, groups in _lists().items()},
    counts={c: count for c, (count, _) in _classes().items()},
    superclasses={
      c: group['name'].split(',')[0]
      for groups in _lists().values()
      for group in groups.values()
      for c in group['classes']
    },
    terms=source.IMAGENET_TERMS,
  )


def _lists():
  """split -> superclass's wnid -> {name, classes: wnid -> (images in ILSVRC, words)}."""
  return source.stored('tiered_imagenet')


@functools.cache
def _classes():
  return {c: row for groups in _lists().values() for group in groups.values() for c, row in group['classes'].items()}


@functools.cache
def _by_name():
  """wnid of each class by all its words, `brambling, Fringilla montifringilla`, and by the first of them."""
  names = {words.split(',')[0]: c for c, (_, words) in _classes().items()}
  return names | {words: c for c, (_, words) in _classes().items()}


def _known(path):
  """The class of an array in one of torchmeta's files, where it goes by its words."""
  name = path.removeprefix('datasets/')
  return _by_name().get(name, name)


def _arrays(pattern, load):
  """A file of images for each split, beside Ren et al.'s or MetaOptNet's labels.

  Args:
    pattern: name of the file, with the split left out.
    load: (path, scratch folder) -> images.

  Returns:
    Format.
  """
  start, _, end = pattern.partition('{}')
  names = {pattern.format(spelled): split for spelled, split in source.SPLITS.items()}

  def beside(path, name):
    return os.path.join(os.path.dirname(path), start + name)

  def load_both(path, scratch):
    labels = beside(path, f'{names[os.path.basename(path)]}_labels.pkl')
    pixels = load(path, scratch)
    return pixels, _labels(labels, beside(path, 'class_names.txt'), beside(path, 'synsets.txt'))

  labelled = containers.labelled(names, load_both)

  def find(folder):
    paths = labelled.find(folder)
    others = [*(f'{split}_labels.pkl' for split in _lists()), 'class_names.txt', 'synsets.txt']
    others = [os.path.join(folder, start + name) for name in others]
    return paths and paths + [path for path in others if os.path.isfile(path)]

  def read(paths, scratch):
    return labelled.read([path for path in paths if path.endswith(end)], scratch)

  files = ', '.join(f'{start}{{train,val,test}}{last}' for last in (end, '_labels.pkl'))
  texts = f'{start}class_names.txt and {start}synsets.txt'
  return source.Format(f'{files}, and {texts} unless labels are numbers without names', find, read)


def _load_encoded(path, scratch):
  """PNG files as OpenCV encoded them, (n,) or (n, 1) uint8 each."""
  del scratch
  files = unpickle.load(path)
  if not isinstance(files, (list, tuple)):
    raise UserError(f'{path} holds no list of PNG files: replace it')
  return files


def _load_npy(path, scratch):
  del scratch
  return containers.entries(path, {'images': containers.npy(path)}, images=4)[0]


def _load_npz(path, scratch):
  (pixels,) = containers.entries(path, containers.npz(path, scratch), images=4)
  return pixels[..., ::-1]  # BGR, see `load`


def _labels(path, names, synsets):
  """Labels (n,) from a pickle: wnids where the numbers have names, which two parallel lists map to wnids."""
  content = _read(unpickle.load, path)
  if isinstance(content, dict) and 'label_specific_str' not in content:
    return containers.entries(path, content, labels=1)[0]
  (numbers,) = containers.entries(path, content, label_specific=1)
  numbers = np.asarray(numbers)
  if numbers.dtype.kind not in 'iu':
    raise UserError(f'{path} has label_specific {numbers.dtype}, not integers: replace it')
  words = content['label_specific_str']  # by number, in a sequence or a dict
  if not isinstance(words, dict):
    words = dict(enumerate(containers.entries(path, content, label_specific_str=1)[0]))
  wnids = _wnids(names, synsets)
  present, inverse = np.unique(numbers, return_inverse=True)
  classes = []
  for number in present.tolist():
    if number not in words:
      raise UserError(f'{path} has images of class {number}, but no name of it in label_specific_str: replace it')
    name = words[number].decode('utf-8', 'replace') if isinstance(words[number], bytes) else str(words[number])
    if name not in wnids:
      raise UserError(f'{path} has class {name!r}, which is not in {names}: replace one of the two')
    wnid = _by_name().get(name, wnids[name][0])
    if wnid not in wnids[name]:
      raise UserError(f'{synsets} has {wnids[name][0]} for {name!r}, which is {wnid}: replace it and {names}')
    classes.append(wnid)
  return np.array(classes)[inverse]


def _wnids(names, synsets):
  """Name -> the wnids beside it in two parallel lists: ILSVRC has some names twice."""
  lines = _read(_lines, names), _read(_lines, synsets)
  if len(lines[0]) != len(lines[1]):
    raise UserError(f'{names} has {len(lines[0])} lines and {synsets} {len(lines[1])}: replace them')
  wnids = collections.defaultdict(list)
  for name, wnid in zip(*lines, strict=True):
    wnids[name].append(wnid)
  return wnids


def _read(read, path):
  try:
    return read(path)
  except FileNotFoundError:
    raise UserError(f'{path} is missing: the images beside it cannot be told apart without it') from None


def _lines(path):
  return pathlib.Path(path).read_text('utf-8', 'replace').rstrip().splitlines()

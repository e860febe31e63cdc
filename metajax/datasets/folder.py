"""Any folder of images: split/class/image, or class/image with the classes divided at random."""

import collections
import contextlib
import functools
import hashlib
import itertools
import logging
import os
import pathlib
import threading
from typing import NamedTuple

import numpy as np
from PIL import ImageColor

from metajax.data import conversion, images, source, table
from metajax.errors import UserError

_log = logging.getLogger(__name__)

# Files that people keep beside images. Others that are passed over may well be images, and are counted.
_TEXTS = ('.txt', '.md', '.csv', '.tsv', '.json', '.xml', '.yaml', '.yml', '.html', '.ini', '.log', '.db', '.py')
_HEIC = ('.heic', '.heif', '.hif')


def load(
  data_dir,
  *,
  path='',
  size=84,
  grey=False,
  resample='bilinear',
  crop=0.0,
  nested=False,
  names_by_split=False,
  white=0,
  ground='white',
  max_pixels=images.MAX_PIXELS,
  fractions=(0.64, 0.16, 0.2),
  split_seed=0,
):
  """Loads a folder of images of any format that Pillow reads, converted once per state of the folder and size.

  Where there are folders `train`, `val` and `test`, classes are the folders in them, and a split without a folder is
  absent. `training`, `valid`, `validation`, `dev`, `testing` and capitals will do; other folders beside two of them are
  left out. Otherwise the top-level folders are the classes. They are sorted by name, permuted with
  `np.random.default_rng(split_seed)` and dealt to train, val and test in this order: each split gets its fraction of
  the classes, rounded, and at least one class unless its fraction is 0 (then it is absent); the split with the largest
  fraction gets what rounding leaves.

  Hidden files and texts are passed over. So are other files that cannot be read, and images that lie elsewhere, but
  they are counted in the tables' notes. HEIC is read where the package pillow-heif is installed. Images are turned as
  their EXIF orientation says, laid on `ground` where they are transparent, and squashed to size x size, or cropped to
  it. The notes also tell which of them span fewer than 16 of 256 levels.

  Args:
    data_dir: str.
    path: str, the folder, relative to `data_dir` or absolute; `~` is the home folder.
    size: side in pixels.
    grey: one channel instead of three.
    resample: Pillow's filter.
    crop: part of the shorter side of which the central square is taken, instead of squashing; 0 takes the whole image.
    nested: images in the folders below a class folder, at any depth, belong to the class as well.
    names_by_split: the same name in two splits is that of two classes, called `train/0` and `test/0`; otherwise it is
      an error.
    white: value that becomes 255 in images of more than 8 bits. 0 looks at all of them for the largest value, and takes
      the end of its range: 255, 511, ..., 4095, ..., 65535.
    ground: colour behind transparent images, by a name or code that Pillow knows.
    max_pixels: millions (2**20) of pixels that an image may have; each core holds one in memory.
    fractions: (train, val, test), summing to 1; unused where the folders give the splits.
    split_seed: seed of the permutation; likewise.

  Returns:
    split -> ClassTable with images (rows, size, size, 1 or 3) and classes in sorted order.

  Raises:
    UserError: the folder is missing, a setting is out of range, a class has no images, classes are too few for the
      splits or in two of them, or an image does not decode.
  """
  rendering = images.Rendering(size, 'L' if grey else 'RGB', resample, crop)
  described = dataset(
    data_dir, path, grey, nested, names_by_split, white, ground, max_pixels, fractions=fractions, split_seed=split_seed
  )
  return source.load(described, data_dir, rendering)


def dataset(
  data_dir,
  path='',
  grey=False,
  nested=False,
  names_by_split=False,
  white=0,
  ground='white',
  max_pixels=images.MAX_PIXELS,
  fractions=(0.64, 0.16, 0.2),
  split_seed=0,
):
  """The folder as a source: another for each state of its files."""
  for name, number, least in (('white', white, 0), ('max_pixels', max_pixels, 1)):
    if number < least:
      raise UserError(f'{name} = {number}: {least} or more is needed')
  try:
    ImageColor.getrgb(ground)
  except ValueError:
    raise UserError(f'ground = {ground!r}: Pillow knows no such colour; take white, black or #808080') from None
  path = os.path.expanduser(path)
  root = os.path.normpath(os.path.join(data_dir, path))
  if not os.path.isdir(root):
    raise UserError(f'there is no folder of images {root}: set data.path to one, relative to --data_dir')
  if refused := images.refusal(root):
    raise UserError(f'the folder of images {root} cannot be read ({refused}): make it readable')
  found = _look(root, nested)
  paths = [path for members in found.classes.values() for path in members]
  passed_over = _passed_over(found)
  if not paths:
    where = 'they are expected at class/image or at split/class/image; set path to the folder'
    raise UserError('; '.join([f'{root} holds no images in class folders: {where}', *_beside(found), *passed_over]))
  images.allow_pixels(max_pixels)
  settings = grey, names_by_split, white, ground, max_pixels, passed_over  # each makes another table
  state = hashlib.sha256(f'{table.fingerprint(root, paths)} {settings}'.encode())
  read = functools.partial(_read, root, found, passed_over, names_by_split, white, ground, max_pixels)
  return source.Dataset(
    name=f'folder-{state.hexdigest()[:16]}',
    title=root,
    places=(path,),
    formats=(source.Format('class/image or split/class/image', lambda folder: paths, read),),
    splits=lambda names: deal(names, fractions, split_seed, root),
  )


class _Found(NamedTuple):
  """What lies in a folder; paths, but names in `strays`."""

  classes: dict  # class folder, relative to the root -> its images
  unread: list  # files of a class that have no extension of an image
  deeper: list  # images in folders below a class folder
  beside: list  # images beside the class folders
  splits: list  # names of the folders of splits,
  strays: list  # and of those beside them


def _look(root, nested):
  top = images.list_folders(root)
  splits = _splits(root, top)
  if splits:
    places = [os.path.join(split, c) for split in splits for c in images.list_folders(os.path.join(root, split))]
  else:
    places = top
  classes, unread, deeper = {}, [], []
  for place in places:
    folder = os.path.join(root, place)
    classes[place] = []
    for path in images.list_files(folder, nested=True):
      if not images.is_named_image(path):
        unread += [path] * (pathlib.PurePath(path).suffix.lower() not in _TEXTS)
      elif nested or os.path.dirname(path) == folder:
        classes[place].append(path)
      else:
        deeper.append(path)
  beside = [path for place in ('', *splits) for path in images.list_images(os.path.join(root, place))]
  return _Found(classes, unread, deeper, beside, splits, [name for name in top if splits and name not in splits])


def _splits(root, top):
  """The folders of splits among the top-level ones; none if these are classes, of which one may be called train."""
  splits = [name for name in top if source.split_of(name)]
  several = len({source.split_of(name) for name in splits}) > 1
  holds_classes = any(images.list_folders(os.path.join(root, name)) for name in splits)
  return splits if holds_classes and (several or splits == top) else []


def _beside(found):
  """Sentences on what lies beside the class folders, and beside those of splits."""
  return [
    *([f'{len(found.beside)} images beside class folders are passed over'] if found.beside else []),
    *([f'folders beside {", ".join(found.splits)} are passed over: {", ".join(found.strays)}'] if found.strays else []),
  ]


def _passed_over(found):
  """Sentences on what of a class is not read, with what to do about it."""
  kinds = collections.Counter(pathlib.PurePath(path).suffix.lower() for path in found.unread)
  heic, bare = sum(kinds.pop(kind, 0) for kind in _HEIC), kinds.pop('', 0)
  others = ', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))
  sentences = [
    (heic, f'{heic} HEIC files are passed over: pip install pillow-heif to read them'),
    (bare, f'{bare} files without an extension are passed over: if they are images, give them one, such as .jpg'),
    (others, f'files that are not read as images are passed over, {others}: if they are images, convert them to PNG'),
    (found.deeper, f'{len(found.deeper)} images in folders below a class folder are passed over: set nested=True'),
  ]
  return [sentence for counted, sentence in sentences if counted]


def _read(root, found, notes, names_by_split, white, ground, max_pixels, paths, scratch):
  del paths, scratch
  for sentence in _beside(found):
    _log.info('%s: %s', root, sentence)
  classes, places, splits, faults = {}, collections.defaultdict(list), collections.defaultdict(list), []
  for place, paths in found.classes.items():
    split, _, c = place.rpartition(os.sep)
    if split and names_by_split:
      c = f'{source.split_of(split)}/{c}'
    places[c].append(place)
    name = place if c in classes else c
    classes[name] = [images.File(path, max_pixels) for path in paths]
    if split:
      splits[source.split_of(split)].append(name)
    if not paths:
      inside = os.path.join(root, place, '')
      below = [[path for path in files if path.startswith(inside)] for files in (found.unread, found.deeper)]
      reasons = _passed_over(_Found({}, *below, [], [], []))
      if refused := images.refusal(inside):
        faults.append(f'class folder {place} in {root} cannot be read ({refused}): make it readable, or remove it')
      else:
        faults.append('; '.join([f'class folder {place} in {root} has no images: add some, or remove it', *reasons]))
  for c, where in places.items():
    if len(where) > 1:
      faults.append(
        f'class {c} is at {" and at ".join(where)} in {root}, but test classes must be unseen: set names_by_split=True '
        'if these are different classes, else lay out all images as class/image'
      )
  range_end = _RangeEnd([item for items in classes.values() for item in items])

  def reduce(image):
    if image.mode == 'F' and not white:
      raise ValueError('pixels are floating-point numbers: set white to the value that becomes 255')
    return images.flatten(image, white or (range_end() if images.is_deep(image) else None), ground)

  return source.Contents(
    classes,
    {split: sorted(names) for split, names in splits.items()},
    transform=reduce,
    notes=tuple(notes),
    faults=tuple(faults),
    explain=functools.partial(_explain, root, reduce),
  )


class _RangeEnd:
  """The end of the range of images with more than 8 bits, 255, 511, ..., 65535: looked for when first asked."""

  def __init__(self, items):
    self._items, self._lock, self._found = items, threading.Lock(), None

  def __call__(self):
    with self._lock:
      if self._found is None:
        largest = max(itertools.chain.from_iterable(conversion.on_cores(_largest, self._items, 'looking for white')))
        self._found = max(255, (1 << largest.bit_length()) - 1)
        _log.info('16-bit images reach up to %d: %d becomes 255, as with white=%d', largest, self._found, self._found)
    return self._found


def _largest(item):
  """The largest value of an image if it has more than 8 bits, else 0."""
  try:
    image = images.open_item(item)
  except UserError:  # which is told when it is its turn
    return 0
  return int(np.asarray(image).max()) if image.mode.startswith('I') else 0


_CAUSES = {
  'one colour': '{count} images have one colour: {names}',
  'faint': '{count} images span fewer than {few} of 256 levels: {names}; stretch their contrast',
  'resized': '{count} images span fewer than {few} of 256 levels once they are resized: {names}; choose a larger size',
  'ground': '{count} images can hardly be told from the ground behind them: {names}; set ground to another colour',
  'range': '{count} images span fewer than {few} of 256 levels: {names}; set white to the value that should become 255',
  '16-bit colour': '{count} images have 16-bit colours, of which the upper 8 bits are read, and these span fewer than '
  '{few} of 256 levels: {names}; convert them to 8 bits',
}


def _explain(root, reduce, items):
  """Sentences on images that span few levels, by cause."""
  found = collections.defaultdict(list)
  for item in items:
    with contextlib.suppress(UserError, OSError):  # somebody has changed it meanwhile
      found[_cause(item, reduce)].append(os.path.relpath(item.path, root))
  return [
    text.format(count=len(found[cause]), names=images.some(found[cause]), few=images.FEW)
    for cause, text in _CAUSES.items()
    if cause in found
  ]


def _cause(item, reduce):
  """Why an image spans few levels: a key of `_CAUSES`."""
  with item.open() as image:
    wide = ';16' in str(image.tile)
  image = images.open_item(item)
  reduced = reduce(image).convert('RGB')
  if not images.is_faint(reduced):
    return 'resized'
  if images.is_deep(image):
    return 'range' if np.ptp(np.asarray(image)) else 'one colour'
  others = [images.flatten(image, ground=g) for g in ('black', 'white')] if image.has_transparency_data else []
  if not all(map(images.is_faint, others)):
    return 'ground'
  if all(low == high for low, high in reduced.getextrema()):
    return 'one colour'
  return '16-bit colour' if wide else 'faint'


def deal(classes, fractions, seed, where):
  """Deals sorted class names to splits, as `load` says; `where` they are is for errors."""
  numbers = len(fractions) == 3 and all(isinstance(part, (int, float)) and part >= 0 for part in fractions)
  if not numbers or not abs(sum(fractions) - 1) <= 1e-6:
    raise UserError(f'fractions {tuple(fractions)} are not three parts of 1, for train, val and test')
  if seed < 0:
    raise UserError(f'split_seed = {seed}: seeds are 0 or more')
  counts = [max(1, round(len(classes) * f)) if f else 0 for f in fractions]
  largest = int(np.argmax(fractions))
  counts[largest] += len(classes) - sum(counts)
  if classes and counts[largest] < 1:
    raise UserError(f'{where} holds {len(classes)} classes, too few for the splits {tuple(fractions)}')
  order = [classes[k] for k in np.random.default_rng(seed).permutation(len(classes))]
  ends = np.cumsum(counts)
  return {
    split: sorted(order[end - count : end])
    for split, count, end in zip(('train', 'val', 'test'), counts, ends, strict=True)
  }

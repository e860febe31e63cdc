"""Any folder of images: split/class/image, or class/image with the classes divided at random."""

import collections
import functools
import os

import numpy as np

from metajax.data import images, source, table
from metajax.errors import UserError


def load(
  data_dir, *, path='', size=84, grey=False, resample='bilinear', crop=0.0, fractions=(0.64, 0.16, 0.2), split_seed=0
):
  """Loads a folder of images of any format that Pillow reads, converted once per state of the folder and size.

  Where the top-level folders are `train` and, if any, `val` (or `validation`, `valid`) and `test`, classes are the
  folders in them, and a split without a folder is absent. Otherwise the top-level folders are the classes. They are
  sorted by name, permuted with `np.random.default_rng(split_seed)` and dealt to train, val and test in this order:
  each split gets its fraction of the classes, rounded, and at least one class unless its fraction is 0 (then it is
  absent); the split with the largest fraction gets what rounding leaves.

  Hidden files and files that are no images are passed over. Images are turned as their EXIF orientation says, laid on
  white where they are transparent, and squashed to size x size, or cropped to it.

  Args:
    data_dir: str.
    path: str, the folder, relative to `data_dir` or absolute.
    size: side in pixels.
    grey: one channel instead of three.
    resample: Pillow's filter.
    crop: part of the shorter side of which the central square is taken, instead of squashing; 0 takes the whole image.
    fractions: (train, val, test), summing to 1; unused where the folders give the splits.
    split_seed: seed of the permutation; likewise.

  Returns:
    split -> ClassTable with images (rows, size, size, 1 or 3) and classes in sorted order.

  Raises:
    UserError: the folder is missing, a class has no images, classes are too few for the splits or in two of them, or
      an image does not decode.
  """
  rendering = images.Rendering(size, 'L' if grey else 'RGB', resample, crop)
  return source.load(dataset(data_dir, path, grey, fractions, split_seed), data_dir, rendering)


def dataset(data_dir, path='', grey=False, fractions=(0.64, 0.16, 0.2), split_seed=0):
  """The folder as a source: another for each state of its files."""
  root = os.path.normpath(os.path.join(data_dir, path))
  if not os.path.isdir(root):
    raise UserError(f'there is no folder of images {root}: set data.path to one, relative to --data_dir')
  classes = _classes(root)
  paths = [path for place in classes for path in images.list_images(os.path.join(root, place))]
  if not paths:
    raise UserError(
      f'{root} holds no images in class folders: they are expected at class/image or at split/class/image; '
      'set path to the folder'
    )
  return source.Dataset(
    name=f'folder-{table.fingerprint(root, paths)[:16]}{"-grey" * grey}',
    title=root,
    places=(path,),
    formats=(source.Format('class/image or split/class/image', lambda folder: paths, functools.partial(_read, root)),),
    splits=lambda names: deal(names, fractions, split_seed, root),
  )


def _classes(root):
  """Class folders relative to `root`; those of splits if its folders are splits."""
  top = images.list_folders(root)
  if 'train' in top and set(top) <= source.SPLITS.keys():
    return [os.path.join(split, c) for split in top for c in images.list_folders(os.path.join(root, split))]
  return top


def _read(root, paths, scratch):
  del scratch
  members = collections.defaultdict(list)
  for path in paths:
    members[os.path.dirname(path)].append(images.File(path))
  classes, splits, faults = {}, collections.defaultdict(list), []
  for place in _classes(root):
    split, _, c = place.rpartition(os.sep)
    if not (items := members[os.path.join(root, place)]):
      faults.append(f'class folder {place} in {root} has no images: add some, or remove it')
    if c in classes:
      faults.append(f'class {c} is in {split} and in another split of {root}: test classes must be unseen')
      c = place
    classes[c] = items
    if split:
      splits[source.SPLITS[split]].append(c)
  return source.Contents(classes, {split: sorted(names) for split, names in splits.items()}, faults=tuple(faults))


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

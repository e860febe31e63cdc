"""Any folder of images: split/class/image, or class/image with the classes divided at random."""

import os
import pathlib

import numpy as np
from PIL import Image, ImageOps

from metajax.data import table
from metajax.errors import UserError

SPLITS = {'train': 'train', 'val': 'val', 'validation': 'val', 'valid': 'val', 'test': 'test'}


def load(data_dir, *, path='', size=84, grey=False, fractions=(0.64, 0.16, 0.2), split_seed=0):
  """Loads a folder of images of any format that Pillow reads, converted once per state of the folder and size.

  Where the top-level folders are `train` and, if any, `val` (or `validation`, `valid`) and `test`, classes are the
  folders in them, and a split without a folder is absent. Otherwise the top-level folders are the classes. They are
  sorted by name, permuted with `np.random.default_rng(split_seed)` and dealt to train, val and test in this order:
  each split gets its fraction of the classes, rounded, and at least one class unless its fraction is 0 (then it is
  absent); the split with the largest fraction gets what rounding leaves.

  Hidden files and files that are no images are passed over. Images are turned as their EXIF orientation says, laid on
  white where they are transparent, and squashed to size x size (bilinear).

  Args:
    data_dir: str.
    path: str, the folder, relative to `data_dir` or absolute.
    size: side in pixels.
    grey: one channel instead of three.
    fractions: (train, val, test), summing to 1; unused where the folders give the splits.
    split_seed: seed of the permutation; likewise.

  Returns:
    split -> ClassTable with images (rows, size, size, 1 or 3) and classes in sorted order.

  Raises:
    UserError: the folder is missing, a class has no images, classes are too few for the splits or in two of them, or
      an image does not decode.
  """
  root = os.path.join(data_dir, path)
  if not os.path.isdir(root):
    raise UserError(f'there is no folder of images {root}: set data.path to one, relative to --data_dir')
  top = list_folders(root)
  if 'train' in top and set(top) <= SPLITS.keys():
    classes, splits = {}, {}
    for name in top:
      members = list_folders(os.path.join(root, name))
      splits.setdefault(SPLITS[name], []).extend(members)
      for c in members:
        if c in classes:
          raise UserError(f'class {c} is in {name} and in another split of {root}: test classes must be unseen')
        classes[c] = list_images(os.path.join(root, name, c))
  else:
    classes = {c: list_images(os.path.join(root, c)) for c in top}
    splits = _divide(top, fractions, split_seed, root)
  if not classes:
    raise UserError(f'{root} holds no class folders: images are expected at class/image or at split/class/image')
  for c, images in classes.items():
    if not images:
      raise UserError(f'class folder {c} in {root} has no images: add some, or remove it')

  mode = 'L' if grey else 'RGB'
  source = table.describe_folder(root, [image for images in classes.values() for image in images])
  key = f'folder-{source["fingerprint"][:16]}-{size}-{mode}'
  images = table.open_table(key) or table.convert(
    key,
    {c: classes[c] for c in sorted(classes)},
    lambda file: table.decode_image(file, file, size, lambda image: to_mode(image, mode)),
    (size, size, len(mode)),
    [source],
  )
  return table.class_tables(images, {split: splits[split] for split in ('train', 'val', 'test') if splits.get(split)})


def list_folders(folder):
  """Names of the visible folders in a folder, sorted."""
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))


def list_images(folder):
  """Paths of the visible files in a folder that have the extension of an image format, sorted by name."""
  formats = Image.registered_extensions()
  with os.scandir(folder) as entries:
    return sorted(
      entry.path
      for entry in entries
      if not entry.name.startswith('.')
      and formats.get(pathlib.PurePath(entry.name).suffix.lower()) in Image.OPEN
      and entry.is_file()
    )


def to_mode(image, mode):
  """Turns a PIL image upright and converts it to 'RGB' or 'L', from whatever it is."""
  image = ImageOps.exif_transpose(image)
  if image.mode == 'F':
    raise ValueError('pixels are floating-point numbers, of unknown range')
  if image.mode.startswith('I'):  # 16 bits, which Pillow would clip at 255
    image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert(mode)


def _divide(classes, fractions, seed, root):
  """Deals sorted class names to splits, as `load` says."""
  if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
    raise UserError(f'fractions {tuple(fractions)} are not three parts of 1, for train, val and test')
  counts = [max(1, round(len(classes) * f)) if f else 0 for f in fractions]
  largest = int(np.argmax(fractions))
  counts[largest] += len(classes) - sum(counts)
  if classes and counts[largest] < 1:
    raise UserError(f'{root} holds {len(classes)} classes, too few for the splits {tuple(fractions)}')
  order = [classes[k] for k in np.random.default_rng(seed).permutation(len(classes))]
  ends = np.cumsum(counts)
  return {
    split: sorted(order[end - count : end])
    for split, count, end in zip(('train', 'val', 'test'), counts, ends, strict=True)
  }

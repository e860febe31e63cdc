"""Any image classification data set of TensorFlow Datasets (TFDS), prepared on this machine: `tfds:<builder>`."""

import json
import os

from metajax.data import containers, images, source
from metajax.datasets import folder
from metajax.errors import UserError, first_line


def load(
  builder,
  data_dir,
  *,
  size=84,
  grey=False,
  resample='bilinear',
  crop=0.0,
  splits='',
  fractions=(0.64, 0.16, 0.2),
  split_seed=0,
):
  """Loads a data set that TFDS has prepared, or prepares it where TensorFlow is installed.

  Its labels are the classes, and all of TFDS's splits are taken together: few-shot learning divides classes.

  Args:
    builder: TFDS's name, 'name', 'name/config', 'name:version' or 'name/config:version'.
    data_dir: str. Looked for in `data_dir/tensorflow_datasets`, `data_dir`, `$TFDS_DATA_DIR`, `~/tensorflow_datasets`.
    size: side in pixels.
    grey: one channel instead of three.
    resample: Pillow's filter.
    crop: part of the shorter side of which the central square is taken, instead of squashing; 0 takes the whole image.
    splits: path, relative to `data_dir` or absolute, of a JSON file of split -> class names.
    fractions: (train, val, test) of the classes, dealt by `split_seed` as for `folder`; unused with `splits`.
    split_seed: likewise.

  Returns:
    split -> ClassTable with images (rows, size, size, 1 or 3) and classes in the order of the file, else sorted.

  Raises:
    UserError: the data set is not there, is damaged, is not for image classification, or the splits do not fit it.
  """
  rendering = images.Rendering(size, 'L' if grey else 'RGB', resample, crop)
  return source.load(dataset(builder, data_dir, grey, splits, fractions, split_seed), data_dir, rendering)


def dataset(builder, data_dir, grey=False, splits='', fractions=(0.64, 0.16, 0.2), split_seed=0):
  """The data set as a source."""
  name = 'tfds-' + builder.replace('/', '+').replace(':', '@') + '~grey' * grey  # no two settings have one name

  def divide(names):
    if splits:
      return _read_splits(os.path.join(data_dir, os.path.expanduser(splits)), names)
    return folder.deal(names, fractions, split_seed, f'TFDS {builder}')

  return source.Dataset(
    name=name,
    title=f'TFDS {builder}',
    places=(),
    formats=(),
    prepared=(containers.tfds(builder, lambda record: record.label),),
    splits=divide,
  )


def _read_splits(path, names):
  try:
    with open(path) as file:
      splits = json.load(file)
    listed = [c for split in splits.values() for c in split]
    if not all(isinstance(split, list) for split in splits.values()) or not all(isinstance(c, str) for c in listed):
      raise ValueError('each split is a list of names')
  except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
    raise UserError(f'{path} is no JSON file of split -> class names: {first_line(error)}') from error
  if unknown := splits.keys() - {'train', 'val', 'test'}:
    raise UserError(f'{path} has a split {min(unknown)!r}: they are train, val and test')
  if missing := sorted(set(listed) - set(names)):
    raise UserError(
      f'{path} lists class {missing[0]!r}, which the data set has not; it has {", ".join(names[:5])}, ...'
    )
  if len(set(listed)) < len(listed):
    twice = next(c for c in listed if listed.count(c) > 1)
    raise UserError(f'{path} lists class {twice!r} twice: test classes must be unseen')
  return splits

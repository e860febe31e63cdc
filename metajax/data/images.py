"""Images wherever they lie, and how one becomes the pixels of a table."""

import contextlib
import functools
import io
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metajax.errors import UserError

_MAX_PIXELS = 1 << 26  # of an image: 64 million are 200 MB in memory for each core, and nobody's photograph
_MIN_CROP = 0.1  # below, the image of which the square is cut would be too large


class File(NamedTuple):
  """An image in a file of its own."""

  path: str

  def open(self):
    return Image.open(self.path, formats=formats())

  def __str__(self):
    return self.path


class Row(NamedTuple):
  """An image among the pixels of others."""

  images: Any  # (rows, h, w) or (rows, h, w, 1 or 3) uint8
  index: int
  where: str

  def open(self):
    pixels = np.asarray(self.images[self.index])
    return Image.fromarray(pixels.reshape(pixels.shape[:2]) if pixels.shape[2:] == (1,) else pixels)

  def __str__(self):
    return f'image {self.index} of {self.where}'


class Encoded(NamedTuple):
  """An image as the bytes of a PNG or JPEG file, among others."""

  files: Any  # sequence of uint8 arrays or byte strings
  index: int
  where: str

  def open(self):
    return Image.open(io.BytesIO(np.asarray(self.files[self.index]).tobytes()), formats=formats())

  def __str__(self):
    return f'image {self.index} of {self.where}'


class Rendering(NamedTuple):
  """How images of any shape become those of a table."""

  size: int  # side in pixels
  mode: str = 'RGB'  # or 'L', for one channel
  resample: str = 'bilinear'  # one of Pillow's filters; all but 'nearest' are antialiased
  crop: float = 0.0  # 0 squashes the whole image; else the central square, this part (0.1 to 1) of the shorter side

  @property
  def shape(self):
    return self.size, self.size, len(self.mode)

  def check(self):
    """Raises UserError where a setting is out of range."""
    if self.size < 1:
      raise UserError(f'size = {self.size}: images need 1 pixel or more')
    if self.resample.upper() not in Image.Resampling.__members__:
      known = ', '.join(name.lower() for name in Image.Resampling.__members__)
      raise UserError(f'resample is one of {known}, not {self.resample!r}')
    if self.crop != 0 and not _MIN_CROP <= self.crop <= 1:
      raise UserError(f'crop = {self.crop}: a part of the shorter side from {_MIN_CROP} to 1, or 0 for the whole image')

  def __str__(self):
    """As part of a table's name."""
    filtered = f'-{self.resample}' * (self.resample != 'bilinear')
    return f'{self.size}{filtered}' + (f'-crop{float(self.crop)!r}' if self.crop else '')


def open_item(item):
  """Decodes an image.

  Args:
    item: File, Row, Encoded, or anything with `open()` that returns a PIL image, and a `str` that says where it is.

  Returns:
    PIL image.

  Raises:
    UserError: it does not decode.
  """
  with _named(item), item.open() as image:
    _check_pixels(*image.size, 'it has')
    image.load()
    return image


def pixels(item, rendering, transform=None):
  """Decodes an image into the pixels of a table.

  Args:
    item: as for `open_item`.
    rendering: Rendering.
    transform: PIL image -> PIL image, first of all.

  Returns:
    (size, size, 1 or 3) uint8.

  Raises:
    UserError: it does not decode.
  """
  image = open_item(item)
  with _named(item):
    image = to_mode(transform(image) if transform else image, rendering.mode)
    size, resample = rendering.size, Image.Resampling[rendering.resample.upper()]
    if rendering.crop:  # resized by the shorter side, then the middle of it, as torchvision's Resize and CenterCrop
      short, shorter = round(size / rendering.crop), min(image.size)
      width, height = (short * side // shorter for side in image.size)
      _check_pixels(width, height, f'it is {image.width} x {image.height}, and resized by the shorter side has')
      left, top = round((width - size) / 2), round((height - size) / 2)
      image = image.resize((width, height), resample).crop((left, top, left + size, top + size))
    return np.asarray(image.resize((size, size), resample)).reshape(rendering.shape)


def _check_pixels(width, height, what):
  if width * height > _MAX_PIXELS:
    raise ValueError(f'{what} {width} x {height} pixels, more than {_MAX_PIXELS >> 20} million')


@contextlib.contextmanager
def _named(item):
  try:
    yield
  except Exception as error:  # each of Pillow's decoders has its own
    reason = 'not an image' if isinstance(error, UnidentifiedImageError) else error
    raise UserError(f'{item} does not decode ({reason}): replace or remove it') from error


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


def list_folders(folder):
  """Names of the visible folders in a folder, sorted; none where there is no folder, or none that may be read."""
  return [entry.name for entry in _visible(folder) if _is(entry.is_dir)]


def list_images(folder):
  """Paths of the visible files in a folder that have the extension of an image format, sorted by name; likewise."""
  return [
    entry.path
    for entry in _visible(folder)
    if pathlib.PurePath(entry.name).suffix.lower() in _extensions() and _is(entry.is_file)
  ]


def _visible(folder):
  """Entries of a folder, sorted by name."""
  if not os.path.isdir(folder):
    return []
  try:
    with os.scandir(folder) as entries:
      return sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda entry: entry.name)
  except (FileNotFoundError, PermissionError):  # it has just been removed, or is somebody else's
    return []


def _is(test):
  """What `DirEntry.is_dir` or `is_file` says; no where it cannot be known, as of a link to itself."""
  try:
    return test()
  except OSError:
    return False


@functools.cache
def formats():
  """Names of the formats that Pillow reads by itself: for EPS it would run Ghostscript on a stranger's program."""
  Image.init()
  return tuple(name for name in Image.OPEN if name != 'EPS')


@functools.cache
def _extensions():
  return {extension for extension, name in Image.registered_extensions().items() if name in formats()}

"""Images wherever they lie, and how one becomes the pixels of a table."""

import contextlib
import functools
import io
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metajax import system
from metajax.errors import UserError

MAX_PIXELS = 64  # million (2**20) of an image: they take 200 MB of memory for each core, and are nobody's photograph
_MIN_CROP = 0.1  # below, the image of which the square is cut would be too large
FEW = 16  # of 256 levels: an image that spans fewer shows next to nothing
_NAMED = 5  # at most so many images in a message
_LITTER = ('__MACOSX', '@eaDir', 'Thumbs.db', 'desktop.ini')  # what systems leave behind besides hidden files


class File(NamedTuple):
  """An image in a file of its own."""

  path: str
  max_pixels: int | None = None  # million, where somebody has set them; else MAX_PIXELS

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
    _check_pixels(item, *image.size, 'it has')
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
      _check_pixels(item, width, height, f'it is {image.width} x {image.height}, and resized by the shorter side has')
      left, top = round((width - size) / 2), round((height - size) / 2)
      image = image.resize((width, height), resample).crop((left, top, left + size, top + size))
    return np.asarray(image.resize((size, size), resample)).reshape(rendering.shape)


def allow_pixels(millions):
  """Has Pillow open images of so many pixels, of which it refuses 178 million by itself."""
  if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, millions << 20)


def is_faint(image):
  """Whether an RGB image of PIL shows next to nothing: none of its colours spans 16 of 256 levels."""
  return all(high - low < FEW for low, high in image.getextrema())


def to_rgb(item, image, transform=None):
  """Converts an image that `open_item` has returned to RGB, as `pixels` does before it resizes it."""
  with _named(item):
    return to_mode(transform(image) if transform else image, 'RGB')


def _check_pixels(item, width, height, what):
  setting = getattr(item, 'max_pixels', None)
  limit = setting or MAX_PIXELS
  if width * height > limit << 20:
    remedy = f'; set max_pixels={-(-width * height >> 20)} to read it' if setting else ''
    raise ValueError(f'{what} {width} x {height} pixels, more than {limit} million{remedy}')


@contextlib.contextmanager
def _named(item):
  try:
    yield
  except Exception as error:  # each of Pillow's decoders has its own
    reason = 'not an image' if isinstance(error, UnidentifiedImageError) else error
    if isinstance(error, Image.DecompressionBombError) and getattr(item, 'max_pixels', None):
      reason = f'{error} Set max_pixels to read it'
    raise UserError(f'{item} does not decode ({reason}): replace or remove it') from error


def to_mode(image, mode):
  """Turns a PIL image upright and converts it to 'RGB' or 'L', from whatever it is."""
  return flatten(image).convert(mode)


def flatten(image, white=None, ground='white'):
  """Turns a PIL image upright, reduces it to 8 bits, and lays it on a ground where it is transparent.

  Args:
    image: PIL image of any mode.
    white: value that becomes 255 in an image of more than 8 bits, which has 256 equal steps from 0 to there. None
      takes 65535, where they are those of `>> 8`, and refuses floating-point numbers.
    ground: colour, by a name or code that Pillow knows.

  Returns:
    PIL image without orientation and transparency.

  Raises:
    ValueError: pixels are floating-point numbers of unknown range.
  """
  image = ImageOps.exif_transpose(image)
  if image.mode == 'F' and white is None:
    raise ValueError('pixels are floating-point numbers, of unknown range')
  if is_deep(image):  # Pillow would clip it at 255
    white, steps = white or 65535, np.array(image, np.float64)
    np.nan_to_num(steps, copy=False)
    np.clip(steps, 0, white, out=steps)
    steps *= 256
    steps /= white
    image = Image.fromarray(steps.clip(0, 255, out=steps).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, ground), image).convert('RGB')
  return image


def is_deep(image):
  """Whether a PIL image has more than 8 bits."""
  return image.mode == 'F' or image.mode.startswith('I')


def name_faint(items):
  """Sentences on images that span fewer than 16 of 256 levels."""
  return [f'{len(items)} images span fewer than {FEW} of 256 levels: {some(items)}'] if items else []


def some(items):
  """Items for a message, the first few of many."""
  return ', '.join(map(str, items[:_NAMED])) + ', ...' * (len(items) > _NAMED)


def list_folders(folder):
  """Names of the visible folders in a folder, sorted; none where there is no folder, or none that may be read."""
  return [entry.name for entry in _visible(folder) if _is(entry.is_dir)]


def list_images(folder):
  """Paths of the visible files in a folder that have the extension of an image format, sorted by name; likewise."""
  return [path for path in list_files(folder) if is_named_image(path)]


def list_files(folder, nested=False):
  """Paths of the visible files in a folder, sorted by name; likewise.

  Args:
    folder: its path.
    nested: files in the folders below follow, at any depth.
  """
  files, seen = [], set()

  def add(place):
    if (real := os.path.realpath(place)) in seen:  # a link leads back
      return
    seen.add(real)
    entries = _visible(place)
    files.extend(entry.path for entry in entries if _is(entry.is_file))
    for entry in entries if nested else ():
      if _is(entry.is_dir):
        add(entry.path)

  add(folder)
  return files


def is_named_image(path):
  """Whether a file has the extension of an image format that can be read."""
  return pathlib.PurePath(path).suffix.lower() in _extensions()


def refusal(folder):
  """Why a folder's entries cannot be listed, such as 'Permission denied'; '' if they can."""
  try:
    os.scandir(folder).close()
  except OSError as error:
    return error.strerror
  return ''


def _visible(folder):
  """Entries of a folder, sorted by name, without what a system keeps there for itself."""
  if not os.path.isdir(folder):
    return []
  try:
    with os.scandir(folder) as entries:
      visible = (entry for entry in entries if not entry.name.startswith('.') and entry.name not in _LITTER)
      return sorted(visible, key=lambda entry: entry.name)
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
  """Names of the formats that Pillow reads by itself: for EPS it would run Ghostscript on a stranger's program.

  With the package pillow-heif, HEIC is one.
  """
  Image.init()
  with contextlib.suppress(UserError):
    system.package('pillow_heif', 'HEIC').register_heif_opener()
  return tuple(name for name in Image.OPEN if name != 'EPS')


@functools.cache
def _extensions():
  known = formats()
  return {extension for extension, name in Image.registered_extensions().items() if name in known}

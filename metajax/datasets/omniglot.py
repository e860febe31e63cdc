"""Omniglot (Lake et al. 2015): 1623 handwritten characters of 50 alphabets, 20 images each. MIT licence."""

import collections
import contextlib
import functools
import io
import json
import pathlib
import zipfile
import zlib

from PIL import ImageChops

from metajax.data import download, table
from metajax.errors import UserError

_ARCHIVES = {  # size in bytes and SHA-256 of the official archives
  'images_background': (9464212, 'ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640'),
  'images_evaluation': (6462886, '1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee'),
}
_MIRRORS = (
  'https://github.com/brendenlake/omniglot/raw/master/python',
  'https://raw.githubusercontent.com/brendenlake/omniglot/master/python',
)
_DRAWERS = 20


def load(data_dir, *, size=28, split='vinyals', rotations=('train', 'val', 'test')):
  """Loads Omniglot, with ink 255 on paper 0, resized as torchmeta does (inverted, then PIL's bilinear filter).

  Tried in order: the converted table; `images_background.zip` and `images_evaluation.zip`, or the folders of these
  names, in `data_dir` or `data_dir/omniglot`; a download of the official archives into `data_dir`.

  Args:
    data_dir: str, where archives lie or are downloaded to; need not exist.
    size: side in pixels.
    split: 'vinyals' (1028 / 172 / 423 characters, Vinyals et al. 2016 as published by Snell et al. 2017) or 'lake'
      (background 964 as train, evaluation 659 as test, no val).
    rotations: the splits in which every character turned by 90, 180 and 270 degrees counts as three more classes:
      character c of C is class c, c + C, c + 2C and c + 3C. All three is the protocol of Vinyals et al. and Snell et
      al. (4112 / 688 / 1692 classes); torchmeta's descendants leave the test split unturned, which is harder.

  Returns:
    split -> ClassTable with images (32460, size, size, 1).

  Raises:
    UserError: an option is unknown; an archive is damaged or is not Omniglot; the download failed.
  """
  splits = _splits()
  if split not in splits:
    raise UserError(f'omniglot has no split {split!r}; choose one of {", ".join(splits)}')
  splits = splits[split]
  if unknown := set(rotations) - {'train', 'val', 'test'}:
    raise UserError(f'omniglot rotations name {sorted(unknown)}; the splits are train, val, test')

  key = f'omniglot-{size}'
  images = table.open_table(key) or _convert(key, data_dir, size)
  turns = {name: range(4) if name in rotations else range(1) for name in splits}
  return table.class_tables(images, {s: [(c, k) for k in turns[s] for c in names] for s, names in splits.items()})


@functools.cache
def _alphabets():
  return json.loads(pathlib.Path(__file__).with_name('splits').joinpath('omniglot.json').read_text())


def _characters():
  """Name of each character, `Alphabet/characterNN` -> its number 1..1623 in the original files."""
  alphabets = _alphabets()['alphabets']  # name -> number of its first character, how many it has
  return {f'{a}/character{k + 1:02d}': first + k for a, (first, count) in alphabets.items() for k in range(count)}


def _splits():
  """'vinyals' or 'lake' -> split -> sorted names of its characters."""
  members = collections.defaultdict(list)  # a split lists characters, or alphabets for all of theirs
  for name in _characters():
    members[name] = [name]
    members[name.split('/')[0]].append(name)
  splits = {kind: _alphabets()[kind] for kind in ('vinyals', 'lake')}
  return {
    kind: {split: sorted(c for entry in entries for c in members[entry]) for split, entries in of_kind.items()}
    for kind, of_kind in splits.items()
  }


def _convert(key, data_dir, size):
  found, source = {}, []
  with contextlib.ExitStack() as stack:
    for half, split in (('images_background', 'train'), ('images_evaluation', 'test')):
      path = _locate(data_dir, half)
      if path.suffix == '.zip':
        archive = stack.enter_context(_open_zip(path))
        files = {name: (archive, name) for name in archive.namelist()}
        source.append(table.describe_file(path))
      else:
        files = {str(file.relative_to(path)): (None, file) for file in sorted(path.glob('*/*/*'))}
        source.append(table.describe_folder(path, [file for _, file in files.values()]))
      found |= _check(files, path, _splits()['lake'][split])

    def decode(item):
      archive, name = item
      file, where = (_read(archive, name), f'{name} in {archive.filename}') if archive else (name, name)
      return table.decode_image(file, where, size, lambda image: ImageChops.invert(image.convert('L')))

    classes = {name: found[name] for name in sorted(found)}
    superclasses = {name: name.split('/')[0] for name in classes}
    return table.convert(key, classes, decode, (size, size, 1), source, superclasses=superclasses)


def _locate(data_dir, half):
  """The archive or folder of one half of the data set, downloaded if there is neither."""
  root = pathlib.Path(data_dir)
  for name in (f'{half}.zip', half):
    for path in (root / name, root / 'omniglot' / name):
      if path.exists():
        return path
  num_bytes, sha256 = _ARCHIVES[half]
  urls = tuple(f'{mirror}/{half}.zip' for mirror in _MIRRORS)
  return download.fetch(download.Remote(f'{half}.zip', urls, sha256, size=num_bytes), root / 'omniglot')


def _check(files, path, characters):
  """Name in archive or folder -> item becomes character -> its 20 items; whatever is not exactly Omniglot is refused.

  The check is on content, not on the hash, because archives that were unpacked and packed again are as good.
  """
  numbers = _characters()
  expected = {c: [f'{c}/{numbers[c]:04d}_{k + 1:02d}.png' for k in range(_DRAWERS)] for c in characters}
  images = {
    '/'.join(pathlib.PurePath(name).parts[-3:]): item
    for name, item in files.items()
    if name.endswith('.png') and '__MACOSX' not in name
  }
  missing = {name for names in expected.values() for name in names} - images.keys()
  if missing or len(images) != _DRAWERS * len(characters):
    example = f'{min(missing)} is missing' if missing else 'there are others besides'
    raise UserError(
      f'{path} is not this half of Omniglot: it holds {len(images)} images of '
      f'{len({name.rpartition("/")[0] for name in images})} characters rather than {_DRAWERS * len(characters)} of '
      f'{len(characters)} ({example}); replace it, or remove it to have the original downloaded'
    )
  return {c: [images[name] for name in names] for c, names in expected.items()}


def _open_zip(path):
  try:
    return zipfile.ZipFile(path)
  except (OSError, zipfile.BadZipFile) as error:
    raise UserError(f'{path} cannot be read ({error}); replace it, or remove it to download it again') from error


def _read(archive, name):
  try:
    return io.BytesIO(archive.read(name))
  except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(
      f'{archive.filename} is damaged at {name} ({error}); replace it, or remove it to download it again'
    ) from error

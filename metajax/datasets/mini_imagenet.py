"""mini-ImageNet (Vinyals et al. 2016) in the split of Ravi and Larochelle (2017): 100 ILSVRC classes of 600 images.

ImageNet's terms allow research and education only and no redistribution, so nothing is downloaded.
"""

import base64
import collections
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import tarfile
import zlib

import numpy as np
from PIL import Image

from metajax.data import table, unpickle
from metajax.datasets import folder
from metajax.errors import UserError

_log = logging.getLogger(__name__)

_FOLDERS = ('mini_imagenet', 'miniimagenet', 'mini-imagenet', '')
_ARCHIVE = 'mini-imagenet.tar.gz'
_CACHE = re.compile(r'mini-imagenet-cache-(train|val|validation|test)\.pkl')
_WNID = re.compile(r'n\d{8}')
_FLAT = re.compile(r'(n\d{8})\d{8}\.jpe?g', re.IGNORECASE)
_PER_CLASS = 600


def load(data_dir, *, size=84):
  """Loads mini-ImageNet.

  Tried in order: the converted table of the whole data set; then, in `mini_imagenet`, `miniimagenet`
  or `mini-imagenet` in `data_dir`, or in `data_dir` itself,
    - `mini-imagenet-cache-{train,val,test}.pkl` (or `validation`), as published by Ren et al. and learn2learn,
    - `mini-imagenet.tar.gz` with these,
    - images in `{train,val,test}/<wnid>/` or `<wnid>/`, or all in one folder and named `<wnid>%08d.jpg`; the last
      two also in `images/`.
  ILSVRC's own class folders serve too: the 600 images of each class are those of Ravi and Larochelle's list. So does
  a part of the data set, of which a warning says what is missing. Whatever the files are called, a class belongs to
  the split that Ravi and Larochelle put it in. Images of another size are squashed to size x size (bilinear), so
  pixels differ a little between sources, as they do between published copies.

  Args:
    data_dir: str.
    size: side in pixels.

  Returns:
    split -> ClassTable with images (60000, size, size, 3); a split without any class is absent.

  Raises:
    UserError: nothing is found, it is damaged, or it has classes of another data set.
  """
  key = f'mini_imagenet-{size}'
  images = table.open_table(key) or _convert(key, data_dir, size)
  for note in images.notes:
    _log.warning('mini-ImageNet is not whole: %s', note)
  splits = {split: [c for c in classes if c in images.names] for split, classes in _lists().items()}
  return table.class_tables(images, {split: classes for split, classes in splits.items() if classes})


@functools.cache
def _lists():
  """split -> wnid -> (images of the class in ILSVRC, the listed ones' ranks there as a bitmap in base 64)."""
  return json.loads(pathlib.Path(__file__).with_name('splits').joinpath('mini_imagenet.json').read_text())


@functools.cache
def _classes():
  return dict(itertools.chain.from_iterable(classes.items() for classes in _lists().values()))


def _convert(key, data_dir, size):
  root, files, read = _find(data_dir)
  listing = table.describe_folder(root, files)
  part_key = f'{key}-{listing["fingerprint"][:16]}'  # a part of the data set must not pass for the whole
  if part := table.open_table(part_key):
    return part
  classes = {c: items for c, items in sorted(read(files).items()) if items}
  if not classes:
    raise UserError(f'{files[0]} has no images of mini-ImageNet: replace it')

  def decode(item):
    if isinstance(item, str):
      return table.decode_image(item, item, size, lambda image: folder.to_mode(image, 'RGB'))
    images, row = item
    return np.asarray(Image.fromarray(images[row]).resize((size, size), Image.Resampling.BILINEAR))

  notes = _deviations(classes)
  source = [listing] if read is _read_images else [table.describe_file(file) for file in files]
  return table.convert(part_key if notes else key, classes, decode, (size, size, 3), source, notes=notes)


def _deviations(classes):
  """How classes, wnid -> images, differ from the data set as published, for a person to read."""
  found = {split: len(members.keys() & classes.keys()) for split, members in _lists().items()}
  notes = [f'{split} has {found[split]} of {len(members)} classes' for split, members in _lists().items()]
  odd = [f'{c} ({len(items)})' for c, items in classes.items() if len(items) != _PER_CLASS]
  if odd:
    notes.append(f'{len(odd)} classes have not {_PER_CLASS} images: {", ".join(odd[:5])}{", ..." * (len(odd) > 5)}')
  return notes if odd or len(classes) < len(_classes()) else []


def _find(data_dir):
  """The first source there is: its folder, its files, and the function that reads them."""
  for name in _FOLDERS:
    root = os.path.normpath(os.path.join(data_dir, name))
    if os.path.isdir(root):
      names = sorted(os.listdir(root))
      if caches := [os.path.join(root, name) for name in names if _CACHE.fullmatch(name)]:
        return root, caches, _read_caches
      if _ARCHIVE in names:
        return root, [os.path.join(root, _ARCHIVE)], _read_archive
      for base in (root, os.path.join(root, 'images')):
        if os.path.isdir(base) and (files := _list_images(base)):
          return root, files, _read_images
  place = os.path.join(data_dir, 'mini_imagenet')
  raise UserError(
    f"mini-ImageNet is not in {data_dir}, and ImageNet's terms forbid downloading it for you: put {_ARCHIVE}, or "
    f'mini-imagenet-cache-{{train,val,test}}.pkl, or image folders {{train,val,test}}/<wnid>/ in {place}'
  )


def _list_images(base):
  """Paths of the images of mini-ImageNet in class folders of the splits, else in class folders, else in `base`."""
  top = folder.list_folders(base)
  in_splits = [(s, c) for s in top if s in folder.SPLITS for c in folder.list_folders(os.path.join(base, s))]
  places = [os.path.join(base, s, c) for s, c in in_splits if _WNID.fullmatch(c)]
  places = places or [os.path.join(base, c) for c in top if _WNID.fullmatch(c)]
  if not places:
    return [file for file in folder.list_images(base) if _FLAT.fullmatch(os.path.basename(file))]
  names = [os.path.basename(place) for place in places]
  if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
    raise UserError(f'class {twice[0]} is in two splits of {base}: remove it from one')
  _check_classes(names, base)
  return [file for place, c in zip(places, names, strict=True) if c in _classes() for file in folder.list_images(place)]


def _check_classes(names, where):
  """Refuses classes of another list, unless all of ours are there too: then it is ILSVRC as a whole."""
  strange = sorted(set(names) - _classes().keys())
  if strange and _classes().keys() - set(names):
    raise UserError(
      f"{where} has class {strange[0]}, which is not in Ravi and Larochelle's mini-ImageNet (there is another data set "
      f'of that name): {len(strange)} of {len(set(names))} classes are strange; remove them, or use data.name=folder'
    )


def _read_images(files):
  """Files -> wnid -> the files that belong to mini-ImageNet."""
  classes = collections.defaultdict(list)
  for file in files:
    place, name = os.path.split(file)
    parent = os.path.basename(place)
    classes[parent if _WNID.fullmatch(parent) else _FLAT.fullmatch(name)[1]].append(file)
  _check_classes(classes, os.path.dirname(files[0]))
  return {c: _listed(c, classes[c]) for c in classes if c in _classes()}


def _listed(wnid, files):
  """Of a whole ILSVRC class folder, the images whose rank by number is in Ravi and Larochelle's list."""
  matches = [re.fullmatch(rf'{wnid}_(\d+)\.jpe?g', os.path.basename(file), re.IGNORECASE) for file in files]
  if len(files) <= _PER_CLASS or not all(matches):
    return files
  total, bitmap = _classes()[wnid]
  if len(files) != total:
    raise UserError(
      f"{os.path.dirname(files[0])} has {len(files)} of ILSVRC's {total} images: mini-ImageNet's are found by their "
      'rank among all, so complete the folder'
    )
  ranked = [file for _, file in sorted((int(match[1]), file) for match, file in zip(matches, files, strict=True))]
  return [ranked[rank - 1] for rank in _ranks(bitmap)]


def _ranks(bitmap):
  return 1 + np.flatnonzero(np.unpackbits(np.frombuffer(base64.b64decode(bitmap), np.uint8)))


def _read_caches(files):
  """Pickles -> wnid -> (images, row) of each of its images."""
  return _merge((file, unpickle.load(file)) for file in files)


def _read_archive(files):
  """Likewise from the archive, straight from the stream."""
  try:
    with tarfile.open(files[0], 'r|*') as archive:
      return _merge(
        (f'{member.name} in {files[0]}', unpickle.load(archive.extractfile(member), f'{member.name} in {files[0]}'))
        for member in archive
        if member.isfile() and _CACHE.fullmatch(os.path.basename(member.name))
      )
  except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
    raise UserError(f'{files[0]} is damaged ({error}): replace it') from error


def _merge(caches):
  classes = {}
  for name, cache in caches:
    try:
      images, members = cache['image_data'], cache['class_dict']
      if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f'image_data is {images.dtype} {images.shape}')
      for c, rows in members.items():
        if c in classes:
          raise ValueError(f'class {c} is in another split too')
        if len(rows) and not 0 <= min(rows) <= max(rows) < len(images):
          raise ValueError(f'rows of class {c} are beyond the {len(images)} images')
        classes[c] = [(images, row) for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise UserError(f'{name} is no mini-ImageNet cache ({error!r}): replace it') from error
    _check_classes(members, name)
  return classes

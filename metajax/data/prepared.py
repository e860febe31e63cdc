"""Image data sets that TensorFlow Datasets (TFDS) has prepared on this machine.

Reading them needs no TensorFlow; preparing one of TFDS's own data sets does.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from metajax import system
from metajax.data import images
from metajax.data.table import locked
from metajax.errors import UserError, first_line

_BUILDER = re.compile(r'(\w+)(?:/([^/:]+))?(?::(\d+\.\d+\.\d+))?')  # name, config, version
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_CLASS_KEYS = 'pythonClassName', 'python_class_name', 'type'  # the last is of older versions of TFDS
_SPARE_FILES = 256  # that the rest of the process may have open besides a data set's


class Item(NamedTuple):
  """An image that is not decoded yet. Its `str` says which it is, for errors."""

  where: str  # the split it belongs to, for errors
  number: int  # among the examples of the split
  load: Callable  # number -> the encoded image (bytes), or its pixels (h, w, 1, 3 or 4) uint8

  def __str__(self):
    return f'example {self.number} of {self.where}'

  def open(self):
    """Reads the image, as a PIL image in the mode in which it is stored; may be called from several threads.

    Raises:
      UserError: it cannot be read.
      PIL.UnidentifiedImageError: it is no image.
    """
    try:
      content = self.load(self.number)
    except Exception as error:  # array_record's are RuntimeErrors
      raise _unreadable(self, error) from error
    if isinstance(content, bytes):
      return Image.open(io.BytesIO(content), formats=images.formats())
    return Image.fromarray(content[..., 0] if content.shape[2] == 1 else content)


class Record(NamedTuple):
  """What is known of one example without decoding its image."""

  split: str  # of TFDS, such as 'train'
  label: str  # name of the class; its number, where TFDS knows no name
  extra: dict[str, Any]  # the features that were asked for: names of classes and texts as str, others as they are
  item: Item


def find(builder, data_dir):
  """Looks for a prepared data set.

  Places, in order: `tensorflow_datasets` in `data_dir`, `data_dir`, `$TFDS_DATA_DIR`, `~/tensorflow_datasets`. The
  first that has the data set counts, and there the newest version.

  Args:
    builder: 'name', 'name/config', 'name:version' or 'name/config:version'.
    data_dir: str, need not exist.

  Returns:
    pathlib.Path of the folder of a version, such as `.../omniglot/3.0.0`; None if there is none.

  Raises:
    UserError: `builder` is malformed, or names no config and only configs are prepared.
  """
  name, config, version = _parse(builder)
  places = [os.path.join(data_dir, 'tensorflow_datasets'), data_dir, os.environ.get('TFDS_DATA_DIR')]
  for place in [*filter(None, places), '~/tensorflow_datasets']:
    folder = pathlib.Path(place).expanduser() / name
    versions = [v for v in _versions(folder / (config or '')) if version in (None, v)]
    if versions:
      return folder / (config or '') / max(versions, key=lambda v: [int(part) for part in v.split('.')])
    if not config and (configs := [child.name for child in _children(folder) if _versions(child)]):
      raise UserError(f'{folder} has configs ({", ".join(configs)}): name one of them, as in {name}/{configs[0]}')
  return None


def read(builder, folder, extra=()):
  """Reads the labels of a prepared data set; images wait until `Item.open`.

  Labels take about 0.1 ms per example, more where the disk is slow, as every example is read whole.

  Args:
    builder: what the data set is called in errors.
    folder: as returned by `find`.
    extra: names of other features that records should have.

  Returns:
    iterator over Records, split by split in the order of TFDS. Examples without a label (-1) are left out.

  Raises:
    UserError: the files are damaged or not all there (while iterating, too), are neither ArrayRecord, Parquet nor
      TFRecord files, have no image or no label or several of which none stands out, lack a feature of `extra`, or
      need code that is not TFDS's own.
  """
  where = f'TFDS {builder} in {folder}'
  tfds = system.package('tensorflow_datasets', f'reading {where}')  # only here, to keep looking for a data set quick
  try:
    names = list(_class_names((pathlib.Path(folder) / 'features.json').read_text('utf-8')))
    if strange := [name for name in names if not name.startswith('tensorflow_datasets.')]:
      raise UserError(f'{where} is not read: it asks for code, {strange[0]}, which is not of TFDS; do not trust it')
    prepared = tfds.builder_from_directory(folder)
    features, splits = prepared.info.features, prepared.info.splits.values()
  except UserError:
    raise
  except Exception as error:  # from OSError to those of JSON
    raise _unreadable(where, error) from error
  image, label = _choose_features(prepared.info, where)
  if unknown := set(extra) - set(features):
    raise UserError(f'{where} has no feature {min(unknown)}; it has {", ".join(sorted(features))}')
  if missing := [path for split in splits for path in split.filepaths if not os.path.exists(path)]:
    raise _unreadable(where, f'{os.path.basename(missing[0])} is missing')

  wanted = {name: features[name] for name in (label, *extra)}
  skip = {image: tfds.decode.SkipDecoding()} if isinstance(features[image], tfds.features.Image) else None
  places = {split.name: f'split {split.name} of {where}' for split in splits}
  try:
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    sources = {split: prepared.as_data_source(split, deserialize_method=raw) for split in places}
    _allow_open_files(sum(len(split.filepaths) for split in splits), where)
  except NotImplementedError as error:  # TFDS has no random access to this format
    if prepared.info.file_format.value != 'tfrecord':
      raise UserError(
        f"{where} is stored as {prepared.info.file_format.value}: prepare it again with file_format='array_record'"
      ) from error
    sources = {split.name: _TfRecords(split, where) for split in splits}

  parse = tfds.features.FeaturesDict(wanted).deserialize_example_np
  parse_image = tfds.features.FeaturesDict({image: features[image]}).deserialize_example_np

  def load(split, number):
    return parse_image(_fetch(sources[split], number), decoders=skip)[image]

  examples = {
    split: _by_number(place, sources[split], parse, functools.partial(load, split)) for split, place in places.items()
  }
  return _records(examples, wanted, label)


def _class_names(description):
  """Names of Python classes in what features.json says, which TFDS would import. Strings may be JSON themselves."""
  if isinstance(description, str):
    with contextlib.suppress(ValueError):
      yield from _class_names(json.loads(description))
  elif isinstance(description, list):
    for value in description:
      yield from _class_names(value)
  elif isinstance(description, dict):
    for key, value in description.items():
      if key in _CLASS_KEYS and isinstance(value, str):
        yield value
      yield from _class_names(value)


class _TfRecords:
  """Random access to TFRecord files.

  A record is its length (uint64), a checksum of the length (4 bytes), the content, and a checksum of it (4 bytes). The
  checksums are not verified: a picture that is damaged does not decode.
  """

  def __init__(self, split, where):
    self._records = []  # path, offset, length
    for path in map(os.fspath, split.filepaths):
      with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        while header := file.read(12):
          length = int.from_bytes(header[:8], 'little')
          self._records.append((path, file.tell(), length))
          if file.seek(length + 4, os.SEEK_CUR) > size:
            raise _unreadable(where, f'{os.path.basename(path)} is cut short')
    if len(self._records) != split.num_examples:
      raise _unreadable(where, f'split {split.name} has {len(self._records)} of {split.num_examples} examples')

  def __len__(self):
    return len(self._records)

  def __getitem__(self, number):
    path, offset, length = self._records[number]
    with open(path, 'rb') as file:
      file.seek(offset)
      return file.read(length)


def _allow_open_files(files, where):
  """Raises the limit of open files, since array_record closes none: ImageNet has 1088 and the usual limit is 1024."""
  needed = files + _SPARE_FILES
  if limit := system.allow_open_files(needed):
    raise UserError(
      f'{where} has {files} files, which stay open together, but this process may open only {limit}: '
      f'raise the limit to {needed} with ulimit -n'
    )


def _records(examples, wanted, label):
  """Turns split -> (example, Item)s into Records."""
  for split, of_split in examples.items():
    for example, item in of_split:
      if example[label] >= 0:
        try:
          values = {name: _value(feature, example[name]) for name, feature in wanted.items()}
        except (IndexError, ValueError) as error:  # a label beyond the names, a text that is not UTF-8
          raise _unreadable(item, error) from error
        yield Record(split, values.pop(label), values, item)


def _by_number(place, source, parse, load):
  """Yields (example, Item) of a split from files with random access."""
  for number in range(len(source)):
    try:
      example = parse(_fetch(source, number))
    except Exception as error:  # RuntimeError of array_record, others of the parser
      raise _unreadable(f'example {number} of {place}', error) from error
    yield example, Item(place, number, load)


def _fetch(source, number):
  record = source[number]
  if not record:  # what array_record returns from a file that was cut at the end of a block
    raise EOFError('the file is cut short')
  return record


def prepare(builder, data_dir):
  """Downloads and prepares one of TFDS's data sets in `tensorflow_datasets` in `data_dir`, for `find`.

  Of several processes one prepares and the others wait for it. Needs TensorFlow, since the code of the data sets does.

  Args:
    builder: as for `find`.
    data_dir: str.

  Raises:
    UserError: TensorFlow is not installed, TFDS knows no such data set, or cannot get it.
  """
  tfds = system.package('tensorflow_datasets', f'preparing TFDS {builder}')
  name, _, _ = _parse(builder)
  root = pathlib.Path(data_dir, 'tensorflow_datasets')
  if name not in tfds.list_builders(with_community_datasets=False):
    raise UserError(f'TFDS has no data set {name}: www.tensorflow.org/datasets/catalog lists them')
  if not _has_tensorflow():
    raise UserError(
      f'TFDS {builder} is not prepared, and preparing it needs TensorFlow: install tensorflow, or copy '
      f"the folder {name} from a machine where TFDS prepared it with file_format='array_record' to {root}"
    )
  _hide_gpus()
  try:
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f'.{name}.lock'):
      tfds.builder(builder, data_dir=root, file_format='array_record').download_and_prepare()
  except Exception as error:  # no network, a full disk, files to be fetched by hand
    raise UserError(f'TFDS cannot prepare {builder} in {root}: {first_line(error)}') from error


def _parse(builder):
  match = _BUILDER.fullmatch(builder)
  if not match:
    raise UserError(f'{builder!r} is not the name of a TFDS data set, such as omniglot, omniglot:3.0.0 or name/config')
  return match.groups()


def _children(folder):
  return sorted(folder.iterdir()) if folder.is_dir() else []


def _versions(folder):
  return [child.name for child in _children(folder) if _VERSION.fullmatch(child.name)]


def _has_tensorflow():
  return importlib.util.find_spec('tensorflow') is not None


def _hide_gpus():
  """Keeps TensorFlow from taking the memory of the GPUs that JAX computes on."""
  import tensorflow as tf

  with contextlib.suppress(RuntimeError):  # the caller uses it already
    tf.config.set_visible_devices([], 'GPU')


def _choose_features(info, where):
  """Names of the image and of the label among the features."""
  import tensorflow_datasets as tfds

  def is_image(feature):
    pixels = isinstance(feature, tfds.features.Image) or type(feature) is tfds.features.Tensor
    return pixels and feature.np_dtype == np.uint8 and len(feature.shape) == 3 and feature.shape[2] in (1, 3, 4)

  def choose(kind, admits, supervised):
    names = sorted(name for name, feature in info.features.items() if admits(feature))
    for name in (kind, supervised):
      if name in names:
        return name
    if len(names) == 1:
      return names[0]
    found = f'{len(names)} ({", ".join(names)})' if names else f'none among {", ".join(sorted(info.features))}'
    raise UserError(f'{where} is not for image classification: it should have one {kind} feature, but has {found}')

  image, label, *_ = info.supervised_keys or (None, None)
  return choose('image', is_image, image), choose('label', lambda f: isinstance(f, tfds.features.ClassLabel), label)


def _value(feature, value):
  if hasattr(feature, 'int2str'):
    return feature.int2str(value) if value >= 0 else None
  if isinstance(value, bytes):
    return value.decode()
  return value.item() if isinstance(value, np.generic) else value


def _unreadable(what, error):
  return UserError(f'{what} cannot be read ({first_line(error)}): remove this folder and prepare it again')

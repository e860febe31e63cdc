"""Reading pickles that strangers made: nothing in them is run, and long strings are not taken into memory."""

import _codecs
import collections
import os
import pickle
import struct
from typing import NamedTuple

import numpy as np

from metajax.errors import UserError

_LONG = 512  # bytes from which on a string stays in the file


class _Outside(NamedTuple):
  """A byte string that stays in the file."""

  offset: int
  size: int


class _Array:
  """What stands for an array until all of the pickle is read."""

  def __setstate__(self, state):
    _, self.shape, self.dtype, self.by_columns, self.content = state


def _reconstruct(kind, shape, typecode):
  del kind, shape, typecode  # of an empty array: __setstate__ follows
  return _Array()


def _from_buffer(content, dtype, shape, order, axis_order=None):
  if axis_order is not None:
    raise ValueError('an array of permuted axes')
  array = _Array()
  array.__setstate__((1, shape, dtype, order == 'F', content))
  return array


def _empty_bytes(*arguments):
  """Python 3 writes empty bytes in protocol 2 as a call of `bytes`, which with a size takes that much memory."""
  if arguments:
    raise ValueError('bytes of a size')
  return b''


_BUILTINS = {
  **{t.__name__: t for t in (list, dict, set, frozenset, tuple, int, float, complex, str)},
  **{'bytes': _empty_bytes, 'bytearray': _empty_bytes},
}
_NUMPY_CORE = {
  ('multiarray', '_reconstruct'): _reconstruct,
  ('multiarray', 'scalar'): np._core.multiarray.scalar,
  ('numeric', '_frombuffer'): _from_buffer,  # contiguous arrays in protocol 5
}
_ADMITTED = {
  ('numpy', 'ndarray'): np.ndarray,
  ('numpy', 'dtype'): np.dtype,
  ('_codecs', 'encode'): _codecs.encode,  # how Python 3 writes bytes in protocol 2
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('collections', 'defaultdict'): collections.defaultdict,
  **{(module, name): t for module in ('builtins', '__builtin__') for name, t in _BUILTINS.items()},
  **{
    (f'numpy.{core}.{module}', name): function
    for core in ('core', '_core')  # before and since NumPy 2
    for (module, name), function in _NUMPY_CORE.items()
  },
}


class _File:
  """A binary file that is not asked for more than it has: the answer would be made room for."""

  def __init__(self, file):
    self._file, self._size = file, os.fstat(file.fileno()).st_size
    self.tell = file.tell

  def readline(self):
    line = self._file.readline()
    if not line.endswith(b'\n'):
      raise EOFError('cut short')
    return line

  def read(self, size):
    if size > self._size - self.tell():
      raise EOFError('cut short')
    return self._file.read(size)

  def skip(self, size):
    if size > self._size - self.tell():
      raise EOFError('cut short')
    self._file.seek(size, os.SEEK_CUR)


class _Unpickler(pickle._Unpickler):
  """The unpickler in Python: unlike the one in C its instructions can be changed."""

  dispatch = pickle._Unpickler.dispatch.copy()

  def __init__(self, file):
    # Latin-1 keeps each byte of a Python 2 string, among which are the pixels of its arrays.
    self._file = _File(file)
    super().__init__(self._file, encoding='latin1')

  def find_class(self, module, name):
    if (module, name) not in _ADMITTED:
      raise UserError(f'{module}.{name}')
    return _ADMITTED[module, name]

  def _load_frame(self):
    self.read(8)  # frames serve reading ahead; without them the file's position is the pickle's

  def _load_bytes(self, length, decode=bytes):
    (size,) = struct.unpack(length, self.read(struct.calcsize(length)))
    if size < _LONG:
      self.append(decode(self.read(size)))
    else:
      self.append(_Outside(self._file.tell(), size))
      self._file.skip(size)

  dispatch[pickle.FRAME[0]] = _load_frame
  dispatch[pickle.BINBYTES[0]] = lambda self: self._load_bytes('<I')
  dispatch[pickle.BINBYTES8[0]] = lambda self: self._load_bytes('<Q')
  dispatch[pickle.BYTEARRAY8[0]] = lambda self: self._load_bytes('<Q')
  dispatch[pickle.BINSTRING[0]] = lambda self: self._load_bytes('<I', lambda content: content.decode('latin1'))


def load(path):
  """Unpickles NumPy arrays in plain containers, from Python 2 or 3.

  Args:
    path: of the pickle.

  Returns:
    the object; keys of dictionaries that are bytes become str. Arrays are read-only views of the file, mapped into
    memory, and so are byte strings of more than 511 bytes, as uint8 arrays.

  Raises:
    UserError: the file is cut short, is not a pickle, or asks for anything but arrays and containers.
  """
  try:
    with open(path, 'rb') as file:
      value = _Unpickler(file).load()
    return _finish(value, np.memmap(path, np.uint8, 'r').view(np.ndarray), {})
  except UserError as error:
    raise UserError(
      f'{path} is not loaded: it asks for {error}, and only NumPy arrays in plain containers are read'
    ) from None
  except FileNotFoundError:
    raise
  except Exception as error:  # broken pickles raise whatever their last instruction does
    raise UserError(f'{path} is damaged or not a pickle ({error}): replace it') from error


def _finish(value, content, done):
  """Puts arrays in the place of what stands for them.

  Args:
    value: what was unpickled.
    content: uint8, the file.
    done: id of a container -> (the container, what became of it): pickles may hold one twice.
  """
  if isinstance(value, _Outside):
    return content[value.offset : value.offset + value.size]
  if not isinstance(value, (_Array, dict, list, tuple)):
    return value
  if id(value) not in done:
    if isinstance(value, _Array):
      result = _array(value, content, done)
    elif isinstance(value, dict):
      result = {_text(k): _finish(v, content, done) for k, v in value.items()}
    else:
      result = type(value)(_finish(v, content, done) for v in value)
    done[id(value)] = value, result
  return done[id(value)][1]


def _array(value, content, done):
  """The ndarray that an _Array stands for; the other arguments as for `_finish`."""
  order = 'F' if value.by_columns else 'C'
  if value.dtype.hasobject:
    array = np.empty(len(value.content), object)
    array[:] = [_finish(v, content, done) for v in value.content]
    return array.reshape(value.shape, order=order)
  data = _finish(value.content, content, done)
  data = data.encode('latin1') if isinstance(data, str) else data
  if not len(data):
    return np.empty(value.shape, value.dtype)
  return np.frombuffer(data, value.dtype).reshape(value.shape, order=order)


def _text(key):
  return key.decode('latin1') if isinstance(key, bytes) else key

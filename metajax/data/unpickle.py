"""Reading pickles that strangers made: nothing in them is run, and long strings are not taken into memory."""

import collections.abc
import os
import pickle
import re
import struct
from typing import NamedTuple

import numpy as np

from metajax.errors import UserError, first_line

_LONG = 512  # bytes from which on a string stays in the file
_DTYPES = re.compile(r'[|<>=]?(b1|[iu][1248]|f[248]|c8|c16|S\d{1,4}|U\d{1,4}|O8?)')


class _Outside(NamedTuple):
  """A byte string that stays in the file."""

  offset: int
  size: int


# NumPy's own dtypes and arrays believe what a pickle says of them, such as that what a file holds are pointers. What
# stands for them here believes nothing, and becomes one of NumPy's when all of the pickle is read.


class _Dtype:
  """What stands for a dtype."""

  def __init__(self, name, align=False, copy=True):
    del align, copy
    if not _DTYPES.fullmatch(name):
      raise UserError(f'dtype {name!r}')
    self._name, self._order = name, '|'

  def set_state(self, state):
    _, self._order, *parts = state[:5]
    if self._order not in ('<', '>', '|', '=') or any(part is not None for part in parts):
      raise ValueError('a dtype of several parts or of no byte order')

  def make(self):
    return np.dtype(self._name).newbyteorder(self._order)


class _Array:
  """What stands for an array."""

  def set_state(self, state):
    _, self.shape, self.dtype, self.by_columns, self.content = state


def _reconstruct(kind, shape, typecode):
  del kind, shape, typecode  # of an empty array: its state follows
  return _Array()


def _from_buffer(content, dtype, shape, order, axis_order=None):
  if axis_order is not None:
    raise ValueError('an array of permuted axes')
  array = _Array()
  array.set_state((1, shape, dtype, order == 'F', content))
  return array


def _scalar(dtype, content):
  (value,) = np.frombuffer(_bytes(content), dtype.make())  # which has no objects made of bytes
  return value


def _bytes(content):
  return content.encode('latin1') if isinstance(content, str) else content  # a str is Python 2's


def _encode(text, encoding):
  """How Python 3 writes bytes in protocol 2."""
  if not isinstance(text, str) or encoding != 'latin1':
    raise ValueError('an encoding other than of text as Latin-1')
  return text.encode('latin1')


def _empty_bytes(*arguments):
  """Likewise, if there are none. With a size `bytes` takes that much memory."""
  if arguments:
    raise ValueError('bytes of a size')
  return b''


def _set(members):
  _Keys().check(members)
  return set(members)


def _frozenset(members):
  _Keys().check(members)
  return frozenset(members)


def _dict(items=()):
  _Keys().check(key for key, _ in items)
  return dict(items)


def _default_dict(factory=None):
  del factory
  return {}


def _complex(real, imaginary):
  if not isinstance(real, float) or not isinstance(imaginary, float):
    raise ValueError('a complex number of no numbers')
  return complex(real, imaginary)


class _Keys:
  """Keys and members are flat, and do not collide: Python takes quadratic time where many have the same hash."""

  def __init__(self):
    self._by_hash = {}

  def check(self, keys):
    for key in keys:
      for part in key if type(key) is tuple else (key,):
        if type(part) not in _KEYS and not isinstance(part, np.generic):  # a deep hash ends Python
          raise ValueError(f'a key with a {type(part).__name__}')
      if type(key) not in (str, bytes):  # whose hashes differ from process to process
        same = self._by_hash.setdefault(hash(key), {key})
        same.add(key)
        if len(same) > _COLLIDING:
          raise ValueError('keys that have the same hash')


_COLLIDING = 32  # so many keys of the same hash are an attack: of numbers in use, -1 and -2 share one
_KEYS = {int, bool, float, complex, str, bytes, type(None)}
_BUILTINS = {
  **{'set': _set, 'frozenset': _frozenset, 'complex': _complex, 'bytes': _empty_bytes, 'bytearray': _empty_bytes},
  **{name: name for name in ('list', 'dict', 'int', 'float', 'str', 'tuple')},  # of a defaultdict: never called
}
_NUMPY_CORE = {
  ('multiarray', '_reconstruct'): _reconstruct,
  ('multiarray', 'scalar'): _scalar,
  ('numeric', '_frombuffer'): _from_buffer,  # contiguous arrays in protocol 5
}
_ADMITTED = {
  ('numpy', 'ndarray'): 'ndarray',  # an argument of _reconstruct
  ('numpy', 'dtype'): _Dtype,
  ('_codecs', 'encode'): _encode,
  ('collections', 'OrderedDict'): _dict,
  ('collections', 'defaultdict'): _default_dict,
  **{(module, name): t for module in ('builtins', '__builtin__') for name, t in _BUILTINS.items()},
  **{
    (f'numpy.{core}.{module}', name): function
    for core in ('core', '_core')  # before and since NumPy 2
    for (module, name), function in _NUMPY_CORE.items()
  },
}


class _Budget:
  """For what is made of something that may be there once and asked for again and again.

  Twice the size of the file, as nothing is made of anything more than twice: text becomes bytes becomes a scalar.
  """

  def __init__(self, path):
    self._left = 2 * os.path.getsize(path)

  def take(self, made):
    self._left -= len(made)
    if self._left < 0:
      raise ValueError('what it asks for is larger than what it has')


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
  for code in pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.EXT1 + pickle.EXT2 + pickle.EXT4:
    del dispatch[code]  # arrays and containers do without

  def __init__(self, file, budget):
    # Latin-1 keeps each byte of a Python 2 string, among which are the pixels of its arrays.
    self._file, self._budget, self._keys = _File(file), budget, _Keys()
    super().__init__(self._file, encoding='latin1')

  def find_class(self, module, name):
    if (module, name) not in _ADMITTED:
      raise UserError(f'{module}.{name}')
    return _ADMITTED[module, name]

  def _load_reduce(self):
    self.load_reduce()
    if isinstance(self.stack[-1], collections.abc.Sized):
      self._budget.take(self.stack[-1])

  def _load_build(self):
    state = self.stack.pop()
    if not isinstance(self.stack[-1], (_Array, _Dtype)):
      raise ValueError('attributes of what is no array')
    self.stack[-1].set_state(state)

  def _load_keys(self, load, step=1):
    self._keys.check(self.stack[::step])  # since the last mark
    load(self)

  def _load_setitem(self):
    self._keys.check(self.stack[-2:-1])
    self.load_setitem()

  def _load_frame(self):
    self.read(8)  # frames serve reading ahead; without them the file's position is the pickle's

  def _load_bytes(self, length, decode=bytes):
    (size,) = struct.unpack(length, self.read(struct.calcsize(length)))
    if size < _LONG:
      self.append(decode(self.read(size)))
    else:
      self.append(_Outside(self._file.tell(), size))
      self._file.skip(size)

  dispatch[pickle.REDUCE[0]] = _load_reduce
  dispatch[pickle.BUILD[0]] = _load_build
  dispatch[pickle.SETITEM[0]] = _load_setitem
  dispatch[pickle.SETITEMS[0]] = lambda self: self._load_keys(pickle._Unpickler.load_setitems, 2)
  dispatch[pickle.DICT[0]] = lambda self: self._load_keys(pickle._Unpickler.load_dict, 2)
  dispatch[pickle.ADDITEMS[0]] = lambda self: self._load_keys(pickle._Unpickler.load_additems)
  dispatch[pickle.FROZENSET[0]] = lambda self: self._load_keys(pickle._Unpickler.load_frozenset)
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
    budget = _Budget(path)
    with open(path, 'rb') as file:
      value = _Unpickler(file, budget).load()
    return _Finish(np.memmap(path, np.uint8, 'r').view(np.ndarray), budget)(value)
  except UserError as error:
    raise UserError(
      f'{path} is not loaded: it asks for {first_line(error)}, and only NumPy arrays in plain containers are read'
    ) from None
  except FileNotFoundError:
    raise
  except Exception as error:  # broken pickles raise whatever their last instruction does
    raise UserError(f'{path} is damaged or not a pickle ({first_line(error)}): replace it') from error


class _Finish:
  """Puts arrays in the place of what stands for them.

  Args:
    content: uint8, the file.
    budget: of `load`.
  """

  def __init__(self, content, budget):
    self._content, self._budget = content, budget
    self._done = {}  # id of what was unpickled -> (it, what became of it): pickles may hold one twice

  def __call__(self, value):
    if isinstance(value, _Outside):
      return self._content[value.offset : value.offset + value.size]
    if isinstance(value, _Dtype):
      return value.make()
    if isinstance(value, _Array):
      return self._once(value, self._array)
    if isinstance(value, dict):
      return self._once(value, lambda value: {self._text(k): self(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
      return self._once(value, lambda value: type(value)(map(self, value)))
    return value

  def _once(self, value, make):
    if id(value) not in self._done:
      self._done[id(value)] = value, make(value)
    return self._done[id(value)][1]

  def _text(self, key):
    return self._once(key, lambda key: key.decode('latin1')) if isinstance(key, bytes) else key

  def _array(self, value):
    dtype, order = value.dtype.make(), 'F' if value.by_columns else 'C'
    if isinstance(value.content, (list, str)):
      self._budget.take(value.content)
    if dtype.hasobject:
      if not isinstance(value.content, list):
        raise ValueError('an array of objects made of bytes')
      array = np.fromiter(map(self, value.content), object, len(value.content))
      return array.reshape(value.shape, order=order)
    data = _bytes(self(value.content))
    if not len(data):
      if 0 not in value.shape:
        raise ValueError('an array without its content')
      return np.empty(value.shape, dtype)
    return np.frombuffer(data, dtype).reshape(value.shape, order=order)

"""Reading pickles that strangers made, without running what they may contain."""

import _codecs
import collections
import os
import pickle

import numpy as np

from metajax.errors import UserError

_BUILTINS = {t.__name__: t for t in (list, dict, set, frozenset, tuple, int, float, complex, str, bytes, bytearray)}
_NUMPY_CORE = {
  'multiarray': ('_reconstruct', 'scalar'),
  'numeric': ('_frombuffer',),  # contiguous arrays in protocol 5
}
_ADMITTED = {
  ('numpy', 'ndarray'): np.ndarray,
  ('numpy', 'dtype'): np.dtype,
  ('_codecs', 'encode'): _codecs.encode,  # how Python 3 writes bytes in protocol 2
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('collections', 'defaultdict'): collections.defaultdict,
  **{(module, name): t for module in ('builtins', '__builtin__') for name, t in _BUILTINS.items()},
  **{
    (f'numpy.{core}.{module}', name): getattr(getattr(np._core, module), name)
    for core in ('core', '_core')  # before and since NumPy 2
    for module, names in _NUMPY_CORE.items()
    for name in names
  },
}


class _Unpickler(pickle.Unpickler):
  def find_class(self, module, name):
    if (module, name) not in _ADMITTED:
      raise UserError(f'{module}.{name}')
    return _ADMITTED[module, name]


def load(source, where=None):
  """Unpickles NumPy arrays in plain containers, from Python 2 or 3.

  Args:
    source: path, or binary file.
    where: what to call it in an error, if not by its name.

  Returns:
    the object; keys of dictionaries that are bytes become str.

  Raises:
    UserError: the file is cut short, is not a pickle, or asks for anything but arrays and containers.
  """
  if isinstance(source, (str, os.PathLike)):
    with open(source, 'rb') as file:
      return load(file, where or source)
  where = where or getattr(source, 'name', 'the pickle')
  try:
    # Latin-1 keeps each byte of a Python 2 string, among which are the pixels of its arrays.
    return _text_keys(_Unpickler(source, encoding='latin1').load())
  except UserError as error:
    raise UserError(
      f'{where} is not loaded: it asks for {error}, and only NumPy arrays in plain containers are read'
    ) from None
  except Exception as error:  # broken pickles raise whatever their last instruction does
    raise UserError(f'{where} is damaged or not a pickle ({error}): replace it') from error


def _text_keys(value):
  if isinstance(value, dict):
    return {k.decode('latin1') if isinstance(k, bytes) else k: _text_keys(v) for k, v in value.items()}
  return value

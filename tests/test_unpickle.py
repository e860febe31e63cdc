import base64
import collections
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from metajax.data import unpickle
from metajax.errors import UserError

IMAGES = np.arange(256, dtype=np.uint8).reshape(2, 8, 4, 4)

# Made by hand as Python 2.7 and NumPy 1 write it, with strings of bytes:
#   {'image_data': arange(256, dtype=uint8).reshape(2, 8, 4, 4), 'class_dict': {'n01': [0, 1]}} as protocol 2
PYTHON_2 = (
  b'\x80\x02}q\x00(U\nimage_dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b'
  b'\x87Rq\x04(K\x01(K\x02K\x08K\x04K\x04tcnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff'
  b'\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x01\x00\x00' + bytes(range(256)) + b'tbU\nclass_dictq\x07}q\x08U\x03n01q\t]q'
  b'\n(K\x00K\x01esu.'
)


def test_python_2_pickle(tmp_path):
  (tmp_path / 'x.pkl').write_bytes(PYTHON_2)
  content = unpickle.load(tmp_path / 'x.pkl')
  np.testing.assert_array_equal(content['image_data'], IMAGES)
  assert content['class_dict'] == {'n01': [0, 1]}


@pytest.mark.parametrize('protocol', range(6))
def test_arrays_and_containers_of_every_protocol(tmp_path, protocol):
  content = {
    b'image_data': IMAGES,
    b'class_dict': collections.OrderedDict({b'n01': [0, 1]}),
    'more': collections.defaultdict(list, a=[b'\xff', {1, 2}, np.float32(0.5), np.array(['x', 'y'])]),
  }
  path = tmp_path / 'x.pkl'
  path.write_bytes(pickle.dumps(content, protocol=protocol))
  loaded = unpickle.load(path)
  np.testing.assert_array_equal(loaded['image_data'], IMAGES)
  assert loaded['class_dict'] == {'n01': [0, 1]}
  assert loaded['more']['a'][:3] == [b'\xff', {1, 2}, 0.5]
  assert list(loaded['more']['a'][3]) == ['x', 'y']


def test_numpy_1_names(tmp_path):
  new = pickle.dumps(IMAGES, protocol=2)
  assert b'numpy._core.' in new
  (tmp_path / 'x.pkl').write_bytes(new.replace(b'numpy._core.', b'numpy.core.'))
  np.testing.assert_array_equal(unpickle.load(tmp_path / 'x.pkl'), IMAGES)


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_arrays_stay_in_the_file(tmp_path, protocol):
  """Also where one is held twice, lies in columns, or is a plain string of bytes."""
  large = np.random.default_rng(0).integers(0, 256, (40, 100_000), np.uint8)
  content = [large, np.asfortranarray(large[:, :300]), large[0].tobytes(), large[:0], {'again': large}]
  with open(tmp_path / 'x.pkl', 'wb') as file:
    pickle.dump(content, file, protocol=protocol)
  tracemalloc.start()
  loaded = unpickle.load(tmp_path / 'x.pkl')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 500_000, peak
  for expected, actual in zip(content[:2] + content[3:4], loaded[:2] + loaded[3:4], strict=True):
    assert actual.dtype == np.uint8 and not (actual.size and actual.flags.writeable)
    np.testing.assert_array_equal(actual, expected)
  assert bytes(loaded[2]) == content[2] and loaded[4]['again'] is loaded[0]


@pytest.mark.parametrize(
  'content',
  [
    b'\x80\x02c__builtin__\nbytes\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.',  # bytes(2**40)
    b'\x80\x05\x96' + (1 << 40).to_bytes(8, 'little') + b'.',  # a bytearray of 2**40
    b'\x80\x04\x8d' + (1 << 40).to_bytes(8, 'little') + b'.',  # a text of 2**40 bytes
  ],
)
def test_no_memory_for_what_the_file_has_not(tmp_path, content):
  path = tmp_path / 'bomb.pkl'
  path.write_bytes(content)
  tracemalloc.start()
  with pytest.raises(UserError, match=r'bomb.pkl is damaged .*(cut short|bytes of a size)'):
    unpickle.load(path)
  assert tracemalloc.get_traced_memory()[1] < 1_000_000
  tracemalloc.stop()


class Call:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('function', [os.system, eval, base64.b64decode, getattr, __import__])
def test_anything_else_is_refused_and_not_run(tmp_path, function):
  path, trace = tmp_path / 'evil.pkl', tmp_path / 'trace'
  path.write_bytes(pickle.dumps({'image_data': Call(function, f'touch {trace}')}))
  with pytest.raises(UserError, match=rf'evil.pkl .*\.{function.__name__}'):
    unpickle.load(path)
  assert not trace.exists()


@pytest.mark.parametrize('keep', [0, 1, 50, 300, -1])
def test_cut_short(tmp_path, keep):
  path = tmp_path / 'cut.pkl'
  path.write_bytes(PYTHON_2[:keep])
  with pytest.raises(UserError, match=r'cut.pkl is damaged'):
    unpickle.load(path)


def test_not_a_pickle(tmp_path):
  path = tmp_path / 'page.pkl'
  path.write_text('<!DOCTYPE html><html>Quota exceeded</html>')
  with pytest.raises(UserError, match=r'page.pkl is damaged or not a pickle'):
    unpickle.load(path)

import base64
import collections
import os
import pickle
import re
import subprocess
import sys
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
    'others': [b'', frozenset(['x', (1, None)]), 1j, {}, set(), np.bool_(True), np.str_('x'), np.bytes_(b'y' * 400)],
    np.int64(3): np.arange(3, dtype='>i4'),
    (4, 'four'): np.array([[1, 2], 'x', b'y', np.arange(2)], object),
    'empty': np.empty((3, 0), 'f2'),
  }
  path = tmp_path / 'x.pkl'
  path.write_bytes(pickle.dumps(content, protocol=protocol))
  loaded = unpickle.load(path)
  np.testing.assert_array_equal(loaded['image_data'], IMAGES)
  assert loaded['class_dict'] == {'n01': [0, 1]}
  assert loaded['more']['a'][:3] == [b'\xff', {1, 2}, 0.5]
  assert list(loaded['more']['a'][3]) == ['x', 'y']
  assert loaded['others'] == content['others']
  assert list(map(type, loaded['others'])) == list(map(type, content['others']))
  assert loaded[3].dtype == '>i4' and list(loaded[3]) == [0, 1, 2]
  objects = loaded[4, 'four']
  assert list(objects[:3]) == [[1, 2], 'x', b'y'] and list(objects[3]) == [0, 1]
  assert loaded['empty'].shape == (3, 0) and loaded['empty'].dtype == 'f2'


@pytest.mark.parametrize('dtype', ['b1', 'i1', 'u8', 'f4', '>f8', 'c8', 'c16', 'S3', 'U2', '>U2'])
def test_every_dtype(tmp_path, dtype):
  array = np.arange(6).reshape(2, 3).astype(dtype)
  (tmp_path / 'x.pkl').write_bytes(pickle.dumps([array, array[1, 1], array.dtype]))
  loaded, scalar, kind = unpickle.load(tmp_path / 'x.pkl')
  np.testing.assert_array_equal(loaded, array)
  assert loaded.dtype == kind == array.dtype and scalar == array[1, 1] and type(scalar) is type(array[1, 1])


def test_python_2_containers_and_scalars(tmp_path):
  """OrderedDict([('a', set([1]))]) and numpy.uint16(258)."""
  (tmp_path / 'x.pkl').write_bytes(
    b'\x80\x02ccollections\nOrderedDict\n](](U\x01ac__builtin__\nset\n](K\x01e\x85Ree\x85R'
    b'cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02u2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ'
    b'\xff\xff\xff\xffK\x00tbU\x02\x02\x01\x86R\x86.'
  )
  assert unpickle.load(tmp_path / 'x.pkl') == ({'a': {1}}, 258)


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


TEXT = b'X' + (100_000).to_bytes(4, 'little') + b'x' * 100_000 + b'q\x00'  # memoised as 0
LIST = b'](' + b''.join(b'J' + k.to_bytes(4, 'little') for k in range(4000)) + b'eq\x00'  # likewise
ENCODE = b'c_codecs\nencode\n'
LATIN1 = b'X\x06\x00\x00\x00latin1\x86R'


@pytest.mark.parametrize(
  'content',
  [
    # list(ndarray(1_000_000))
    b'\x80\x02c__builtin__\nlist\ncnumpy\nndarray\nJ' + (1_000_000).to_bytes(4, 'little') + b'\x85R\x85R.',
    # encode(encode(..., 'hex'), 'hex'), which is twice as long each time
    b'\x80\x03' + ENCODE * 16 + b'C\xff' + b'a' * 255 + b'X\x03\x00\x00\x00hex\x86R' * 16 + b'.',
    # one text encoded, one list made a set, and one list an array, again and again
    b'\x80\x02' + TEXT + b'(' + (ENCODE + b'h\x00' + LATIN1) * 200 + b't.',
    b'\x80\x02' + LIST + b'(' + b'c__builtin__\nset\nh\x00\x85R' * 400 + b't.',
    b'\x80\x02' + LIST + b'(' + b'c__builtin__\nfrozenset\nh\x00\x85R' * 400 + b't.',
    b'\x80\x02' + LIST + b'cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85Rq\x01('
    b'cnumpy.core.multiarray\n_reconstruct\nq\x02' + b'h\x02NNN\x87R(K\x01M\xa0\x0f\x85h\x01\x89h\x00tb' * 400 + b't.',
  ],
)
def test_what_is_made_has_a_limit(tmp_path, content):
  path = tmp_path / 'bomb.pkl'
  path.write_bytes(content)
  tracemalloc.start()
  with pytest.raises(UserError, match=r'bomb.pkl is damaged'):
    unpickle.load(path)
  assert tracemalloc.get_traced_memory()[1] < 8_000_000
  tracemalloc.stop()


def test_one_key_of_many_dictionaries_is_there_once(tmp_path):
  key = ENCODE + TEXT + LATIN1 + b'q\x010'
  (tmp_path / 'x.pkl').write_bytes(b'\x80\x02' + key + b'(' + b'}h\x01K\x01s' * 200 + b't.')
  tracemalloc.start()
  assert unpickle.load(tmp_path / 'x.pkl')[199] == {'x' * 100_000: 1}
  assert tracemalloc.get_traced_memory()[1] < 8_000_000
  tracemalloc.stop()


def test_an_array_without_content_is_not_made_up(tmp_path):
  pixels = bytes(range(256))
  assert pixels in PYTHON_2
  (tmp_path / 'x.pkl').write_bytes(PYTHON_2.replace(b'T\x00\x01\x00\x00' + pixels, b'U\x00'))
  with pytest.raises(UserError, match=r'x.pkl is damaged .*without its content'):
    unpickle.load(tmp_path / 'x.pkl')


# dtype('O8'), then told that it has no objects
NO_OBJECTS = (
  b'cnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87R'
  b'(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
)


@pytest.mark.parametrize(
  'content',
  [
    b'cnumpy.core.multiarray\nscalar\n' + NO_OBJECTS + b'C\x08AAAAAAAA\x86R',
    b'cnumpy.core.multiarray\n_reconstruct\nNNN\x87R(K\x01K\x01\x85' + NO_OBJECTS + b'\x89C\x08AAAAAAAAtb',
    b'cnumpy.core.multiarray\n_reconstruct\nNNN\x87R(K\x01K\x08\x85' + NO_OBJECTS + b'\x89U\x08AAAAAAAAtb',
  ],
)
def test_bytes_do_not_become_pointers(tmp_path, content):
  """In a Python of its own, which following a pointer to nowhere ends."""
  path = tmp_path / 'x.pkl'
  path.write_bytes(b'\x80\x03' + content + b'.')
  script = 'import sys; from metajax.data import unpickle; print(repr(unpickle.load(sys.argv[1])))'
  result = subprocess.run([sys.executable, '-c', script, path], capture_output=True, text=True)
  assert result.returncode == 1 and 'x.pkl is damaged' in result.stderr, result


@pytest.mark.parametrize('name', ['V8', 'M8', 'f16', 'O4', 'u1,O', '(2,)u1', 'S99999'])
def test_other_dtypes_are_named(tmp_path, name):
  path = tmp_path / 'x.pkl'
  path.write_bytes(b'\x80\x02cnumpy\ndtype\nU' + bytes([len(name)]) + name.encode() + b'\x85R.')
  with pytest.raises(UserError, match=rf'x.pkl .* it asks for dtype {re.escape(repr(name))}, and only'):
    unpickle.load(path)


def test_dtypes_have_no_parts(tmp_path):
  path = tmp_path / 'x.pkl'
  path.write_bytes(NO_OBJECTS.join([b'\x80\x02', b'.']).replace(b'NNN', b'(K\x01K\x02tNN'))
  with pytest.raises(UserError, match=r'x.pkl is damaged .*several parts'):
    unpickle.load(path)


@pytest.mark.parametrize(
  'target', [b'cnumpy.core.numeric\n_frombuffer\n', b'cnumpy\ndtype\n', b'c_codecs\nencode\n', b'c__builtin__\nset\n']
)
def test_nothing_takes_attributes(tmp_path, target):
  """BUILD of an empty state's slots: {'__doc__': 'changed'}."""
  path = tmp_path / 'x.pkl'
  path.write_bytes(b'\x80\x02' + target + b'N}U\x07__doc__U\x07changeds\x86b.')
  with pytest.raises(UserError, match=r'x.pkl is damaged .*attributes'):
    unpickle.load(path)


@pytest.mark.parametrize(
  'content',
  [
    b'}%sNs.',
    b'}(%sNu.',
    b'(%sNd.',
    b'\x8f(%s\x90.',
    b'(%s\x91.',
    b'c__builtin__\nset\n](%se\x85R.',
    b'c__builtin__\nfrozenset\n](%se\x85R.',
    b'ccollections\nOrderedDict\n](%sN\x86e\x85R.',
  ],
)
def test_keys_and_members_are_flat(tmp_path, content):
  """A key ((1,),): one that is deep enough would end Python as it is hashed."""
  path = tmp_path / 'x.pkl'
  path.write_bytes(b'\x80\x04' + content % b'K\x01\x85\x85')
  with pytest.raises(UserError, match=r'x.pkl is damaged .*a key with a tuple'):
    unpickle.load(path)


@pytest.mark.parametrize('make', [dict.fromkeys, set, frozenset, collections.OrderedDict.fromkeys])
@pytest.mark.parametrize('key', [lambda k: k * (2**61 - 1), lambda k: (k * (2**61 - 1), 0)], ids=['int', 'tuple'])
def test_keys_that_collide_are_refused_before_they_cost_anything(tmp_path, make, key):
  """Python's hash of a whole number is its remainder by 2^61 - 1."""
  path = tmp_path / 'x.pkl'
  path.write_bytes(pickle.dumps(make([key(k) for k in range(200)])))
  with pytest.raises(UserError, match=r'x.pkl is damaged .*the same hash'):
    unpickle.load(path)
  few = [make([-1, -2, 0, 2**61 - 1, 'a']) for _ in range(100)]  # the same keys again do not count
  path.write_bytes(pickle.dumps(few))
  assert unpickle.load(path) == few


def test_instructions_that_make_instances_are_refused(tmp_path):
  path = tmp_path / 'x.pkl'
  for content in (b'(i__builtin__\nset\n.', b'(c__builtin__\nset\no.', b'cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85\x81.'):
    path.write_bytes(b'\x80\x02' + content)
    with pytest.raises(UserError, match=r'x.pkl is damaged'):
      unpickle.load(path)


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

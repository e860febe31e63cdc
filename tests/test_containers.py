import zipfile

import h5py
import numpy as np
import pytest

from metajax.data import containers, images
from metajax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
FILES = h5py.vlen_dtype(np.uint8)


def read_hdf5(folder, write):
  with h5py.File(folder / 'x.hdf5', 'w') as file:
    write(file)
  form = containers.hdf5(['x.hdf5'], lambda key: key)
  return form.read(form.find(str(folder)), None).classes


def write_files(file):
  rows = file.create_dataset('a', (50,), FILES)
  for k in range(50):
    rows[k] = np.full(k, k, np.uint8)


@pytest.mark.parametrize('options', [{}, {'chunks': (2, 4, 4, 3)}, {'compression': 'gzip'}])
def test_pixels_in_hdf5(tmp_path, options):
  items = read_hdf5(tmp_path, lambda file: file.create_dataset('a', data=PIXELS, **options))['a']
  assert len(items) == 5
  for item, pixels in zip(items, PIXELS, strict=True):
    np.testing.assert_array_equal(images.pixels(item, images.Rendering(4)), pixels)


def test_files_in_hdf5(tmp_path):
  items = read_hdf5(tmp_path, write_files)['a']
  assert [item.files[item.index].tolist() for item in items] == [[k] * k for k in range(50)]


def test_rows_in_hdf5_are_not_taken_into_memory(tmp_path):
  items = read_hdf5(tmp_path, lambda file: file.create_dataset('a', data=np.zeros((1_000_000, 1, 1), np.uint8)))['a']
  assert len(items) == 1_000_000 and not isinstance(items, list)
  assert str(items[999_999]) == f'image 999999 of a in {tmp_path / "x.hdf5"}'


def write_external(file):
  file.create_dataset('a', (1, 4, 4, 3), 'u1', external=[(file.filename, 0, 48)])


def write_virtual(file):
  with h5py.File(f'{file.filename}.other', 'w') as other:
    other['a'] = PIXELS
  layout = h5py.VirtualLayout(PIXELS.shape, 'u1')
  layout[:] = h5py.VirtualSource(f'{file.filename}.other', 'a', PIXELS.shape)
  file.create_virtual_dataset('a', layout)


def write_first(file, **options):
  file.create_dataset('a', PIXELS.shape, 'u1', **options)[0] = 1


@pytest.mark.parametrize(
  ('write', 'complaint'),
  [
    (lambda file: file.create_dataset('a', data=5), r'a is int64 \(\), neither images nor files'),
    (lambda file: file.create_dataset('a', data=h5py.Empty('u1')), 'a is uint8 None, neither'),
    (lambda file: file.create_dataset('a', data=np.zeros(9)), r'a is float64 \(9,\), neither'),
    (lambda file: file.create_dataset('a', (2, 2, 2), FILES), 'a is object .*, neither'),
    (lambda file: file.create_dataset('a', (2,), h5py.ref_dtype), 'a is object .*, neither'),
    (write_external, 'a lies in other files'),
    (write_virtual, 'a lies in other files'),
    (lambda file: file.create_dataset('a', (20_000_000, 84, 84, 3), 'u1', chunks=(64, 84, 84, 3)), 'a has 423.4 GB'),
    (lambda file: file.create_dataset('a', (2_000_000, 1, 1, 3), 'u1'), 'a is cut short'),
    (lambda file: file.create_dataset('a', (2_000_000,), FILES), 'a is cut short'),
    (lambda file: write_first(file, chunks=(1, 4, 4, 3)), 'a is cut short'),
    (lambda file: write_first(file, chunks=(1, 4, 4, 3), compression='gzip'), 'a is cut short'),
  ],
)
def test_arrays_in_hdf5_that_are_no_images(tmp_path, write, complaint):
  with pytest.raises(UserError, match=rf'x.hdf5 is not read: {complaint}.*; replace it'):
    read_hdf5(tmp_path, write)


def test_links_out_of_an_hdf5_file_are_not_followed(tmp_path):
  with h5py.File(tmp_path / 'other.hdf5', 'w') as other:
    other['b'] = other['c/d'] = PIXELS

  def write(file):
    file['a'] = PIXELS
    file['b'] = h5py.ExternalLink(str(tmp_path / 'other.hdf5'), 'b')
    file['c'] = h5py.ExternalLink(str(tmp_path / 'other.hdf5'), 'c')

  assert list(read_hdf5(tmp_path, write)) == ['a']


def test_many_references_to_the_same_bytes_do_not_fill_the_memory(tmp_path):
  """All rows of `a` are made to refer to the bytes of its first."""

  def write(file):
    rows = file.create_dataset('a', (100,), FILES)
    for k in range(100):
      rows[k] = np.full(5000 if k == 0 else 1, k, np.uint8)
    file.flush()
    places.append(rows.id.get_offset())

  places = []
  items = read_hdf5(tmp_path, write)['a']
  content = bytearray((tmp_path / 'x.hdf5').read_bytes())
  reference = content[places[0] : places[0] + 16]
  content[places[0] : places[0] + 1600] = reference * 100
  (tmp_path / 'x.hdf5').write_bytes(content)
  with pytest.raises(UserError, match=r'image 7 of a in .*x.hdf5 does not decode \(a has more bytes than the file'):
    images.open_item(items[7])


def header(text):
  text = text.ljust(117) + b'\n'
  return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text


@pytest.mark.parametrize(
  'content',
  [
    b'',
    header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, '''"),
    header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
    header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (9,)}"),
  ],
)
def test_damaged_arrays_in_npz(tmp_path, content):
  with zipfile.ZipFile(tmp_path / 'x.npz', 'w') as archive:
    archive.writestr('features.npy', content)
  with pytest.raises(UserError, match=r'x.npz is damaged \(') as error:
    containers.npz(str(tmp_path / 'x.npz'), tmp_path)
  assert '\n' not in str(error.value)

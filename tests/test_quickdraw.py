"""Quick, Draw! in the formats that it comes in, and the draw of Fast Forward Labs."""

import logging
import os
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from metajax.data import conversion, download, source
from metajax.datasets import quickdraw
from metajax.errors import UserError

NAMES = sorted(quickdraw._published())
FEW = {'train': ['The Eiffel Tower', 'bear'], 'val': ['ant'], 'test': ['angel']}  # Meta-Dataset's


pytestmark = pytest.mark.usefixtures('tables')


@pytest.fixture
def data(tmp_path):
  (tmp_path / 'data/quickdraw').mkdir(parents=True)
  return tmp_path / 'data'


def drawings(name):
  """Of a class as in Google's file, 10 to 29 of them."""
  rng = np.random.default_rng(NAMES.index(name))
  return rng.integers(0, 256, (10 + NAMES.index(name) % 20, 784), np.uint8)


def write(data, names, place='quickdraw'):
  (data / place).mkdir(exist_ok=True)
  for name in names:
    np.save(data / place / f'{name}.npy', drawings(name))


def fast_forward_labs(folder, per_class, seed=123):
  """The draw as the original code makes it: split -> class -> drawings."""
  files = sorted(name for name in os.listdir(folder) if name.endswith('.npy'))
  rng = np.random.RandomState(seed)
  rng.shuffle(files)
  first, second = int(0.6 * len(files)), int(0.2 * len(files))
  result = {}
  parts = {'train': files[:first], 'val': files[first : first + second], 'test': files[first + second :]}
  for split, members in parts.items():
    result[split] = {}
    for file in members:
      content = np.load(folder / file)
      drawn = rng.choice(len(content), per_class, replace=False)
      result[split][file[:-4]] = content[drawn].reshape(per_class, 28, 28)
  return result


def of(t, name):
  """The images of a class of a ClassTable."""
  c = t.names.index(name)
  return t.images[t.starts[c] : t.starts[c] + t.counts[c], :, :, 0]


@pytest.mark.parametrize('place', ['quickdraw', 'quickdraw-dataset', ''])
def test_all_drawings(data, place, caplog):
  (data / 'quickdraw').rmdir()
  write(data, [name for names in FEW.values() for name in names], place)
  (data / place / '._bear.npy').write_bytes(b'of a Mac')
  tables = quickdraw.load(str(data))
  assert {split: list(t.names) for split, t in tables.items()} == FEW
  for t in tables.values():
    assert t.images.shape[1:] == (28, 28, 1) and t.images.dtype == np.uint8
    for name in t.names:
      np.testing.assert_array_equal(of(t, name), drawings(name).reshape(-1, 28, 28))
  assert '341 of 345 classes are missing' in caplog.text
  assert 'class bear has 16 images, not 134762' in caplog.text


def test_draw_is_fast_forward_labs(data):
  write(data, NAMES)
  truth = fast_forward_labs(data / 'quickdraw', 5)
  tables = quickdraw.load(str(data), split='ffl', per_class=5)
  assert {split: list(t.names) for split, t in tables.items()} == {split: list(c) for split, c in truth.items()}
  assert [len(t.names) for t in tables.values()] == [207, 69, 69]
  for split, t in tables.items():
    np.testing.assert_array_equal(t.counts, 5)
    for name in t.names:
      np.testing.assert_array_equal(of(t, name), truth[split][name])

  # of the training classes alone fewer may be taken
  few = quickdraw.load(str(data), split='ffl', per_class=5, train_per_class=3)
  assert [set(t.counts) for t in few.values()] == [{3}, {5}, {5}]
  np.testing.assert_array_equal(of(few['train'], 'bear'), truth['train']['bear'][:3])

  # the other split has the same drawings; another seed has others
  everywhere = {name: rows for classes in truth.values() for name, rows in classes.items()}
  others = quickdraw.load(str(data), per_class=5)
  assert [len(t.names) for t in others.values()] == [241, 52, 52]
  assert {split: list(t.names) for split, t in others.items()} == quickdraw._lists()['meta_dataset']
  assert others['train'].images.filename == tables['train'].images.filename
  for name in FEW['train']:
    np.testing.assert_array_equal(of(others['train'], name), everywhere[name])
  seven = quickdraw.load(str(data), split='ffl', split_seed=7, per_class=5)
  truth = fast_forward_labs(data / 'quickdraw', 5, seed=7)
  assert seven['test'].names == tuple(truth['test'])
  np.testing.assert_array_equal(of(seven['test'], seven['test'].names[-1]), list(truth['test'].values())[-1])


def test_class_that_is_missing_changes_no_other_split(data):
  write(data, ['airplane', 'bear'])
  tables = quickdraw.load(str(data), split='ffl')
  whole = quickdraw._dealt(123)[0]
  assert {name: split for split, t in tables.items() for name in t.names} == {
    name: split for split, names in whole.items() for name in names if name in ('airplane', 'bear')
  }


def test_few_drawings_are_all_taken(data, caplog):
  write(data, ['airplane'])
  (t,) = quickdraw.load(str(data), per_class=100).values()
  assert sorted(map(bytes, of(t, 'airplane'))) == sorted(map(bytes, drawings('airplane')))
  assert f'class airplane has {len(drawings("airplane"))} images, not 100' in caplog.text


def write_drawn(folder, content, **options):
  """What torchmeta's descendant makes of the draw."""
  folder.mkdir(parents=True)
  for split, classes in content.items():
    with h5py.File(folder / f'{split}_data.hdf5', 'w') as file:
      group = file.create_group('datasets')
      for name, rows in classes.items():
        group.create_dataset(name, data=rows, **options)


@pytest.mark.parametrize('place', ['', 'quickdraw'])
def test_drawings_that_fast_forward_labs_code_has_drawn(data, tmp_path, place):
  write(tmp_path, NAMES, 'npy')
  truth = fast_forward_labs(tmp_path / 'npy', 3)
  write_drawn(data / place / 'quickdraw-3-meta', truth)
  tables = quickdraw.load(str(data), split='ffl', per_class=3)
  for split, t in tables.items():
    assert list(t.names) == list(truth[split])
    for name in t.names:
      np.testing.assert_array_equal(of(t, name), truth[split][name])


def test_counts_are_those_published():
  assert sum(quickdraw.dataset().counts.values()) == 50_426_266
  assert set(quickdraw.dataset(per_class=20).counts.values()) == {20}
  counts = quickdraw.dataset(per_class=200_000).counts
  assert counts['panda'] == 113_613 and counts['snowman'] == 200_000
  options = [{}, dict(per_class=20), dict(per_class=100), dict(per_class=20, split_seed=7)]
  names = {quickdraw.dataset(**settings).name for settings in options}
  assert len(names) == 4  # of tables with other drawings


def test_downloads_are_googles_files():
  remotes = {remote.name: remote for remote in quickdraw.dataset().downloads}
  assert len(remotes) == 345 and all(len(remote.sha256) == 64 for remote in remotes.values())
  tower = remotes['The Eiffel Tower.npy']
  assert tower.urls[0].endswith('quickdraw_dataset/full/numpy_bitmap/The Eiffel Tower.npy')
  header = np.lib.format.header_data_from_array_1_0(np.empty((134801, 784), np.uint8))
  assert header['shape'] == (134801, 784) and tower.size == 80 + 134801 * 784
  assert sum(remote.size for remote in remotes.values()) == 345 * 80 + 50_426_266 * 784


def test_download_that_was_broken_off_is_continued(data, monkeypatch, caplog):
  def fetch(remote, folder):
    path = Path(folder, remote.name)
    asked.append(path.name)
    if path.name == 'airplane.npy' and len(asked) == 5:
      path.with_name(f'{path.name}.part').write_bytes(b'beginning')
      raise UserError('cannot download')
    np.save(path, drawings(path.stem))
    path.with_name(f'{path.name}.part').unlink(missing_ok=True)

  caplog.set_level(logging.INFO)
  monkeypatch.setattr(download, 'fetch', fetch)
  asked = []
  with pytest.raises(UserError, match='cannot download'):
    quickdraw.load(str(data), per_class=1)
  assert f'downloading 345 files of Quick, Draw! to {data}/quickdraw (39.53 GB)' in caplog.text
  assert 'CC BY 4.0 (Google)' in caplog.text
  asked.clear()
  tables = quickdraw.load(str(data), per_class=1)
  assert asked == [f'{name}.npy' for name in quickdraw._published()][4:]
  assert sum(len(t.names) for t in tables.values()) == 345


def test_millions_of_drawings_take_no_memory(data):
  """Three files of 2 million drawings, 4.7 GB: holes, which take no room on the disk either."""
  for name in ('airplane', 'bear', 'snowman'):
    with open(data / f'quickdraw/{name}.npy', 'wb') as file:
      np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': (2_000_000, 784)})
      file.truncate(file.tell() + 2_000_000 * 784)
  with open(data / 'quickdraw/bear.npy', 'r+b') as file:
    file.seek(-784, os.SEEK_END)
    file.write(bytes([1, 2, 3]))
  tracemalloc.start()
  contents = source.read(quickdraw.dataset(), source.locate(quickdraw.dataset(), str(data)), None)
  items = conversion._Joined(contents.classes.values())
  assert len(items) == 6_000_000
  assert [np.asarray(items[k].open())[0, :3].tolist() for k in (0, 3_999_999, 4_000_000, 5_999_999)] == [
    [0, 0, 0],
    [1, 2, 3],
    [0, 0, 0],
    [0, 0, 0],
  ]
  assert str(items[3_999_999]) == f'image 1999999 of {data}/quickdraw/bear.npy'
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2e6


def cut(path, keep):
  os.truncate(path, int(path.stat().st_size * keep))


def save(data, name, array, **options):
  np.save(data / f'quickdraw/{name}.npy', array, **options)


ONE = np.zeros((1, 28, 28), np.uint8)
MISTAKES = {
  'float': (lambda d: save(d, 'bear', np.zeros((2, 784))), r'bear.npy has an array float64 \(2, 784\), not uint8'),
  'narrow': (lambda d: save(d, 'bear', np.zeros((2, 783), np.uint8)), r'bear.npy has an array uint8 \(2, 783\), not'),
  'square': (lambda d: save(d, 'bear', ONE), r'bear.npy has an array uint8 \(1, 28, 28\), not uint8 \(n, 784\)'),
  'by columns': (lambda d: save(d, 'bear', np.asfortranarray(drawings('bear'))), r'\(16, 784\) by columns, not'),
  'objects': (lambda d: save(d, 'bear', np.array([{}]), allow_pickle=True), 'bear.npy is damaged or cut short'),
  'cut': (lambda d: write(d, ['bear']) or cut(d / 'quickdraw/bear.npy', 0.9), 'bear.npy is damaged or cut short'),
  'cut header': (lambda d: write(d, ['bear']) or cut(d / 'quickdraw/bear.npy', 0.001), 'bear.npy is damaged or cut'),
  'page': (lambda d: (d / 'quickdraw/bear.npy').write_text('<html>'), 'bear.npy is damaged or cut short'),
  'strange class': (lambda d: write(d, ['bear']) or save(d, 'newt', drawings('bear')), 'class newt, which is not in Q'),
  'no drawings': (lambda d: save(d, 'bear', np.zeros((0, 784), np.uint8)), 'bear.npy has no images of Quick, Draw!'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_named(data, mistake):
  make, complaint = MISTAKES[mistake]
  make(data)
  with pytest.raises(UserError, match=complaint) as error:
    quickdraw.load(str(data))
  assert '\n' not in str(error.value)


DRAWN = {
  'class in two splits': ({'train': {'bear': ONE}, 'val': {}, 'test': {'bear': ONE}}, 'class bear is in two of .*hdf5'),
  'strange class': ({'train': {'newt': ONE}, 'val': {}, 'test': {}}, 'has class newt, which is not in Quick, Draw!'),
  'float': ({'train': {'bear': ONE * 1.0}, 'val': {}, 'test': {}}, 'image 0 of datasets/bear in .* does not decode'),
}


@pytest.mark.parametrize('mistake', DRAWN)
def test_mistakes_in_drawn_files_are_named(data, mistake):
  content, complaint = DRAWN[mistake]
  write_drawn(data / 'quickdraw-1-meta', content)
  with pytest.raises(UserError, match=complaint):
    quickdraw.load(str(data), per_class=1)


@pytest.mark.parametrize(
  ('options', 'complaint'),
  [
    (dict(split='random'), "quickdraw has no split 'random'; choose one of meta_dataset, ffl"),
    (dict(per_class=-1), 'per_class = -1: drawings of each class, or 0 for all'),
    (dict(train_per_class=-1), 'train_per_class = -1: drawings of each class, or 0 for all'),
    (dict(split_seed=-1), 'split_seed = -1: seeds are from 0 to 4294967295'),
    (dict(size=0), 'size = 0'),
  ],
)
def test_options_out_of_range(data, options, complaint):
  with pytest.raises(UserError, match=complaint):
    quickdraw.load(str(data), **options)

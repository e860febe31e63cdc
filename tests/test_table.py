import hashlib
import json
import os

import numpy as np
import pytest

from metajax.data import conversion, table

SHAPE = (4, 5, 3)
CLASSES = {'b': list(range(70)), 'a': list(range(100, 103)), 'c': [7]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def convert():
  (table.cache_dir()).mkdir(exist_ok=True)
  job = {'fingerprint': 'f', 'superclasses': {c: c.upper() for c in CLASSES}, 'splits': {}, 'notes': ['a note']}
  return conversion.convert('key', CLASSES, lambda k: np.full(SHAPE, k, np.uint8), SHAPE, job)


def test_cache_dir_follows_the_environment(cache, monkeypatch):
  assert table.cache_dir() == cache
  monkeypatch.delenv('METAJAX_CACHE')
  monkeypatch.setenv('HOME', '/somewhere')
  assert str(table.cache_dir()) == '/somewhere/.cache/metajax'


def test_table_holds_every_row_in_order(cache):
  assert table.open_table('key') is None
  convert()
  opened = table.open_table('key')
  assert opened.names == ('b', 'a', 'c')
  assert (opened.notes, opened.fingerprint, opened.splits) == (('a note',), 'f', {})
  np.testing.assert_array_equal(opened.counts, [70, 3, 1])
  np.testing.assert_array_equal(opened.images[:, 0, 0, 0], [*range(70), 100, 101, 102, 7])
  assert opened.images.shape == (74, *SHAPE) and not opened.images.flags.writeable
  manifest = json.loads((cache / 'key/manifest.json').read_text())
  assert manifest['sha256'] == hashlib.sha256((cache / 'key/images.npy').read_bytes()).hexdigest()
  assert manifest['bytes'] == (cache / 'key/images.npy').stat().st_size


def test_class_tables_share_images_and_place_turned_classes():
  tables = table.class_tables(convert(), {'train': [('b', 0), ('c', 0), ('b', 3)], 'test': [('a', 0)]})
  train, test = tables['train'], tables['test']
  assert train.images is test.images
  assert train.names == ('b', 'c', 'b/rot270') and test.names == ('a',)
  assert train.superclasses == ('B', 'C', 'B') and test.superclasses == ('A',)
  np.testing.assert_array_equal(train.starts, [0, 73, 0])
  np.testing.assert_array_equal(train.counts, [70, 1, 70])
  np.testing.assert_array_equal(train.turns, [0, 0, 3])
  np.testing.assert_array_equal(test.starts, [70])
  assert (train.starts.dtype, train.turns.dtype) == (np.int64, np.int8)


def truncate(folder):
  os.truncate(folder / 'images.npy', 500)


def pad(folder):
  with open(folder / 'images.npy', 'ab') as file:
    file.write(b'more')


def lose_class(folder):
  manifest = json.loads((folder / 'manifest.json').read_text())
  manifest['images_per_class'][0] -= 1
  (folder / 'manifest.json').write_text(json.dumps(manifest))


@pytest.mark.parametrize(
  'damage',
  [
    truncate,
    pad,
    lose_class,
    lambda folder: (folder / 'manifest.json').write_text('{"format": 2'),
    lambda folder: (folder / 'manifest.json').write_text('{"format": 0}'),
    lambda folder: (folder / 'images.npy').unlink(),
  ],
)
def test_damaged_table_is_named_and_made_anew(cache, damage, caplog):
  convert()
  damage(cache / 'key')
  assert table.open_table('key') is None
  assert str(cache / 'key') in caplog.text
  assert len(convert().images) == 74
  assert os.listdir(cache) == ['key']


def test_fingerprint_changes_with_name_size_and_time(tmp_path):
  def fingerprint(*names):
    return table.fingerprint(tmp_path, [tmp_path / name for name in names])

  (tmp_path / 'a').write_text('a')
  (tmp_path / 'b').write_text('a')
  os.utime(tmp_path / 'a', ns=(5, 5))
  os.utime(tmp_path / 'b', ns=(5, 5))
  first = fingerprint('a')
  assert fingerprint('a') == first != fingerprint('b')
  os.utime(tmp_path / 'a', ns=(5, 6))
  assert fingerprint('a') != first
  (tmp_path / 'a').write_text('aa')
  os.utime(tmp_path / 'a', ns=(5, 5))
  assert fingerprint('a') != first

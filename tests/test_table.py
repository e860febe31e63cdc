import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from metajax.data import table
from metajax.errors import UserError

SHAPE = (4, 5, 3)
CLASSES = {'b': list(range(70)), 'a': list(range(100, 103)), 'c': [7]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(table, '_CHUNK', 3)  # many jobs, so that their order matters
  return tmp_path / 'cache'


def decode(item):
  return np.full(SHAPE, item, np.uint8)


def convert(decode=decode):
  return table.convert('key', CLASSES, decode, SHAPE, [{'path': 'x.zip'}], notes=['a note'])


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
  assert opened.notes == ('a note',)
  np.testing.assert_array_equal(opened.counts, [70, 3, 1])
  np.testing.assert_array_equal(opened.images[:, 0, 0, 0], [*range(70), 100, 101, 102, 7])
  assert opened.images.shape == (74, *SHAPE) and not opened.images.flags.writeable
  manifest = json.loads((cache / 'key/manifest.json').read_text())
  assert manifest['sha256'] == hashlib.sha256((cache / 'key/images.npy').read_bytes()).hexdigest()
  assert manifest['source'] == [{'path': 'x.zip'}]


def test_class_tables_share_images_and_place_turned_classes():
  tables = table.class_tables(convert(), {'train': [('b', 0), ('c', 0), ('b', 3)], 'test': ['a']})
  train, test = tables['train'], tables['test']
  assert train.images is test.images
  assert train.names == ('b', 'c', 'b/rot270') and test.names == ('a',)
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
    lambda folder: (folder / 'manifest.json').write_text('{"format": 1'),
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
  assert sorted(os.listdir(cache)) == ['.key.lock', 'key']


def test_failed_decode_leaves_nothing(cache):
  def fail(item):
    if item == 101:
      raise UserError('image 101')
    return decode(item)

  with pytest.raises(UserError, match='image 101'):
    convert(fail)
  assert os.listdir(cache) == ['.key.lock']


def test_full_disk_is_one_line_and_leaves_nothing(cache):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'cannot write .*key: File too large; .*METAJAX_CACHE') as error:
      convert()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert '\n' not in str(error.value)
  assert os.listdir(cache) == ['.key.lock']


def test_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'file/cache'))
  assert table.open_table('key') is None
  with pytest.raises(UserError, match='METAJAX_CACHE'):
    convert()


SLOW_CONVERSION = f"""
import os, sys, time
import numpy as np
from metajax.data import table
def decode(item):
  time.sleep(0.01)
  with open(sys.argv[1], 'a') as log:
    log.write(f'{{os.getpid()}}\\n')
  return np.full({SHAPE}, item, np.uint8)
print(len(table.convert('key', {{'a': range(200)}}, decode, {SHAPE}, []).images))
"""


def start_conversion(log):
  return subprocess.Popen([sys.executable, '-c', SLOW_CONVERSION, str(log)], stdout=subprocess.PIPE, text=True)


def test_two_processes_convert_once(tmp_path):
  processes = [start_conversion(tmp_path / 'log') for _ in range(2)]
  assert [process.communicate()[0].strip() for process in processes] == ['200', '200']
  pids = (tmp_path / 'log').read_text().split()
  assert len(pids) == 200 and len(set(pids)) == 1


def test_killed_conversion_is_no_table_and_is_cleaned(cache, tmp_path):
  process = start_conversion(tmp_path / 'log')
  while not (tmp_path / 'log').exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert len(os.listdir(cache)) == 2  # the lock and what was being written
  assert table.open_table('key') is None
  convert()
  assert sorted(os.listdir(cache)) == ['.key.lock', 'key']


def test_decode_image_squashes_bilinearly_and_names_what_fails(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'x.png')
  decoded = table.decode_image(tmp_path / 'x.png', 'x', 10, lambda image: image.convert('L'))
  truth = Image.fromarray(pixels).convert('L').resize((10, 10), Image.BILINEAR)
  np.testing.assert_array_equal(decoded, np.asarray(truth)[:, :, None])

  os.truncate(tmp_path / 'x.png', 700)
  with pytest.raises(UserError, match=r'this one does not decode .*replace or remove'):
    table.decode_image(tmp_path / 'x.png', 'this one', 10, lambda image: image.convert('L'))
  (tmp_path / 'x.png').write_text('text')
  with pytest.raises(UserError, match=r'not an image'):
    table.decode_image(tmp_path / 'x.png', 'this one', 10, lambda image: image)


def test_fingerprint_changes_with_name_size_and_time(tmp_path):
  def fingerprint(*names):
    return table.describe_folder(tmp_path, [tmp_path / name for name in names])['fingerprint']

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

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from metajax.data import conversion, table
from metajax.errors import UserError

SHAPE = (4, 5, 3)
CLASSES = {'b': range(70), 'a': range(100, 103), 'c': [7]}
VALUES = [*range(70), 100, 101, 102, 7]
JOB = {'fingerprint': '', 'superclasses': {}, 'splits': {}, 'notes': ['a note']}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(conversion, '_CHUNK', 3)  # many jobs, so that their order matters
  (tmp_path / 'cache').mkdir()
  return tmp_path / 'cache'


def decode(item):
  return np.full(SHAPE, item, np.uint8)


def convert(decode=decode, job=JOB, **options):
  return conversion.convert('key', CLASSES, decode, SHAPE, job, **options)


def failing(*bad):
  """A decoder that does not know some items, and the items it was asked for."""
  asked = []

  def decode(item):
    asked.append(item)
    if item in bad:
      raise UserError(f'image {item}')
    return np.full(SHAPE, item, np.uint8)

  return decode, asked


def test_a_conversion_that_failed_goes_on_where_it_was(cache):
  decode, first = failing(60)
  with pytest.raises(UserError, match='image 60'):
    convert(decode)
  assert table.open_table('key') is None and os.listdir(cache) == ['.key.partial']
  done = (cache / '.key.partial' / 'steps.jsonl').read_text().splitlines()  # how many depends on the threads
  left = sorted(VALUES[json.loads(done[-1])[0] :]) if done else sorted(VALUES)
  decode, second = failing()
  result = convert(decode)
  np.testing.assert_array_equal(result.images[:, 0, 0, 0], VALUES)
  assert sorted(second) == left and 60 in second and len(first) < 74
  assert os.listdir(cache) == ['key']


def test_another_job_does_not_take_over(cache):
  with pytest.raises(UserError):
    convert(failing(60)[0])
  decode, asked = failing()
  convert(decode, JOB | {'fingerprint': 'changed'})
  assert len(asked) == 74


@pytest.mark.parametrize('name', ['images.npy', 'steps.jsonl', 'job.json'])
def test_what_was_cut_short_is_written_again(cache, name):
  with pytest.raises(UserError):
    convert(failing(60)[0])
  path = cache / '.key.partial' / name
  os.truncate(path, path.stat().st_size - 5)
  np.testing.assert_array_equal(convert().images[:, 3, 4, 2], VALUES)


def test_images_that_do_not_decode_are_left_out_if_asked(cache, caplog):
  with pytest.raises(UserError):
    convert(failing(4, 5, 60, 101)[0])
  result = convert(failing(4, 5, 60, 101)[0], skip_bad=True)  # also those of the part that was taken over
  kept = [value for value in VALUES if value not in (4, 5, 60, 101)]
  np.testing.assert_array_equal(result.images[:, 0, 0, 0], kept)
  np.testing.assert_array_equal(result.counts, [67, 2, 1])
  assert result.notes == ('a note', *(f'left out: image {k}' for k in (4, 5, 60, 101)))
  assert 'left out: image 101' in caplog.text
  assert (cache / 'key/images.npy').stat().st_size == 128 + 70 * 60


def test_who_wants_all_images_does_not_go_on_from_where_some_were_left_out(cache):
  def stop(item):
    if item == 60:
      raise KeyboardInterrupt
    return failing(4)[0](item)

  with pytest.raises(KeyboardInterrupt):
    convert(stop, skip_bad=True)
  with pytest.raises(UserError, match='image 4'):
    convert(failing(4)[0])


def test_images_of_few_levels_are_explained(cache):
  """Those of the part that was taken over as well, and not those that were left out."""

  def decode(item):
    if item == stop:
      raise KeyboardInterrupt
    if item == 4:
      raise UserError('image 4')
    return np.linspace(0, 15 if item in (3, 4, 5, 101, 7) else 16, 20).astype(np.uint8).repeat(3).reshape(SHAPE)

  explained = []

  def explain(items):
    explained.extend(items)
    return ['few']

  stop = 102
  with pytest.raises(KeyboardInterrupt):
    convert(decode, explain=explain, skip_bad=True)
  stop = None
  assert convert(decode, explain=explain, skip_bad=True).notes == ('a note', 'left out: image 4', 'few')
  assert explained == [3, 5, 7, 101, 7]


def test_full_disk_is_one_line_and_leaves_nothing(cache):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'cannot write .*key: File too large; .*METAJAX_CACHE') as error:
      convert()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert '\n' not in str(error.value)
  assert os.listdir(cache) == []


def test_memory_holds_a_few_images_at_a_time(monkeypatch):
  monkeypatch.setattr(conversion, '_CHUNK', 64)
  tracemalloc.start()
  shape = (50, 50, 4)
  conversion.convert('key', {'a': range(4000)}, lambda k: np.zeros(shape, np.uint8), shape, JOB)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 64 * 10_000 * (4 * os.cpu_count() + 6), peak  # the images are 40 MB


SLOW = f"""
import sys, time
import numpy as np
from metajax.data import conversion
conversion._CHUNK = 3
def decode(item):
  time.sleep(0.005)
  open(sys.argv[1], 'a').write(f'{{item}}\\n')
  return np.full({SHAPE}, item, np.uint8)
conversion.convert('key', {{'a': range(200)}}, decode, {SHAPE}, {JOB})
"""


def test_a_killed_conversion_goes_on_where_it_was(cache, tmp_path):
  log = tmp_path / 'log'
  process = subprocess.Popen([sys.executable, '-c', SLOW, str(log)])
  while not log.exists() or len(log.read_text().split()) < 60:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert table.open_table('key') is None
  done = len(log.read_text().split())
  log.unlink()
  assert subprocess.run([sys.executable, '-c', SLOW, str(log)]).returncode == 0
  again = log.read_text().split()
  assert len(again) < 200 - done + 40
  np.testing.assert_array_equal(table.open_table('key').images[:, 0, 0, 0], range(200))

"""Episodes: drawn fairly, the same whoever asks, and decoded to the images that they name."""

import itertools
import mmap
import threading
import time
import types

import jax
import numpy as np
import pytest
from scipy import stats

from metajax.data import episodes, pipeline
from metajax.data.table import ClassTable, gather
from metajax.datasets import sinusoid
from metajax.errors import UserError

COUNTS = np.array([7, 5, 9, 6, 8, 5])  # of the table's classes
ROWS = COUNTS.sum()


def table_of(classes, turns=None):
  """A split of the table with these classes; every image is different and its first pixel says which row it is."""
  images = np.random.default_rng(0).integers(0, 256, (ROWS, 2, 2, 1), np.uint8)
  images[:, 0, 0, 0] = np.arange(ROWS)
  starts = np.cumsum(COUNTS) - COUNTS
  classes = np.array(classes)
  turns = np.zeros(len(classes), np.int8) if turns is None else np.array(turns, np.int8)
  return ClassTable(images, starts[classes], COUNTS[classes], turns, tuple(f'class{c}' for c in classes))


def make(table, split='train', **settings):
  settings = dict(way=3, shot=1, query_shot=2, seed=0, placement='device') | settings
  return episodes.make_source(table, split, **settings)


def decode(source, start, count):
  return jax.device_get(jax.jit(source.decode)(source.resident, source.sample(start, count)))


def rows_of(examples):
  """The table's rows that the images show, (tasks, n)."""
  return np.rint(examples.inputs[:, :, 0, 0, 0] * 255).astype(int)


# Choosing.


@pytest.mark.parametrize(('n', 'k'), [(5, 5), (5, 3), (4, 1)])
def test_choose_takes_the_unit_cube_to_every_ordered_choice_equally(n, k):
  # One point in each of the n (n - 1) ... (n - k + 1) boxes of the cube that a shuffle tells apart.
  cube = [(np.arange(n - i) + 0.5) / (n - i) for i in range(k)]
  uniform = np.array(list(itertools.product(*cube)))
  chosen = episodes.choose(uniform, np.full(len(uniform), n))
  assert sorted(map(tuple, chosen.tolist())) == list(itertools.permutations(range(n), k))


def test_choose_is_uniform_over_ordered_choices():
  draws = episodes.choose(np.random.default_rng(0).random((60_000, 3)), np.full(60_000, 5))
  choices = list(itertools.permutations(range(5), 3))
  seen, counts = np.unique(draws, axis=0, return_counts=True)
  assert list(map(tuple, seen.tolist())) == choices
  assert stats.chisquare(counts).pvalue > 1e-3


def test_choose_minds_each_row_s_own_n_and_the_ends_of_the_interval():
  n = np.random.default_rng(1).integers(4, 40, (300, 3))
  random = np.random.default_rng(2).random((300, 3, 4))
  for uniform in (random, np.zeros_like(random), np.full_like(random, 1 - 2**-53)):
    chosen = episodes.choose(uniform, n)
    assert chosen.shape == (300, 3, 4) and chosen.min() >= 0 and (chosen < n[..., None]).all()
    assert (np.diff(np.sort(chosen), axis=-1) > 0).all()  # distinct


# Image episodes.


def test_images_are_of_their_class_and_never_in_both_support_and_query():
  classes = [0, 2, 3, 5]
  table = table_of(classes)
  batch = decode(make(table, way=3, shot=2, query_shot=3), 0, 400)
  assert batch.support.inputs.shape == (400, 6, 2, 2, 1) and batch.query.inputs.shape == (400, 9, 2, 2, 1)
  assert batch.support.inputs.dtype == np.float32 and batch.support.targets.dtype == np.int32
  class_of_row = np.repeat(np.arange(6), COUNTS)
  for ids, support, query, support_rows, query_rows in zip(
    batch.class_ids, batch.support.targets, batch.query.targets, *map(rows_of, batch[:2]), strict=True
  ):
    assert len(set(ids)) == 3 and min(ids) >= 0 and max(ids) < 4
    assert support.tolist() == [0, 0, 1, 1, 2, 2] and query.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for targets, rows in ((support, support_rows), (query, query_rows)):
      assert [classes[ids[t]] for t in targets] == class_of_row[rows].tolist()
    assert len({*support_rows, *query_rows}) == 15


def test_classes_labels_and_images_are_drawn_uniformly():
  batch = decode(make(table_of([0, 1, 2, 3, 4, 5]), way=3, shot=2, query_shot=3), 0, 6000)
  for position in range(3):  # every class is equally often behind every label
    assert stats.chisquare(np.bincount(batch.class_ids[:, position], minlength=6)).pvalue > 1e-3
  orders = np.unique(batch.class_ids, axis=0, return_counts=True)[1]
  assert len(orders) == 120 and stats.chisquare(orders).pvalue > 1e-3
  for examples in batch[:2]:  # every image of a class is equally often in support, and in query
    used = np.bincount(rows_of(examples).ravel(), minlength=ROWS)
    for start, count in zip(np.cumsum(COUNTS) - COUNTS, COUNTS, strict=True):
      assert stats.chisquare(used[start : start + count]).pvalue > 1e-3


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def functions():
  return sinusoid.load(None)['train']


@pytest.mark.parametrize('data', [table_of([0, 1, 2, 3]), functions()], ids=['images', 'functions'])
def test_an_episode_is_a_function_of_seed_split_and_number_alone(data):
  whole = make(data).sample(0, 600)
  # Across the borders at multiples of 256, one by one, backwards, and by sources that have drawn nothing before.
  for start, count in ((590, 10), (250, 12), (255, 1), (256, 1), (3, 300), (0, 1), (511, 2)):
    fresh, part = make(data), {name: x[start : start + count] for name, x in whole.items()}
    assert_same(fresh.sample(start, count), part)
    assert_same(fresh.sample(start, count), part)
  for other in (make(data, seed=1), make(data, 'val'), make(data, 'test')):
    for name in whole.keys() - {'turns'}:
      same = (other.sample(0, 600)[name] == whole[name]).reshape(600, -1).all(axis=1)
      assert same.mean() < 0.1  # 4 classes make 24 orders
  for name in whole.keys() - {'turns'}:
    assert not np.array_equal(whole[name][:256], whole[name][256:512])  # a block does not repeat the one before


def test_known_episodes_stay_as_they_are():
  """Published numbers are of fixed test episodes: a change of these changes every number."""
  batch = make(table_of([0, 1, 2, 3]), 'test').sample(1000, 1)
  assert batch['class_ids'].tolist() == [[3, 0, 2]]
  assert batch['rows'].tolist() == [[[24, 26, 21], [4, 2, 6], [18, 20, 13]]]


def test_what_was_sampled_may_be_changed_without_changing_the_source():
  source = make(table_of([0, 1, 2, 3]))
  before = jax.tree.map(np.copy, source.sample(5, 3))
  for array in source.sample(5, 3).values():
    array[...] = 0
  assert_same(source.sample(5, 3), before)


def test_placement_does_not_change_an_episode():
  table = table_of([0, 1, 2, 4], turns=[0, 1, 2, 3])
  device, host = (make(table, placement=placement) for placement in ('device', 'host'))
  assert device.resident is table.images and host.resident == ()
  assert_same(decode(device, 250, 20), decode(host, 250, 20))
  assert 'images' in host.sample(0, 1) and 'images' not in device.sample(0, 1)
  assert_same(decode(make(table, placement='auto'), 250, 20), decode(host, 250, 20))


def test_a_table_lies_on_the_device_if_the_budget_holds_it():
  images = np.zeros((5, 4, 4, 1), np.uint8)
  assert [episodes.place(images, budget) for budget in (79, 80)] == ['host', 'device']
  assert episodes.place(images) == 'device'


def test_turned_classes_show_turned_images():
  turns = [0, 1, 2, 3]
  table = table_of([4, 4, 4, 4], turns)
  table = table._replace(images=np.random.default_rng(0).integers(0, 256, (ROWS, 3, 3, 2), np.uint8))
  source = make(table, way=4, shot=1, query_shot=1)
  sampled, batch = source.sample(0, 50), decode(source, 0, 50)
  for e, label in itertools.product(range(50), range(4)):
    for n, examples in enumerate(batch[:2]):
      image = np.rot90(table.images[sampled['rows'][e, label, n]], turns[batch.class_ids[e, label]])
      np.testing.assert_allclose(examples.inputs[e, label], image / 255, rtol=1e-6)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(way=5), 'way = 5, but the val split has only 4 classes'),
    (dict(shot=2, query_shot=4), 'shot [+] query_shot = 6, but class class1 of the val split has only 5 images'),
    (dict(way=None), 'way = None'),
    (dict(way=1), 'way = 1'),
    (dict(shot=0), 'shot = 0'),
    (dict(query_shot=0), 'query_shot = 0'),
    (dict(placement='disk'), "'disk'"),
  ],
)
def test_settings_that_do_not_fit_the_data_are_refused_with_their_numbers(settings, message):
  with pytest.raises(UserError, match=message):
    make(table_of([0, 1, 2, 3]), 'val', **settings)
  make(table_of([0, 1, 2, 3]), 'val', way=4, shot=2, query_shot=3)  # just fits


@pytest.mark.slow
def test_sampling_is_fast():
  images, none = np.zeros((60_000, 1, 1, 1), np.uint8), np.zeros(100, np.int8)
  table = ClassTable(images, 600 * np.arange(100), np.full(100, 600), none, ('',) * 100)
  source = make(table, way=5, shot=1, query_shot=15)
  start = time.perf_counter()
  for step in range(80):
    source.sample(32 * step, 32)
  rate = 32 * 80 / (time.perf_counter() - start)
  print(f'{rate:,.0f} episodes per second')
  assert rate > 1000


# Batches of all classes.


@pytest.mark.parametrize('placement', ['device', 'host'])
def test_batches_go_through_every_image_of_every_class_once_an_epoch(placement):
  classes, turns = [1, 4, 1, 5], [0, 0, 1, 0]  # the third is the first, turned
  table = table_of(classes, turns)
  images = sum(COUNTS[classes])  # 23
  batches = decode(make(table, merged=True, batch=5, placement=placement), 0, images)  # five epochs
  assert batches.support.inputs.shape == (images, 0, 2, 2, 1) and batches.support.targets.shape == (images, 0)
  assert batches.query.inputs.shape == (images, 5, 2, 2, 1)
  np.testing.assert_array_equal(batches.class_ids, np.tile(np.arange(4), (images, 1)))
  upright = np.round(batches.query.inputs * 255).astype(np.uint8).reshape(-1, 2, 2, 1)
  targets = batches.query.targets.ravel()
  upright[targets == 2] = np.rot90(upright[targets == 2], -1, axes=(1, 2))
  rows = upright[:, 0, 0, 0].astype(int)
  np.testing.assert_array_equal(upright, table.images[rows])
  np.testing.assert_array_equal(np.repeat(np.arange(6), COUNTS)[rows], np.array(classes)[targets])
  epochs = np.stack([rows, targets]).reshape(2, 5, images).swapaxes(0, 1)
  for epoch in epochs:
    assert len(set(map(tuple, epoch.T))) == images
  assert all((a != b).any() for a, b in itertools.combinations(epochs, 2))


def test_a_batch_is_a_function_of_seed_split_and_number_alone():
  whole = make(table_of([0, 1, 2]), merged=True, batch=4).sample(0, 30)
  for start, count in ((7, 3), (29, 1), (0, 1), (4, 20)):
    fresh = make(table_of([0, 1, 2]), merged=True, batch=4)
    assert_same(fresh.sample(start, count), {name: x[start : start + count] for name, x in whole.items()})
  for other in (dict(seed=1), dict(split='val')):
    assert (make(table_of([0, 1, 2]), merged=True, batch=4, **other).sample(0, 30)['rows'] != whole['rows']).any()


def test_merged_episodes_have_all_of_their_images_in_the_query_set():
  settings = dict(way=3, shot=2, query_shot=1)
  apart, merged = (decode(make(table_of([0, 1, 2, 5]), merged=m, **settings), 0, 40) for m in (False, True))
  assert merged.support.inputs.shape == (40, 0, 2, 2, 1)
  np.testing.assert_array_equal(merged.class_ids, apart.class_ids)
  np.testing.assert_array_equal(merged.query.targets, np.tile(np.repeat(np.arange(3), 3), (40, 1)))
  both = np.concatenate([rows_of(apart.support).reshape(40, 3, 2), rows_of(apart.query).reshape(40, 3, 1)], axis=-1)
  np.testing.assert_array_equal(rows_of(merged.query).reshape(40, 3, 3), both)


# Functions.


def test_sinusoids_are_waves_of_uniform_amplitude_and_phase():
  batch = decode(make(functions(), way=None, shot=5, query_shot=7), 0, 1000)
  assert batch.support.inputs.shape == batch.support.targets.shape == (1000, 5, 1)
  assert batch.query.inputs.shape == batch.query.targets.shape == (1000, 7, 1) and batch.class_ids.shape == (1000, 0)
  x, y = (np.concatenate(pair, axis=1)[..., 0].astype(np.float64) for pair in zip(*batch[:2], strict=True))
  amplitudes, phases = [], []
  for xs, ys in zip(x, y, strict=True):  # a sin(x - p) = a cos(p) sin(x) - a sin(p) cos(x)
    basis = np.stack([np.sin(xs), np.cos(xs)], axis=1)
    (sine, cosine), *_ = np.linalg.lstsq(basis, ys)
    np.testing.assert_allclose(basis @ (sine, cosine), ys, atol=1e-5)
    amplitudes.append(np.hypot(sine, cosine))
    phases.append(np.arctan2(-cosine, sine))
  for values, low, high in ((x.ravel(), -5, 5), (amplitudes, 0.1, 5), (phases, 0, np.pi)):
    margin = (high - low) / 100
    assert low - 1e-4 <= np.min(values) < low + margin and high - margin < np.max(values) <= high + 1e-4
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_the_oracle_is_told_amplitude_and_phase_of_the_same_tasks():
  plain, oracle = (make(sinusoid.load(None, oracle=o)['val'], 'val', shot=4, query_shot=4) for o in (False, True))
  plain, oracle = plain.sample(0, 50), oracle.sample(0, 50)
  np.testing.assert_array_equal(oracle['inputs'][..., :1], plain['inputs'])
  np.testing.assert_array_equal(oracle['targets'], plain['targets'])
  x, amplitude, phase = np.moveaxis(oracle['inputs'], -1, 0)
  np.testing.assert_allclose(oracle['targets'][..., 0], amplitude * np.sin(x - phase), atol=1e-5)
  assert (np.ptp(amplitude, axis=1) == 0).all() and (np.ptp(phase, axis=1) == 0).all()


# The pipeline.


def running_threads():
  return [thread for thread in threading.enumerate() if thread.name == 'prefetch']


def test_prefetch_keeps_the_order_and_stays_at_most_its_depth_ahead():
  made = []

  def make_batch(step):
    made.append(step)
    return f'batch {step}'

  batches = pipeline.prefetch(make_batch, range(3, 20), depth=2)
  for expected in range(3, 20):
    assert next(batches) == (expected, f'batch {expected}')
    time.sleep(0.01)
    assert len(made) <= expected - 3 + 1 + 3  # taken, two waiting, one that finds the queue full
  assert list(batches) == [] and made == list(range(3, 20))
  assert not running_threads()


def test_prefetch_makes_batches_in_another_thread_before_they_are_asked_for():
  second = threading.Event()
  batches = pipeline.prefetch(lambda step: second.set() if step == 2 else None, (1, 2))
  next(batches)
  assert second.wait(10)
  batches.close()


def test_prefetch_raises_what_went_wrong_after_the_batches_before_it():
  def make_batch(step):
    if step == 2:
      raise UserError('no such image')
    return step

  batches = pipeline.prefetch(make_batch, range(10))
  assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
  with pytest.raises(UserError, match='no such image'):
    next(batches)
  assert not running_threads()


def test_prefetch_tells_how_long_it_was_waited_for_and_not_how_long_it_waited(monkeypatch):
  clock, asked, waits = [0.0], threading.Event(), []

  def now():
    asked.set()  # the loop is about to wait
    return clock[0]

  def make_batch(step):
    asked.wait()
    clock[0] += 5.0 * (step == 0)  # only making the first one takes time
    return step

  monkeypatch.setattr(pipeline, 'time', types.SimpleNamespace(perf_counter=now))
  assert [step for step, _ in pipeline.prefetch(make_batch, range(4), waits.append)] == [0, 1, 2, 3]
  assert waits == [5, 0, 0, 0]


def test_closing_prefetch_ends_its_thread_though_the_queue_is_full():
  batches = pipeline.prefetch(lambda step: step, itertools.count())
  assert next(batches) == (0, 0)
  assert len(running_threads()) == 1
  batches.close()
  assert not running_threads()


def test_gathering_asks_the_disk_for_the_images_alone_and_for_all_at_once(tmp_path, monkeypatch):
  asked = []

  class Map(mmap.mmap):
    def madvise(self, option, start, length):
      asked.append((start, start + length))
      super().madvise(option, start, length)

  truth = np.random.default_rng(0).integers(0, 256, (50, 61, 61, 3), np.uint8)
  np.save(tmp_path / 'images.npy', truth)
  with monkeypatch.context() as patch:
    patch.setattr(mmap, 'mmap', Map)
    images = np.load(tmp_path / 'images.npy', mmap_mode='r')
  rows = np.array([[0, 49], [7, 8]], np.int32)
  np.testing.assert_array_equal(gather(images, rows), truth[rows])
  header = (tmp_path / 'images.npy').stat().st_size - truth.nbytes
  for row, (start, end) in zip(rows.ravel(), asked, strict=True):
    assert start % mmap.PAGESIZE == 0 and end == header + (row + 1) * truth[0].nbytes
    assert 0 <= header + row * truth[0].nbytes - start < mmap.PAGESIZE
  np.testing.assert_array_equal(gather(truth, rows), truth[rows])

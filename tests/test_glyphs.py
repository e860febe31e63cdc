"""The embedded characters: deterministic, well formed, and of a difficulty that leaves something to learn."""

import re

import numpy as np
import pytest

from metajax.datasets import glyphs
from metajax.errors import UserError


@pytest.fixture(scope='module')
def tables():
  return glyphs.load(None)


def test_shapes_counts_and_ink(tables):
  images = tables['train'].images
  assert images.shape == (12_000, 28, 28, 1) and images.dtype == np.uint8
  assert [len(tables[split].starts) for split in ('train', 'val', 'test')] == [400, 100, 100]
  for table in tables.values():
    assert table.images is images  # one copy serves all splits
    assert table.starts.dtype == table.counts.dtype == np.int64 and table.turns.dtype == np.int8
    assert (table.counts == 20).all() and not table.turns.any()
    assert len(table.names) == len(table.starts) == len(table.counts) == len(table.turns)
  ink = images.mean((1, 2, 3)) / 255
  assert 0.07 < ink.mean() < 0.13 and ink.min() > 0.01 and ink.max() < 0.35
  assert (images[:, 0] == 0).mean() > 0.97 and images.max() == 255  # the paper is blank, the ink is not grey


def test_splits_are_disjoint_and_cover_the_rows(tables):
  rows = [
    row
    for t in tables.values()
    for start, count in zip(t.starts, t.counts, strict=True)
    for row in range(start, start + count)
  ]
  assert rows == list(range(12_000))
  assert len({name for t in tables.values() for name in t.names}) == 600
  assert len(np.unique(tables['train'].images.reshape(12_000, -1), axis=0)) == 12_000  # no drawing occurs twice


def test_a_class_depends_on_seed_and_number_alone(tables):
  few = glyphs.load('/nowhere', classes=(3, 2, 1), images_per_class=4)
  every = tables['train'].images.reshape(600, 20, 28, 28, 1)
  np.testing.assert_array_equal(few['test'].images.reshape(6, 4, 28, 28, 1), every[:6, :4])
  other = glyphs.load(None, classes=(3, 2, 1), images_per_class=4, seed=1)
  assert (other['test'].images != few['test'].images).any((1, 2, 3)).all()


def test_other_sizes_show_the_same_characters():
  small, large = (glyphs.load(None, size=size, classes=(4, 1, 1))['val'].images / 255 for size in (28, 84))
  assert large.shape == (120, 84, 84, 1)
  averaged = large.reshape(120, 28, 3, 28, 3, 1).mean((2, 4))
  assert np.abs(averaged - small).mean() < 0.01


def test_drawings_of_a_class_resemble_each_other(tables):
  flat = tables['test'].images[-2000:].reshape(2000, -1).astype(np.float32) / 255
  squares = (flat**2).sum(1)
  distances = (
    np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0)).reshape(100, 20, 100, 20).mean((1, 3))
  )
  others = (distances.sum(1) - np.diag(distances)) / 99
  assert np.mean(np.diag(distances) < others) > 0.95


def test_nearest_neighbour_leaves_something_to_learn(tables):
  table, rng = tables['test'], np.random.default_rng(0)
  flat = table.images.reshape(len(table.images), -1).astype(np.float32) / 255
  hits = []
  for _ in range(300):  # 5-way 1-shot, 15 queries per class
    classes = table.starts[rng.choice(100, 5, replace=False)]
    rows = classes[:, None] + np.stack([rng.permutation(20)[:16] for _ in range(5)])
    support, query = flat[rows[:, 0]], flat[rows[:, 1:].ravel()]
    distances = (support**2).sum(1) - 2 * query @ support.T
    hits.append(np.mean(distances.argmin(1) == np.repeat(np.arange(5), 15)))
  assert 0.55 < np.mean(hits) < 0.75


@pytest.mark.parametrize('wrong', [dict(size=0), dict(classes=(4, 4)), dict(images_per_class=0), dict(seed=-1)])
def test_numbers_out_of_range_are_named(wrong):
  [(name, value)] = wrong.items()
  with pytest.raises(UserError, match=re.escape(f'{name}={value}')):
    glyphs.load(None, **wrong)

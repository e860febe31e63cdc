"""Figures: each is written, opens as an image and holds what it was given; matplotlib's state stays as it was."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from metajax import figures


@pytest.fixture
def drawn(tmp_path, monkeypatch):
  """Where to draw; afterwards `drawn.image()` is the PNG as (h, w, 3) uint8 and `drawn.figure` the figure behind it."""

  class Drawn:
    path = tmp_path / 'figures' / 'figure.png'
    figure = None

    def image(self):
      with Image.open(self.path) as image:
        assert image.format == 'PNG'
        pixels = np.asarray(image.convert('RGB'))
      assert pixels.shape[0] > 300 and pixels.shape[1] > 500 and pixels.std() > 5  # not blank
      return pixels

    def texts(self):
      return [t.get_text() for t in self.figure.findobj(matplotlib.text.Text) if t.get_text()]

  drawn = Drawn()
  save = Figure.savefig

  def savefig(figure, *args, **kwargs):
    drawn.figure = figure
    save(figure, *args, **kwargs)

  monkeypatch.setattr(Figure, 'savefig', savefig)
  return drawn


def has_color(pixels, color):
  wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
  return (pixels == wanted).all(-1).sum() > 20


def classification_records(num):
  rng = np.random.default_rng(0)
  for step in range(1, num + 1):
    yield {'step': 10 * step, 'train/loss': 1 / step + 0.1 * rng.random(), 'train/accuracy': 1 - 1 / (step + 1)}
    if step % 5 == 0:
      val = {'val/loss': 1 / step, 'val/loss_ci95': 0.02, 'val/accuracy': 0.7, 'val/accuracy_ci95': 0.01}
      yield {'step': 10 * step, **val}


def test_learning_curves_of_classification(drawn):
  figures.learning_curves(drawn.path, list(classification_records(60)))
  assert has_color(drawn.image(), figures.BLUE) and has_color(drawn.image(), figures.RED)
  loss, accuracy = drawn.figure.axes
  assert loss.get_ylabel() == 'loss' and accuracy.get_ylabel() == 'accuracy (%)'
  val = accuracy.lines[-1]
  np.testing.assert_array_equal(val.get_xdata(), np.arange(50, 601, 50))
  np.testing.assert_allclose(val.get_ydata(), 70)  # fractions come in, percent are drawn


def test_learning_curves_of_regression_have_one_panel(drawn):
  records = [{'step': k, 'train/loss': 4 / k, 'val/loss': 5 / k, 'val/loss_ci95': 0.1} for k in range(1, 30)]
  figures.learning_curves(drawn.path, records)
  drawn.image()
  assert len(drawn.figure.axes) == 1


@pytest.mark.parametrize(
  'records',
  [
    [],
    [{'step': 0}],
    [{'step': 1, 'train/loss': 0.5}],
    [{'step': 1, 'val/loss': 0.0, 'val/accuracy': 1.0}],
    [{'step': 1, 'train/loss': float('nan'), 'train/accuracy': None}, {'step': 2, 'train/loss': 1.0}],
  ],
)
def test_learning_curves_of_next_to_nothing(drawn, records):
  figures.learning_curves(drawn.path, records)
  drawn.image()


def test_running_mean_is_a_mean_over_the_window():
  values = np.random.default_rng(0).standard_normal(11)
  expected = [values[max(0, i - 2) : i + 3].mean() for i in range(11)]
  np.testing.assert_allclose(figures._running_mean(values, 3), expected)
  np.testing.assert_allclose(figures._running_mean(values, 1), values)


def test_inner_steps_of_accuracy(drawn):
  figures.inner_steps(drawn.path, [0.2, 0.5, 0.634], [0.01, 0.02, 0.02], quantity='accuracy', way=5)
  drawn.image()
  assert {'20.0 %', '63.4 %', 'chance, 20 %'} <= set(drawn.texts())


@pytest.mark.parametrize('values', [[2.5], [3.0, 0.5, 0.25], np.linspace(0.5, 4, 21)])
def test_inner_steps_of_loss(drawn, values):
  figures.inner_steps(drawn.path, values, np.full(len(values), 0.1), quantity='loss')
  drawn.image()
  assert f'{values[0]:.3g}' in drawn.texts() and not any('chance' in text for text in drawn.texts())


def episode(way, shot, queries, channels, seed=0):
  rng = np.random.default_rng(seed)
  support, query = (rng.random((way * n, 14, 14, channels)) for n in (shot, queries))
  return (support, rng.permutation(np.arange(way).repeat(shot))), (
    query,
    rng.permutation(np.arange(way).repeat(queries)),
  )


@pytest.mark.parametrize(
  ('way', 'shot', 'queries', 'channels'), [(5, 1, 15, 3), (5, 1, 1, 1), (20, 5, 15, 1), (2, 12, 3, 3)]
)
def test_episode_grid(drawn, way, shot, queries, channels):
  support, query = episode(way, shot, queries, channels)
  predictions = query[1].copy()
  wrong = np.flatnonzero(query[1] == 1)[0]
  predictions[wrong] = 0
  figures.episode_grid(drawn.path, support, query, predictions, way=way)
  assert has_color(drawn.image(), figures.GREEN) and has_color(drawn.image(), figures.RED)
  texts, shown = drawn.texts(), min(queries, figures.SHOWN)
  assert texts.count('✗ class 0') == 1
  assert [texts.count(f'✓ class {k}') for k in range(way)] == [shown - (k == 1) for k in range(way)]
  assert len(drawn.figure.axes[0].images) == way * (shown + min(shot, figures.SHOWN))
  accuracy = 100 * (1 - 1 / (way * queries))
  assert f'{way}-way {shot}-shot episode: {accuracy:.0f} % of {way * queries} queries correct' in texts


def test_a_single_query_and_uint8(drawn):
  support = (np.full((3, 8, 8, 3), 7, np.uint8), np.arange(3))
  figures.episode_grid(drawn.path, support, (support[0][:1], np.array([2])), np.array([2]), way=3)
  assert '✓ class 2' in drawn.texts() and has_color(drawn.image(), figures.GREEN)


def test_images_of_any_scale_are_shown_ink_on_white():
  ink = np.zeros((2, 6, 6, 1))
  ink[:, 2, 1:4] = 1
  paper = 1 - ink[..., 0]
  for images in (ink, 1 - ink, (255 * ink).astype(np.uint8), 3 * ink - 2):
    for shown in figures._displayable(images[:1], images[1:]):
      np.testing.assert_allclose(shown, paper[:1], atol=1e-6)
  color = np.random.default_rng(0).uniform(-2, 3, (2, 6, 6, 3))
  [shown] = figures._displayable(color)
  np.testing.assert_allclose(shown, (color - color.min()) / np.ptp(color), atol=1e-6)


@pytest.mark.parametrize('num', [1, 3, 4])
def test_regression_curves(drawn, num):
  x = np.linspace(-5, 5, 50)
  task = dict(x=x, y=np.sin(x), x_support=x[::10], y_support=np.sin(x[::10]))
  predictions = {0: np.sin(x) + 2, 1: np.sin(x) + 1, 10: np.sin(x) + 0.5}
  figures.regression_curves(drawn.path, [dict(task, predictions=predictions)] * num)
  drawn.image()
  assert {'before adaptation', 'after 1 step', 'after 10 steps', 'truth', 'support'} <= set(drawn.texts())
  assert f'Task {num}: mean squared error 4 → 0.25' in drawn.texts()


def test_matplotlib_is_left_as_it_was(drawn):
  before = dict(matplotlib.rcParams)
  figures.inner_steps(drawn.path, [0.2, 0.5], [0.1, 0.1], quantity='accuracy')
  assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
  'record',
  [
    {'train/weights': [0.5, 0.4], 'train/pair': [5.0, 5.1], 'train/gain': 0.2, 'train/radius': 15.0},
    {'train/weights': [1.0] * 20},
    {
      'train/weights_quantiles': [0.1, 0.2, 0.3, 0.4, 0.5],
      'train/pair': [1.0, 0.0],
      'train/gain': 1,
      'train/radius': 1,
    },
  ],
  ids=['places', 'many', 'quantiles'],
)
def test_task_weights(drawn, record):
  figures.task_weights(drawn.path, [{'step': k, **record} for k in (20, 10, 30)] + [{'step': 30}])
  drawn.image()
  axes = drawn.figure.axes
  assert [ax.get_title(loc='left') for ax in axes][1:] == ['Values of the pair', 'Gain and radius'] * (
    'train/pair' in record
  )
  if 'train/weights' in record:
    assert len(axes[0].lines) == len(record['train/weights'])
    np.testing.assert_array_equal(axes[0].lines[1].get_xydata()[:, 0], [10, 20, 30])
    assert (axes[0].lines[1].get_ydata() == record['train/weights'][1]).all()
  else:
    assert (axes[0].lines[0].get_ydata() == 0.3).all()


def test_without_task_weights_nothing_is_drawn(tmp_path):
  figures.task_weights(tmp_path / 'figure.png', [{'step': 1, 'train/loss': 2.0}])
  assert not (tmp_path / 'figure.png').exists()

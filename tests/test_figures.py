"""Figures: each is written, opens as an image and holds what it was given; matplotlib's state stays as it was."""

import contextlib

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from metajax import config, figures, report, writer
from tests.conftest import tensorboard_events


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


@pytest.mark.parametrize(
  ('names', 'rows', 'below'),
  [
    (('cat', 'maple tree'), ['cat', 'maple tree'], ['✓ cat', '✓ maple tr…']),
    (
      ('Angelic/character01', 'Angelic/character02'),
      ['0: Angelic/character01', '1: Angelic/character02'],
      ['✓ class 0'],
    ),
    (('\u732b', '\u72d7'), ['0: □', '1: □'], ['✓ class 1']),  # in Chinese, which the font lacks
    (('$a', 'b' * 40), [r'\$a', f'...{"b" * 21}'], ['✓ \\$a', '✓ ...bbbbb…']),
  ],
)
def test_classes_have_their_names(drawn, names, rows, below):
  support, query = episode(2, 1, 3, 3)
  figures.episode_grid(drawn.path, support, query, query[1], way=2, names=names)
  assert {*rows, *below} <= set(drawn.texts())


@pytest.mark.parametrize('channels', [2, 4, 12])
def test_images_of_any_number_of_channels(drawn, channels):
  support, query = episode(3, 1, 2, channels)
  figures.episode_grid(drawn.path, support, query, query[1], way=3)
  shown = np.asarray(drawn.figure.axes[0].images[0].get_array(), float)
  image = support[0][np.flatnonzero(support[1] == 0)[0]]
  expected = image.mean(-1) if channels == 2 else image[..., :3]
  np.testing.assert_allclose(np.corrcoef(shown.ravel(), expected.ravel())[0, 1], 1, atol=1e-3)


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


def step_sizes(records, shift):
  for k in range(1, records + 1):
    sizes = {'conv0': [0.1 + 0.01 * k, 0.1 - 0.02 * k - shift], 'head/bias': [0.1 + 0.03 * k]}
    yield {'step': 10 * k, 'train/loss': 1.0, **{f'train/inner_lr/{name}': x for name, x in sizes.items()}}


def test_inner_lr_shows_the_last_ones_from_where_they_began(drawn):
  figures.inner_lr(drawn.path, [*step_sizes(3, 0.0)][::-1])
  drawn.image()
  table, curves, bar = drawn.figure.axes
  np.testing.assert_allclose(table.images[0].get_array(), [[0.13, 0.04], [0.19, 0.19]])
  assert [text.get_text() for text in table.texts] == ['0.130', '0.040', '0.190', '0.190']
  assert [label.get_text() for label in table.get_yticklabels()] == ['conv0', 'head/bias']
  # The first record's are 0.11, 0.08 and 0.13; the farthest from their median is 0.19.
  np.testing.assert_allclose(table.images[0].get_clim(), (0.03, 0.19))
  assert bar.get_ylabel() == "step size (white: 0.11, the first record's median)"
  np.testing.assert_allclose(curves.lines[0].get_xydata(), [[10, 0.095], [20, 0.09], [30, 0.085]])
  np.testing.assert_allclose(curves.lines[1].get_xydata(), [[10, 0.13], [20, 0.16], [30, 0.19]])


def test_inner_lr_of_both_signs_shows_zero_white(drawn):
  figures.inner_lr(drawn.path, list(step_sizes(3, 0.3)))
  drawn.image()
  np.testing.assert_allclose(drawn.figure.axes[0].images[0].get_clim(), (-0.26, 0.26))
  assert drawn.figure.axes[2].get_ylabel() == 'step size (white: 0)'


@pytest.mark.parametrize('sizes', [[0.1], [0.0, 0.0], [0.01] * 20])
def test_inner_lr_of_next_to_nothing(drawn, sizes):
  figures.inner_lr(drawn.path, [{'step': 1, 'train/inner_lr/head': sizes}])
  drawn.image()


@pytest.mark.parametrize('num', [1, 3])
def test_loss_importance_is_stacked(drawn, num):
  values = np.array([[0.2, 0.8], [0.1, 0.9], [0.0, 1.0]])[:num]
  records = [{'step': 10 * k, 'train/loss_importance': v.tolist()} for k, v in enumerate(values, 1)]
  figures.loss_importance(drawn.path, [*records, {'step': 40}])
  drawn.image()
  first, second = (band.get_paths()[0].vertices for band in drawn.figure.axes[0].collections)
  for x, (low, _) in zip(10 * np.arange(1, num + 1), values, strict=True):
    np.testing.assert_allclose(np.unique(first[first[:, 0] == x, 1].round(9)), np.unique([0, low]))
    np.testing.assert_allclose(np.unique(second[second[:, 0] == x, 1].round(9)), np.unique([low, 1]))
  assert {'step 1', 'step 2'} <= set(drawn.texts())


def test_training_is_drawn_as_far_as_it_was_recorded_and_goes_into_the_events_once(tmp_path):
  def figures_in_events():
    found = [(e.step, v.tag, v.image) for e in tensorboard_events(tmp_path) for v in e.summary.value]
    return [(step, tag) for step, tag, image in found if image.encoded_image_string.startswith(b'\x89PNG')]

  with contextlib.closing(writer.Writer(tmp_path, 0)) as log:
    log.write(1, 'train', {'loss': 1.0})
  report.draw_training(tmp_path)
  assert {path.stem for path in (tmp_path / 'figures').iterdir()} == {'learning_curves'}
  assert figures_in_events() == [(1, 'figures/learning_curves')]
  with contextlib.closing(writer.Writer(tmp_path, 1)) as log:
    log.write(2, 'train', {'loss': 1.0, 'inner_lr/head': [0.1], 'loss_importance': [0.4, 0.6]})
  for _ in range(2):
    report.draw_training(tmp_path)
    found = figures_in_events()
    assert found == [(2, f'figures/{name}') for name in ('inner_lr', 'learning_curves', 'loss_importance')]


def test_a_figure_that_cannot_be_drawn_costs_a_line(tmp_path, monkeypatch, capsys):
  def fail(path, *args):
    raise RuntimeError('no room\nat all')

  monkeypatch.setattr(figures, 'task_weights', fail)
  with contextlib.closing(writer.Writer(tmp_path, 0)) as log:
    log.write(1, 'train', {'loss': 1.0})
  report.draw_training(tmp_path)
  assert 'task_weights.png was not drawn: RuntimeError: no room\n' in capsys.readouterr().out
  assert (tmp_path / 'figures' / 'learning_curves.png').exists()


def test_the_legend_says_where_training_and_validation_differ(drawn):
  records = list(classification_records(60))
  figures.learning_curves(drawn.path, records, ('20-way', '5-way'))
  assert {'meta-train, 20-way, running mean', 'meta-validation, 5-way, 95 % interval'} <= set(drawn.texts())
  given = config.load('quickstart')
  for overrides, kinds in (
    ([], ('', '')),
    (['--config.eval.way=3'], ('5-way', '3-way')),
    (['--config.data.batch=8'], ('all classes', '5-way')),
  ):
    assert report._kinds(config.override(given, overrides)) == kinds


def test_a_mean_of_a_few_records_is_none(drawn):
  records = [{'step': k, 'train/loss': float(k % 2)} for k in range(1, 5)]
  figures.learning_curves(drawn.path, records)
  assert 'meta-train' in drawn.texts()
  figures.learning_curves(drawn.path, [*records, {'step': 5, 'train/loss': 1.0}])
  assert 'meta-train, running mean' in drawn.texts()
  smooth = drawn.figure.axes[0].lines[1].get_ydata()
  np.testing.assert_allclose(smooth, [0.5, 2 / 3, 1 / 3, 2 / 3, 0.5])

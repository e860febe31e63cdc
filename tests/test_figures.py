"""Figures: each is written, opens as an image and holds what it was given; matplotlib's state stays as it was.

None of them costs a run its result.
"""

import contextlib
import errno
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from metajax import config as config_lib
from metajax import figures, main, report, workdir, writer
from metajax.data.table import ClassTable
from metajax.types import Episode, Examples
from tests.conftest import TINY, tensorboard_events


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


@pytest.mark.parametrize(('num', 'half'), [(1, 0), (19, 0), (20, 2), (79, 2), (400, 9)])
def test_running_mean_is_a_mean_over_the_window(num, half):
  values = np.random.default_rng(0).standard_normal(num)
  expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(num)]
  means, window = figures._running_mean(values)
  np.testing.assert_allclose(means, expected)
  assert window == 2 * half + 1


def test_the_legend_of_learning_curves_says_running_mean_where_there_is_one(drawn):
  figures.learning_curves(drawn.path, list(classification_records(60)))
  assert {'meta-train, running mean of 5 records', 'meta-validation, 95 % interval'} <= set(drawn.texts())
  records = list(classification_records(6))
  figures.learning_curves(drawn.path, records, ['meta-train, 20-way', 'meta-validation, 5-way'])
  assert {'meta-train, 20-way', 'meta-validation, 5-way, 95 % interval'} <= set(drawn.texts())
  train, _ = drawn.figure.axes[0].lines  # of training, the values alone
  np.testing.assert_array_equal(train.get_ydata(), [r['train/loss'] for r in records if 'train/loss' in r])


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
  ('way', 'shot', 'queries', 'channels'), [(5, 1, 15, 3), (5, 1, 1, 1), (20, 5, 15, 1), (2, 12, 3, 3), (3, 1, 2, 8)]
)
def test_episode_grid(drawn, way, shot, queries, channels):
  support, query = episode(way, shot, queries, channels)
  predictions = query[1].copy()
  wrong = np.flatnonzero(query[1] == 1)[0]
  predictions[wrong] = 0
  figures.episode_grid(drawn.path, support, query, predictions, names=[f'kind {k}' for k in range(way)])
  assert has_color(drawn.image(), figures.GREEN) and has_color(drawn.image(), figures.RED)
  texts, shown = drawn.texts(), min(queries, figures.SHOWN)
  assert {f'kind {k}' for k in range(way)} <= set(texts)
  assert [text for text in texts if '✗' in text] == ['✗ kind 0'] and texts.count('✓') == way * shown - 1
  assert len(drawn.figure.axes[0].images) == way * (shown + min(shot, figures.SHOWN))
  accuracy = 100 * (1 - 1 / (way * queries))
  assert f'{way}-way {shot}-shot episode: {accuracy:.0f} % of {way * queries} queries correct' in texts


def test_a_single_query_and_uint8(drawn):
  support = (np.full((3, 8, 8, 3), 7, np.uint8), np.arange(3))
  figures.episode_grid(drawn.path, support, (support[0][:1], np.array([2])), np.array([2]), names='abc')
  assert '✓' in drawn.texts() and has_color(drawn.image(), figures.GREEN)


@pytest.mark.parametrize(
  ('names', 'first'),
  [
    (['001.Black_footed_Albatross', '014.Indigo_Bunting', '112.Great_Grey_Shrike'], '001.Black_f…'),
    ([f'Anglo-Saxon_Futhorc/character{k:02d}/rot090' for k in range(20)], '…er00/rot090'),
    ([f'{a}{"_" * 20}{z}' for a, z in (('abc', 'uvw'), ('abc', 'xyz'), ('def', 'xyz'))], 'abc___…__uvw'),
    (['a' * 50 + str(k) + 'b' * 50 for k in range(3)], '1: aaaaaaaa…'),
    (['$x_{$', '%', '\udcff\n'], r'\$x_{\$'),
  ],
  ids=['beginnings', 'ends', 'both', 'neither', 'odd'],
)
def test_names_lie_in_their_places_and_can_be_told_apart(drawn, names, first):
  support, query = episode(len(names), 1, 1, 1)
  predictions = (query[1] + 1) % len(names)
  figures.episode_grid(drawn.path, support, query, predictions, names=names)
  wrong = [text for text in drawn.figure.axes[0].texts if '✗' in text.get_text()]
  rows = [text for text in drawn.figure.axes[0].texts if text.get_ha() == 'right']
  assert f'✗ {first}' in drawn.texts()
  for labels in (wrong, rows):
    assert len({text.get_text() for text in labels}) == len(labels) == len(names)
  drawn.figure.set_dpi(150)  # as it was saved: letters are as wide as whole pixels
  to_images = drawn.figure.axes[0].transData.inverted()  # 1.1 is from one image to the next
  assert all(text.get_window_extent().transformed(to_images).width <= 1.1 for text in wrong)
  ends = [text.get_window_extent() for text in drawn.figure.axes[0].texts]  # the headings too
  assert min(box.x0 for box in ends) >= 0 and max(box.x1 for box in ends) <= drawn.figure.bbox.width


@pytest.mark.parametrize(('h', 'w', 'sides'), [(14, 28, (1, 0.5)), (30, 20, (2 / 3, 1)), (2, 90, (1, 1 / 3))])
def test_images_keep_their_shape(drawn, h, w, sides):
  images, targets = np.random.default_rng(0).random((2, h, w, 3)), np.arange(2)
  figures.episode_grid(drawn.path, (images, targets), (images, targets), targets, names='ab')
  for image in drawn.figure.axes[0].images:
    left, right, bottom, top = image.get_extent()
    np.testing.assert_allclose((right - left, bottom - top), sides)


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 8])
def test_any_number_of_channels_is_shown(channels):
  images = np.random.default_rng(0).random((5, 6, 6, channels))
  images[0, 0, 0], images[0, 0, 1] = 0, 1
  [shown] = figures._displayable(images)
  expected = images.mean(axis=-1) if channels < 3 else images[..., :3]
  np.testing.assert_allclose(shown, expected, atol=1e-6)


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


@pytest.mark.parametrize('record', ['weights', 'weights_quantiles'])
def test_the_legends_of_task_weights_lie_under_the_lines(drawn, record):
  rng = np.random.default_rng(0)
  pair = {'train/pair': [1.0, 0.0], 'train/gain': 1, 'train/radius': 1}
  records = [{'step': k, f'train/{record}': np.sort(rng.random(5)).tolist(), **pair} for k in range(1, 9)]
  figures.task_weights(drawn.path, records)
  for ax in drawn.figure.axes:
    assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0


@pytest.mark.parametrize(
  ('shape', 'dtype'), [((8, 8, 1), np.uint8), ((8, 12, 2), np.uint16), ((8, 8, 4), np.float32), ((70, 70, 3), np.uint8)]
)
def test_contact_sheet(drawn, shape, dtype):
  images = (100 * np.random.default_rng(0).random((12, *shape))).astype(dtype)
  starts, counts, turns = np.arange(0, 12, 4), np.full(3, 4), np.array([0, 0, 2], np.int8)
  figures.contact_sheet(drawn.path, 'name', {'train': ClassTable(images, starts, counts, turns, ('a', 'b', 'c'))})
  drawn.image()
  shown = drawn.figure.axes[0].images[0].get_array()
  scaled = images / 255 if dtype == np.uint8 else (images - images[..., :3].min()) / np.ptp(images[..., :3])
  if shape[-1] == 2:
    mean = images.mean(-1)
    scaled = ((mean - mean.min()) / np.ptp(mean))[..., None]
  np.testing.assert_allclose(shown[: shape[0], : shape[1]], scaled[0, ..., :3].squeeze(), atol=1e-5)


def test_a_table_of_vectors_has_no_contact_sheet(tmp_path):
  one = np.ones(1, np.int64)
  table = ClassTable(np.zeros((1, 9), np.float32), 0 * one, one, one, ('a',))
  figures.contact_sheet(tmp_path / 'sheet.png', 'name', {'train': table})
  assert not (tmp_path / 'sheet.png').exists()


def test_training_is_drawn_as_far_as_it_was_recorded_and_goes_into_the_events_once(tmp_path):
  def figures_in_events():
    found = [(e.step, v.tag, v.image) for e in tensorboard_events(tmp_path) for v in e.summary.value]
    return [(step, tag) for step, tag, image in found if image.encoded_image_string.startswith(b'\x89PNG')]

  workdir.keep_config(tmp_path, config_lib.override(config_lib.load(TINY), []))
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


@pytest.mark.parametrize(
  ('settings', 'names'),
  [
    ([], ['meta-train', 'meta-validation']),
    (['--config.eval.way=2'], ['meta-train, 3-way', 'meta-validation, 2-way']),
    (['--config.eval.way=3'], ['meta-train', 'meta-validation']),
    (['--config.data.batch=8'], ['meta-train, all classes', 'meta-validation, 3-way']),
  ],
  ids=str,
)
def test_learning_curves_say_the_way_where_training_and_validation_have_others(tmp_path, monkeypatch, settings, names):
  seen = []
  workdir.keep_config(tmp_path, config_lib.override(config_lib.load(TINY), settings))
  monkeypatch.setattr(figures, 'learning_curves', lambda path, records, names: seen.append(names))
  report.draw_training(tmp_path)
  assert seen == [names]


def one_episode(shape, way=3):
  inputs, targets = np.random.default_rng(0).random((way, *shape), np.float32), np.arange(way)
  return Episode(Examples(inputs, targets), Examples(inputs, targets), np.array([2, 0, 3]))


def draw_episode(monkeypatch, folder, episode):
  """Calls `report.draw` on this one test episode, whose queries are all classified right."""
  table = SimpleNamespace(names=('ant', 'bee', 'cow', 'dog'))
  experiment = SimpleNamespace(splits={'test': table}, sources={'test': None})
  monkeypatch.setattr(report, '_predictor', lambda *_: lambda number: (episode, np.eye(3)[None]))
  steps = {'accuracy': [0.3, 0.9], 'accuracy_ci95': [0.1, 0.1]}
  report.draw(figures, experiment, None, {'accuracy': 0.9, 'way': 3, 'by_inner_step': steps}, folder)


def test_classes_of_an_episode_have_their_names(drawn, monkeypatch, tmp_path):
  draw_episode(monkeypatch, tmp_path, one_episode((8, 8, 12)))
  assert [text for text in drawn.texts() if len(text) == 3] == ['cow', 'ant', 'dog']


@pytest.mark.parametrize('shape', [(64,), (50, 3), (4, 8, 8, 1)])
def test_an_episode_without_images_has_no_figure_and_no_line(monkeypatch, tmp_path, capsys, shape):
  draw_episode(monkeypatch, tmp_path, one_episode(shape))
  assert {path.name for path in tmp_path.iterdir()} == {'inner_steps.png'} and not capsys.readouterr().out


@pytest.mark.parametrize(
  ('inputs', 'outputs', 'figure'), [('x', 1, True), ('oracle', 1, True), ('x', 2, False), ('plane', 1, False)]
)
def test_regression_is_drawn_where_tasks_are_curves(monkeypatch, tmp_path, capsys, inputs, outputs, figure):
  x = np.random.default_rng(0).random((9, 2), np.float32)
  x = {'x': x[:, :1], 'oracle': np.stack([x[:, 0], np.full(9, 2)], 1), 'plane': x}[inputs]
  examples = Examples(x, np.zeros((9, outputs), np.float32))
  episode, predictions = Episode(examples, examples, np.zeros(0)), np.zeros((2, 9, outputs))
  monkeypatch.setattr(report.episodes, 'make_source', lambda *_, **__: None)
  monkeypatch.setattr(report, '_predictor', lambda *_: lambda number: (episode, predictions))
  report.draw(figures, SimpleNamespace(splits={'test': None}), None, {'loss': 1.0, 'shot': 9}, tmp_path)
  assert (tmp_path / 'regression.png').exists() == figure and not capsys.readouterr().out


@pytest.mark.parametrize(
  'error', [TypeError('Invalid shape\n(20, 20, 12)'), OSError(errno.ENOSPC, 'No space left'), MemoryError()], ids=repr
)
def test_figures_that_cannot_be_drawn_cost_a_line_each_and_no_result(cache, tmp_path, monkeypatch, capsys, error):
  def fail(*_, **__):
    raise error

  monkeypatch.setattr(Figure, 'savefig', fail)
  small = '--config.total_steps=1', '--config.eval.episodes=4', '--config.eval.val_episodes=2'
  assert main.main(['metajax', f'--config={TINY}', '--config.model.name=mlp', *small, f'--workdir={tmp_path}']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert (tmp_path / 'test.json').exists() and lines[-1].startswith('test: ')
  missing = [line for line in lines if line.startswith('no ')]
  assert [line.split(':')[0] for line in missing] == [
    f'no {name}.png' for name in ('learning_curves', 'inner_steps', 'episode')
  ]
  assert all(str(error).split('\n')[0] in line for line in missing)


def test_a_figure_that_cannot_be_written_leaves_the_one_before(drawn, monkeypatch):
  figures.inner_steps(drawn.path, [0.2, 0.5], [0.1, 0.1], quantity='accuracy')
  before = drawn.path.read_bytes()

  def save(figure, file, **_):
    file.write(b'half of it')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(Figure, 'savefig', save)
  with pytest.raises(OSError, match='No space'):
    figures.inner_steps(drawn.path, [0.2, 0.6], [0.1, 0.1], quantity='accuracy')
  assert drawn.path.read_bytes() == before

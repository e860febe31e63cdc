"""Augmentation beside NumPy and Pillow, normalisation beside the numbers that the field's code has."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import stats

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax.data import augment, episodes
from metajax.data.table import ClassTable
from metajax.errors import UserError
from tests.conftest import TINY

ALL = ('crop', 'jitter', 'flip', 'rotate')
SIDE, PAD = 16, 2  # an eighth


def random_images(*shape, seed=0):
  return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def augmented(images, names, seed=0):
  """As uint8, where nothing but pixels' places has changed."""
  result = np.asarray(jax.jit(augment.augment, static_argnums=2)(jax.random.key(seed), images, names))
  assert result.shape == images.shape and result.dtype == np.float32
  if 'jitter' not in names:
    np.testing.assert_allclose(255 * result, np.rint(255 * result), atol=1e-4)
    return np.rint(255 * result).astype(np.uint8)
  return result


# What each may make of an image, as NumPy writes it.


def crops(image, pad=PAD):
  h, w, _ = image.shape
  padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  return [padded[y : y + h, x : x + w] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]


def flips(image):
  return [image, image[:, ::-1]]


def turns(image):
  return [np.rot90(image, k) for k in range(4)]


CHOICES = {'crop': crops, 'flip': flips, 'rotate': turns}


def choices(image, names):
  """All that a sequence of augmentations may make of an image."""
  images = [image]
  for name in names:
    images = [choice for image in images for choice in CHOICES[name](image)]
  return np.stack(images)


def chosen(images, results, names):
  """Which of its choices each image has become, (way, n)."""
  way, n = images.shape[:2]
  found = np.empty((way, n), int)
  for c, i in np.ndindex(way, n):
    (matches,) = (choices(images[c, i], names) == results[c, i]).all((1, 2, 3)).nonzero()
    assert len(matches) == 1, (names, c, i, matches)  # exactly one
    found[c, i] = matches[0]
  return found


@pytest.mark.parametrize(('name', 'number'), [('crop', (2 * PAD + 1) ** 2), ('flip', 2)])
@pytest.mark.parametrize('channels', [1, 3])
def test_each_image_is_cropped_and_flipped_for_itself_with_equal_chances(name, number, channels):
  images = random_images(20, 50, SIDE, SIDE, channels)
  found = chosen(images, augmented(images, (name,)), (name,))
  assert stats.chisquare(np.bincount(found.ravel(), minlength=number)).pvalue > 1e-3
  for neighbours in (found[1:], found[:-1]), (found[:, 1:], found[:, :-1]):  # those of a class, of an episode
    assert abs((neighbours[0] == neighbours[1]).mean() - 1 / number) < 0.06


def test_a_class_turns_as_one_and_classes_each_for_itself():
  images = random_images(400, 3, 5, 5, 1)
  found = chosen(images, augmented(images, ('rotate',)), ('rotate',))
  assert (found == found[:, :1]).all()
  assert stats.chisquare(np.bincount(found[:, 0], minlength=4)).pvalue > 1e-3
  assert abs((found[1:, 0] == found[:-1, 0]).mean() - 1 / 4) < 0.08


@pytest.mark.parametrize(('side', 'pad'), [(84, 8), (32, 4), (28, 3), (128, 8), (7, 0)])
def test_crops_are_padded_with_an_eighth_and_at_most_eight(side, pad):
  images = np.full((10, 40, side, side, 1), 255, np.uint8)
  black_rows = (augmented(images, ('crop',)).max((3, 4)) == 0).sum(axis=2)
  assert (black_rows.min(), black_rows.max()) == (0, pad)


@pytest.mark.parametrize('names', [('rotate', 'crop'), *itertools.permutations(CHOICES)])
def test_several_are_what_one_after_the_other_makes(names):
  images = random_images(12, 2, SIDE, SIDE, 1)
  found = chosen(images, augmented(images, names), names)
  for part in np.unravel_index(found, [len(CHOICES[name](images[0, 0])) for name in names]):
    assert len(np.unique(part)) > 1  # none is left out


def test_moving_pixels_does_not_mind_an_image_that_is_not_square():
  images = random_images(4, 5, 8, 24, 3)
  padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (3, 3), (0, 0))).reshape(20, 10, 30, 3)
  for image, result in zip(padded, augmented(images, ('crop',)).reshape(20, 8, 24, 3), strict=True):
    windows = [image[y : y + 8, x : x + 24] for y in range(3) for x in range(7)]
    assert sum(np.array_equal(window, result) for window in windows) == 1


# Resized crops.


def resized(image, top, left, height, width):
  """A box of an image at the image's size, in float64: NumPy's interpolation of each column, then of each row."""
  h, w, c = image.shape
  box = image[top : top + height, left : left + width].astype(np.float64)
  y, x = (np.arange(h) + 0.5) * height / h - 0.5, (np.arange(w) + 0.5) * width / w - 0.5
  columns = [[np.interp(y, np.arange(height), box[:, i, k]) for k in range(c)] for i in range(width)]
  rows = np.transpose(columns, (2, 0, 1))  # (h, width, c)
  return np.stack([[np.interp(x, np.arange(width), row[:, k]) for k in range(c)] for row in rows]).swapaxes(1, 2)


def resized_pillow(image, top, left, height, width):
  pixels = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
  pixels = pixels.crop((left, top, left + width, top + height)).resize(pixels.size, Image.Resampling.BILINEAR)
  return np.asarray(pixels).reshape(image.shape)


def boxes_of(shape, names, seed=0):
  """Those that `augmented` takes, (way, n, 4)."""
  rng = jax.random.split(jax.random.key(seed), len(names))[names.index('resized_crop')]
  return np.stack(augment._draw_boxes(rng, shape), axis=-1)


def augmented_floats(images, names):
  return 255 * np.asarray(jax.jit(augment.augment, static_argnums=2)(jax.random.key(0), images, names))


@pytest.mark.parametrize('shape', [(4, 5, 16, 16, 1), (3, 4, 12, 20, 3)])
def test_a_resized_crop_is_numpy_s_interpolation_of_its_box_and_pillow_s(shape):
  images = random_images(*shape)
  found, boxes = augmented_floats(images, ('resized_crop',)), boxes_of(shape, ('resized_crop',))
  assert len({tuple(box) for box in boxes.reshape(-1, 4)}) > 10
  for place in np.ndindex(shape[:2]):
    np.testing.assert_allclose(found[place], resized(images[place], *boxes[place]), atol=1e-3)
    np.testing.assert_allclose(found[place], resized_pillow(images[place], *boxes[place]), atol=1.01)  # it rounds twice


@pytest.mark.parametrize(
  'names',
  [
    ('crop', 'resized_crop', 'flip'),
    ('flip', 'resized_crop', 'crop'),
    ('rotate', 'resized_crop'),
    ('resized_crop', 'flip', 'rotate'),
  ],
)
def test_a_resized_crop_is_made_where_it_stands_among_moves(names):
  images = random_images(3, 4, SIDE, SIDE, 1)
  found, boxes, place = augmented_floats(images, names), boxes_of(images.shape, names), names.index('resized_crop')
  parts = set()
  for c, i in np.ndindex(3, 4):
    before = [resized(image, *boxes[c, i]) for image in choices(images[c, i], names[:place])]
    after = np.stack([image for start in before for image in choices(start, names[place + 1 :])])
    (matches,) = np.isclose(after, found[c, i], atol=1e-3).all((1, 2, 3)).nonzero()
    assert len(matches) == 1
    parts.add(int(matches[0]))
  assert len(parts) > 1


@pytest.mark.parametrize('names', [('resized_crop', 'jitter', 'flip'), ('jitter', 'flip', 'resized_crop')])
def test_jitter_sees_a_resized_crop_where_it_stands_before_it(names):
  images = random_images(2, 6, SIDE, SIDE, 3)
  found, boxes = augmented_floats(images, names), boxes_of(images.shape, names)
  rng = jax.random.split(jax.random.key(0), len(names))[names.index('jitter')]
  factors, orders = (np.asarray(x) for x in augment._draw_jitter(rng, images.shape))
  for place in np.ndindex(2, 6):
    made = [images[place]]
    for name in names:
      if name == 'jitter':
        made = [255 * jitter_loop(image / 255, factors[place], orders[place]) for image in made]
      elif name == 'flip':
        made = [side for image in made for side in flips(image)]
      else:
        made = [resized(image, *boxes[place]) for image in made]
    assert sum(np.allclose(image, found[place], atol=2e-3) for image in made) == 1


def torchvision_box(rng, height, width):
  """RandomResizedCrop.get_params with its defaults."""
  for _ in range(10):
    area = height * width * rng.uniform(0.08, 1)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
  return None


@pytest.mark.parametrize(('height', 'width'), [(500, 500), (500, 300)])
def test_boxes_are_distributed_as_torchvision_s(height, width):
  top, left, h, w = (np.asarray(x).ravel() for x in augment._draw_boxes(jax.random.key(0), (60, 50, height, width, 3)))
  assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
  area, aspect = h * w / (height * width), w / h
  assert 0.079 < area.min() < 0.1 and (area.max() > 0.95) == (height == width)
  assert abs(aspect.min() - 3 / 4) < 0.02 and abs(aspect.max() - 4 / 3) < 0.02
  rng = np.random.default_rng(0)
  boxes = [torchvision_box(rng, height, width) for _ in range(3000)]
  other_top, other_left, other_h, other_w = np.transpose([box for box in boxes if box])
  others = other_top, other_left, other_h * other_w / (height * width), other_w / other_h
  for found, other in zip((top, left, area, aspect), others, strict=True):
    assert stats.ks_2samp(found, other).pvalue > 1e-3
  assert np.abs(np.corrcoef([area[:-1], area[1:], top[:-1] / (height - h[:-1] + 1)]) - np.eye(3)).max() < 0.06


def test_where_no_box_fits_the_first_is_cut_to_the_image():
  top, left, h, w = (np.asarray(x) for x in augment._draw_boxes(jax.random.key(0), (5, 100, 4, 400, 1)))
  assert (h == 4).any() and (top + h <= 4).all() and (left + w <= 400).all() and (h >= 1).all() and (w >= 1).all()


# Jitter.

ORDERS = list(itertools.permutations(range(3)))


def jitter_loop(image, factors, order):
  """One image in float64; `order` is of brightness, contrast, saturation."""
  image = image.astype(np.float64)
  for kind in order:
    grey = image if image.shape[-1] == 1 else image @ [[0.299], [0.587], [0.114]]
    other = [0, grey.mean(), grey][kind]
    image = np.clip(factors[kind] * image + (1 - factors[kind]) * other, 0, 1)
  return image


def jitter_pillow(image, factors, order):
  enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
  image = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
  for kind in order:
    image = enhancers[kind](image).enhance(factors[kind])
  return np.asarray(image).reshape(*image.size[::-1], -1)


def smooth_images(n, channels):
  """Photographs of a kind: colours of every brightness, few of them black or white."""
  rng = np.random.default_rng(1)
  coarse = rng.integers(0, 256, (n, 4, 4, channels), np.uint8)
  fine = [Image.fromarray(image.squeeze()).resize((12, 12), Image.Resampling.BICUBIC) for image in coarse]
  return np.stack(fine).reshape(n, 12, 12, channels)


@pytest.mark.parametrize('channels', [1, 3])
def test_jitter_is_the_loop_s_and_pillow_s(channels):
  images, rng = smooth_images(60, channels), np.random.default_rng(0)
  kinds = 3 if channels == 3 else 2
  factors = rng.uniform(0.6, 1.4, (60, kinds)).astype(np.float32)
  orders = np.stack([rng.permutation(kinds) for _ in images])
  results = np.asarray(augment.jitter(images.astype(np.float32) / 255, factors, orders))
  for image, factor, order, result in zip(images, factors, orders, results, strict=True):
    np.testing.assert_allclose(result, jitter_loop(image / 255, factor, order), atol=2e-6)
    # Pillow cuts off after each of the three, and rounds the mean.
    np.testing.assert_allclose(255 * result, jitter_pillow(image, factor.tolist(), order), atol=4)


@pytest.mark.parametrize('kind', range(3))
def test_each_kind_of_jitter_alone_is_pillow_s_within_a_level(kind):
  images = smooth_images(20, 3)
  factors = np.ones((20, 3), np.float32)
  factors[:, kind] = np.linspace(0.6, 1.4, 20)
  results = np.asarray(augment.jitter(images.astype(np.float32) / 255, factors, np.tile(np.arange(3), (20, 1))))
  for image, factor, result in zip(images, factors, results, strict=True):
    np.testing.assert_allclose(255 * result, jitter_pillow(image, factor.tolist(), [kind]), atol=1.2)


def test_factors_and_orders_are_drawn_for_each_image_with_equal_chances():
  factors, order = augment._draw_jitter(jax.random.key(0), (60, 50, 8, 8, 3))
  factors, order = np.asarray(factors).reshape(-1, 3), np.asarray(order).reshape(-1, 3)
  for column in factors.T:
    assert stats.kstest(column, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
  assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.06
  seen, counts = np.unique(order, axis=0, return_counts=True)
  assert [tuple(row) for row in seen] == ORDERS and stats.chisquare(counts).pvalue > 1e-3


def test_grey_images_have_no_saturation():
  factors, order = augment._draw_jitter(jax.random.key(0), (2, 3, 8, 8, 1))
  assert factors.shape == order.shape == (2, 3, 2) and set(np.asarray(order).ravel().tolist()) == {0, 1}
  grey = np.repeat(random_images(1, 6, 6, 1), 3, axis=-1).astype(np.float32) / 255
  same = augment.jitter(grey, np.float32([[1, 1, 1.4]]), np.array([[0, 1, 2]]))  # of which Pillow says as much
  np.testing.assert_allclose(same, grey, atol=1e-6)


def test_jitter_is_applied_where_it_stands_among_the_others():
  images = np.full((4, 10, SIDE, SIDE, 3), 200, np.uint8)
  after = augmented(images, ('jitter', 'crop'))
  inside = after > 0
  assert 0.7 < inside.mean() < 1  # black from outside stays black
  assert np.ptp(np.where(inside, after, after.max((2, 3), keepdims=True)), axis=(2, 3)).max() < 1e-6
  before = augmented(images, ('crop', 'jitter'))
  assert (before.min((2, 3, 4)) > 0).any()  # a lower contrast makes it grey


@pytest.mark.parametrize('names', [('jitter', 'flip'), ('flip', 'jitter')])
def test_a_flip_changes_nothing_about_jitter(names):
  images = random_images(3, 10, SIDE, SIDE, 3)
  rng = jax.random.split(jax.random.key(0), 2)[names.index('jitter')]
  jittered = np.asarray(augment.jitter(images.astype(np.float32) / 255, *augment._draw_jitter(rng, images.shape)))
  sides = [0, 0]
  for image, result in zip(np.concatenate(jittered), np.concatenate(augmented(images, names)), strict=True):
    matches = [np.allclose(choice, result, atol=1e-6) for choice in flips(image)]
    assert sum(matches) == 1
    sides[matches.index(True)] += 1
  assert min(sides) > 5


# Episodes.


def table_of(side=8, channels=3, turned=False):
  images = random_images(6 * 8, side, side, channels)
  turns = np.arange(6, dtype=np.int8) % 4 if turned else np.zeros(6, np.int8)
  return ClassTable(images, 8 * np.arange(6), np.full(6, 8), turns, tuple('abcdef'))


def make(table, split='train', **settings):
  settings = dict(way=3, shot=1, query_shot=2, seed=0, placement='device') | settings
  return episodes.make_source(table, split, **settings)


def decode(source, start, count):
  return jax.device_get(jax.jit(source.decode)(source.resident, source.sample(start, count)))


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ('names', 'tolerance'), [(('crop', 'flip', 'rotate'), 0), (('resized_crop', *ALL), 1e-5), (('resized_crop',), 1e-6)]
)
@pytest.mark.parametrize('placement', ['device', 'host'])
def test_an_augmented_episode_is_a_function_of_seed_split_and_number_alone(names, tolerance, placement):
  """To the bit where pixels only move; a mean over an image ends in other bits if more episodes are made at once."""
  table, settings = table_of(), dict(augment=names)
  whole = decode(make(table, **settings), 240, 40)
  source = make(table, placement=placement, **settings)
  for number in (279, 250, 240, 255, 256):
    for a, b in zip(jax.tree.leaves(decode(source, number, 1)), jax.tree.leaves(whole), strict=True):
      np.testing.assert_allclose(a[0], b[number - 240], rtol=0, atol=tolerance)


def test_seeds_splits_and_numbers_have_keys_of_their_own():
  rows = [(augment.seeds(seed, 0, 8), split) for seed in (0, 1, 2**32) for split in range(3)]
  keys = [jax.vmap(augment.rng, (0, None))(seeds, split) for seeds, split in rows]
  keys += [jax.random.split(jax.random.fold_in(jax.random.key(0), step)) for step in range(20)]  # the training steps'
  data = np.concatenate([jax.random.key_data(k) for k in keys])
  assert len(np.unique(data, axis=0)) == len(data) == 3 * 3 * 8 + 20 * 2
  assert_same(augment.seeds(5, 250, 8)[3:5], augment.seeds(5, 253, 2))


def test_which_images_an_episode_has_does_not_depend_on_augmentation():
  plain, other = (make(table_of(), augment=names).sample(0, 300) for names in ((), ALL))
  assert plain.keys() == other.keys() - {'seeds'}
  assert_same(plain, {name: other[name] for name in plain})


def test_without_augmentation_no_random_numbers_are_made():
  for names in ((), ('flip',)):
    source = make(table_of(), normalize='imagenet', augment=names)
    batch = source.sample(0, 2)
    assert ('seeds' in batch) == ('random' in str(jax.make_jaxpr(source.decode)(source.resident, batch))) == bool(names)


def by_class(episode, way):
  """Images (tasks, way, shot + query_shot, h, w, c), support first."""
  return np.concatenate([x.inputs.reshape(len(x.inputs), way, -1, *x.inputs.shape[2:]) for x in episode[:2]], axis=2)


@pytest.mark.parametrize('turned', [False, True])
def test_support_and_query_of_a_class_turn_together_also_if_the_class_is_a_turned_one(turned):
  table = table_of(turned=turned)
  plain, rotated = (decode(make(table, augment=names), 0, 60) for names in ((), ('rotate',)))
  assert_same(plain.class_ids, rotated.class_ids)
  seen = set()
  for before, after in zip(by_class(plain, 3), by_class(rotated, 3), strict=True):
    pairs = list(zip(before, after, strict=True))
    turns = [[k for k in range(4) if np.array_equal(np.rot90(b, k, axes=(1, 2)), a)] for b, a in pairs]
    assert all(len(each) == 1 for each in turns)
    seen.add(tuple(k for (k,) in turns))
  assert len(seen) > 30  # of 64


def test_training_alone_is_augmented_unless_evaluation_asks_for_it():
  config = config_lib.load(TINY)
  splits = {'train': table_of(), 'val': table_of(), 'test': table_of()}

  def of(*overrides):
    sources = experiment_lib.make_sources(config_lib.override(config, overrides), splits)
    return {split: decode(source, 0, 4) for split, source in sources.items()}

  def differing(a, b):
    return {split for split in a if not np.array_equal(a[split].query.inputs, b[split].query.inputs)}

  plain = of()
  assert differing(plain, of('--config.data.augment=("crop","flip")')) == {'train'}
  assert differing(plain, of('--config.eval.augment=("crop",)')) == {'val', 'test'}
  assert differing(plain, of('--config.data.normalize=mamlpp_omniglot')) == {'train', 'val', 'test'}


# Normalisation: what each code base does to a byte, with the numbers as it writes them.

METAOPTNET_MINI = (120.39586422, 115.59361427, 104.54012653), (70.68188272, 68.27635443, 72.54505529)
METAOPTNET_CIFAR = (129.37731888, 124.10583864, 112.47758569), (68.20947949, 65.43124043, 70.45866994)
MTL = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
PUBLISHED = {
  'none': lambda x: x / 255,
  'bytes': lambda x: x,
  'mamlpp_omniglot': lambda x: 1 - x / 255,
  'imagenet': lambda x: (x / 255 - IMAGENET[0]) / IMAGENET[1],
  'metaoptnet_mini': lambda x: (x - METAOPTNET_MINI[0]) / METAOPTNET_MINI[1],
  'metaoptnet_cifar': lambda x: (x - METAOPTNET_CIFAR[0]) / METAOPTNET_CIFAR[1],
  'rfs_cifar': lambda x: (x / 255 - CIFAR[0]) / CIFAR[1],
  'mtl': lambda x: (x - MTL[0]) / MTL[1],
}


@pytest.mark.parametrize('name', augment.NORMALIZE)
def test_normalisation_is_the_published_one(name):
  table = table_of()
  table.images[...] = np.arange(table.images.size).reshape(table.images.shape) % 256  # every byte in every channel
  plain, normalised = (decode(make(table, normalize=n), 0, 20) for n in ('none', name))
  for before, after in zip(plain[:2], normalised[:2], strict=True):
    expected = PUBLISHED[name](np.rint(255 * before.inputs.astype(np.float64)))
    np.testing.assert_allclose(after.inputs, expected, rtol=2e-6, atol=1e-6)
    assert after.inputs.dtype == np.float32
  assert augment.NORMALIZE.keys() == PUBLISHED.keys()


def test_normalisation_comes_after_augmentation():
  plain, normalised = (decode(make(table_of(), augment=('crop',), normalize=n), 0, 5) for n in ('none', 'imagenet'))
  assert (plain.query.inputs == 0).any()
  expected = (plain.query.inputs - IMAGENET[0]) / IMAGENET[1]
  np.testing.assert_allclose(normalised.query.inputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'settings', 'message'),
  [
    ((8, 8, 3), dict(augment=('flop',)), "there is no 'flop'; known: crop, flip, jitter, resized_crop, rotate"),
    ((8, 8, 3), dict(augment=('flip', 'crop', 'flip')), 'flip is there more than once'),
    ((8, 6, 3), dict(augment=('rotate',)), '8 x 6 pixels are not square'),
    ((8, 8, 2), dict(augment=('jitter',)), '2 channels are neither grey nor RGB'),
    ((8, 8, 3), dict(normalize='image_net'), "normalize = 'image_net'.*known: none, bytes, imagenet"),
    ((8, 8, 1), dict(normalize='imagenet'), 'of RGB images, these have 1 channel.*none, bytes, mamlpp_omniglot'),
  ],
)
def test_what_does_not_fit_the_images_is_refused(shape, settings, message):
  table = table_of()._replace(images=np.zeros((48, *shape), np.uint8))
  with pytest.raises(UserError, match=message):
    make(table, **settings)


def test_functions_cannot_be_augmented():
  from metajax.datasets import sinusoid

  for settings in (dict(augment=('flip',)), dict(normalize='bytes')):
    with pytest.raises(UserError, match='regression has no images'):
      make(sinusoid.load(None)['train'], way=None, **settings)

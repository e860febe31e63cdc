"""The three networks of Meta-Transfer Learning against plain Flax, and sizes against the released code's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.errors import UserError
from metajax.models import resnet12_mtl, resnet18_mtl, resnet25

TINY = (2, 3, 4, 5)


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def assert_same(ours, theirs, tolerance=1e-7):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), ours, theirs)


def drawn(tree):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), tree)


def shapes(model, *image):
  """Shapes of the outputs for two images, and of the variables."""
  return jax.eval_shape(model.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((2, *image), jnp.float32))


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# 3x3 convolutions, that of 7x7, those of 1x1, their biases, and normalisation
@pytest.mark.parametrize(
  ('network', 'pixels', 'features', 'parameters', 'statistics'),
  [
    (resnet12_mtl, 84, 512, 9 * 868_544 + 172_224 + 2_880, 2 * 2_880),
    (resnet12_mtl, 32, 512, 9 * 868_544 + 172_224 + 2_880, 2 * 2_880),
    (resnet18_mtl, 84, 512, 9 * 1_220_608 + 9_408 + 524_288 + 3_904, 2 * 3_904),
    (resnet25, 80, 640, 9 * 4_032_240 + 268_800 + 80 + 20_320, 20_320),
    (resnet25, 8, 640, 9 * 4_032_240 + 268_800 + 80 + 20_320, 20_320),
  ],
)
def test_sizes(network, pixels, features, parameters, statistics):
  out, variables = shapes(network.make(None), pixels, pixels, 3)
  assert out.shape == (2, features)
  assert size(variables['params']) == parameters
  assert size(variables['batch_stats']) == statistics
  out, variables = shapes(network.make(5), pixels, pixels, 3)
  assert out.shape == (2, 5)
  assert size(variables['params']['head']) == features * 5 + 5


# With this momentum its state, like that of ours, is the batch's own statistics.
NORM = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.0, use_fast_variance=False)


class PlainResNet12(nn.Module):
  """Their TensorFlow network of Flax's own layers, one after the other; without a head."""

  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate(self.widths):
      shortcut = nn.Conv(width, (1, 1), use_bias=False, name=f'block{i}/shortcut')(x)
      for j in range(3):
        x = nn.Conv(width, (3, 3), name=f'block{i}/conv{j}')(x)
        x = NORM(epsilon=1e-3, use_scale=False, use_bias=False, name=f'block{i}/norm{j}')(x)
        x = nn.leaky_relu(x, 0.1)
      x = nn.max_pool(x + shortcut, (2, 2), (2, 2))
    return x.mean((1, 2))


class PlainResNet18(nn.Module):
  """Their other TensorFlow network likewise, of images that have their size already."""

  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    x = self.activated('stem_norm', nn.Conv(self.widths[0], (7, 7), name='stem')(x))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for i, width in enumerate(self.widths):
      for block in (f'stage{i}_block0', f'stage{i}_block1'):
        y = self.activated(f'{block}/norm0', nn.Conv(width, (3, 3), name=f'{block}/conv0')(x))
        y = self.activated(f'{block}/norm1', nn.Conv(width, (3, 3), name=f'{block}/conv1')(y))
        x = y + nn.Conv(width, (1, 1), use_bias=False, name=f'{block}/shortcut')(x)
      x = nn.max_pool(x, (2, 2), (2, 2), 'SAME')
    return x.mean((1, 2))

  def activated(self, name, x):
    return nn.leaky_relu(NORM(epsilon=1e-3, use_scale=False, use_bias=False, name=name)(x), 0.1)


class PlainResNet25(nn.Module):
  """Their PyTorch network likewise; each convolution is padded by one pixel on every side."""

  widths: tuple[int, ...]
  blocks: int

  @nn.compact
  def __call__(self, x):
    x = nn.relu(self.normalised('stem_norm', nn.Conv(self.widths[0], (3, 3), name='stem')(x)))
    for i, width in enumerate(self.widths[1:]):
      for j in range(self.blocks):
        block, stride = f'stage{i}_block{j}', 2 if j == 0 else 1
        y = nn.Conv(width, (3, 3), stride, padding=1, use_bias=False, name=f'{block}/conv0')(x)
        y = nn.relu(self.normalised(f'{block}/norm0', y))
        y = nn.Conv(width, (3, 3), padding=1, use_bias=False, name=f'{block}/conv1')(y)
        y = self.normalised(f'{block}/norm1', y)
        if stride == 2:
          x = nn.Conv(width, (1, 1), 2, use_bias=False, name=f'{block}/shortcut')(x)
          x = self.normalised(f'{block}/shortcut_norm', x)
        x = nn.relu(x + y)
    return x.mean((1, 2))

  def normalised(self, name, x):
    return NORM(epsilon=1e-5, name=name)(x)


def for_plain(params, prefix=''):
  """Parameters, or statistics, as the plain networks name them: all on one level."""
  plain = {}
  for name, value in params.items():
    if 'norm' in name:
      plain[prefix + name] = value
    elif isinstance(value, dict):
      plain.update(for_plain(value, f'{name}/'))
    elif not name.endswith('_bias'):
      plain[prefix + name] = {'kernel': value if value.ndim == 4 else value[None, None]}
      if f'{name}_bias' in params:
        plain[prefix + name]['bias'] = params[f'{name}_bias']
  return plain


# Odd sizes, so that pooling drops a row and a stride of 2 rounds up.
@pytest.mark.parametrize(
  ('ours', 'plain', 'image'),
  [
    (resnet12_mtl.make(None, widths=TINY), PlainResNet12(TINY), (18, 23, 2)),
    (resnet25.make(None, widths=TINY, blocks=2), PlainResNet25(TINY, 2), (9, 12, 2)),
  ],
  ids=['resnet12_mtl', 'resnet25'],
)
def test_the_network_is_that_of_flax_with_its_statistics_and_its_gradient(ours, plain, image):
  with jax.enable_x64(True):
    x = draw(0, 3, *image)
    out, variables = shapes(ours, *image)
    params = drawn(variables['params'])
    weights = draw(99, 3, out.shape[-1])

    def value_and_gradient(apply):
      def scalar(params):
        out, state = apply(params)
        return jnp.sum(jnp.sin(out) * weights), (out, for_plain(state['batch_stats']))

      return jax.value_and_grad(scalar, has_aux=True)(params)

    def both(params):
      mine = value_and_gradient(lambda p: ours.apply({'params': p}, x, mutable=['batch_stats']))
      theirs = value_and_gradient(lambda p: plain.apply({'params': for_plain(p)}, x, mutable=['batch_stats']))
      return mine, theirs

    mine, theirs = jax.jit(both)(params)
  assert_same(mine, theirs)


def bilinear(images, side):
  """Images (n, h, w, c) as (n, side, side, c), pixel by pixel: at its centre, between the centres of four pixels."""
  h, w = images.shape[1:3]
  out = np.empty((len(images), side, side, images.shape[-1]))
  for i in range(side):
    for j in range(side):
      y, x = np.clip([(i + 0.5) * h / side - 0.5, (j + 0.5) * w / side - 0.5], 0, [h - 1, w - 1])
      top, left = min(int(y), h - 2), min(int(x), w - 2)
      columns = (left + 1 - x) * images[:, :, left] + (x - left) * images[:, :, left + 1]
      out[:, i, j] = (top + 1 - y) * columns[:, top] + (y - top) * columns[:, top + 1]
  return out


# 33 pixels: odd in front of every pooling, all of which round up.
def test_resnet18_is_that_of_flax_on_images_resized_or_as_they_are():
  with jax.enable_x64(True):
    small = draw(0, 3, 12, 20, 2)
    images = bilinear(small, 33)
    ours, plain = resnet18_mtl.make(None, widths=TINY, size=33), PlainResNet18(TINY)
    params = drawn(shapes(ours, 12, 20, 2)[1]['params'])

    @jax.jit
    def run(small, images, params):
      resized = ours.apply({'params': params}, small, mutable=['batch_stats'])
      as_they_are = ours.clone(size=0).apply({'params': params}, images, mutable=['batch_stats'])
      return resized, as_they_are, plain.apply({'params': for_plain(params)}, images, mutable=['batch_stats'])

    *mine, theirs = run(small, images, params)
  for out, state in mine:
    assert_same((out, for_plain(state['batch_stats'])), (theirs[0], theirs[1]['batch_stats']))


def test_dropout_is_active_with_a_key_alone_and_not_in_the_last_block_alone():
  x = draw(0, 4, 16, 16, 1).astype(np.float32)
  model = resnet12_mtl.make(None, widths=TINY, dropout=0.5)
  params = drawn(shapes(model, 16, 16, 1)[1]['params'])

  @jax.jit
  def runs(key):
    return [model.apply({'params': params}, x, rngs=rngs) for rngs in ({}, {'dropout': key})]

  plain, dropped = runs(jax.random.key(0))
  kept = dropped != 0  # the last map has one pixel
  assert np.all(plain != 0) and 0 < np.mean(kept) < 1
  assert np.all(np.abs(dropped - 2 * plain)[kept] > 1e-3)  # what came before was dropped from too


def test_dropout_of_resnet18_follows_the_first_pooling_and_each_block_with_a_key_alone():
  model = resnet18_mtl.make(None, widths=TINY, size=64)

  def dropouts(*keys):
    seen = []

    def see(method, args, kwargs, context):
      if isinstance(context.module, nn.Dropout):
        seen.append((*args[0].shape[2:], context.module.rate, context.module.deterministic))
      return method(*args, **kwargs)

    with nn.intercept_methods(see):
      jax.eval_shape(model.init, dict.fromkeys(('params', *keys), jax.random.key(0)), jnp.zeros((1, 8, 8, 3)))
    return seen

  maps = [(32, 2), (32, 2), (16, 2), (16, 3), (8, 3), (8, 4), (4, 4), (4, 5), (2, 5)]
  assert dropouts('dropout') == [(*of_one, 0.1, False) for of_one in maps]
  assert dropouts() == [(*of_one, 0.1, True) for of_one in maps]


def test_initial_weights_are_kaiming_normal_or_glorot_uniform():
  x = np.zeros((1, 2, 2, 32), np.float32)
  block = jax.jit(resnet12_mtl.ResidualBlock(64).init)(jax.random.key(0), x)['params']
  limit = np.sqrt(6 / (9 * (64 + 64)))
  np.testing.assert_allclose([block['conv2'].min(), block['conv2'].max()], [-limit, limit], rtol=0.01)
  np.testing.assert_allclose(np.abs(block['shortcut']).max(), np.sqrt(6 / (32 + 64)), rtol=0.01)
  block = jax.jit(resnet25.ResidualBlock(64, halve=True).init)(jax.random.key(0), x)['params']
  np.testing.assert_allclose(np.std(block['conv1']), np.sqrt(2 / (9 * 64)), rtol=0.02)
  np.testing.assert_allclose(np.std(block['shortcut']), np.sqrt(2 / 64), rtol=0.1)


@pytest.mark.parametrize(
  ('network', 'settings', 'message'),
  [
    (resnet12_mtl, dict(widths=(64, 128, 256)), 'four are needed'),
    (resnet12_mtl, dict(dropout=1.0), 'dropout = 1.0'),
    (resnet18_mtl, dict(widths=(64, 128, 0, 512)), 'each at least 1'),
    (resnet18_mtl, dict(size=-1), 'size = -1'),
    (resnet25, dict(widths=(160, 320, 640)), 'four are needed'),
    (resnet25, dict(widths=(80, 160, 0, 640)), 'each at least 1'),
    (resnet25, dict(blocks=0), 'blocks = 0'),
  ],
)
def test_settings_out_of_their_range_are_refused(network, settings, message):
  with pytest.raises(UserError, match=message):
    network.make(5, **settings)


@pytest.mark.parametrize(
  ('network', 'settings', 'pixels', 'message'),
  [
    (resnet12_mtl, {}, 16, '16 x 15 .* 4 times'),
    (resnet18_mtl, dict(size=0), 32, '32 x 31 .* 5 times'),
    (resnet25, {}, 8, '8 x 7 .* 3 times'),
  ],
)
def test_images_too_small_are_refused(network, settings, pixels, message):
  with pytest.raises(UserError, match=message):
    shapes(network.make(5, **settings), pixels, pixels - 1, 3)
  shapes(network.make(5, **settings), pixels, pixels, 3)

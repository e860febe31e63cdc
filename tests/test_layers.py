"""Layers and Conv4 against Flax and XLA: values, first and second derivatives in float64, and sizes by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.models import conv4, layers


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def derivatives(function, *args):
  """The value of `function`, the gradient of a curved scalar of it, and the gradient of a scalar of that gradient."""
  numbers = range(len(args))
  weights = [jnp.asarray(draw(100 + i, *np.shape(x))) for i, x in enumerate(args)]

  def scalar(*args):
    out = function(*args)
    return jnp.sum(jnp.sin(out) * jnp.asarray(draw(99, *out.shape)))

  def of_gradient(*args):
    grads = jax.grad(scalar, numbers)(*args)
    return sum(jnp.sum(w * jnp.sin(g)) for w, g in zip(weights, grads, strict=True))

  return jax.jit(lambda *x: (function(*x), jax.grad(scalar, numbers)(*x), jax.grad(of_gradient, numbers)(*x)))(*args)


def assert_same(ours, theirs, **tolerance):
  tolerance = {'rtol': 1e-9, 'atol': 1e-9, **tolerance}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def convolution(x, kernel, stride):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


@pytest.mark.parametrize('stride', [1, 2])
def test_conv3x3_is_the_padded_convolution_with_all_its_derivatives(stride):
  x, kernel = draw(0, 2, 5, 6, 3), draw(1, 3, 3, 3, 4)
  ours = derivatives(lambda x, kernel: layers.conv3x3(x, kernel, stride), x, kernel)
  assert ours[0].shape == ((2, 5, 6, 4) if stride == 1 else (2, 3, 3, 4))
  assert_same(ours, derivatives(lambda x, kernel: convolution(x, kernel, stride), x, kernel))


@pytest.mark.parametrize(('size', 'pooled'), [((6, 5), (3, 2)), ((7, 4), (3, 2))])
def test_max_pool_is_that_of_flax_and_drops_odd_edges(size, pooled):
  x = draw(0, 2, *size, 3)
  ours = derivatives(layers.max_pool2x2, x)
  assert ours[0].shape == (2, *pooled, 3)
  assert_same(ours, derivatives(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x))


SCALE = np.array([1.3, -0.7, 0.2, -2.0])
BIAS = np.array([0.3, 0.5, -0.2, 0.4])


def ours(pool, x, scale, bias, stats=None):
  variables = {'params': {'scale': scale, 'bias': bias}}
  if stats:
    variables['batch_stats'] = {'mean': stats[0], 'var': stats[1]}
  return layers.BatchNormReluPool(pool).apply(variables, x)


def flax(pool, x, scale, bias, stats=None):
  """Normalisation, ReLU and pooling one after the other."""
  mean, variance = stats or (jnp.zeros(4), jnp.ones(4))
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': {'mean': mean, 'var': variance}}
  norm = nn.BatchNorm(use_running_average=stats is not None, epsilon=1e-5, use_fast_variance=False)
  x = nn.relu(norm.apply(variables, x, mutable=['batch_stats'])[0])
  return nn.max_pool(x, (2, 2), (2, 2)) if pool else x


def both(pool, x, scale, bias, stats=None):
  mine = derivatives(lambda *args: ours(pool, *args, stats), x, scale, bias)
  # At a scale of exactly zero all of a window ties; the derivatives are those of a small positive scale.
  scale = np.where(scale == 0, 1e-12, scale)
  theirs = derivatives(lambda *args: flax(pool, *args, stats), x, scale, bias)
  return mine, theirs


@pytest.mark.parametrize('pool', [False, True])
@pytest.mark.parametrize('scale', [SCALE, SCALE * [1, 0, -1, 0]], ids=['signs', 'zeros'])
def test_batch_norm_relu_pool_is_flax_with_all_its_derivatives(pool, scale):
  x = 2 * draw(0, 3, 5, 6, 4) + 1
  mine, theirs = both(pool, x, scale, BIAS)
  assert mine[0].shape == ((3, 2, 3, 4) if pool else (3, 5, 6, 4))
  assert_same(mine, theirs, atol=1e-8)


@pytest.mark.parametrize('pool', [False, True])
def test_stored_statistics_normalise_like_flax_with_a_running_average(pool):
  x, stats = 2 * draw(0, 3, 5, 6, 4) + 1, (draw(1, 4), np.exp(draw(2, 4)))
  mine, theirs = both(pool, x, SCALE, BIAS, stats)
  assert_same(mine, theirs)
  assert_same(ours(pool, x[:1], SCALE, BIAS, stats), mine[0][:1])  # each example by itself


def test_mutable_statistics_are_the_batch_s_own_and_take_precedence_over_given_ones():
  x = draw(0, 3, 5, 6, 4)
  variables = {
    'params': {'scale': SCALE, 'bias': BIAS},
    'batch_stats': {'mean': np.ones(4), 'var': np.full(4, 9.0)},
  }
  out, updated = layers.BatchNormReluPool(True).apply(variables, x, mutable=['batch_stats'])
  assert_same(out, ours(True, x, SCALE, BIAS))
  rows = x.reshape(-1, 4)
  assert_same(updated['batch_stats'], {'mean': rows.mean(0), 'var': rows.var(0)})


@pytest.mark.parametrize('downsample', ['pool', 'stride'])
def test_conv4_is_the_plain_network(downsample):
  pool = downsample == 'pool'
  x = draw(0, 2, 18, 17, 2)
  model = conv4.make(3, width=4, downsample=downsample)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = jax.tree.map(lambda s: draw(s.size, *s.shape), shapes)

  def plain(params, x):
    for i in range(4):
      x = convolution(x, params[f'conv{i}'], 1 if pool else 2)
      x = flax(pool, x, params[f'norm{i}']['scale'], params[f'norm{i}']['bias'])
    x = x.reshape(len(x), -1) if pool else x.mean((1, 2))
    return x @ params['head']['kernel'] + params['head']['bias']

  assert_same(*jax.jit(lambda params, x: (model.apply({'params': params}, x), plain(params, x)))(params, x))


@pytest.mark.parametrize(
  ('image', 'width', 'downsample', 'features', 'parameters'),
  [
    # conv0 + 3 convs, 4 times scale and bias, head; 28 -> 14 -> 7 -> 3 -> 1 and 28 -> 14 -> 7 -> 4 -> 2, averaged
    ((28, 28, 1), 64, 'pool', 64, 576 + 3 * 36_864 + 4 * 128 + 325),
    ((28, 28, 1), 64, 'stride', 64, 576 + 3 * 36_864 + 4 * 128 + 325),
    # 84 -> 42 -> 21 -> 10 -> 5, so 5 * 5 * 32 features; strided the last map is averaged to 32
    ((84, 84, 3), 32, 'pool', 800, 864 + 3 * 9_216 + 4 * 64 + 4_005),
    ((84, 84, 3), 32, 'stride', 32, 864 + 3 * 9_216 + 4 * 64 + 165),
  ],
)
def test_conv4_sizes(image, width, downsample, features, parameters):
  model = conv4.make(5, width=width, downsample=downsample)
  x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert out.shape == (2, 5)
  assert variables['params']['head']['kernel'].shape == (features, 5)
  assert sum(p.size for p in jax.tree.leaves(variables['params'])) == parameters


def test_conv4_refuses_another_downsampling():
  with pytest.raises(ValueError, match="'pool' or 'stride', not 'poool'"):
    conv4.make(5, downsample='poool')

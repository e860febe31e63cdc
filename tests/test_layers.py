"""Convolution, layers and Conv4 against Flax and XLA: values, first and second derivatives in float64, and sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.errors import UserError
from metajax.models import conv4, convolution, layers


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


def lax_conv(x, kernel, stride=1):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


@pytest.fixture(params=['whole', 'blocks'])
def blocks(request, monkeypatch):
  """Runs a test twice, the second time with blocks so small that there are several."""
  if request.param == 'blocks':
    monkeypatch.setattr(convolution, '_BLOCK', 60)


# Few input channels take another way to the kernel's gradient than many.
@pytest.mark.parametrize('channels', [(1, 4), (3, 4)], ids=['few', 'many'])
def test_conv3x3_is_the_padded_convolution_with_all_its_derivatives(channels, blocks):
  x, kernel = draw(0, 3, 5, 6, channels[0]), draw(1, 3, 3, *channels)
  ours = derivatives(convolution.conv3x3, x, kernel)
  assert ours[0].shape == (3, 5, 6, 4)
  assert_same(ours, derivatives(lax_conv, x, kernel))


@pytest.mark.parametrize('slope', [0.0, 0.2])
def test_convolution_and_pooling_in_one_are_the_same_in_blocks(monkeypatch, slope):
  monkeypatch.setattr(convolution, '_BLOCK', 60)
  x, kernel = draw(0, 3, 6, 4, 3) + 1, draw(1, 3, 3, 3, 4)
  assert_same(*both_blocks('pool', x, kernel, SCALE, slope=slope), atol=1e-7, rtol=1e-7)


def test_strided_conv3x3_is_the_strided_convolution_with_all_its_derivatives():
  x, kernel = draw(0, 2, 5, 6, 3), draw(1, 3, 3, 3, 4)
  ours = derivatives(convolution.strided_conv3x3, x, kernel)
  assert ours[0].shape == (2, 3, 3, 4)
  assert_same(ours, derivatives(lambda *args: lax_conv(*args, stride=2), x, kernel))


def test_what_other_platforms_compute_is_the_same(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  x, kernel = draw(0, 2, 5, 6, 3), draw(1, 3, 3, 3, 4)
  assert_same(derivatives(convolution.conv3x3, x, kernel), derivatives(lax_conv, x, kernel))


@pytest.mark.parametrize('shared', [(False, False), (False, True), (True, False)], ids=['none', 'kernel', 'images'])
def test_vmap_over_tasks_is_a_loop_over_tasks(shared):
  x, kernel = draw(0, 2, 2, 4, 5, 3), draw(1, 2, 3, 3, 3, 4)
  x, kernel = (x[0] if shared[0] else x), (kernel[0] if shared[1] else kernel)
  axes = tuple(None if s else 0 for s in shared)

  def in_a_loop(x, kernel):
    return jnp.stack([lax_conv(x if shared[0] else x[i], kernel if shared[1] else kernel[i]) for i in range(2)])

  ours = derivatives(jax.vmap(convolution.conv3x3, axes), x, kernel)
  assert_same(ours, derivatives(in_a_loop, x, kernel))


# Each task with weights of its own and with the images of all; an odd size; few channels and many.
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('shape', [(4, 6, 3), (5, 4, 5)])
def test_blocks_under_vmap_are_those_of_a_loop_with_all_their_derivatives(monkeypatch, backend, shape):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  x, kernel = draw(0, 2, 3, *shape), draw(1, 2, 3, 3, shape[-1], 4)

  def vmapped(x, kernel, scale):
    return jax.vmap(lambda *pair: block('pool', *pair, scale, BIAS))(x, kernel)

  def looped(x, kernel, scale):
    return jnp.stack([plain_block('pool', x[i], kernel[i], scale, BIAS) for i in range(2)])

  ours, plain = (derivatives(f, x, kernel, SCALE) for f in (vmapped, looped))
  assert_same(ours, plain, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize('channels', [3, 5])
def test_statistics_of_nearly_constant_inputs_are_sound_in_float32(channels):
  with jax.enable_x64(False):
    x, kernel = (100 + 0.01 * draw(0, 4, 6, 6, channels)).astype(np.float32), draw(1, 3, 3, channels, 4)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(block('pool', x, k, SCALE, BIAS) ** 2)))
    assert np.isfinite(gradient(kernel.astype(np.float32))).all()


@pytest.mark.parametrize(('size', 'pooled'), [((6, 5), (3, 2)), ((7, 4), (3, 2))])
def test_max_pool_is_that_of_flax_and_drops_odd_edges(size, pooled):
  x = draw(0, 2, *size, 3)
  ours = derivatives(convolution.max_pool2x2, x)
  assert ours[0].shape == (2, *pooled, 3)
  assert_same(ours, derivatives(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x))


def test_of_equals_in_a_pooling_window_one_gets_the_gradient():
  x = jnp.ones((1, 4, 4, 1)).at[0, 0, 1].set(2)
  gradient = jax.grad(lambda x: convolution.max_pool2x2(x).sum())(x)
  expected = np.zeros((1, 4, 4, 1))
  expected[0, 0, 1] = expected[0, 0, 2] = expected[0, 2, 0] = expected[0, 2, 2] = 1
  assert_same(gradient, expected)


SCALE = np.array([1.3, -0.7, 0.2, -2.0])
BIAS = np.array([0.3, 0.5, -0.2, 0.4])


def block(downsample, x, kernel, scale, bias, stats=None, slope=0.0):
  variables = {'params': {'scale': scale, 'bias': bias}}
  if stats:
    variables['batch_stats'] = {'mean': stats[0], 'var': stats[1]}
  return layers.ConvBlock(downsample, slope).apply(variables, x, kernel)


def plain_block(downsample, x, kernel, scale, bias, stats=None, slope=0.0):
  """Convolution, normalisation, LeakyReLU and pooling one after the other, of Flax and XLA."""
  x = lax_conv(x, kernel, 2 if downsample == 'stride' else 1)
  mean, variance = stats or (jnp.zeros(4), jnp.ones(4))
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': {'mean': mean, 'var': variance}}
  norm = nn.BatchNorm(use_running_average=stats is not None, epsilon=1e-5, use_fast_variance=False)
  x = nn.leaky_relu(norm.apply(variables, x, mutable=['batch_stats'])[0], slope)
  return nn.max_pool(x, (2, 2), (2, 2)) if downsample == 'pool' else x


def both_blocks(downsample, x, kernel, scale, stats=None, slope=0.0):
  args = x, kernel, scale, BIAS
  mine = derivatives(lambda *args: block(downsample, *args, stats, slope), *args)
  theirs = derivatives(lambda *args: plain_block(downsample, *args, stats, slope), *args)
  return mine, theirs


# Pooling behind three input channels and even sizes has a way of its own.
@pytest.mark.parametrize(
  ('downsample', 'shape', 'slope'),
  [
    ('pool', (6, 4, 3), 0.0),
    ('pool', (6, 4, 3), 0.2),
    ('pool', (5, 6, 3), 0.0),
    ('pool', (6, 4, 5), 0.2),
    ('stride', (6, 4, 5), 0.0),
    ('no', (6, 4, 5), 0.2),
  ],
)
def test_a_block_is_that_of_flax_with_all_its_derivatives(downsample, shape, slope):
  x, kernel = draw(0, 3, *shape) + 1, draw(1, 3, 3, shape[-1], 4)
  assert_same(*both_blocks(downsample, x, kernel, SCALE, slope=slope), atol=1e-7, rtol=1e-7)


# At a scale of zero the maximum has no unique position. In one pass with the convolution it is the first, as in Flax;
# pooled for itself it is that of a small positive scale.
@pytest.mark.parametrize(('channels', 'like'), [(3, 0), (5, 1e-12)])
def test_a_scale_of_zero_has_finite_derivatives(channels, like):
  x, kernel, scale = draw(0, 3, 4, 6, channels), draw(1, 3, 3, channels, 4), SCALE * [1, 0, -1, 0]
  mine, _ = both_blocks('pool', x, kernel, scale)
  _, theirs = both_blocks('pool', x, kernel, np.where(scale == 0, like, scale))
  assert_same(mine, theirs, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize('channels', [3, 5])
@pytest.mark.parametrize('downsample', ['pool', 'no'])
def test_stored_statistics_normalise_like_flax_with_a_running_average(downsample, channels):
  x, kernel, stats = draw(0, 3, 4, 6, channels), draw(1, 3, 3, channels, 4), (draw(1, 4), np.exp(draw(2, 4)))
  mine, theirs = both_blocks(downsample, x, kernel, SCALE, stats)
  assert_same(mine, theirs, atol=1e-8)
  alone = block(downsample, x[:1], kernel, SCALE, BIAS, stats)
  assert_same(alone, mine[0][:1])  # each example by itself


@pytest.mark.parametrize('channels', [3, 5])
def test_mutable_statistics_are_the_batch_s_own_and_take_precedence_over_given_ones(channels):
  x, kernel = draw(0, 3, 4, 6, channels), draw(1, 3, 3, channels, 4)
  variables = {
    'params': {'scale': SCALE, 'bias': BIAS},
    'batch_stats': {'mean': np.ones(4), 'var': np.full(4, 9.0)},
  }
  out, updated = layers.ConvBlock('pool').apply(variables, x, kernel, mutable=['batch_stats'])
  assert_same(out, block('pool', x, kernel, SCALE, BIAS))
  rows = np.asarray(lax_conv(x, kernel)).reshape(-1, 4)
  assert_same(updated['batch_stats'], {'mean': rows.mean(0), 'var': rows.var(0)})


@pytest.mark.parametrize(('affine', 'epsilon'), [(True, 1e-5), (False, 1e-3)])
def test_batch_norm_is_that_of_flax(affine, epsilon):
  x = draw(0, 3, 5, 6, 4) + 1
  names = ('scale', 'bias') if affine else ()
  args = x, *(SCALE, BIAS)[: len(names)]

  def ours(x, *values):
    return layers.BatchNorm(epsilon, affine).apply({'params': dict(zip(names, values, strict=True))}, x)

  def flax(x, *values):
    norm = nn.BatchNorm(False, epsilon=epsilon, use_scale=affine, use_bias=affine, use_fast_variance=False)
    return norm.apply({'params': dict(zip(names, values, strict=True))}, x, mutable=['batch_stats'])[0]

  assert_same(derivatives(ours, *args), derivatives(flax, *args), atol=1e-8)


@pytest.mark.parametrize('channels', [3, 5])
def test_bfloat16_is_near_float32_and_leaves_parameters_and_statistics_float32(channels):
  with jax.enable_x64(False):
    args = (draw(0, 8, 8, 8, channels), draw(1, 3, 3, channels, 4), SCALE, BIAS)
    x, kernel, scale, bias = (jnp.asarray(a, jnp.float32) for a in args)

    def run(dtype):
      variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': {'mean': bias, 'var': bias}}
      module = layers.ConvBlock('pool', dtype=dtype)

      def loss(kernel):
        out, updated = module.apply(variables, x, kernel, mutable=['batch_stats'])
        return jnp.sum(out.astype(jnp.float32) ** 2), (out, updated)

      return jax.jit(jax.grad(loss, has_aux=True))(kernel)

    (grad32, (out32, stats32)), (grad16, (out16, stats16)) = run(jnp.float32), run(jnp.bfloat16)
  assert out16.dtype == jnp.bfloat16
  assert grad16.dtype == jnp.float32 == stats16['batch_stats']['var'].dtype
  assert np.abs(np.asarray(out16, np.float32) - out32).max() < 0.05 * np.abs(out32).max()
  assert np.linalg.norm(grad16 - grad32) < 0.15 * np.linalg.norm(grad32)
  assert_same(stats16, stats32, rtol=0.02, atol=0.02)


def plain_layer_block(downsample, x, kernel, bias, norm, slope):
  """As `plain_block`, with layer normalisation of each image."""
  x = lax_conv(x, kernel, 2 if downsample == 'stride' else 1) + bias
  axes = (1, 2, 3)
  layer_norm = nn.LayerNorm(1e-5, use_scale=False, reduction_axes=axes, feature_axes=axes, use_fast_variance=False)
  x = nn.leaky_relu(layer_norm.apply({'params': norm}, x), slope)
  return nn.max_pool(x, (2, 2), (2, 2)) if downsample == 'pool' else x


@pytest.mark.parametrize(
  ('downsample', 'norm', 'slope'),
  [('pool', 'batch', 0.01), ('stride', 'batch', 0.0), ('pool', 'layer', 0.01), ('stride', 'layer', 0.0)],
)
def test_conv4_is_the_plain_network(downsample, norm, slope):
  pool = downsample == 'pool'
  x = draw(0, 2, 18, 17, 2)
  model = conv4.make(3, width=4, downsample=downsample, norm=norm, negative_slope=slope)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = jax.tree.map(lambda s: draw(s.size, *s.shape), shapes)

  def plain(params, x):
    for i in range(4):
      kernel, of_norm = params[f'conv{i}'], params[f'norm{i}']
      if norm == 'batch':
        x = plain_block(downsample, x, kernel, of_norm['scale'], of_norm['bias'], slope=slope)
      else:
        x = plain_layer_block(downsample, x, kernel, params[f'conv{i}_bias'], of_norm, slope)
    x = x.reshape(len(x), -1) if pool else x.mean((1, 2))
    return x @ params['head']['kernel'] + params['head']['bias']

  ours, theirs = jax.jit(lambda params, x: (model.apply({'params': params}, x), plain(params, x)))(params, x)
  assert_same(ours, theirs)


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


@pytest.mark.parametrize('norm', ['batch', 'layer'])
@pytest.mark.parametrize(
  ('image', 'way', 'width', 'parameters'),
  [((28, 28, 1), 20, 64, 112_724), ((28, 28, 1), 5, 64, 111_749), ((84, 84, 3), 5, 48, 69_701)],
)
def test_conv4_s_convolutions_and_head_are_of_the_size_of_those_of_mamlpp(image, way, width, parameters, norm):
  """Weights and biases as PyTorch counts them in the original, whose convolutions have a bias before either norm."""
  x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
  params = jax.eval_shape(conv4.make(way, width=width, norm=norm).init, jax.random.key(0), x)['params']
  ours = {name: leaf for name, leaf in params.items() if not name.startswith('norm')}
  without_bias = 4 * width if norm == 'batch' else 0
  assert sum(p.size for p in jax.tree.leaves(ours)) == parameters - without_bias


def test_layer_norm_has_a_bias_of_each_pixel_and_no_statistics():
  variables = jax.eval_shape(
    conv4.make(5, width=4, norm='layer').init, jax.random.key(0), jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
  )
  assert set(variables) == {'params'}
  shapes = [jax.tree.map(jnp.shape, variables['params'][f'norm{i}']) for i in range(4)]
  assert shapes == [{'bias': (size, size, 4)} for size in (28, 14, 7, 3)]


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (dict(downsample='poool'), "'pool' or 'stride', not 'poool'"),
    (dict(norm='instance'), "'batch' or 'layer', not 'instance'"),
    (dict(negative_slope=-0.1), 'negative_slope = -0.1: from 0'),
    (dict(negative_slope=1.0), 'negative_slope = 1.0: from 0'),
  ],
)
def test_conv4_refuses(settings, text):
  with pytest.raises(UserError, match=text):
    conv4.make(5, **settings)

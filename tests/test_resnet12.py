"""ResNet-12 against plain Flax, DropBlock against loops, and sizes against the paper's and the released code's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.errors import UserError
from metajax.models import layers, resnet12

TINY = (2, 3, 4, 5)


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def assert_same(ours, theirs, **tolerance):
  tolerance = {'rtol': 1e-9, 'atol': 1e-9, **tolerance}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def parameters(model, x):
  """Parameters of the model drawn so that scales are of both signs and biases not 0, and its counters."""
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  params = jax.tree.map(lambda s: draw(s.size, *s.shape).astype(s.dtype), variables['params'])
  return params, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), variables.get('counters', {}))


@pytest.mark.parametrize(('pixels', 'features'), [(84, 640 * 5 * 5), (32, 640 * 2 * 2)])
def test_sizes(pixels, features):
  model = resnet12.make(None)
  x = jax.ShapeDtypeStruct((2, pixels, pixels, 3), jnp.float32)
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert out.shape == (2, features)
  assert sum(p.size for p in jax.tree.leaves(variables['params'])) == 12_424_320


def test_pooled_features_and_the_head():
  x = jax.ShapeDtypeStruct((2, 84, 84, 3), jnp.float32)
  assert jax.eval_shape(resnet12.make(None, pool=True).init_with_output, jax.random.key(0), x)[0].shape == (2, 640)
  out, variables = jax.eval_shape(resnet12.make(5, pool=True).init_with_output, jax.random.key(0), x)
  assert out.shape == (2, 5)
  assert variables['params']['head']['kernel'].shape == (640, 5)


class Plain(nn.Module):
  """The network of Flax's own layers, in the order of the text: LeakyReLU, then pooling."""

  widths: tuple[int, ...]
  num_outputs: int | None = None

  @nn.compact
  def __call__(self, x):
    for width in self.widths:
      shortcut = self.normalised(nn.Conv(width, (1, 1), use_bias=False)(x))
      for i in range(3):
        x = self.normalised(nn.Conv(width, (3, 3), use_bias=False)(x))
        x = nn.leaky_relu(x if i < 2 else x + shortcut, 0.1)
      x = nn.max_pool(x, (2, 2), (2, 2))
    return nn.Dense(self.num_outputs)(x.reshape(len(x), -1)) if self.num_outputs else x

  def normalised(self, x):
    return nn.BatchNorm(use_running_average=False, epsilon=1e-5, use_fast_variance=False)(x)


def for_plain(params):
  """Parameters of ResNet12 as `Plain` names them."""
  renamed = {'Dense_0': params['head']} if 'head' in params else {}
  for i in range(len(params) - len(renamed)):
    block = params[f'block{i}']
    kernels = [block['shortcut'][None, None], *(block[f'conv{j}'] for j in range(3))]
    norms = [block['shortcut_norm'], *(block[f'norm{j}'] for j in range(3))]
    for j in range(4):
      renamed[f'Conv_{4 * i + j}'] = {'kernel': kernels[j]}
      renamed[f'BatchNorm_{4 * i + j}'] = norms[j]
  return renamed


def test_the_network_is_that_of_flax_with_its_gradient():
  with jax.enable_x64(True):
    x = draw(0, 2, 32, 32, 3)
    params, _ = parameters(model := resnet12.make(3, widths=TINY), x)

    def ours(params):
      return model.apply({'params': params}, x)

    def plain(params):
      return Plain(TINY, 3).apply({'params': for_plain(params)}, x, mutable=['batch_stats'])[0]

    mine, theirs = jax.jit(lambda p: (with_gradient(ours)(p), with_gradient(plain)(p)))(params)
  assert_same(mine, theirs, rtol=1e-6, atol=1e-6)


def test_second_derivatives_are_those_of_flax():
  with jax.enable_x64(True):
    x = draw(0, 2, 5, 4, 2)
    params, _ = parameters(model := resnet12.ResidualBlock(3), x)

    def ours(params):
      return model.apply({'params': params}, x)

    def plain(params):
      return Plain((3,)).apply({'params': for_plain({'block0': params})}, x, mutable=['batch_stats'])[0]

    def second(function):
      return with_gradient(lambda params: jax.tree.leaves(with_gradient(function)(params)[1])[2])

    mine, theirs = jax.jit(lambda p: (second(ours)(p), second(plain)(p)))(params)
  assert_same(mine, theirs, rtol=1e-6, atol=1e-6)


def with_gradient(function):
  """The value of `function`, and the gradient of a curved scalar of it."""

  def scalar(params):
    out = function(params)
    return jnp.sum(jnp.sin(out) * draw(99, *out.shape)), out

  def value_and_gradient(params):
    gradient, out = jax.grad(scalar, has_aux=True)(params)
    return out, gradient

  return value_and_gradient


def step_of(model):
  """Of parameters, counters, images and a key for dropout: the gradient, and the counters afterwards."""

  def step(params, counters, x, key):
    def loss(params):
      variables = {'params': params, 'counters': counters}
      out, state = model.apply(variables, x, mutable=['counters'], rngs={'dropout': key})
      return jnp.sum(jnp.sin(out)), state['counters']

    return jax.grad(loss, has_aux=True)(params)

  return step


def test_a_step_with_dropout_on_images_of_84_pixels():
  x = draw(0, 1, 84, 84, 3).astype(np.float32)
  params, counters = parameters(model := resnet12.make(3, widths=TINY), x)
  grads, counters = jax.jit(step_of(model))(params, counters, x, jax.random.key(0))
  assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))
  assert counters == {'drop2': {'calls': 1}, 'drop3': {'calls': 1}}


def test_vmap_over_tasks_with_weights_and_counters_of_their_own_is_a_loop():
  x = draw(0, 2, 3, 8, 8, 3).astype(np.float32)
  model = nn.Sequential([resnet12.ResidualBlock(4), layers.DropBlock(0.5, 2, 10)])
  params = jax.tree.map(lambda p: np.stack([p, p[..., ::-1]]), parameters(model, x[0])[0])
  arguments = params, {'layers_1': {'calls': np.float32([2, 9])}}, x, jax.random.split(jax.random.key(0), 2)
  step = jax.jit(step_of(model))
  each = [jax.device_get(step(*jax.tree.map(lambda a: a[i], arguments))) for i in range(2)]  # noqa: B023
  ours = jax.jit(jax.vmap(step))(*arguments)
  assert_same(ours, jax.tree.map(lambda *a: np.stack(a), *each), rtol=1e-3, atol=1e-4)
  assert_same(ours[1]['layers_1']['calls'], [3, 10])


def test_dropout_is_active_with_a_key_alone_and_counts_such_calls():
  model = resnet12.make(None, widths=TINY, ramp=1000)
  x = draw(0, 4, 32, 32, 3).astype(np.float32)
  params, early = parameters(model, x)
  late = jax.tree.map(lambda _: np.float32(999), early)

  def run(model, counters, **rngs):
    out, state = model.apply({'params': params, 'counters': counters}, x, mutable=['counters'], rngs=rngs)
    return out, state['counters']

  @jax.jit
  def runs(key):
    without, _ = run(resnet12.make(None, widths=TINY, dropout=0.0), {}, dropout=key)
    return without, run(model, early), run(model, early, dropout=key), run(model, late, dropout=key)

  without, (still, unmoved), (first, once), (last, thousand) = runs(jax.random.key(0))
  assert_same(still, without)
  assert np.max(np.abs(first - still)) > 0.1  # by plain dropout alone: of DropBlock there is a thousandth
  assert np.max(np.abs(last - first)) > 0.1  # by DropBlock alone, as the key is the same
  assert unmoved == early == {'drop2': {'calls': 0}, 'drop3': {'calls': 0}}
  assert once == {'drop2': {'calls': 1}, 'drop3': {'calls': 1}}
  assert thousand == {'drop2': {'calls': 1000}, 'drop3': {'calls': 1000}}


def test_counters_that_are_not_mutable_are_used_and_stay():
  x = np.ones((4, 5, 5, 8), np.float32)
  calls = {'counters': {'calls': np.float32(39_999)}}
  out = layers.DropBlock(0.5, 2, 40_000).apply(calls, x, rngs={'dropout': jax.random.key(0)})
  assert np.mean(out == 0) > 0.3


def test_initialisation_drops_and_counts_nothing():
  x = np.ones((1, 4, 4, 2), np.float32)
  out, variables = layers.DropBlock(0.5, 2, 1).init_with_output({'dropout': jax.random.key(0)}, x)
  assert_same(out, x)
  assert variables == {'counters': {'calls': 0}}


@pytest.mark.parametrize(('size', 'block_size'), [((5, 4), 1), ((5, 4), 2), ((6, 7), 3), ((5, 5), 5)])
def test_squares_are_dropped_as_by_a_loop(size, block_size):
  x = draw(0, 2, *size, 3).astype(np.float32)
  margin = block_size - 1
  seeds = np.random.default_rng(1).random((2, size[0] - margin, size[1] - margin, 3)) < 0.1
  seeds[0, 0, 0, 0] = seeds[1, -1, -1, 1] = True  # at both ends of the grid
  mask = np.ones(x.shape)
  for n, i, j, c in np.argwhere(seeds):
    mask[n, i : i + block_size, j : j + block_size, c] = 0
  assert_same(layers.dropped(x, seeds, block_size), x * mask * mask.size / mask.sum(), rtol=1e-5, atol=1e-5)


# Maps of the last two blocks, of 84 and of 32 pixels, with the squares of the two sizes.
@pytest.mark.parametrize(
  ('side', 'block_size', 'gamma'), [(10, 5, 0.01111), (5, 5, 0.1), (4, 2, 0.04444), (2, 2, 0.1), (10, 2, 0.0309)]
)
def test_what_is_left_of_ones_has_the_mean_1_and_about_the_rate_is_dropped(side, block_size, gamma):
  x = np.ones((64, side, side, 64), np.float32)
  late = {'counters': {'calls': np.float32(40_000)}}
  out = np.asarray(layers.DropBlock(0.1, block_size, 40_000).apply(late, x, rngs={'dropout': jax.random.key(0)}))
  np.testing.assert_allclose(out.mean(), 1, rtol=1e-4)
  starts = np.arange(side - block_size + 1)
  reach = [np.sum((starts <= i) & (i < starts + block_size)) for i in range(side)]  # seeds, along a side
  expected = np.mean((1 - gamma) ** np.outer(reach, reach))
  np.testing.assert_allclose(np.mean(out != 0), expected, atol=0.01)
  assert 0.9 - 1e-4 < expected < 0.93


def test_where_nothing_is_left_the_gradient_is_zero():
  x, seeds = np.ones((1, 2, 2, 1), np.float32), np.ones((1, 1, 1, 1), bool)
  assert_same(jax.grad(lambda x: layers.dropped(x, seeds, 2).sum())(x), np.zeros_like(x))


def test_the_ramp_and_the_probability_of_a_seed_are_those_of_the_formulas():
  kept = [1 - layers.ramped(0.1, calls, 40_000) for calls in (0, 10_000, 40_000, 10**6)]
  np.testing.assert_allclose(kept, [1, 0.975, 0.9, 0.9], rtol=1e-6)
  assert layers.ramped(0.1, 0, 40_000) == 0
  for side, gamma in ((10, 0.0309), (5, 0.0391), (4, 0.0444), (2, 0.1)):
    np.testing.assert_allclose(layers.seed_probability(0.1, 2, side, side), gamma, atol=5e-5)


def test_initial_kernels_are_kaiming_normal_of_the_outputs():
  model = resnet12.ResidualBlock(64)
  block = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2, 2, 8), np.float32))['params']
  values = np.asarray(block['conv2']).ravel()
  np.testing.assert_allclose(values.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
  assert np.abs(values).max() > 3 * values.std()  # not truncated
  np.testing.assert_allclose(np.std(block['shortcut']), np.sqrt(2 / 64), rtol=0.15)
  assert_same(block['norm0'], {'scale': np.ones(64), 'bias': np.zeros(64)})


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(widths=(64, 160, 320)), 'four are needed'),
    (dict(widths=(64, 160, 320, 0)), 'each at least 1'),
    (dict(dropout=1.0), 'dropout = 1.0'),
    (dict(block_size=0), 'block_size = 0'),
    (dict(ramp=0), 'ramp = 0'),
  ],
)
def test_settings_out_of_their_range_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    resnet12.make(5, **settings)


@pytest.mark.parametrize(
  ('pixels', 'block_size', 'message'),
  [(15, 1, '15 x 15 pixels are too small'), (28, 2, 'a map of 1 x 1 pixels has no room'), (32, 5, '4 x 4 pixels')],
)
def test_images_too_small_are_refused(pixels, block_size, message):
  model = resnet12.make(5, block_size=block_size)
  x = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
  with pytest.raises(UserError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), x)

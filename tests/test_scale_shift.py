"""Scaling and shifting against the paper's equation, and how many scales and shifts the released code has."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import scale_shift
from metajax.checkpoint import Checkpoints
from metajax.models import conv4, convolution, mlp, resnet12, resnet12_mtl, resnet18_mtl, resnet25
from metajax.train import TrainState

TINY = (2, 3, 4, 5)
NETWORKS = {
  'conv4': conv4.make(3, width=4),
  'conv4 with layer norm': conv4.make(3, width=4, norm='layer'),
  'resnet12': resnet12.make(3, widths=TINY),
  'resnet12_mtl': resnet12_mtl.make(3, widths=TINY),
  'resnet25': resnet25.make(3, widths=TINY, blocks=2),
  'mlp': mlp.make(3),
}


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def shapes(model, pixels):
  """Shapes of a network's parameters."""
  x = jax.ShapeDtypeStruct((2, pixels, pixels, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), x)['params']


def learned_shapes(params, **settings):
  return jax.eval_shape(functools.partial(scale_shift.init, **settings), params)


def drawn(tree, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), tree)


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_sizes_are_those_of_the_tensorflow_code():
  params = shapes(resnet12_mtl.make(None), 84)
  learned = learned_shapes(params, shortcuts=False)
  assert {kind: size(of_kind) for kind, of_kind in learned.items()} == {'scale': 868_544, 'shift': 2_880}
  kernels = [leaf for leaf in jax.tree.leaves(params) if len(leaf.shape) == 4]
  assert size(kernels) == 7_816_896 == 9 * size(learned['scale'])
  assert size(params) - size(kernels) - size(learned['shift']) == 172_224
  assert learned['scale']['block1']['conv0'].shape == (1, 1, 64, 128)
  assert size(learned_shapes(params)['scale']) == 868_544 + 172_224
  learned = learned_shapes(shapes(resnet18_mtl.make(None), 84), shortcuts=False)
  assert {kind: size(of_kind) for kind, of_kind in learned.items()} == {'scale': 1_220_800, 'shift': 3_904}
  assert learned['scale']['stem'].shape == (1, 1, 3, 64)


def test_convolutions_of_flax_are_known_by_their_names():
  x = jnp.asarray(draw(0, 1, 5, 5, 2), jnp.float32)
  model = nn.Sequential([nn.Conv(3, (3, 3)), nn.Conv(4, (1, 1)), nn.Dense(2)])
  params = drawn(jax.eval_shape(model.init, jax.random.key(0), x)['params'])
  learned = scale_shift.init(params, shortcuts=False)
  assert {kind: list(of_kind) for kind, of_kind in learned.items()} == {'scale': ['layers_0'], 'shift': ['layers_0']}
  learned = drawn(scale_shift.init(params), seed=1)
  assert learned['scale']['layers_1']['kernel'].shape == (1, 1, 3, 4)
  expected = x
  for layer in ('layers_0', 'layers_1'):
    kernel = params[layer]['kernel'] * learned['scale'][layer]['kernel']
    bias = params[layer]['bias'] + learned['shift'][layer]['bias']
    expected = nn.Conv(*((3, (3, 3)) if layer == 'layers_0' else (4, (1, 1)))).apply(
      {'params': {'kernel': kernel, 'bias': bias}}, expected
    )
  expected = expected @ params['layers_2']['kernel'] + params['layers_2']['bias']
  np.testing.assert_allclose(
    model.apply({'params': scale_shift.apply(params, learned)}, x), expected, rtol=1e-4, atol=1e-5
  )


def test_sizes_are_those_of_the_pytorch_code():
  learned = learned_shapes(shapes(resnet25.make(None), 80), norm=True)
  sizes = {kind: size(of_kind) for kind, of_kind in learned.items()}
  assert sizes == {'scale': 4_301_040, 'shift': 80, 'norm': 20_320}
  assert size(learned) == 4_321_440
  assert learned['scale']['stem'].shape == (1, 1, 3, 80)
  assert learned['scale']['stage2_block0']['shortcut'].shape == (320, 640)


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('name', NETWORKS)
def test_at_first_the_parameters_are_bit_by_bit_those_of_the_network(name, norm):
  params = drawn(shapes(NETWORKS[name], 32))
  jax.tree.map(np.testing.assert_array_equal, scale_shift.apply(params, scale_shift.init(params, norm=norm)), params)


def test_what_is_scaled_shifted_and_learned_of_normalisation():
  params = drawn(shapes(NETWORKS['resnet25'], 8))
  learned = drawn(scale_shift.init(params, norm=True), seed=1)
  expected = {**params, 'stem': params['stem'] * learned['scale']['stem'], 'stem_norm': learned['norm']['stem_norm']}
  expected['stem_bias'] = params['stem_bias'] + learned['shift']['stem_bias']
  for name in (f'stage{i}_block{j}' for i in range(3) for j in range(2)):
    convolutions = ('conv0', 'conv1') if name.endswith('1') else ('conv0', 'conv1', 'shortcut')
    scaled = {key: params[name][key] * learned['scale'][name][key] for key in convolutions}
    assert params[name].keys() == scaled.keys() | learned['norm'][name].keys()
    expected[name] = {**scaled, **learned['norm'][name]}
  jax.tree.map(np.testing.assert_array_equal, scale_shift.apply(params, learned), expected)
  assert size(learned_shapes(shapes(NETWORKS['mlp'], 8))) == 0
  layer = learned_shapes(shapes(NETWORKS['conv4 with layer norm'], 16), norm=True)
  assert size(layer['shift']) == 4 * 4 and size(layer['norm']) == 4 * (16**2 + 8**2 + 4**2 + 2**2)


def test_a_convolution_is_that_of_the_equation_with_its_gradient():
  with jax.enable_x64(True):
    x, g = draw(0, 2, 4, 5, 3), draw(1, 2, 4, 5, 2)
    frozen = {'conv': draw(2, 3, 3, 3, 2), 'conv_bias': draw(3, 2)}
    learned = {'scale': {'conv': draw(4, 1, 1, 3, 2)}, 'shift': {'conv_bias': draw(5, 2)}}

    def ours(learned):
      params = scale_shift.apply(frozen, learned)
      return convolution.conv3x3(x, params['conv']) + params['conv_bias']

    out, pullback = jax.vjp(ours, learned)
    (gradient,) = pullback(jnp.asarray(g))
  windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
  of_channel = np.einsum('nhwcij,ijcf->nhwcf', windows, frozen['conv'])  # of one input and one output channel
  scale, shift = learned['scale']['conv'][0, 0], learned['shift']['conv_bias']
  expected = np.sum(of_channel * scale, axis=3) + frozen['conv_bias'] + shift
  np.testing.assert_allclose(out, expected, rtol=1e-9)
  np.testing.assert_allclose(gradient['scale']['conv'][0, 0], np.einsum('nhwcf,nhwf->cf', of_channel, g), rtol=1e-9)
  np.testing.assert_allclose(gradient['shift']['conv_bias'], g.sum((0, 1, 2)), rtol=1e-9)


def test_statistics_of_the_batch_cancel_shifts_and_given_ones_do_not():
  with jax.enable_x64(True):
    x = draw(0, 3, 16, 16, 3)
    model = NETWORKS['resnet12_mtl']
    params = drawn(shapes(model, 16))
    learned = scale_shift.init(params)
    direction = drawn(learned['scale'])

    def loss(learned, state):
      return jnp.sum(jnp.sin(model.apply({'params': scale_shift.apply(params, learned), **state}, x)))

    def moved(length):
      return {**learned, 'scale': jax.tree.map(lambda scale, d: scale + length * d, learned['scale'], direction)}

    @jax.jit
    def run():
      given = model.apply({'params': params}, x, mutable=['batch_stats'])[1]
      return jax.grad(loss)(learned, {}), jax.grad(loss)(learned, given), loss(moved(1e-6), {}) - loss(moved(-1e-6), {})

    of_batch, of_given, rise = jax.device_get(run())
  largest = max(np.abs(g).max() for g in jax.tree.leaves(of_batch['scale']))
  assert all(np.abs(g).max() < 1e-12 * largest for g in jax.tree.leaves(of_batch['shift']))
  assert all(np.abs(g).min() > 1e-6 for g in jax.tree.leaves(of_given['shift']))
  slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, of_batch['scale'], direction)))
  np.testing.assert_allclose(rise / 2e-6, slope, rtol=1e-5)


def test_checkpoints_hold_what_is_learned_with_or_without_shifts(tmp_path):
  names = ('resnet12', 'resnet25')
  params = {name: drawn(scale_shift.init(drawn(shapes(NETWORKS[name], 32)), norm=True)) for name in names}
  state = TrainState(np.int32(1), params, {}, {}, {})
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, state).params, params)
  checkpoints.close()

"""The outer optimiser against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import optimizers
from metajax.errors import UserError


def path(tx, grads, weight):
  """The weight after each gradient."""
  state, seen = tx.init(jnp.float32(weight)), []
  for grad in grads:
    step, state = tx.update(jnp.float32(grad), state, jnp.float32(weight))
    weight = float(weight + step)
    seen.append(weight)
  return seen


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_with_momentum_weight_decay_and_steps_is_pytorch_s(nesterov):
  grads, w, expected, buffer = [1.0, -2.0, 0.5, 3.0], 0.7, [], 0.0
  for k, g in enumerate(grads):
    g += 0.01 * w  # decay belongs to the gradient, before momentum
    buffer = 0.9 * buffer + g
    w -= (0.1, 0.1, 0.02, 0.004)[k] * (g + 0.9 * buffer if nesterov else buffer)
    expected.append(w)
  tx = optimizers.make(
    10,
    name='sgd',
    learning_rate=0.1,
    schedule='steps',
    boundaries=(2, 3),
    rates=(0.02, 0.004),
    momentum=0.9,
    nesterov=nesterov,
    weight_decay=0.01,
  )
  np.testing.assert_allclose(path(tx, grads, 0.7), expected, rtol=1e-5)


def test_weight_decay_of_adam_is_part_of_the_gradient_and_of_adamw_is_not():
  """The first step of an Adam is its step size against the gradient's sign, here that of the decay."""
  decayed = path(optimizers.make(1, name='adam', learning_rate=0.1, weight_decay=0.5), [-0.2], 1.0)
  apart = path(optimizers.make(1, name='adamw', learning_rate=0.1, weight_decay=0.5), [-0.2], 1.0)
  np.testing.assert_allclose([decayed[0], apart[0]], [1 - 0.1, 1 + 0.1 - 0.1 * 0.5], rtol=1e-5)


def test_radam_is_momentum_for_five_steps_and_adaptive_from_the_sixth_on():
  """The formulas of Liu et al. (2020) with the decay of torch_optimizer's."""
  grads, lr, decay, w, expected = [1.0, -2.0, 0.5, 3.0, 0.1, -0.7, 0.2, 1.5], 0.1, 0.5, 0.7, []
  m = v = 0.0
  limit = 2 / (1 - 0.999) - 1
  for t, g in enumerate(grads, 1):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    rho = limit - 2 * t * 0.999**t / (1 - 0.999**t)
    assert (rho >= 5) == (t >= 6)
    step = m / (1 - 0.9**t)
    if t >= 6:
      shares = (rho - 4) / (limit - 4), (rho - 2) / (limit - 2), limit / rho
      step *= np.sqrt((1 - 0.999**t) * np.prod(shares)) / (np.sqrt(v) + 1e-8)
    w -= lr * decay * w + lr * step
    expected.append(w)
  tx = optimizers.make(1, name='radam', learning_rate=lr, weight_decay=decay)
  np.testing.assert_allclose(path(tx, grads, 0.7), expected, rtol=2e-4)  # Optax: rho in float32, 1999 less 1993


def test_adamax_is_pytorch_s():
  grads, w, expected = [1.0, -2.0, 0.5, 3.0], 0.7, []
  m = largest = 0.0
  for t, g in enumerate(grads, 1):
    g += 0.01 * w
    m, largest = 0.9 * m + 0.1 * g, max(0.999 * largest, abs(g) + 1e-8)
    w -= 0.1 / (1 - 0.9**t) * m / largest
    expected.append(w)
  tx = optimizers.make(1, name='adamax', learning_rate=0.1, weight_decay=0.01)
  np.testing.assert_allclose(path(tx, grads, 0.7), expected, rtol=1e-5)


@pytest.mark.parametrize('name', optimizers._OPTIMIZERS)
def test_the_head_s_factor_is_one_of_its_step_size_with_every_optimiser(name):
  settings = dict(name=name, learning_rate=0.01, weight_decay=0.5)
  plain, other = optimizers.make(1, **settings), optimizers.make(1, head_factor=10.0, **settings)
  params = {'head': {'kernel': jnp.array([2.0])}, 'body': {'head': jnp.array([3.0])}, 'inner_lr': {'head': jnp.ones(1)}}
  states = [plain.init(params), other.init(params)]
  for grad in (0.3, -0.4):
    grads = {'head': {'kernel': jnp.array([grad])}, 'body': {'head': jnp.ones(1)}, 'inner_lr': {'head': jnp.ones(1)}}
    (a, states[0]), (b, states[1]) = plain.update(grads, states[0], params), other.update(grads, states[1], params)
    np.testing.assert_allclose(b.pop('head')['kernel'], 10 * a.pop('head')['kernel'], rtol=1e-6)
    assert a == b


def test_a_factor_of_no_head_is_refused():
  tx = optimizers.make(1, head_factor=10.0)
  with pytest.raises(UserError, match="no parameter 'head', only body"):
    tx.init({'body': jnp.ones(1)})
  assert len(tx.init(jnp.ones(4)))  # task weights


@pytest.mark.parametrize('name', optimizers._OPTIMIZERS)
def test_a_plateau_s_factor_is_one_of_the_step_size_with_every_optimiser(name):
  settings = dict(name=name, learning_rate=0.01, weight_decay=0.5)
  plain, other = optimizers.make(1, **settings), optimizers.make(1, schedule='plateau', **settings)
  params, grads = jnp.array([2.0, -3.0]), jnp.array([0.3, 0.1])
  (a, _), (b, state) = (tx.update(grads, tx.init(params), params) for tx in (plain, other))
  np.testing.assert_array_equal(a, b)
  nested = optimizers.with_factor({'factor': 3, 'outer': (other.init(params), state)}, 0.25)
  assert nested['factor'] == 3
  for state in nested['outer']:
    assert state[-1].factor.dtype == np.float32
  step, after = other.update(grads, nested['outer'][0], params)
  np.testing.assert_allclose(step, a / 4, rtol=1e-6)
  assert after[-1].factor == 0.25
  assert not any(isinstance(x, optimizers.Plateau) for x in plain.init(params))


def step_sizes(updates, total_steps, **settings):
  """That of the meta-update after each of so many `updates`."""
  tx = optimizers.make(total_steps, name='sgd', **settings)
  states = (optax.tree.set(tx.init(jnp.float32(0)), count=jnp.int32(n)) for n in updates)
  return [-float(tx.update(jnp.float32(1), state, jnp.float32(0))[0]) for state in states]


def test_cosine_held_over_epochs_has_the_values_of_mamlpp():
  """100 epochs of 500 meta-updates: the first one of an epoch, the last one, and what comes after them all."""
  golden = {0: 1e-3, 1: 9.997557e-4, 2: 9.990230e-4, 50: 5.05e-4, 99: 1.024425e-5, 100: 1e-5}
  settings = dict(schedule='cosine', learning_rate=1e-3, final_rate=1e-5, hold=500)
  for within in (0, 499):
    found = step_sizes([500 * epoch + within for epoch in golden], 50_000, **settings)
    np.testing.assert_allclose(found, list(golden.values()), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize('schedule', ['cosine', 'linear'])
def test_schedules_descend_at_every_update_unless_held(schedule):
  done = np.arange(13)
  share = np.minimum(done / 10, 1)
  fall = (1 + np.cos(np.pi * share)) / 2 if schedule == 'cosine' else 1 - share
  for last in (0.0, 0.1):
    found = step_sizes(done, 10, schedule=schedule, learning_rate=0.5, final_rate=last)
    np.testing.assert_allclose(found, last + (0.5 - last) * fall, rtol=1e-6, atol=1e-8)


def test_clamp_bounds_each_entry_before_clip_and_leaves_inner_step_sizes_alone():
  grads = {'network': {'inner_lr': jnp.array([-30.0, 4.0])}, 'inner_lr': {'network': jnp.array([50.0])}}
  clamped = {'network': {'inner_lr': np.array([-10.0, 4.0])}, 'inner_lr': {'network': np.array([50.0])}}
  norm = np.sqrt(10**2 + 4**2 + 50**2)
  for clip, factor in ((0.0, 1.0), (5.0, 5 / norm)):
    tx = optimizers.make(1, name='sgd', learning_rate=1.0, clamp=10.0, clip=clip)
    steps, _ = tx.update(grads, tx.init(grads), grads)
    for group, name in (('network', 'inner_lr'), ('inner_lr', 'network')):
      np.testing.assert_allclose(steps[group][name], -factor * clamped[group][name], rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_weight_decay_leaves_inner_step_sizes_alone(name):
  params = {'network': jnp.array([2.0]), 'inner_lr': jnp.array([3.0]), 'log_inner_lr': jnp.array([-4.0])}
  tx = optimizers.make(1, name=name, learning_rate=1.0, weight_decay=0.1)
  steps, _ = tx.update({key: jnp.zeros(1) for key in params}, tx.init(params), params)
  assert {key: round(float(x[0]), 6) for key, x in steps.items()} == {'network': -0.2, 'inner_lr': 0, 'log_inner_lr': 0}


def test_only_what_is_named_is_learned_as_if_there_were_nothing_else():
  """Neither decay moves the rest nor does it count in the norm that is clipped; it has no moments either."""
  settings = dict(learning_rate=0.1, weight_decay=0.5, clip=1.0)
  params = {'scale': {'block0': jnp.array([2.0]), 'block1': jnp.array([3.0])}, 'head': jnp.array([1.0, -1.0])}
  grads = {'scale': {'block0': jnp.array([9.0]), 'block1': jnp.array([4.0])}, 'head': jnp.array([0.5, 3.0])}
  tx = optimizers.make(1, only=('block1', 'head'), **settings)
  state = tx.init(params)
  assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 3 + 1
  steps, _ = tx.update(grads, state, params)
  part = {'scale': {'block1': params['scale']['block1']}, 'head': params['head']}
  alone = optimizers.make(1, **settings)
  expected, _ = alone.update({'scale': {'block1': jnp.array([4.0])}, 'head': grads['head']}, alone.init(part), part)
  assert steps['scale']['block0'] == 0
  del steps['scale']['block0']
  jax.tree.map(np.testing.assert_array_equal, steps, expected)
  derivative = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(optimizers.held(p, ('head',)))))(params)
  assert derivative['scale'] == {'block0': 0, 'block1': 0} and derivative['head'].tolist() == [2, -2]


def test_a_part_that_there_is_not_is_refused_and_task_weights_are_learned_whatever_is_named():
  tx = optimizers.make(1, learning_rate=1.0, name='sgd', only=('block1',))
  with pytest.raises(UserError, match='only: there is no block1 among head, scale, block0'):
    tx.init({'scale': {'block0': jnp.zeros(1)}, 'head': jnp.zeros(1)})
  assert path(tx, [2.0], 1.0) == [-1.0]


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (dict(name='lamb'), 'name is one of'),
    (dict(schedule='steps'), 'go together'),
    (dict(boundaries=(5,), rates=(0.1,)), 'go together'),
    (dict(schedule='steps', boundaries=(5, 3), rates=(0.1, 0.2)), 'in order'),
    (dict(schedule='steps', boundaries=(5,), rates=()), 'a rate for each'),
    (dict(schedule='steps', boundaries=(0,), rates=(0.1,)), 'in order'),
    (dict(schedule='steps', boundaries=('a',), rates=(0.1,)), 'a rate for each'),
    (dict(name='sgd', nesterov=True), 'give momentum'),
    (dict(momentum=0.9), 'of sgd, not of adam'),
    (dict(name='sgd', momentum=1.0), 'out of range'),
    (dict(weight_decay=-1.0), 'out of range'),
    (dict(head_factor=0.0), 'head_factor = 0.0: above 0'),
    (dict(plateau_patience=3), "of schedule = 'plateau', not of 'constant'"),
    (dict(schedule='plateau', plateau_factor=1.0), 'plateau_factor = 1.0'),
    (dict(schedule='plateau', hold=5), "not of 'plateau'"),
    (dict(clamp=-1.0), 'clamp = -1.0.* out of range'),
    (dict(final_rate=1e-5), "not of 'constant'"),
    (dict(schedule='steps', boundaries=(5,), rates=(0.1,), hold=5), "not of 'steps'"),
    (dict(schedule='cosine', final_rate=-1e-5), 'final_rate = -1e-05'),
    (dict(schedule='cosine', learning_rate=0.1, final_rate=0.2), 'from 0 to learning_rate = 0.1'),
    (dict(schedule='cosine', hold=0), 'hold = 0'),
  ],
)
def test_settings_that_are_refused(settings, text):
  with pytest.raises(UserError, match=text):
    optimizers.make(10, **settings)

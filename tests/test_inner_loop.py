"""Inner-loop gradient descent: on (w - s)^2 everything is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import inner_loop
from metajax.errors import UserError

TARGET = 0.3
RATES = (0.1, 0.25, 0.7)


def loss_fn(params, step):
  del step
  value = jnp.square(params['w'] - TARGET)
  return value, value


def closed_form(w, rates):
  """The weights before every step and after the last."""
  path = [w]
  for rate in rates:
    path.append(TARGET + (1 - 2 * rate) * (path[-1] - TARGET))
  return np.array(path)


@pytest.mark.parametrize('checkpoint', [False, True])
def test_weights_and_losses_are_the_closed_form(checkpoint):
  fast, losses = inner_loop.sgd(loss_fn, {'w': jnp.float32(1.5)}, jnp.array(RATES), checkpoint=checkpoint)
  path = closed_form(1.5, RATES)
  np.testing.assert_allclose(fast['w'], path[-1], rtol=1e-6)
  np.testing.assert_allclose(losses, (path[:-1] - TARGET) ** 2, rtol=1e-5)  # each before its step


@pytest.mark.parametrize('checkpoint', [False, True])
@pytest.mark.parametrize('first_order', [False, True])
def test_derivatives_in_weights_and_rates_are_the_closed_form(first_order, checkpoint):
  def after(w, rates):
    return inner_loop.sgd(loss_fn, {'w': w}, rates, first_order=first_order, checkpoint=checkpoint)[0]['w']

  in_w, in_rates = jax.jit(jax.grad(after, (0, 1)))(jnp.float32(1.5), jnp.array(RATES))
  factors = 1 - 2 * np.array(RATES)
  gradients = 2 * (closed_form(1.5, RATES)[:-1] - TARGET)
  # The rate of step i moves the weight by -gradient_i, and the later steps scale that if they are differentiated.
  later = [1.0 if first_order else np.prod(factors[i + 1 :]) for i in range(3)]
  np.testing.assert_allclose(in_w, 1.0 if first_order else factors.prod(), rtol=1e-5)
  np.testing.assert_allclose(in_rates, -gradients * later, rtol=1e-5)


def test_a_pytree_of_weights_moves_as_under_optax_sgd():
  params = {'a': jnp.arange(3.0), 'b': (jnp.ones((2, 2)), jnp.float32(-1.0))}

  def loss_fn(params, _=None):
    return sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(params)) * jnp.sum(params['b'][0]), ()

  fast, _ = jax.jit(lambda params: inner_loop.sgd(loss_fn, params, jnp.full(4, 0.01)))(params)
  tx = optax.sgd(0.01)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss_fn, has_aux=True)(params)[0], state)
    return optax.apply_updates(params, updates), state

  expected, state = params, tx.init(params)
  for _ in range(4):
    expected, state = step(expected, state)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), fast, expected)


def test_no_steps_leave_the_weights():
  fast, losses = inner_loop.sgd(loss_fn, {'w': jnp.float32(1.5)}, jnp.zeros(0))
  assert fast['w'] == 1.5 and losses.shape == (0,)


def test_the_path_has_the_weights_after_each_step():
  start = {'w': jnp.float32(1.5)}
  fast, _, path = inner_loop.sgd(loss_fn, start, jnp.array(RATES), after=lambda w, _: w)
  assert path['w'].shape == (3,) and path['w'][-1] == fast['w']
  np.testing.assert_allclose(inner_loop.prepend(start, path)['w'], closed_form(1.5, RATES), rtol=1e-6)


def test_checkpoint_saves_memory_in_the_backward_pass():
  x = np.random.default_rng(0).standard_normal((200, 30)).astype(np.float32)

  def after(w, checkpoint):
    def loss_fn(w, _):
      return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w.T) ** 2), ()

    return inner_loop.sgd(loss_fn, w, jnp.full(10, 0.1), checkpoint=checkpoint)[0].sum()

  def memory(checkpoint):
    compiled = jax.jit(jax.grad(lambda w: after(w, checkpoint))).lower(jnp.ones((30, 40))).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(checkpoint=True) < 0.5 * memory(checkpoint=False)


@pytest.mark.parametrize('steps', [17, 20])  # with a rest after the groups, and without
def test_checkpoint_of_a_long_loop_is_the_loop_without(steps):
  rates = jnp.linspace(0.01, 0.3, steps)

  def after(w, rates, checkpoint):
    def loss_fn(w, _):
      value = jnp.sum(jnp.sin(w) ** 2)
      return value, value

    fast, losses, path = inner_loop.sgd(loss_fn, w, rates, checkpoint=checkpoint, after=lambda w, _: w)
    return jnp.sum(fast) + jnp.sum(losses) + jnp.sum(path), (fast, losses, path)

  gradient = jax.jit(jax.grad(after, (0, 1), has_aux=True), static_argnums=2)
  both = [gradient(jnp.array([0.3, -0.8]), rates, c) for c in (True, False)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *both)


def test_checkpoint_keeps_few_copies_of_the_weights_of_a_long_loop():
  size, steps = 1000, 100

  def after(w):
    return inner_loop.sgd(lambda w, _: (jnp.sum(jnp.sin(w)), ()), w, jnp.full(steps, 0.1), checkpoint=True)[0].sum()

  compiled = jax.jit(jax.grad(after)).lower(jnp.ones(size)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * steps * 4 * size


# Step sizes: of several kinds, in closed form on two independent weights.


def sum_of_squares(params, step):
  del step
  return sum(jnp.sum(jnp.square(x - TARGET)) for x in jax.tree.leaves(params)), ()


WEIGHTS = {'a': jnp.array([1.5, -0.5]), 'b': {'c': jnp.float32(2.0)}, 'out': None}


@pytest.mark.parametrize(
  ('kind', 'learned', 'a_after', 'c_after'),
  [
    # Of each weight: the factors by which its distance to the target shrinks in each of three steps.
    ('no', None, [[0.8, 0.8]] * 3, [0.8] * 3),
    ('tensor', {'a': 0.25, 'b': {'c': -0.1}}, [[0.5, 0.5]] * 3, [1.2] * 3),
    ('tensor_step', {'a': [0.25, 0.0], 'b': {'c': [0.1, -0.1]}}, [[0.5, 0.5], [1, 1], [1, 1]], [0.8, 1.2, 1.2]),
    ('element', {'a': [0.25, 0.5], 'b': {'c': 0.1}}, [[0.5, 0.0]] * 3, [0.8] * 3),
  ],
)
@pytest.mark.parametrize('positive', [False, True])
def test_step_sizes_of_every_kind_move_the_weights_as_in_closed_form(kind, learned, a_after, c_after, positive):
  """Three steps; those of each tensor and step have two rows only, and the third step uses the last again."""
  positive = positive and learned is not None
  sizes = inner_loop.step_sizes(kind, 0.1, positive=positive)
  learned = learned and jax.tree.map(jnp.array, {**learned, 'out': None}, is_leaf=lambda x: isinstance(x, list))
  if positive:
    a_after, c_after = np.abs(1 - np.array(a_after)), np.abs(1 - np.array(c_after))  # all step sizes above zero
    a_after, c_after = 1 - np.maximum(a_after, 0.02), 1 - np.maximum(c_after, 0.02)
    learned = jax.tree.map(lambda x: jnp.log(jnp.maximum(jnp.abs(x), 0.01)), learned)
  steps, rate = sizes.of_steps(learned, 3)
  fast, _ = inner_loop.sgd(sum_of_squares, WEIGHTS, steps, rate=rate)
  for x, before, factors in ((fast['a'], WEIGHTS['a'], a_after), (fast['b']['c'], WEIGHTS['b']['c'], c_after)):
    np.testing.assert_allclose(x, TARGET + np.prod(factors, axis=0) * (before - TARGET), rtol=1e-5)


@pytest.mark.parametrize(('kind', 'shape_of_a'), [('tensor', ()), ('tensor_step', (4,)), ('element', (2,))])
def test_initial_step_sizes(kind, shape_of_a):
  for positive, expected in ((False, 0.1), (True, np.log(0.1))):
    rates = inner_loop.step_sizes(kind, 0.1, positive=positive).init(jax.random.key(0), WEIGHTS, 4)
    assert jax.tree.structure(rates) == jax.tree.structure(WEIGHTS) and rates['a'].shape == shape_of_a
    np.testing.assert_allclose(np.concatenate([np.ravel(x) for x in jax.tree.leaves(rates)]), expected, rtol=1e-6)
  drawn = inner_loop.step_sizes(kind, 0.1, (0.005, 0.2)).init(jax.random.key(0), WEIGHTS, 4)
  drawn = np.concatenate([np.ravel(x) for x in jax.tree.leaves(drawn)])
  assert (drawn >= 0.005).all() and (drawn < 0.2).all() and len(set(drawn)) == drawn.size


def test_what_is_logged_of_step_sizes():
  weights = {'a': jnp.zeros(2), 'b': {'c': jnp.zeros(())}}
  metrics = inner_loop.step_sizes('element', 0.1).metrics({'a': jnp.array([0.1, 0.3]), 'b': {'c': jnp.array(-0.2)}})
  expected = {'inner_lr/a': [0.2], 'inner_lr_std/a': 0.1, 'inner_lr/b/c': [-0.2], 'inner_lr_std/b/c': 0.0}
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
  sizes = inner_loop.step_sizes('tensor_step', 0.1, positive=True)
  metrics = sizes.metrics(sizes.init(jax.random.key(0), weights, 3))
  assert metrics.keys() == {'inner_lr/a', 'inner_lr/b/c'}
  np.testing.assert_allclose(metrics['inner_lr/a'], [0.1] * 3, rtol=1e-6)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(learned='layer', inner_lr=0.1), "tensor_step, element, not 'layer'"),
    (dict(learned='no', inner_lr=0.1, positive=True), 'choose a learned_lr'),
    (dict(learned='no', inner_lr=0.1, inner_lr_range=(0.1, 0.2)), 'choose a learned_lr'),
    (dict(learned='tensor', inner_lr=0.0, positive=True), 'above 0'),
    (dict(learned='tensor', inner_lr=0.1, inner_lr_range=(0.2, 0.1)), 'low, high'),
    (dict(learned='tensor', inner_lr=0.1, inner_lr_range=(0.2,)), 'low, high'),
  ],
)
def test_step_sizes_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    inner_loop.step_sizes(**settings)


def test_rows_before_the_first_and_beyond_the_last_are_those():
  table = {'x': jnp.array([[1.0, 2.0], [3.0, 4.0]])}
  np.testing.assert_array_equal(inner_loop.rows(table, np.arange(-1, 4))['x'][:, 0], [1, 1, 3, 3, 3])
  np.testing.assert_array_equal(inner_loop.rows(table, 1)['x'], [3, 4])

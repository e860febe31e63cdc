"""Inner-loop gradient descent: on (w - s)^2 everything is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import inner_loop

TARGET = 0.3
RATES = (0.1, 0.25, 0.7)


def loss_fn(params):
  return jnp.square(params['w'] - TARGET)


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

  def loss_fn(params):
    return sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(params)) * jnp.sum(params['b'][0])

  fast, _ = jax.jit(lambda params: inner_loop.sgd(loss_fn, params, jnp.full(4, 0.01)))(params)
  tx = optax.sgd(0.01)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss_fn)(params), state)
    return optax.apply_updates(params, updates), state

  expected, state = params, tx.init(params)
  for _ in range(4):
    expected, state = step(expected, state)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), fast, expected)


def test_no_steps_leave_the_weights():
  fast, losses = inner_loop.sgd(loss_fn, {'w': jnp.float32(1.5)}, jnp.zeros(0))
  assert fast['w'] == 1.5 and losses.shape == (0,)


def test_trajectory_starts_with_the_initial_weights_and_has_one_more_than_steps():
  path = inner_loop.sgd_trajectory(loss_fn, {'w': jnp.float32(1.5)}, jnp.array(RATES))
  assert path['w'].shape == (4,) and path['w'][0] == 1.5
  np.testing.assert_allclose(path['w'], closed_form(1.5, RATES), rtol=1e-6)


def test_checkpoint_saves_memory_in_the_backward_pass():
  x = np.random.default_rng(0).standard_normal((200, 30)).astype(np.float32)

  def after(w, checkpoint):
    def loss_fn(w):
      return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w.T) ** 2)

    return inner_loop.sgd(loss_fn, w, jnp.full(10, 0.1), checkpoint=checkpoint)[0].sum()

  def memory(checkpoint):
    compiled = jax.jit(jax.grad(lambda w: after(w, checkpoint))).lower(jnp.ones((30, 40))).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(checkpoint=True) < 0.5 * memory(checkpoint=False)


@pytest.mark.parametrize('steps', [17, 20])  # with a rest after the groups, and without
def test_checkpoint_of_a_long_loop_is_the_loop_without(steps):
  rates = jnp.linspace(0.01, 0.3, steps)

  def after(w, rates, checkpoint):
    fast, losses = inner_loop.sgd(lambda w: jnp.sum(jnp.sin(w) ** 2), w, rates, checkpoint=checkpoint)
    return jnp.sum(fast) + jnp.sum(losses), (fast, losses)

  gradient = jax.jit(jax.grad(after, (0, 1), has_aux=True), static_argnums=2)
  both = [gradient(jnp.array([0.3, -0.8]), rates, c) for c in (True, False)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *both)


def test_checkpoint_keeps_few_copies_of_the_weights_of_a_long_loop():
  size, steps = 1000, 100

  def after(w):
    return inner_loop.sgd(lambda w: jnp.sum(jnp.sin(w)), w, jnp.full(steps, 0.1), checkpoint=True)[0].sum()

  compiled = jax.jit(jax.grad(after)).lower(jnp.ones(size)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * steps * 4 * size

"""Differentiable gradient descent on one task, shared by every gradient-based learner."""

import functools

import jax
import jax.numpy as jnp


def _sgd_step(loss_fn, first_order):
  def step(params, rate):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    if first_order:
      grads = jax.lax.stop_gradient(grads)
    return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss

  return step


def sgd(loss_fn, params, rates, *, first_order=False, checkpoint=False):
  """Takes SGD steps on one task's support loss, differentiable in `params` and `rates`.

  Finn et al. 2017, Algorithm 1, line 6.

  Args:
    loss_fn: params -> scalar, mean support loss.
    params: pytree of initial weights.
    rates: (steps,) step sizes; its length is the number of steps.
    first_order: drop second derivatives (FOMAML).
    checkpoint: keep only the weights between steps for the backward pass and compute the rest again: the memory of
      one step instead of all, for about a third more time. From 9 steps on the weights too are kept between groups of
      steps only, and within one group at a time: of n steps about 2 sqrt(n) copies, for one more forward pass.

  Returns:
    fast weights, a pytree like `params`; support losses (steps,), each before its step.
  """
  step = _sgd_step(loss_fn, first_order)
  if not checkpoint:
    return jax.lax.scan(step, params, rates)
  # Inside a loop nothing else could be made one with what is computed again, so there is nothing to prevent.
  take_steps = functools.partial(jax.lax.scan, jax.checkpoint(step, prevent_cse=False))
  steps = len(rates)
  if steps < 9:
    return take_steps(params, rates)
  # A rest of one step would be no loop, and XLA could compute it while it still has the memory of what follows.
  group = min((size for size in range(2, steps) if steps % size != 1), key=lambda size: steps // size + size)
  grouped = steps // group * group
  params, losses = jax.lax.scan(
    jax.checkpoint(take_steps, prevent_cse=False), params, rates[:grouped].reshape(-1, group)
  )
  params, last = take_steps(params, rates[grouped:])
  return params, jnp.concatenate([losses.reshape(-1), last])


def sgd_trajectory(loss_fn, params, rates):
  """The weights along `sgd`: a pytree like `params` with a leading axis of steps + 1, the initial weights first."""
  step = _sgd_step(loss_fn, first_order=True)

  def keep(params, rate):
    params, _ = step(params, rate)
    return params, params

  _, path = jax.lax.scan(keep, params, rates)
  return prepend(params, path)


def prepend(first, rest):
  """Puts a pytree in front of one with a leading axis."""
  return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rest)

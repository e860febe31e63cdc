"""Differentiable gradient descent on one task, shared by every gradient-based learner."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.errors import UserError


def sgd(loss_fn, params, steps, *, rate=lambda step: step, first_order=False, checkpoint=False, after=None):
  """Takes SGD steps on one task's support loss, differentiable in `params`, `steps` and whatever `rate` reads.

  Finn et al. 2017, Algorithm 1, line 6; with other step sizes for each tensor and step Antoniou et al. 2019, section 4
  (LSLR), with one for each weight Li et al. 2017 (Meta-SGD).

  Args:
    loss_fn: (params, step) -> scalar, mean support loss; and what to keep of each step, any pytree.
    params: pytree of initial weights.
    steps: pytree with a leading axis of steps: in what they differ. `loss_fn` and `rate` get a step's slice of it.
    rate: step -> step size, a scalar or a pytree like `params` whose leaves broadcast against its; by default `steps`
      are the step sizes themselves.
    first_order: drop second derivatives (FOMAML): gradients are constants, step sizes are not.
    checkpoint: keep only the weights between steps for the backward pass and compute the rest again: the memory of
      one step instead of all, for about a third more time. From 9 steps on the weights too are kept between groups of
      steps only, and within one group at a time: of n steps about 2 sqrt(n) copies, for one more forward pass.
    after: (weights after a step, step) -> what to keep of them, any pytree; None for nothing.

  Returns:
    fast weights, a pytree like `params`; what `loss_fn` kept, with a leading axis of steps; with `after` a third, what
    it returned, likewise.
  """
  gradient = jax.grad(loss_fn, has_aux=True)

  def take_step(params, step):
    grads, kept = gradient(params, step)
    if first_order:
      grads = jax.lax.stop_gradient(grads)
    rates = jax.tree.broadcast(rate(step), params)
    params = jax.tree.map(lambda p, r, g: p - jnp.asarray(r, p.dtype) * g, params, rates, grads)
    return params, (kept, after(params, step)) if after else (kept,)

  params, kept = _scan(take_step, params, steps, checkpoint)
  return params, *kept


def _scan(take_step, params, steps, checkpoint):
  if not checkpoint:
    return jax.lax.scan(take_step, params, steps)
  # Inside a loop nothing else could be made one with what is computed again, so there is nothing to prevent.
  take_steps = functools.partial(jax.lax.scan, jax.checkpoint(take_step, prevent_cse=False))
  number = len(jax.tree.leaves(steps)[0])
  if number < 9:
    return take_steps(params, steps)
  # A rest of one step would be no loop, and XLA could compute it while it still has the memory of what follows.
  group = min((size for size in range(2, number) if number % size != 1), key=lambda size: number // size + size)
  grouped = number // group * group
  groups = jax.tree.map(lambda x: x[:grouped].reshape(-1, group, *x.shape[1:]), steps)
  params, kept = jax.lax.scan(jax.checkpoint(take_steps, prevent_cse=False), params, groups)
  params, last = take_steps(params, jax.tree.map(lambda x: x[grouped:], steps))
  return params, jax.tree.map(lambda x, y: jnp.concatenate([x.reshape(-1, *x.shape[2:]), y]), kept, last)


def prepend(first, rest):
  """Puts a pytree in front of one with a leading axis."""
  return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rest)


def rows(tables, steps):
  """Of a pytree of tables (inner_steps, ...) the rows that the steps use: beyond the last its row again.

  Args:
    tables: pytree.
    steps: a number, or several (n,), from -1 on; before the first step it is the first row.

  Returns:
    a pytree of rows, with the leading axis of `steps`.
  """
  return jax.tree.map(lambda x: x[np.clip(steps, 0, len(x) - 1)], tables)


class StepSizes(NamedTuple):
  """Step sizes of the inner loop, fixed or learned."""

  init: Callable  # (rng, weights that the inner loop moves, steps) -> what is learned, a pytree like them
  of_steps: Callable  # (what is learned, steps) -> `steps` and `rate` for `sgd`
  metrics: Callable  # (what is learned,) -> {name: vector over steps}, to be logged


def step_sizes(learned, inner_lr, inner_lr_range=(), positive=False):
  """Makes step sizes.

  Args:
    learned: what has a learned step size of its own. 'no': nothing, all are `inner_lr`. 'tensor': each weight tensor.
      'tensor_step': each in each step (LSLR of MAML++, Antoniou et al. 2019, section 4). 'element': each weight
      (Meta-SGD, Li et al. 2017, equation 1). They may become negative.
    inner_lr: the initial one.
    inner_lr_range: (low, high), to draw the initial ones uniformly instead.
    positive: learn their logarithms.

  Raises:
    UserError: numbers out of range, or that do not go together.
  """
  shapes = {'tensor': lambda p, _: (), 'tensor_step': lambda p, steps: (steps,), 'element': lambda p, _: p.shape}
  if learned not in ('no', *shapes):
    raise UserError(f'learned_lr is one of no, {", ".join(shapes)}, not {learned!r}')
  if learned == 'no' and (inner_lr_range or positive):
    raise UserError('inner_lr_range and positive_lr are for learned step sizes: choose a learned_lr')
  bounds = inner_lr_range or (inner_lr, inner_lr)
  sound = len(bounds) == 2 and all(type(x) in (int, float) and math.isfinite(x) for x in bounds)
  if not sound or bounds[0] > bounds[1] or (positive and bounds[0] <= 0):
    raise UserError(
      f'inner_lr = {inner_lr}, inner_lr_range = {inner_lr_range}: the latter is (low, high), and both are above 0 '
      'with positive_lr'
    )
  low, high = bounds

  def init(rng, weights, steps):
    leaves, treedef = jax.tree.flatten(weights)
    rngs = jax.random.split(rng, len(leaves))
    rates = [
      jax.random.uniform(rng, shapes[learned](x, steps), x.dtype, minval=low, maxval=high)
      if inner_lr_range
      else jnp.full(shapes[learned](x, steps), inner_lr, x.dtype)
      for rng, x in zip(rngs, leaves, strict=True)
    ]
    return treedef.unflatten([jnp.log(rate) if positive else rate for rate in rates])

  def of_steps(rates, steps):
    if learned == 'no':
      return np.full((steps,), inner_lr), lambda step: step
    if positive:
      rates = jax.tree.map(jnp.exp, rates)
    if learned == 'tensor_step':
      return rows(rates, np.arange(steps)), lambda step: step
    return np.arange(steps), lambda step: rates

  def metrics(rates):
    result = {}
    for path, x in jax.tree.leaves_with_path(rates):
      name, x = jax.tree_util.keystr(path, simple=True, separator='/'), jnp.exp(x) if positive else x
      if learned == 'element':
        result[f'inner_lr_std/{name}'] = jnp.std(x)
        x = jnp.mean(x)
      result[f'inner_lr/{name}'] = x.reshape(-1)
    return result

  return StepSizes(init, of_steps, metrics)

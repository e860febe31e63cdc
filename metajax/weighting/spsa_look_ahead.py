"""SPSA with a perturbation pair of networks: either weighting takes a trial outer step and is judged by its losses."""

import jax.numpy as jnp

from metajax.types import TaskWeighting
from metajax.weighting import spsa


def make(
  *,
  tasks,
  gain=('constant', 1.0),
  radius=('constant', 0.1),
  space='log',
  initial=1.0,
  normalize_every=0,
  norm='l2',
):
  """The two sides of the difference are the mean query losses after an outer step with either perturbed weighting.

  Both steps are those that the outer optimiser would take, from the same weights; the episodes are the meta-batch's own
  on both sides, their tasks adapted to anew. So the weights move to where they lower the loss that counts, and not, as
  in `spsa.make`, to where a formula of the losses is small. Task i counts as 1 / w_i^2, over the mean of all tasks: a
  larger step would nearly always lower the loss of the episodes that it was taken on, so its size is not theirs to
  learn.

  After an early version of the code of Boiarov et al. (2021), which tried plain SGD steps, and weighted the losses that
  it judged by.

  Args as in `spsa.make`; a meta-update evaluates every task twice more.
  """
  rule = spsa.make_rule(form='mean', gain=gain, radius=radius, space=space, normalize_every=normalize_every, norm=norm)

  def relative(weights):
    slope = spsa.slope('mean', weights)
    return slope / jnp.mean(slope)

  def trials(state, rng):
    shift = rule.radius(state.update) * spsa.signs(rng, state.weights.shape)
    return jnp.stack([relative(rule.move(state.weights, side * shift)) for side in (1, -1)])

  def update(state, losses, classes, rng, after):
    del losses, classes
    pair = after.mean(axis=(1, 2))
    step = spsa.step_from(rule, state, pair, spsa.signs(rng, state.weights.shape))
    return spsa.finish(rule, state, step, pair)

  return TaskWeighting(
    spsa.init_slots(tasks, initial, 1), lambda state, classes: relative(state.weights), update, trials
  )

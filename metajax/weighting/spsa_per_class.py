"""MTM SPSA per class: a weight for each class of the training split instead of each place in the meta-batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metajax.errors import UserError
from metajax.types import TaskWeighting
from metajax.weighting import spsa


def make(
  *,
  num_classes,
  gain=('power', 0.25, 1 / 6),
  radius=('power', 15.0, 1 / 24),
  space='linear',
  normalize_every=0,
  norm='l2',
  update_from='last',
):
  """Every query image is weighted by its class: a task's loss is the mean of e_k / w^2 + ln w^2 over its queries k.

  An update perturbs the weight of each query by a sign of its own, and moves a class by the sum over its queries,
  divided by the number of tasks. Classes that are not among the queries stay as they are. Weights start at 1, n at 0.

  Args:
    num_classes: of the training split.
    update_from: tasks that the update takes its queries from: the 'last' of the meta-batch alone, as in the code of
      Boiarov et al. (2021), or 'all' of them.
    (others as in `spsa.make`)

  Raises:
    UserError: no classes, or see `spsa.make`.
  """
  if not num_classes:
    raise UserError('spsa_per_class needs classes: regression has none')
  return shared(
    np.arange(num_classes),
    update_from=update_from,
    gain=gain,
    radius=radius,
    space=space,
    normalize_every=normalize_every,
    norm=norm,
  )


def shared(weight_of, *, update_from, **rule):
  """As `make`, but classes may share weights: `weight_of` (classes,) says which is whose, counted from 0."""
  rule = spsa.make_rule(form='mean', **rule)
  if update_from not in ('last', 'all'):
    raise UserError(f"update_from is 'last' or 'all', not {update_from!r}")
  weights, weight_of = jnp.ones(weight_of.max() + 1), jnp.asarray(weight_of)

  def init(rng):
    del rng
    return spsa.State(jnp.int32(0), weights)

  def coefficients(state, classes):
    return 1 / jnp.square(state.weights[weight_of[classes]])

  def update(state, losses, classes, rng):
    tasks = len(losses)
    used = slice(-1, None) if update_from == 'last' else slice(None)
    rows, losses = weight_of[classes[used]], losses[used]

    def of_task(losses, weights, signs):
      value = functools.partial(rule.objective, losses=losses)
      return spsa.perturb(rule, state, value, value, signs, weights)

    steps, pairs = jax.vmap(of_task)(losses, state.weights[rows], spsa.signs(rng, rows.shape))
    step = jnp.zeros_like(state.weights).at[rows].add(steps) / tasks
    return spsa.finish(rule, state, step, pairs.mean(axis=0))

  return TaskWeighting(init, coefficients, update)

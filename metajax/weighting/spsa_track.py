"""MTM SPSA-Track: the two sides of the difference are two successive meta-updates' losses."""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from metajax.errors import UserError
from metajax.types import Array, TaskWeighting
from metajax.weighting import spsa


class State(NamedTuple):
  update: Array  # () int32, n of the next update
  weights: Array  # (tasks,)
  before: Array  # (tasks,), losses of the update before, by place in the meta-batch
  known: Array  # () bool, whether there was one


def make(
  *,
  tasks,
  form='mean',
  gain=('power', 0.25, 1 / 6),
  radius=('power', 15.0, 1 / 24),
  space='linear',
  initial=0.0,
  first=0,
  normalize_every=0,
  norm='l2',
  restart_every=0,
):
  """MTM SPSA-Track: the plus side sees the losses of the meta-update before, the minus side those of this one.

  Where there is none before, both sides see this one's, as in `spsa.make`.

  Args:
    restart_every: forget the losses before every so-manieth update, as an epoch's start did for prototypical networks.
    (others as in `spsa.make`)

  Raises:
    UserError: see `spsa.make`.
  """
  rule = spsa.make_rule(form=form, gain=gain, radius=radius, space=space, normalize_every=normalize_every, norm=norm)
  init_slots = spsa.init_slots(tasks, initial, first)
  if restart_every < 0:
    raise UserError(f'restart_every = {restart_every}: it cannot be negative')

  def init(rng):
    return State(*init_slots(rng), before=jnp.zeros(tasks), known=jnp.bool(False))

  def update(state, losses, classes, rng):
    del classes
    losses = losses.mean(axis=1)
    before = jnp.where(state.known, state.before, losses)
    step, pair = spsa.perturb(
      rule,
      state,
      functools.partial(rule.objective, losses=before),
      functools.partial(rule.objective, losses=losses),
      spsa.signs(rng, state.weights.shape),
    )
    done = state.update - first + 1
    known = (done % restart_every != 0) if restart_every else jnp.bool(True)
    return spsa.finish(rule, state._replace(before=losses, known=known), step, pair)

  return TaskWeighting(init, lambda state, classes: spsa.slope(form, state.weights), update)

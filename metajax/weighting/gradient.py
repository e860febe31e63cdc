"""Task weights by gradient descent: MTM Backprop and MTM Inner First-Order (Boiarov et al. 2021)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax.errors import UserError
from metajax.types import Array, TaskWeighting
from metajax.weighting import spsa


class State(NamedTuple):
  weights: Array  # (tasks,)
  outer: Any  # states of the two optimisers
  own: Any


def make(*, tasks, tx, optimizer='outer', learning_rate=1e-3, form='mean', linear=False, initial=1.0, original=False):
  """The weights descend the multi-task loss of `spsa.make`, whose gradient in them is known: nothing is perturbed.

  Its gradient is taken at the losses as they are; it does not pass through a meta-update.

  Args:
    tasks: places of a meta-batch.
    tx: the outer optimiser.
    optimizer: what moves the weights: 'outer', the outer optimiser with all its settings (Backprop; `clip` knows the
      norm of their gradient alone), or 'adam', an Adam of their own (Inner First-Order).
    learning_rate: of that Adam.
    form: 'mean' over the tasks or 'sum'.
    linear: w L in place of L / w^2 + ln w^2; then all weights fall, and become negative.
    initial: first value of the weights.
    original: do what the code of Boiarov et al. did for MAML, by a mistake: with 'outer' the weights never move, with
      'adam' the outer optimiser moves them first and their own then, by the same gradient.

  Raises:
    UserError: an unknown optimiser or form.
  """
  if optimizer not in ('outer', 'adam'):
    raise UserError(f'optimizer is outer or adam, not {optimizer!r}')
  if initial <= 0 or learning_rate <= 0:
    raise UserError(f'initial = {initial}, learning_rate = {learning_rate}: above 0 is needed')
  uncertainty = spsa.objective(form)
  by_outer = (optimizer == 'outer') != original
  by_own = optimizer == 'adam'
  own_tx = optax.adam(learning_rate)

  def value(weights, losses):
    if linear:
      return (jnp.mean if form == 'mean' else jnp.sum)(weights * losses)
    return uncertainty(weights, losses)

  def init(rng):
    del rng
    weights = jnp.full(tasks, initial, float)
    return State(weights, tx.init(weights) if by_outer else (), own_tx.init(weights) if by_own else ())

  def coefficients(state, classes):
    del classes
    if linear:
      return state.weights * (tasks if form == 'sum' else 1)
    return spsa.slope(form, state.weights)

  def update(state, losses, classes, rng):
    del classes, rng
    weights, outer, own = state
    grad = jax.grad(value)(weights, losses.mean(axis=1))
    if by_outer:
      step, outer = tx.update(grad, outer, weights)
      weights = optax.apply_updates(weights, step)
    if by_own:
      step, own = own_tx.update(grad, own, weights)
      weights = optax.apply_updates(weights, step)
    return State(weights, outer, own), {'weights': weights}

  return TaskWeighting(init, coefficients, update)

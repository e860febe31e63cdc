"""Tilted empirical risk minimisation (Li et al., ICLR 2021): tasks with a high loss count more, or less."""

import jax
import jax.numpy as jnp

from metajax.types import TaskWeighting


def make(*, tasks, tilt=1.0):
  """The outer loss is log(mean(exp(t L_i))) / t over the tasks of a meta-batch (equation 2).

  Its gradient is that of the sum of softmax(t L)_i L_i with the softmax as constants (lemma 1), which is what the
  coefficients are. They depend on the losses of the same meta-update, so each costs one more forward pass.

  Args:
    tasks: in a meta-batch.
    tilt: t; above 0 the hardest tasks count most (their maximum, as it grows), below 0 the easiest, at 0 all the same.
  """

  def from_losses(state, losses, classes):
    del state, classes
    return tasks * jax.nn.softmax(tilt * jnp.mean(losses, axis=1))

  def update(state, losses, classes, rng):
    del rng
    return state, {'weights': from_losses(state, losses, classes)}

  return TaskWeighting(lambda rng: {}, None, update, from_losses=from_losses)

"""What a task minimises and what is reported of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.errors import UserError


class Objective(NamedTuple):
  """A task's loss, in nats or squared units, and the metrics that go with it."""

  losses: Callable  # (outputs (n, ...), targets (n, ...)) -> (n,)
  metrics: Callable  # (outputs, targets) -> {name: (n,)}


def _squared_errors(outputs, targets):
  if outputs.shape != targets.shape:  # else they would be broadcast, and every example would learn all targets
    raise UserError(
      f'regression: the outputs are {outputs.shape}, but the targets {targets.shape}; give targets the shape of the '
      'outputs, such as (n, 1)'
    )
  return jnp.mean(jnp.square(outputs - targets), axis=-1)


def check_labels(labels, shape, way):
  """Looks whether labels are integers from 0 to way - 1.

  Args:
    labels: concrete or traced.
    shape: the one that they must have.
    way: classes.

  Returns:
    factors of that shape, 1 or, for a traced label that is out of range, NaN: multiply by them what must not look
    sound then. A `where` would not do, since the derivatives of its other branch are finite.

  Raises:
    UserError: labels of another shape or type, or concrete ones that are out of range.
  """
  dtype = jnp.result_type(labels)
  if jnp.shape(labels) != tuple(shape) or not jnp.issubdtype(dtype, jnp.integer):
    raise UserError(
      f'classification: labels are {dtype} {jnp.shape(labels)}; integers {tuple(shape)} from 0 to {way - 1} are needed'
    )
  if not isinstance(labels, jax.core.Tracer):
    found = np.asarray(labels)
    if found.size and (found.min() < 0 or found.max() >= way):
      raise UserError(
        f'classification: labels are {found.min()} to {found.max()}; they must be 0 to {way - 1}, a number for each '
        'class of the task'
      )
    return jnp.ones(shape)
  return jnp.where((labels >= 0) & (labels < way), 1.0, jnp.nan)


def _cross_entropies(logits, labels):
  factors = check_labels(labels, logits.shape[:-1], logits.shape[-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels) * factors.astype(logits.dtype)


def _accuracy(logits, targets):
  return {'accuracy': (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)}


CLASSIFICATION = Objective(_cross_entropies, _accuracy)
REGRESSION = Objective(_squared_errors, lambda outputs, targets: {})

"""What a task minimises and what is reported of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
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


def _accuracy(logits, targets):
  return {'accuracy': (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)}


CLASSIFICATION = Objective(optax.softmax_cross_entropy_with_integer_labels, _accuracy)
REGRESSION = Objective(_squared_errors, lambda outputs, targets: {})

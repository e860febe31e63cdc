"""The outer optimiser against plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from metajax import optimizers
from metajax.errors import UserError


def path(tx, grads, weight):
  """The weight after each gradient."""
  state, seen = tx.init(jnp.float32(weight)), []
  for grad in grads:
    step, state = tx.update(jnp.float32(grad), state, jnp.float32(weight))
    weight = float(weight + step)
    seen.append(weight)
  return seen


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_with_momentum_weight_decay_and_steps_is_pytorch_s(nesterov):
  grads, w, expected, buffer = [1.0, -2.0, 0.5, 3.0], 0.7, [], 0.0
  for k, g in enumerate(grads):
    g += 0.01 * w  # decay belongs to the gradient, before momentum
    buffer = 0.9 * buffer + g
    w -= (0.1, 0.1, 0.02, 0.004)[k] * (g + 0.9 * buffer if nesterov else buffer)
    expected.append(w)
  tx = optimizers.make(
    10,
    name='sgd',
    learning_rate=0.1,
    schedule='steps',
    boundaries=(2, 3),
    rates=(0.02, 0.004),
    momentum=0.9,
    nesterov=nesterov,
    weight_decay=0.01,
  )
  np.testing.assert_allclose(path(tx, grads, 0.7), expected, rtol=1e-5)


def test_weight_decay_of_adam_is_part_of_the_gradient_and_of_adamw_is_not():
  """The first step of an Adam is its step size against the gradient's sign, here that of the decay."""
  decayed = path(optimizers.make(1, name='adam', learning_rate=0.1, weight_decay=0.5), [-0.2], 1.0)
  apart = path(optimizers.make(1, name='adamw', learning_rate=0.1, weight_decay=0.5), [-0.2], 1.0)
  np.testing.assert_allclose([decayed[0], apart[0]], [1 - 0.1, 1 + 0.1 - 0.1 * 0.5], rtol=1e-5)


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (dict(name='lamb'), 'name is one of'),
    (dict(schedule='steps'), 'go together'),
    (dict(boundaries=(5,), rates=(0.1,)), 'go together'),
    (dict(schedule='steps', boundaries=(5, 3), rates=(0.1, 0.2)), 'in order'),
    (dict(schedule='steps', boundaries=(5,), rates=()), 'a rate for each'),
    (dict(schedule='steps', boundaries=(0,), rates=(0.1,)), 'in order'),
    (dict(schedule='steps', boundaries=('a',), rates=(0.1,)), 'a rate for each'),
    (dict(name='sgd', nesterov=True), 'give momentum'),
    (dict(momentum=0.9), 'of sgd, not of adam'),
    (dict(name='sgd', momentum=1.0), 'out of range'),
    (dict(weight_decay=-1.0), 'out of range'),
  ],
)
def test_settings_that_are_refused(settings, text):
  with pytest.raises(UserError, match=text):
    optimizers.make(10, **settings)

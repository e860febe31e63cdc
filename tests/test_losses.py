"""Objectives: what a task minimises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import losses
from metajax.errors import UserError


def test_regression_is_the_mean_of_squared_errors_over_the_values_of_each_example():
  outputs, targets = np.random.default_rng(0).normal(size=(2, 5, 3))
  expected = [np.mean((o - t) ** 2) for o, t in zip(outputs, targets, strict=True)]
  np.testing.assert_allclose(losses.REGRESSION.losses(outputs, targets), expected, rtol=1e-6)


@pytest.mark.parametrize(
  ('outputs', 'targets'), [((3, 1), (3,)), ((3, 2), (3, 1)), ((3, 1), (3, 2)), ((3, 1), (1, 1)), ((3,), (3, 1))]
)
def test_targets_of_another_shape_are_refused_and_not_broadcast(outputs, targets):
  for run in (lambda f, *args: f(*args), jax.eval_shape):
    with pytest.raises(UserError) as error:
      run(losses.REGRESSION.losses, jnp.zeros(outputs), jnp.zeros(targets))
    assert str(outputs) in str(error.value) and str(targets) in str(error.value)

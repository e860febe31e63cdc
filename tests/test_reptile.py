"""Reptile against NumPy on linear regression: its gradient is params minus fast weights."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import losses
from metajax.algorithms import reptile
from metajax.models import mlp
from metajax.types import Episode, Examples

RNG = jax.random.key(0)


@pytest.fixture(scope='module')
def problem():
  """A linear model, its initial weights, and an episode of 4 support and 3 query points."""
  draw = np.random.default_rng(0).standard_normal
  model = mlp.make(2, hidden=())
  params = {'head': {'kernel': np.float32(draw((3, 2))), 'bias': np.float32(draw(2))}}
  x, y = np.float32(draw((7, 3))), np.float32(draw((7, 2)))
  return model, params, Episode(Examples(x[:4], y[:4]), Examples(x[4:], y[4:]), np.zeros(0, np.int32))


def make(model, **settings):
  return reptile.make(model, objective=losses.REGRESSION, inner_lr=0.05, **settings)


def fit(params, x, y, steps):
  """The linear model's weights along `steps` steps of Adam without momentum, on all points in every step."""
  w, b = np.float64(params['head']['kernel']), np.float64(params['head']['bias'])
  squares, path = [0.0, 0.0], [(w, b)]
  for t in range(1, steps + 1):
    residuals = 2 * (x @ w + b - y) / y.size  # the loss is the mean over examples and outputs
    grads = x.T @ residuals, residuals.sum(0)
    squares = [0.999 * v + 0.001 * g**2 for v, g in zip(squares, grads, strict=True)]
    moves = [0.05 * g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) for v, g in zip(squares, grads, strict=True)]
    w, b = w - moves[0], b - moves[1]
    path.append((w, b))
  return path


def test_gradient_is_params_minus_fast_weights_and_value_the_query_loss(problem):
  model, params, episode = problem
  loss = make(model, inner_steps=4, inner_batch=7).loss
  (value, (model_state, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, {}, episode, RNG)
  x, y = (np.concatenate(pair) for pair in zip(episode.support, episode.query, strict=True))
  w, b = fit(params, x, y, steps=4)[-1]
  np.testing.assert_allclose(grads['head']['kernel'], params['head']['kernel'] - w, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(grads['head']['bias'], params['head']['bias'] - b, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(value, np.mean((episode.query.inputs @ w + b - episode.query.targets) ** 2), rtol=1e-5)
  assert model_state == {}


def test_adapts_to_the_support_set_alone_and_keeps_the_way_there(problem):
  model, params, episode = problem
  learner = make(model, inner_steps=30, inner_batch=10)
  path = fit(params, *episode.support, steps=30)
  adapted = jax.jit(learner.adapt)(params, {}, episode.support, RNG)
  np.testing.assert_allclose(adapted.params['head']['kernel'], path[-1][0], rtol=1e-3, atol=1e-5)
  outputs = learner.predict(params, {}, adapted, episode.query.inputs)
  np.testing.assert_allclose(outputs, episode.query.inputs @ path[-1][0] + path[-1][1], rtol=1e-3, atol=1e-4)

  trajectory = jax.jit(learner.trajectory)(params, {}, episode.support, RNG).params['head']['bias']
  np.testing.assert_allclose(trajectory, [b for _, b in path], rtol=1e-3, atol=1e-5)
  np.testing.assert_array_equal(trajectory[0], params['head']['bias'])
  errors = [np.mean((episode.support.inputs @ w + b - episode.support.targets) ** 2) for w, b in path]
  assert errors[-1] < 0.5 * errors[0]


class Constant(nn.Module):
  """One weight, whatever the input."""

  @nn.compact
  def __call__(self, x):
    return jnp.broadcast_to(self.param('w', nn.initializers.zeros, (1,)), (x.shape[0], 1))


def test_an_inner_batch_holds_each_example_at_most_once_and_changes_between_steps():
  targets = jnp.array([[1.0], [4.0], [10.0], [100.0]])
  learner = reptile.make(Constant(), objective=losses.REGRESSION, inner_lr=1e-6, inner_steps=2, inner_batch=2)
  adapt = jax.jit(jax.vmap(lambda rng: learner.adapt({'w': jnp.zeros(1)}, {}, Examples(targets, targets), rng)))
  second = adapt(jax.random.split(RNG, 100)).params['w'][:, 0] / 1e-6 - 1  # the first step of Adam is the rate itself
  # Its second step tells how the gradients of both relate: as the sums of the targets they saw.
  sums = [a + b for a, b in itertools.combinations((1, 4, 10, 100), 2)]
  possible = [g2 / np.sqrt((0.999 * g1**2 + g2**2) / 1.999) for g1 in sums for g2 in sums]
  distances = np.abs(np.array(second)[:, None] - possible)
  assert distances.min(axis=1).max() < 1e-3
  assert len(np.unique(distances.argmin(axis=1))) > 20  # of 36


@pytest.mark.parametrize('mode', ['running', 'none'])
def test_refuses_batch_norm_modes_that_it_does_not_have(mode):
  with pytest.raises(ValueError, match='batch_norm'):
    reptile.make(Constant(), batch_norm=mode)

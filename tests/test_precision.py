"""Under `jax_enable_x64` all that a learner computes has the precision of its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from metajax import heads, inner_loop
from metajax.algorithms import maml, meta_sgd, protonet
from metajax.models import mlp
from metajax.types import Episode, Examples
from metajax.weighting import gradient, sin, spsa

RNG = np.random.default_rng(0)
FEATURES, LABELS = RNG.normal(size=(30, 6)), np.arange(30) % 3


@pytest.fixture
def double():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize('learned', ['no', 'tensor', 'tensor_step', 'element'])
def test_inner_steps_are_those_of_numpy(double, learned):
  """Of the loss |w - 1|^2 / 2 three steps of 0.1 leave 0.9^3 of the distance."""
  rates = inner_loop.step_sizes(learned, 0.1)
  params = {'w': jnp.float64([3.0, -2.0])}
  table = rates.init(jax.random.key(0), params, 3) if learned != 'no' else None
  steps, rate = rates.of_steps(table, 3)
  fast, _ = inner_loop.sgd(lambda p, _: (jnp.sum((p['w'] - 1) ** 2) / 2, ()), params, steps, rate=rate)
  assert fast['w'].dtype == jnp.float64
  np.testing.assert_allclose(fast['w'], 1 + (np.array([3.0, -2.0]) - 1) * 0.9**3, rtol=1e-14)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(
  'make',
  [
    lambda network: maml.make(network, inner_steps=2, inner_lr=0.1, multi_step_epochs=3, epoch=2),
    lambda network: meta_sgd.make(network, inner_steps=2),
    lambda network: protonet.make(network, way=3),
  ],
  ids=['multi-step', 'meta_sgd', 'protonet'],
)
def test_losses_and_gradients_keep_the_precision_of_weights_and_inputs(double, dtype, make):
  learner = make(mlp.make(3, hidden=(4,)))
  params, state = learner.init(jax.random.key(0), jnp.zeros((1, 6), dtype))
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  examples = Examples(jnp.asarray(FEATURES, dtype), jnp.asarray(LABELS))
  episode = Episode(examples, examples, jnp.arange(3))
  loss = learner.phases[0].loss if learner.phases else lambda *args: learner.loss(*args[:-1])
  grads, losses = jax.grad(lambda p: (lambda x: (x.mean(), x))(loss(p, state, episode, None, 1)[0]), has_aux=True)(
    params
  )
  assert losses.dtype == dtype
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_importance_is_that_of_numpy(double):
  last = 1 / 5 + 3 * 4 / (5 * 100)
  rest = 1 / 5 - 3 / (5 * 100)
  np.testing.assert_allclose(maml.importance(3, 5, 100), [rest] * 4 + [last], rtol=1e-15)


def test_heads_equal_scikit_learn(double):
  ridge = heads.make('ridge', c=0.7, normalize=False).fit(FEATURES, LABELS, 3)
  expected = Ridge(1 / 0.7, solver='cholesky').fit(FEATURES, np.eye(3)[LABELS])
  np.testing.assert_allclose(ridge.kernel, expected.coef_.T, rtol=1e-10, atol=1e-13)
  logistic = heads.make('logistic_regression', c=0.7, normalize=False).fit(FEATURES, LABELS, 3)
  expected = LogisticRegression(C=0.7, tol=1e-12, solver='newton-cg', max_iter=1000).fit(FEATURES, LABELS)
  np.testing.assert_allclose(logistic.kernel, expected.coef_.T, atol=1e-8)
  for name in ('prototype', 'cosine'):
    linear = heads.make(name, normalize=False).fit(FEATURES, LABELS, 3)
    means = np.stack([FEATURES[k::3].mean(0) for k in range(3)])
    assert linear.kernel.dtype == linear.bias.dtype == jnp.float64
    if name == 'prototype':
      np.testing.assert_allclose(linear.kernel, 2 * means.T, rtol=1e-14)
  assert heads.make('ridge').fit(np.float32(FEATURES), LABELS, 3).kernel.dtype == jnp.float32


def test_weightings_are_those_of_numpy(double):
  made = spsa.make(tasks=3)
  np.testing.assert_allclose(made.coefficients(made.init(None), np.zeros((3, 1))), [9.0] * 3, rtol=1e-15)
  made = sin.make(tasks=3)
  expected = np.sin((np.arange(3) + 0.5) * np.pi / 3) + 0.9
  np.testing.assert_allclose(made.coefficients(made.init(None), None), expected, rtol=1e-15)
  assert gradient.make(tasks=3, tx=None, optimizer='adam').init(None).weights.dtype == jnp.float64

"""Heads: the same problems as scikit-learn solves, the formulas in NumPy, and what has no unique or finite answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from metajax import heads
from metajax.errors import UserError

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def draw(tasks, counts, d, query=40, seed=0):
  """Unit-norm features of tasks whose classes overlap: support (tasks, n, d), targets (tasks, n), queries."""
  rng = np.random.default_rng(seed)
  means = rng.standard_normal((tasks, len(counts), d)) * 2 * d**-0.5 + 0.3
  of_class = np.repeat(np.arange(len(counts)), counts)
  support = means[:, of_class] + rng.standard_normal((tasks, len(of_class), d))
  queries = means[:, np.arange(query) % len(counts)] + rng.standard_normal((tasks, query, d))
  targets = np.broadcast_to(of_class, (tasks, len(of_class))).astype(np.int32)
  return unit(support), targets, unit(queries)


def unit(x):
  return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def fitted(head, support, targets, queries):
  """What it fits to each of several tasks, and its logits."""
  way = int(targets.max()) + 1

  def one(x, y, q):
    linear = head.fit(x, y, way)
    return linear, head.outputs(linear, q)

  return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(support, targets, queries))


def objective(kernel, bias, x, targets, c):
  """Of logistic regression in float64, and its gradient by kernel and bias."""
  kernel, bias, x = (np.float64(value) for value in (kernel, bias, x))
  logits = x @ kernel + bias
  logits -= logits.max(axis=1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  labels = np.eye(len(bias))[targets]
  rest = c * (np.exp(log_p) - labels)
  return 0.5 * (kernel**2).sum() - c * (labels * log_p).sum(), kernel + x.T @ rest, rest.sum(axis=0)


@pytest.mark.parametrize(
  ('counts', 'd', 'c'),
  [
    ((1,) * 5, 64, 0.1),
    ((1,) * 5, 64, 100.0),
    ((5,) * 5, 640, 1.0),
    ((5,) * 20, 64, 3.0),
    ((2, 9, 13), 6, 100.0),  # more examples than features, not separable
    ((20, 3, 9), 40, 100.0),
    ((1, 2, 40), 2, 1e3),  # rank 2 of 43
  ],
)
def test_logistic_regression_is_that_of_scikit_learn(counts, d, c):
  support, targets, queries = draw(2, counts, d)
  linear, logits = fitted(heads.make('logistic_regression', c=c), support, targets, queries)
  for x, y, q, kernel, bias, outputs in zip(support, targets, queries, *linear, logits, strict=True):
    reference = LogisticRegression(C=c, tol=1e-8, max_iter=10000).fit(np.float64(x), y)
    assert (outputs.argmax(axis=1) == reference.predict(q)).all()
    value, *gradients = objective(kernel, bias, x, y, c)
    assert value <= (1 + 1e-5) * objective(reference.coef_.T, reference.intercept_, x, y, c)[0]
    # What float32 tells of the objective near its minimum depends on the order in which XLA adds.
    assert max(np.linalg.norm(g) for g in gradients) < 2e-4 * c * len(x) ** 0.5


def test_logistic_regression_of_features_of_very_different_sizes():
  """Where Newton's method goes far astray by whole steps alone, in some of these tasks."""
  rng = np.random.default_rng(0)
  support = np.float32(rng.standard_cauchy((60, 12, 4)).clip(-30, 30))
  targets = np.int32(rng.integers(3, size=(60, 12)))
  targets[:, :3] = np.arange(3)
  linear, _ = fitted(heads.make('logistic_regression', c=100.0, normalize=False), support, targets, support[:, :1])
  for x, y, kernel, bias in zip(support, targets, *linear, strict=True):
    reference = LogisticRegression(C=100.0, tol=1e-8, max_iter=10000).fit(np.float64(x), y)
    best = objective(reference.coef_.T, reference.intercept_, x, y, 100.0)[0]
    assert objective(kernel, bias, x, y, 100.0)[0] <= (1 + 1e-3) * best  # of features of up to 30, in float32


def test_two_classes_are_those_of_scikit_learn_with_twice_c():
  support, targets, queries = draw(2, (4, 6), 16)
  linear, logits = fitted(heads.make('logistic_regression', c=1.5), support, targets, queries)
  for x, y, q, kernel, bias, outputs in zip(support, targets, queries, *linear, logits, strict=True):
    reference = LogisticRegression(C=3.0, tol=1e-8).fit(np.float64(x), y)
    close(kernel[:, 1] - kernel[:, 0], reference.coef_[0], atol=1e-4)
    close(bias[1] - bias[0], reference.intercept_[0], atol=1e-4)
    assert (outputs.argmax(axis=1) == reference.predict(q)).all()


@pytest.mark.parametrize(('counts', 'd', 'c'), [((1,) * 5, 64, 1.0), ((2, 9, 13), 6, 100.0)])
def test_ridge_is_that_of_scikit_learn(counts, d, c):
  support, targets, queries = draw(2, counts, d)
  _, logits = fitted(heads.make('ridge', c=c), support, targets, queries)
  for x, y, q, outputs in zip(support, targets, queries, logits, strict=True):
    reference = Ridge(alpha=1 / c).fit(np.float64(x), np.eye(len(counts))[y])
    close(outputs, reference.predict(q), atol=1e-4)


@pytest.mark.parametrize('normalize', [True, False])
def test_prototypes_are_the_nearest(normalize):
  support, targets, queries = draw(2, (2, 3, 4), 8)
  lengths = np.random.default_rng(1).uniform(0.5, 2, (2, 9, 1)).astype(np.float32)
  _, logits = fitted(heads.make('prototype', normalize=normalize), lengths * support, targets, 3 * queries)
  for x, y, q, outputs in zip(support if normalize else lengths * support, targets, queries, logits, strict=True):
    q = q if normalize else 3 * q
    means = np.stack([x[y == k].mean(axis=0) for k in range(3)])
    distances = ((q[:, None] - means) ** 2).sum(axis=-1)
    close(outputs - outputs[:, :1], distances[:, :1] - distances, atol=1e-5)


@pytest.mark.parametrize('normalize', [True, False])
def test_cosines_to_the_class_means(normalize):
  support, targets, queries = draw(1, (2, 3, 4), 8)
  lengths = np.random.default_rng(1).uniform(0.5, 2, (1, 9, 1)).astype(np.float32)
  _, logits = fitted(heads.make('cosine', normalize=normalize), lengths * support, targets, 3 * queries)
  means = unit(np.stack([support[0][targets[0] == k].mean(axis=0) for k in range(3)]))
  close(logits[0], queries[0] @ means.T)


def test_features_of_length_1_are_divided_and_have_derivatives_of_zeros_too():
  x = np.float32([[3, 4], [0, 0], [1e-9, 0]])
  close(heads.unit(x), [[0.6, 0.8], [0, 0], [1, 0]])
  derivative = jax.grad(lambda x: jnp.sum(heads.unit(jax.nn.relu(x)) ** 2 + heads.unit(x)))(x)
  assert np.isfinite(derivative).all()
  close(derivative[0], [(1 * 16 - 12) / 125, (9 - 12) / 125])


def test_under_vmap_as_one_by_one():
  support, targets, queries = draw(3, (3, 3, 3), 12)
  support[0] = 0  # done at once, while the others go on
  support[1] *= np.where(targets[1] == 0, 5, 1)[:, None]
  head = heads.make('logistic_regression', c=10.0, normalize=False)
  together, logits = fitted(head, support, targets, queries)
  alone = jax.jit(head.fit, static_argnums=2)
  for k in range(3):
    linear = alone(support[k], targets[k], 3)
    close(linear.kernel, together.kernel[k], rtol=1e-4, atol=1e-4)
    close(linear.bias, together.bias[k], rtol=1e-4, atol=1e-4)
    close(logits[k], heads.outputs(linear, queries[k]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', ['logistic_regression', 'ridge', 'prototype', 'cosine'])
def test_features_that_say_little_or_too_much(name):
  support, targets, queries = draw(6, (1, 3, 4), 16)
  support[0] = 0
  support[1] = support[1, :1]  # one image, of all classes
  support[2, 4:] = support[2, :4]  # each image twice, some of two classes
  support[3] = np.eye(16)[targets[3]]  # separable, with nothing else
  support[4, 2:] = 0
  queries[4] = 0
  for c, normalize, length in ((1e4, True, 1), (1e8 if name == 'ridge' else 1e4, False, 30), (1e-3, True, 1)):
    head = heads.make(name, c=c, normalize=normalize)
    linear, logits = fitted(head, length * support, targets, queries)
    assert all(np.isfinite(x).all() for x in (*linear, logits))
    if name == 'logistic_regression':
      # Where nothing is known, the bias alone gives the classes' shares.
      close(jax.nn.softmax(logits[0]), np.broadcast_to([1 / 8, 3 / 8, 4 / 8], logits[0].shape), rtol=2e-3)
    if c > 1:
      own = head.outputs(heads.Linear(linear.kernel[3], linear.bias[3]), length * support[3])
      assert (own.argmax(axis=1) == targets[3]).all()


def test_conjugate_gradients_end_where_it_is_flat():
  target = np.ones((2, 3, 2), np.float32)
  solution = heads._conjugate_gradients(lambda vector, image: 0 * vector, lambda x: jnp.stack([x, x]), target)
  assert (solution == 0).all()


@pytest.mark.parametrize(
  ('name', 'settings', 'text'),
  [
    ('svm', {}, "a head is one of logistic_regression, ridge, prototype, cosine, not 'svm'"),
    ('ridge', dict(c=0.0), 'c = 0.0 of a head: a number above 0 is needed'),
    ('logistic_regression', dict(c=float('nan')), 'c = nan'),
  ],
)
def test_settings_that_are_refused(name, settings, text):
  with pytest.raises(UserError, match=text):
    heads.make(name, **settings)

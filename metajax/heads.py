"""Linear heads that are fitted to a task's embedded support images, whatever embeds them.

Functions of ONE task, to be mapped over tasks by the caller, in the precision of the features, at least float32. They
are for evaluation: a fit is not meant to be differentiated. Every class has a support image.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax import losses
from metajax.algorithms import protonet
from metajax.errors import UserError
from metajax.types import Array

_NEWTON_STEPS, _CG_STEPS = 30, 50  # at most
# Newton's method stops at this norm of the gradient, over c times that of all features and a 1 for each bias; conjugate
# gradients stop at that share of the norm they began with. The precision still tells both, multiplied, from rounding.
_TOLERANCE, _FORCING = {4: 1e-5, 8: 1e-12}, 0.1  # by bytes of a number
_ROUNDING = {4: 1e-6, 8: 1e-14}  # share of a value
_STEP_SIZES = np.float32([*0.25 ** np.arange(5), 0])  # from 0 on none is taken that makes things worse


WITH_C = ('logistic_regression', 'ridge')  # the others have no c


class Linear(NamedTuple):
  """A fitted head."""

  kernel: Array  # (d, way)
  bias: Array  # (way,)


class Head(NamedTuple):
  """How a head is fitted and used."""

  fit: Callable  # (features (n, d), targets (n,) int in [0, way), way) -> Linear; NaN where a traced target is not
  outputs: Callable  # (linear, features (n, d)) -> logits (n, way)


def make(name, *, c=1.0, normalize=True):
  """Makes a head, with kernel A and bias b.

  Args:
    name: 'logistic_regression': minimises `|A|^2 / 2` + c * the sum of cross-entropies in nats, as scikit-learn's
      LogisticRegression(C=c) does from 3 classes on; of 2 classes, which it gives one logit instead of two, as with
      C=2c. RFS (Tian et al. 2020) has c = 1, joint multi-task training (Wang et al. 2021) c = 3.
      'ridge': minimises `|A|^2 / 2` + c / 2 * the sum of squared errors to one-hot targets, as Ridge(1 / c).
      'prototype': logits `2 x.m - |m|^2` with class means m; their softmax is that of minus squared distances.
      'cosine': cosines between features and the means of normalised features, between -1 and 1.
    c: how much the examples count beside the penalty, which b is free of; the last two have none.
    normalize: scale features to length 1 before all else, as 'cosine' always does. Zeros stay zeros.

  Raises:
    UserError: an unknown name; c is not above 0.
  """
  fits = {
    'logistic_regression': functools.partial(_logistic_regression, c=c),
    'ridge': functools.partial(_ridge, c=c),
    'prototype': _prototype,
    'cosine': _cosine,
  }
  if name not in fits:
    raise UserError(f'a head is one of {", ".join(fits)}, not {name!r}')
  if not 0 < c < np.inf:
    raise UserError(f'c = {c} of a head: a number above 0 is needed')

  def scaled(features):
    features = jnp.asarray(features)
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    return unit(features) if normalize or name == 'cosine' else features

  def fit(features, targets, way):
    factor = jnp.min(losses.check_labels(targets, jnp.shape(features)[:1], way))
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), fits[name](scaled(features), targets, way))

  return Head(
    fit=fit,
    outputs=lambda linear, features: outputs(linear, scaled(features)),
  )


def outputs(linear, features):
  """Logits (n, way) of features (n, d)."""
  return _product(features, linear.kernel) + linear.bias


_product = functools.partial(jnp.matmul, precision='highest')


def unit(x):
  """x (..., d) at length 1; zeros stay zeros, and have derivatives."""
  return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _prototype(features, targets, way):
  means = protonet.prototypes(features, targets, way)
  return Linear(2 * means.T, -jnp.sum(jnp.square(means), axis=-1))


def _cosine(features, targets, way):
  return Linear(unit(protonet.prototypes(features, targets, way)).T, jnp.zeros(way, features.dtype))


def _centred(features):
  """Features less their mean, and what makes a Linear for features of one for those: the bias is free to follow."""
  mean = jnp.mean(features, axis=0)
  return features - mean, lambda kernel, bias: Linear(kernel, bias - _product(mean, kernel))


def _ridge(features, targets, way, c):
  x, linear = _centred(features)
  labels = jax.nn.one_hot(targets, way, dtype=x.dtype)
  bias = jnp.mean(labels, axis=0)
  few = x.shape[0] < x.shape[1]
  gram = _product(x, x.T) if few else _product(x.T, x)
  penalty = jnp.maximum(1 / c, jnp.finfo(x.dtype).eps * jnp.trace(gram))  # what rounding tells from none
  solve = functools.partial(jax.scipy.linalg.solve, gram + penalty * jnp.eye(len(gram), dtype=x.dtype), assume_a='pos')
  return linear(_product(x.T, solve(labels - bias)) if few else solve(_product(x.T, labels - bias)), bias)


def _logistic_regression(features, targets, way, c):
  """Newton's method with conjugate gradients.

  The minimiser is a sum of examples, kernel = x^T a, and so is every gradient on the way: they are vectors of the
  coefficients a (n, way), and the bias as one more row. Besides, only their image is needed, products with the Gram
  matrix x x^T (n, n), and no factor of it: in <u, v> = sum(u * image of v) a vector has the length of the kernel and
  bias that it stands for. A pair is (2, n + 1, way), a vector and its image.
  """
  x, linear = _centred(features)
  labels = jax.nn.one_hot(targets, way, dtype=x.dtype)
  n, d = x.shape
  gram = _product(x, x.T) if n <= 2 * d else None  # of many examples two products cost less

  def pair(vector):
    a, bias = vector[:-1], vector[-1:]
    image = _product(x, _product(x.T, a)) if gram is None else _product(gram, a)
    return jnp.stack([vector, jnp.concatenate([image, bias])])

  def logits(image):
    return image[..., :-1, :] + image[..., -1:, :]

  def derivative(vector, of_logits):
    """Of the objective, or of its gradient, from that of the cross-entropies by the logits (n, way)."""
    mean = jnp.mean(of_logits, axis=0, keepdims=True)  # the centred features of all examples sum to nothing
    return jnp.concatenate([vector[:-1] + c * (of_logits - mean), c * n * mean])

  def objective(vector, image):
    penalty = jnp.sum((vector * image)[..., :-1, :], (-2, -1)) / 2
    return penalty - c * jnp.sum(labels * jax.nn.log_softmax(logits(image)), (-2, -1))

  def step(state):
    count, weights, gradient, _ = state
    p = jax.nn.softmax(logits(weights[1]))

    def hessian(vector, image):
      change = logits(image)
      return derivative(vector, p * (change - jnp.sum(p * change, axis=-1, keepdims=True)))

    direction = _conjugate_gradients(hessian, pair, -gradient)
    moved = weights + _STEP_SIZES[:, None, None, None] * direction  # by all sizes: logits are linear in the weights
    values = objective(moved[:, 0], moved[:, 1])
    best = values <= jnp.min(values) + _ROUNDING[x.dtype.itemsize] * values[-1]
    return at(count + 1, pair(moved[jnp.argmax(best), 0]))  # its image anew: rounding adds up in a sum of images

  def at(count, weights):
    gradient = pair(derivative(weights[0], jax.nn.softmax(logits(weights[1])) - labels))
    return count, weights, gradient, _squared_norm(gradient)

  scale = c**2 * (n + jnp.sum(jnp.square(x)))

  def unfinished(state):
    count, *_, squared = state
    return (count < _NEWTON_STEPS) & (squared > _TOLERANCE[x.dtype.itemsize] ** 2 * scale)

  _, (weights, _), *_ = jax.lax.while_loop(unfinished, step, at(0, jnp.zeros((2, n + 1, way), x.dtype)))
  return linear(_product(x.T, weights[:-1]), weights[-1])


def _conjugate_gradients(operator, pair, target):
  """Solves operator(*v) = target[0], roughly, for a pair v."""

  def step(state):
    count, solution, rest, direction, squared = state
    product = operator(*direction)
    curvature = jnp.sum(product * direction[1])
    # Else the objective is flat there, or this is rounding: no further.
    sound = curvature > _ROUNDING[squared.dtype.itemsize] * squared
    size = jnp.where(sound, squared / curvature, 0)
    rest = pair(rest[0] - size * product)
    after = jnp.where(sound, _squared_norm(rest), 0)
    return count + 1, solution + size * direction, rest, rest + after / squared * direction, after

  def unfinished(state):
    count, *_, squared = state
    return (count < _CG_STEPS) & (squared > _FORCING**2 * first)

  first = _squared_norm(target)
  return jax.lax.while_loop(unfinished, step, (0, jnp.zeros_like(target), target, target, first))[1]


def _squared_norm(pair):
  return jnp.sum(pair[0] * pair[1])


class Fitted(NamedTuple):
  """What a task leaves behind: its head, and the statistics that normalise its queries."""

  linear: Linear
  model_state: Any


def learner(head, embedding, way):
  """`adapt` and `predict` of an Algorithm that fits a head to the embedded support images."""

  def adapt(params, model_state, support, rng):
    del rng  # of dropout, which is for training
    features, model_state = embedding.support(params, model_state, support.inputs)
    return Fitted(head.fit(features, support.targets, way), model_state)

  def predict(params, model_state, adapted, inputs):
    del model_state
    return head.outputs(adapted.linear, embedding.query(params, adapted.model_state, inputs))

  return adapt, predict

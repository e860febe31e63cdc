"""Labels that are not 0 to way - 1 never look sound, whatever learns from them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import heads, losses
from metajax.algorithms import anil, maml, meta_sgd, protonet, reptile
from metajax.errors import UserError
from metajax.models import mlp
from metajax.types import Episode, Examples

WAY = 3
RNG = np.random.default_rng(0)
INPUTS = np.float32(RNG.normal(size=(6, 4)))
GOOD = np.array([0, 1, 2, 0, 1, 2])
LEARNERS = {
  **{
    module.__name__.rpartition('.')[2]: lambda module=module: module.make(mlp.make(WAY, hidden=(5,)), inner_steps=2)
    for module in (maml, anil, meta_sgd, reptile)
  },
  'protonet': lambda: protonet.make(mlp.make(WAY, hidden=(5,)), way=WAY),
}
BAD = {'a class too many': GOOD + 1, 'padding': np.where(np.arange(6) == 5, -1, GOOD)}
RANGE = r'labels are -?\d to \d; they must be 0 to 2'
ODD = {
  'float32': (np.float32(np.eye(3))[GOOD], np.float32(GOOD)),
  'int32': (GOOD[:, None], GOOD[:3]),
}


def adapted_outputs(learner, labels):
  params, state = learner.init(jax.random.key(0), INPUTS[:1])
  adapted = learner.adapt(params, state, Examples(INPUTS, labels), jax.random.key(1))
  return learner.predict(params, state, adapted, INPUTS)


def loss(learner, labels):
  params, state = learner.init(jax.random.key(0), INPUTS[:1])
  episode = Episode(Examples(INPUTS, GOOD), Examples(INPUTS, labels), jnp.arange(WAY))
  return jnp.asarray(learner.loss(params, state, episode, jax.random.key(1))[0])


@pytest.mark.parametrize('name', LEARNERS)
def test_every_learner(name):
  learner = LEARNERS[name]()
  assert jnp.isfinite(adapted_outputs(learner, GOOD)).all() and jnp.isfinite(loss(learner, GOOD)).all()
  for labels in BAD.values():
    assert jnp.isnan(jax.jit(lambda labels: adapted_outputs(learner, labels))(labels)).all()
    assert jnp.isnan(jax.jit(lambda labels: loss(learner, labels))(labels)).any()
    for function in (adapted_outputs, loss):
      with pytest.raises(UserError, match=RANGE):
        function(learner, labels)
  for labels, dtype in ((labels, dtype) for dtype, each in ODD.items() for labels in each):
    for function in (adapted_outputs, loss)[: 1 if name == 'reptile' else 2]:  # whose loss joins both sets first
      with pytest.raises(UserError, match=rf'labels are {dtype} .*; integers .* from 0 to 2'):
        jax.eval_shape(lambda labels, function=function: function(learner, labels), labels)


@pytest.mark.parametrize('name', ['logistic_regression', 'ridge', 'prototype', 'cosine'])
def test_every_head(name):
  fit = heads.make(name).fit
  for labels in BAD.values():
    linear = jax.jit(fit, static_argnums=2)(INPUTS, labels, WAY)
    assert jnp.isnan(linear.kernel).all() and jnp.isnan(linear.bias).all()
    with pytest.raises(UserError, match=RANGE):
      fit(INPUTS, labels, WAY)
  for labels, dtype in ((labels, dtype) for dtype, each in ODD.items() for labels in each):
    with pytest.raises(UserError, match=rf'labels are {dtype} .*; integers .* from 0 to 2'):
      jax.eval_shape(lambda labels: fit(INPUTS, labels, WAY), labels)


def test_a_bad_label_spoils_the_loss_and_gradient_of_its_own_example_alone():
  logits = jnp.asarray(RNG.normal(size=(6, WAY)), jnp.float32)
  labels = BAD['padding']

  def total(logits, labels):
    return losses.CLASSIFICATION.losses(logits, labels).sum()

  found = jax.jit(losses.CLASSIFICATION.losses)(logits, labels)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, GOOD)
  np.testing.assert_array_equal(np.isnan(found), labels < 0)
  np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-6)
  gradient = jax.jit(jax.grad(total))(logits, labels)
  np.testing.assert_array_equal(np.isnan(gradient).all(1), labels < 0)
  np.testing.assert_allclose(gradient[:5], jax.nn.softmax(logits)[:5] - np.eye(WAY)[GOOD][:5], rtol=1e-5, atol=1e-6)

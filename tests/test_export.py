"""Networks and learners as `jax.export` takes them away: any number of images, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from metajax.algorithms import maml, protonet
from metajax.models import conv4, mlp, resnet12
from metajax.types import Examples

NETS = {
  'conv4': lambda: conv4.make(3, width=4),
  'conv4 strided': lambda: conv4.make(3, width=4, downsample='stride'),
  'resnet12': lambda: resnet12.make(3, widths=(4, 4, 4, 4), dropout=0.0),
  'mlp': lambda: mlp.make(3, hidden=(5,)),
}
IMAGES = np.random.default_rng(0).normal(size=(7, 16, 16, 3)).astype(np.float32)


def exported(function, *examples):
  """`function` exported for the shapes of examples, of which the last may have any number of rows."""
  (rows,) = export.symbolic_shape('rows')
  *known, last = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), x) for x in examples)
  last = jax.ShapeDtypeStruct((rows, *last.shape[1:]), last.dtype)
  return export.export(jax.jit(function))(*known, last).call


@pytest.mark.parametrize('name', NETS)
def test_a_network_takes_any_number_of_images(name):
  network = NETS[name]()
  variables = network.init(jax.random.key(0), IMAGES[:2])
  forward = exported(network.apply, variables, IMAGES)
  for images in (IMAGES, IMAGES[:1]):
    np.testing.assert_allclose(forward(variables, images), network.apply(variables, images), atol=1e-5)


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize(
  'make',
  [
    lambda network: maml.make(network, inner_steps=2, inner_lr=0.1),
    lambda network: protonet.make(network, way=3, batch_norm='transductive'),
  ],
  ids=['maml', 'protonet'],
)
def test_a_learner_adapts_and_predicts_for_any_number_of_queries(name, make):
  learner = make(NETS[name]())
  params, state = learner.init(jax.random.key(0), IMAGES[:1])
  labels = jnp.array([0, 1, 2])

  def classify(params, state, support, queries):
    return learner.predict(params, state, learner.adapt(params, state, Examples(support, labels), None), queries)

  given = params, state, IMAGES[:3]
  away = exported(classify, *given, IMAGES)
  for queries in (IMAGES, IMAGES[2:4]):
    np.testing.assert_allclose(away(*given, queries), classify(*given, queries), atol=1e-4)

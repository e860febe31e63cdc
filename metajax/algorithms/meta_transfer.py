"""Meta-Transfer Learning (Sun, Liu, Chua & Schiele 2019): a frozen deep network, scaled and shifted to few-shot tasks.

The outer loop learns a scale of each pair of channels of each convolution, a shift of each channel, and the initial
head; the inner loop moves the head alone, on features that are computed once. The network comes from a run that
`config.init_from` names, such as the pre-training of `configs/pretrain.py`; from random weights otherwise.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metajax import inner_loop, losses, networks, scale_shift
from metajax.errors import UserError
from metajax.types import Algorithm


class Adapted(NamedTuple):
  """What a task leaves behind: its head, and the statistics that normalise its queries."""

  head: Any
  statistics: Any


def make(
  model,
  *,
  way,
  objective=losses.CLASSIFICATION,
  inner_steps=20,
  inner_lr=0.01,
  first_order=False,
  shortcuts=True,
  learn_norm=False,
  mirror=False,
  batch_norm='transductive',
  batch_norm_momentum=0.9,
):
  """Meta-Transfer Learning with one of the two inner loops that its authors' codes have.

  Args:
    model: a Flax module with `num_outputs`, inputs (n, ...) -> features (n, d) without its head.
    way: classes of a task.
    objective: what the task minimises.
    inner_steps: gradient steps of the head on the support set; may differ between training and evaluation.
    inner_lr: their step size, of the mean loss. The authors' TensorFlow code has one of the sum over the support set,
      divided by shot: `way` times as much.
    first_order: take the inner gradients for constants, as the authors' PyTorch code does: the network then learns from
      the queries alone. Otherwise derivatives go through all inner steps into the features of both sets.
    shortcuts, learn_norm: see `scale_shift.init`; the TensorFlow code has neither, the PyTorch code both.
    mirror: in evaluation the support set has each image's mirror image too, as in the TensorFlow code.
    batch_norm: what normalises. 'transductive': support and query images by their own statistics each. 'support': both
      by those of the support images. 'running': as 'transductive' in training, by running averages in evaluation.
    batch_norm_momentum: how much of the running average stays at each of a task's two passes; a meta-batch's tasks are
      averaged.

  Returns:
    Algorithm, whose params are what `scale_shift.init` returns and 'head'; model_state has the network under 'frozen'.

  Raises:
    UserError: an unknown batch-norm mode; regression; a model without a form without a head.
  """
  networks.check_batch_norm(batch_norm)
  if objective is not losses.CLASSIFICATION:
    raise UserError('meta_transfer needs classes: regression has none')
  if inner_steps < 1:
    raise UserError(f'inner_steps = {inner_steps}: at least 1 is needed')
  if networks.without_head(model) is None:
    raise UserError('meta_transfer needs a model with num_outputs, which can be left out')
  model = networks.without_head(model)
  head = nn.Dense(way, kernel_init=nn.initializers.glorot_uniform())

  def logits(weights, features):
    # Of as many classes as there were in training.
    return jnp.matmul(features, weights['kernel'], precision='highest') + weights['bias']

  def network(params, model_state):
    learned = {kind: x for kind, x in params.items() if kind != 'head'}
    return scale_shift.apply(model_state['frozen'], learned)

  embedding = networks.embedding(model, batch_norm, network)

  def init(rng, inputs):
    rng_model, rng_head = jax.random.split(rng)
    features, model_state = model.init_with_output(rng_model, inputs)
    model_state = dict(model_state)
    weights = model_state.pop('params')
    return adopt({'head': head.init(rng_head, features)['params']}, model_state, weights, {})

  def adopt(params, model_state, network, statistics):
    learned = scale_shift.init(network, shortcuts=shortcuts, norm=learn_norm)
    params = {'head': params['head'], **learned}
    return params, {**model_state, 'frozen': network, **statistics}

  def descend(params, features, targets, **options):
    """The inner loop: what `inner_loop.sgd` returns."""

    def support_loss(weights, _):
      return jnp.mean(objective.losses(logits(weights, features), targets)), ()

    rates = np.full((inner_steps,), inner_lr)
    return inner_loop.sgd(support_loss, params['head'], rates, first_order=first_order, **options)

  def embedded(params, model_state, support):
    """Features and targets of a support set in evaluation, and the statistics for its queries."""
    if mirror:
      support = jax.tree.map(lambda *x: jnp.concatenate(x), support, mirrored(support))
    features, model_state = embedding.support(params, model_state, support.inputs)
    return features, support.targets, model_state

  def adapt(params, model_state, support, rng):
    del rng  # of dropout, which is for training
    features, targets, model_state = embedded(params, model_state, support)
    return Adapted(descend(params, features, targets)[0], networks.changing(model_state))

  def heads_along(params, model_state, support):
    """The head before each inner step and after the last, and the statistics for queries."""
    features, targets, model_state = embedded(params, model_state, support)
    _, _, path = descend(params, features, targets, after=lambda weights, _: weights)
    return inner_loop.prepend(params['head'], path), model_state

  def trajectory(params, model_state, support, rng):
    del rng
    path, model_state = heads_along(params, model_state, support)
    return jax.vmap(lambda weights: Adapted(weights, networks.changing(model_state)))(path)

  def predict_along(params, model_state, support, inputs, rng):
    del rng
    path, model_state = heads_along(params, model_state, support)
    features = embedding.query(params, model_state, inputs)  # of all steps: the network does not change
    return jax.vmap(logits, (0, None))(path, features)

  def predict(params, model_state, adapted, inputs):
    return logits(adapted.head, embedding.query(params, {**model_state, **adapted.statistics}, inputs))

  def loss(params, model_state, episode, rng):
    rng_support, rng_query = networks.split(rng)
    momentum = batch_norm_momentum if batch_norm == 'running' else 1.0
    weights = network(params, model_state)
    features, of_support = networks.by_batch(model, weights, model_state, episode.support.inputs, rng_support)
    adapted, _ = descend(params, features, episode.support.targets)
    model_state = networks.updated(model_state, of_support, momentum)
    if batch_norm == 'support':
      features, of_query = networks.by_state(model, weights, of_support, episode.query.inputs, rng_query)
    else:
      features, of_query = networks.by_batch(model, weights, model_state, episode.query.inputs, rng_query)
    outputs = logits(adapted, features)
    model_state = networks.updated(model_state, of_query, momentum)
    each = objective.losses(outputs, episode.query.targets)
    return each, (model_state, objective.metrics(outputs, episode.query.targets))

  return Algorithm(init, adapt, predict, loss, trajectory, predict_along, embedding=embedding, adopt=adopt)


def mirrored(examples):
  """The mirror images of examples."""
  return examples._replace(inputs=jnp.flip(examples.inputs, axis=-2))

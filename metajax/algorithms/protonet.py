"""Prototypical networks (Snell, Swersky & Zemel 2017): the nearest class mean of embedded support images."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metajax import losses, networks
from metajax.errors import UserError
from metajax.types import Algorithm, Array


class Adapted(NamedTuple):
  """What a task leaves behind: its prototypes, and the statistics that normalise its queries."""

  prototypes: Array  # (way, d)
  model_state: Any


def make(
  model,
  *,
  way,
  objective=losses.CLASSIFICATION,
  scale=1.0,
  learn_scale=True,
  batch_norm='running',
  batch_norm_momentum=0.9,
):
  """Prototypical networks (Algorithm 1): logits are minus squared Euclidean distances to the class means.

  A distance is the mean over the d features, times a scale: learned from 1 on, as in MetaOptNet's code, or fixed at d,
  which makes it the sum of Snell et al.

  Args:
    model: a Flax module, inputs (n, ...) -> embeddings (n, d). One that has `num_outputs` is taken without its head.
    way: classes of an episode.
    objective: classification; there are no prototypes in regression.
    scale: the first value; 0 for d.
    learn_scale: whether the outer loop learns it.
    batch_norm: what normalises. 'running': in training the batch's own statistics, support and query images in a pass
      each, those of all episodes of a task together; in evaluation running averages. 'transductive': support and query
      images of an episode by their own statistics; 'support': both by those of the support images.
    batch_norm_momentum: how much of the running average stays at each pass. The averages of a meta-batch's tasks are
      averaged in turn, so that several tasks count as one.

  Raises:
    UserError: an unknown batch-norm mode; regression.
  """
  networks.check_batch_norm(batch_norm)
  if objective is not losses.CLASSIFICATION:
    raise UserError('protonet needs classes: regression has none')
  model = networks.without_head(model) or model
  embedding = networks.embedding(model, batch_norm, lambda params, _: params['embedding'])

  def init(rng, inputs):
    embedded, model_state = model.init_with_output(rng, inputs)
    model_state = dict(model_state)
    params = {'embedding': model_state.pop('params', {})}
    if learn_scale:
      params['scale'] = jnp.asarray(scale or embedded.shape[-1], embedded.dtype)
    return params, model_state

  def logits(params, protos, embedded):
    factor = params['scale'] if learn_scale else scale or embedded.shape[-1]
    return -factor / embedded.shape[-1] * squared_distances(embedded, protos)

  def adapt(params, model_state, support, rng):
    del rng  # of dropout, which is for training
    embedded, model_state = embedding.support(params, model_state, support.inputs)
    return Adapted(prototypes(embedded, support.targets, way), model_state)

  def predict(params, model_state, adapted, inputs):
    del model_state
    return logits(params, adapted.prototypes, embedding.query(params, adapted.model_state, inputs))

  def group_loss(params, model_state, episodes, rng):
    group = len(episodes.class_ids)
    rng_support, rng_query = networks.split(rng)

    def embed(normalise, model_state, inputs, rng):
      """Embeds the images of all episodes in one pass: (group, n, d)."""
      images = inputs.reshape(-1, *inputs.shape[2:])
      embedded, state = normalise(model, params['embedding'], model_state, images, rng)
      return embedded.reshape(group, -1, embedded.shape[-1]), state

    momentum = batch_norm_momentum if batch_norm == 'running' else 1.0
    support, state = embed(networks.by_batch, model_state, episodes.support.inputs, rng_support)
    model_state = networks.updated(model_state, state, momentum)
    if batch_norm == 'support':
      query, _ = embed(networks.by_state, state, episodes.query.inputs, rng_query)
    else:
      query, state = embed(networks.by_batch, model_state, episodes.query.inputs, rng_query)
      model_state = networks.updated(model_state, state, momentum)

    protos = jax.vmap(prototypes, (0, 0, None))(support, episodes.support.targets, way)
    outputs = jax.vmap(logits, (None, 0, 0))(params, protos, query)
    each = objective.losses(outputs, episodes.query.targets)
    return each, (model_state, objective.metrics(outputs, episodes.query.targets))

  def loss(params, model_state, episode, rng):
    episodes = jax.tree.map(lambda x: x[None], episode)
    losses, (model_state, metrics) = group_loss(params, model_state, episodes, rng)
    return losses[0], (model_state, {name: x[0] for name, x in metrics.items()})

  # Only with running averages do episodes share statistics in training: the other modes know their own episode alone.
  return Algorithm(
    init,
    adapt,
    predict,
    loss,
    group_loss=group_loss if batch_norm == 'running' else None,
    embedding=embedding,
    adopt=networks.adopt,
  )


def prototypes(embedded, targets, way):
  """Class means (way, d) of embedded (n, d) with targets (n,), see `losses.check_labels`."""
  factor = jnp.min(losses.check_labels(targets, embedded.shape[:1], way)).astype(embedded.dtype)
  members = jax.nn.one_hot(targets, way, dtype=embedded.dtype)
  return factor * jnp.matmul(members.T, embedded, precision='highest') / jnp.sum(members, axis=0)[:, None]


def squared_distances(a, b):
  """Squared Euclidean distances (n, m) between a (n, d) and b (m, d), without an array of n * m * d."""
  squares = [jnp.sum(jnp.square(x), axis=-1) for x in (a, b)]
  return squares[0][:, None] + squares[1][None] - 2 * jnp.matmul(a, b.T, precision='highest')

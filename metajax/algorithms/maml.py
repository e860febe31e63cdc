"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017) and what differs from it by an option."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax import inner_loop, losses, networks
from metajax.errors import UserError
from metajax.types import Algorithm


class Adapted(NamedTuple):
  """What MAML leaves of a task: fast weights, and the statistics that normalise its queries."""

  params: Any
  model_state: Any


def make(
  model,
  *,
  objective=losses.CLASSIFICATION,
  inner_steps=5,
  inner_lr=0.01,
  first_order=False,
  inner_params=(),
  batch_norm='transductive',
  batch_norm_momentum=0.9,
  checkpoint=False,
):
  """MAML with exact second-order gradients through the inner loop.

  Args:
    model: a Flax module, inputs (n, ...) -> outputs (n, way).
    objective: what the task minimises.
    inner_steps: gradient steps on the support set; may differ between training and evaluation.
    inner_lr: step size of the inner loop (alpha).
    first_order: leave out second derivatives (FOMAML, section 5.2).
    inner_params: names of the model's top-level parameters that the inner loop moves; all if empty.
    batch_norm: statistics that normalise queries; the support set always uses its own. 'transductive': those of the
      query batch, so queries see one another (the practice of the paper's code). 'support': those of the support set
      under the fast weights. 'running': the query batch's in training, their running average in evaluation. The last
      two need layers that keep a batch's statistics as they are and use given ones when 'batch_stats' is not
      mutable, such as `models.layers.BatchNorm`; Flax's own BatchNorm serves 'transductive' alone.
    batch_norm_momentum: how much of the running average stays at each meta-update.
    checkpoint: trade time for memory in the backward pass, see `inner_loop.sgd`.

  Raises:
    UserError: an unknown batch-norm mode; names in `inner_params` that the model does not have (by `init`).
  """
  networks.check_batch_norm(batch_norm)
  if inner_steps < 0:
    raise UserError(f'inner_steps = {inner_steps}: it cannot be negative')
  rates = np.full((inner_steps,), inner_lr, np.float32)

  def init(rng, inputs):
    model_state = dict(model.init(rng, inputs))
    params = model_state.pop('params')
    if unknown := set(inner_params) - set(params):
      raise UserError(f'inner_params {sorted(unknown)} are not in the model, which has {sorted(params)}')
    return params, model_state

  def split(params):
    """The weights that the inner loop moves, and how to put them back among the others."""
    fast = {name: params[name] for name in inner_params or params}
    return fast, lambda fast: {**params, **fast}

  def support_loss(merge, model_state, support, rng=None):
    def loss_fn(fast):
      outputs, _ = networks.by_batch(model, merge(fast), model_state, support.inputs, rng)
      return jnp.mean(objective.losses(outputs, support.targets))

    return loss_fn

  def query_state(params, model_state, support, rng=None):
    if batch_norm == 'support':
      _, model_state = networks.by_batch(model, params, model_state, support.inputs, rng)
    return model_state

  query_pass = networks.by_batch if batch_norm == 'transductive' else networks.by_state

  def descend(params, model_state, support, rng):
    fast, merge = split(params)
    loss_fn = support_loss(merge, model_state, support, rng)  # one dropout mask: all steps descend the same loss
    fast, _ = inner_loop.sgd(loss_fn, fast, rates, first_order=first_order, checkpoint=checkpoint)
    return Adapted(merge(fast), query_state(merge(fast), model_state, support, rng))

  def adapt(params, model_state, support, rng):
    del rng  # of dropout, which is for training
    return descend(params, model_state, support, None)

  def trajectory(params, model_state, support, rng):
    del rng
    fast, merge = split(params)
    path = inner_loop.sgd_trajectory(support_loss(merge, model_state, support), fast, rates)
    return jax.vmap(lambda fast: Adapted(merge(fast), query_state(merge(fast), model_state, support)))(path)

  def predict(params, model_state, adapted, inputs):
    del params, model_state
    return query_pass(model, *adapted, inputs)[0]

  def loss(params, model_state, episode, rng):
    rng_support, rng_query = networks.split(rng)
    adapted = descend(params, model_state, episode.support, rng_support)
    normalise = networks.by_state if batch_norm == 'support' else networks.by_batch
    outputs, state = normalise(model, *adapted, episode.query.inputs, rng_query)
    model_state = networks.updated(model_state, state, batch_norm_momentum if batch_norm == 'running' else 1.0)
    metrics = objective.metrics(outputs, episode.query.targets)
    return objective.losses(outputs, episode.query.targets), (model_state, metrics)

  return Algorithm(init, adapt, predict, loss, trajectory)

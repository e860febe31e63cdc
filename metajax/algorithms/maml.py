"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017) and what differs from it by an option."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax import inner_loop, losses
from metajax.errors import UserError
from metajax.types import Algorithm

BATCH_NORM_MODES = ('transductive', 'support', 'running')


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
  if batch_norm not in BATCH_NORM_MODES:
    raise UserError(f'batch_norm is one of {", ".join(BATCH_NORM_MODES)}, not {batch_norm!r}')
  if inner_steps < 0:
    raise UserError(f'inner_steps = {inner_steps}: it cannot be negative')
  rates = np.full((inner_steps,), inner_lr, np.float32)

  def init(rng, inputs):
    model_state = dict(model.init(rng, inputs))
    params = model_state.pop('params')
    if unknown := set(inner_params) - set(params):
      raise UserError(f'inner_params {sorted(unknown)} are not in the model, which has {sorted(params)}')
    return params, model_state

  def batch_forward(params, model_state, inputs):
    """Normalises by the batch's own statistics, and returns them."""
    return model.apply({'params': params, **model_state}, inputs, mutable=list(model_state))

  def split(params):
    """The weights that the inner loop moves, and how to put them back among the others."""
    fast = {name: params[name] for name in inner_params or params}
    return fast, lambda fast: {**params, **fast}

  def support_loss(merge, model_state, support):
    def loss_fn(fast):
      outputs, _ = batch_forward(merge(fast), model_state, support.inputs)
      return jnp.mean(objective.losses(outputs, support.targets))

    return loss_fn

  def query_state(params, model_state, support):
    if batch_norm == 'support':
      _, model_state = batch_forward(params, model_state, support.inputs)
    return model_state

  def adapt(params, model_state, support, rng):
    del rng
    fast, merge = split(params)
    loss_fn = support_loss(merge, model_state, support)
    fast, _ = inner_loop.sgd(loss_fn, fast, rates, first_order=first_order, checkpoint=checkpoint)
    return Adapted(merge(fast), query_state(merge(fast), model_state, support))

  def trajectory(params, model_state, support, rng):
    del rng
    fast, merge = split(params)
    path = inner_loop.sgd_trajectory(support_loss(merge, model_state, support), fast, rates)
    return jax.vmap(lambda fast: Adapted(merge(fast), query_state(merge(fast), model_state, support)))(path)

  def predict(params, model_state, adapted, inputs):
    del params, model_state
    if batch_norm == 'transductive':
      return batch_forward(adapted.params, adapted.model_state, inputs)[0]
    return model.apply({'params': adapted.params, **adapted.model_state}, inputs)

  def loss(params, model_state, episode, rng):
    adapted = adapt(params, model_state, episode.support, rng)
    if batch_norm == 'running':
      outputs, batch_state = batch_forward(adapted.params, model_state, episode.query.inputs)
      model_state = jax.tree.map(
        lambda old, new: batch_norm_momentum * old + (1 - batch_norm_momentum) * jax.lax.stop_gradient(new),
        model_state,
        dict(batch_state),
      )
    else:
      outputs = predict(params, model_state, adapted, episode.query.inputs)
    metrics = objective.metrics(outputs, episode.query.targets)
    return objective.losses(outputs, episode.query.targets), (model_state, metrics)

  return Algorithm(init, adapt, predict, loss, trajectory)

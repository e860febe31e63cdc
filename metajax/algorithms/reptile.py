"""Reptile (Nichol, Achiam & Schulman 2018): move the weights towards those that a task's training ends with."""

import jax
import jax.numpy as jnp
import optax

from metajax import inner_loop, losses, networks
from metajax.algorithms import maml
from metajax.errors import UserError


def make(
  model,
  *,
  objective=losses.CLASSIFICATION,
  inner_steps=5,
  inner_lr=1e-3,
  inner_batch=10,
  batch_norm='transductive',
):
  """Reptile, batched version (section 3): the outer gradient of a task is params minus fast weights.

  Training takes a task's support and query examples as one set, and each inner step a random part of it; evaluation
  adapts to the support set alone. The inner optimiser is Adam without momentum, as in the paper's experiments. With
  the outer optimiser `sgd` the learning rate is the paper's epsilon. Dropout is never active.

  Args:
    model: a Flax module, inputs (n, ...) -> outputs (n, way).
    objective: what the task minimises.
    inner_steps: steps of the inner optimiser; the paper takes many more in evaluation (50) than in training (5).
    inner_lr: its step size.
    inner_batch: examples a step, drawn without replacement; all, if the set has no more.
    batch_norm: 'transductive' or 'support', see `maml.make`.
  """
  if batch_norm == 'running':
    raise UserError("reptile has batch_norm 'transductive' or 'support': no outer loss keeps a running average")
  if inner_steps < 1 or inner_batch < 1:
    raise UserError(f'inner_steps = {inner_steps}, inner_batch = {inner_batch}: at least 1 is needed')
  # Its inner loop of no steps leaves the choice of normalising statistics, and `predict`.
  base = maml.make(model, objective=objective, inner_steps=0, batch_norm=batch_norm)
  inner = optax.adam(inner_lr, b1=0.0)

  def descend(params, model_state, examples, rng):
    """The weights after each inner step, with a leading axis of inner_steps."""
    if rng is None:
      raise UserError('reptile draws the examples of each inner step: give it a key')
    size = min(inner_batch, examples.targets.shape[0])

    def losses_of(params, batch):
      outputs, _ = networks.by_batch(model, params, model_state, batch.inputs)
      return objective.losses(outputs, batch.targets)

    def loss_fn(params, batch):
      return jnp.mean(losses_of(params, batch))

    # Within the loop all examples are traced, and bad targets could not be told.
    jax.eval_shape(lambda params, inputs: losses_of(params, examples._replace(inputs=inputs)), params, examples.inputs)
    examples = jax.tree.map(jnp.asarray, examples)

    def step(carry, rng):
      params, state = carry
      rows = jax.random.permutation(rng, examples.targets.shape[0])[:size]
      grads = jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[rows], examples))
      updates, state = inner.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), params

    return jax.lax.scan(step, (params, inner.init(params)), jax.random.split(rng, inner_steps))[1]

  def adapt(params, model_state, support, rng):
    fast = jax.tree.map(lambda path: path[-1], descend(params, model_state, support, rng))
    return base.adapt(fast, model_state, support, rng)

  def trajectory(params, model_state, support, rng):
    path = inner_loop.prepend(params, descend(params, model_state, support, rng))
    return jax.vmap(lambda fast: base.adapt(fast, model_state, support, rng))(path)

  def loss(params, model_state, episode, rng):
    everything = jax.tree.map(lambda *x: jnp.concatenate(x), episode.support, episode.query)
    adapted = jax.lax.stop_gradient(adapt(params, model_state, everything, rng))
    outputs = base.predict(params, model_state, adapted, episode.query.inputs)
    differences = jax.tree.map(jnp.subtract, params, adapted.params)
    # Half the squared distance has the gradient that Reptile wants; the value reported is the loss on the queries.
    distance = 0.5 * optax.tree.norm(differences, squared=True)
    value = jnp.mean(objective.losses(outputs, episode.query.targets))
    metrics = objective.metrics(outputs, episode.query.targets)
    return jax.lax.stop_gradient(value - distance) + distance, (model_state, metrics)

  return base._replace(adapt=adapt, loss=loss, trajectory=trajectory, predict_along=None)

"""The gradient of a meta-batch, and trial steps along it: what the outer loop computes of the tasks."""

import functools

import jax
import jax.numpy as jnp
import optax

from metajax import networks, parallel
from metajax.errors import UserError


def gradient(loss, params, model_state, episodes, local, rng, *, tasks, coefficients, trials=None):
  """The gradient of the mean over tasks and queries of coefficient times loss.

  Args:
    loss: (params, model_state, episode, rng) -> losses, (model_state, metrics), of one task.
    params, model_state: replicated.
    episodes: batch -> the tasks' episodes, with the leading axis of `batch`.
    local: this device's part of the meta-batch, see `parallel.lay_out`.
    rng: a key, folded with each task's position.
    tasks: in the meta-batch.
    coefficients: (tasks,) or (tasks, query), constants.
    trials: (n, tasks) further coefficients, to have their gradients too; `coefficients` is (tasks,) then.

  Returns:
    the gradient, like `params`; with `trials` each leaf has a leading axis of 1 + n.
    model_state: the tasks' mean, without what is 'frozen'.
    losses: (tasks, query), or (tasks, 1) of a learner that has one loss a task.
    metrics: leaves (tasks, ...).
  """

  # Indexing would clamp: the last coefficient would serve the tasks beyond it.
  if coefficients.shape[:1] != (tasks,):
    raise UserError(f'task weighting: coefficients have shape {coefficients.shape}, but there are {tasks} tasks')
  if trials is not None and trials.shape[1:] != (tasks,):
    raise UserError(f'task weighting: trials have shape {trials.shape}, not (trials, {tasks})')

  def outer_loss(params, coefficients, episode, rng):
    losses, (model_state, metrics) = loss(params, model_state_before, episode, rng)
    losses, model_state = losses.reshape(-1), networks.changing(model_state)
    if jnp.ndim(coefficients) and coefficients.shape != losses.shape:
      raise UserError('config.weighting weights single queries, but the algorithm has one loss for a task')
    return jnp.mean(coefficients * losses), (losses, model_state, metrics)

  model_state_before = model_state

  def of_chunk(positions, weights, batch):
    average = functools.partial(jnp.tensordot, weights, axes=1, precision='highest')
    over_tasks = (episodes(batch), task_rngs(rng, positions))
    if trials is None:

      def mean_loss(params):
        values, aux = jax.vmap(outer_loss, (None, 0, 0, 0))(params, coefficients[positions], *over_tasks)
        return jnp.sum(weights * values), aux

      grads, (losses, model_state, metrics) = jax.grad(mean_loss, has_aux=True)(params)
    else:  # a task's gradient serves all of its coefficients
      of_task = jax.vmap(jax.grad(outer_loss, has_aux=True), (None, None, 0, 0))
      grads, (losses, model_state, metrics) = of_task(params, 1.0, *over_tasks)
      rows = weights * jnp.concatenate([coefficients[None], trials])[:, positions]
      grads = jax.tree.map(lambda g: jnp.tensordot(rows, g, axes=1, precision='highest'), grads)
    return (grads, jax.tree.map(average, model_state)), (losses, metrics)

  like = params if trials is None else jax.tree.map(lambda p: jnp.stack([p] * (1 + len(trials))), params)
  # What is frozen is not averaged, so that it stays as it is to the bit.
  like = like, networks.changing(model_state)
  (grads, model_state), (losses, metrics) = parallel.mean_over_tasks(of_chunk, like, local, tasks)
  return grads, model_state, losses, metrics


def task_losses(loss, params, model_state, episodes, local, rng, *, tasks):
  """The losses of a meta-batch, (tasks, query), without their gradient; arguments as in `gradient`."""

  def of_chunk(positions, weights, batch):
    del weights
    of_tasks = jax.vmap(lambda *task: loss(*task)[0].reshape(-1), (None, None, 0, 0))
    return (), of_tasks(params, model_state, episodes(batch), task_rngs(rng, positions))

  return parallel.mean_over_tasks(of_chunk, (), local, tasks)[1]


def trial_losses(loss, tx, opt_state, params, model_state, grads, episodes, local, rng, *, tasks):
  """What the losses of the same tasks would be after one outer step along each of several gradients.

  Args:
    tx, opt_state: the outer optimiser, whose step is tried.
    grads: like `params`, with a leading axis of trials.
    (others as in `gradient`)

  Returns:
    losses: (trials, tasks, query).
  """

  def step(grads):
    updates, _ = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates)

  stepped = jax.vmap(step)(grads)

  def of_chunk(positions, weights, batch):
    del weights
    of_tasks = jax.vmap(lambda *task: loss(*task)[0].reshape(-1), (None, None, 0, 0))
    of_trials = jax.vmap(of_tasks, (0, None, None, None), out_axes=1)
    return (), of_trials(stepped, model_state, episodes(batch), task_rngs(rng, positions))

  _, losses = parallel.mean_over_tasks(of_chunk, (), local, tasks)
  return losses.swapaxes(0, 1)


def task_rngs(rng, positions):
  """A key for each task, by its position in the meta-batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(rng, positions)

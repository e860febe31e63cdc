"""Evaluation on fixed episodes: adapt, predict, mean and 95 % interval."""

import jax
import jax.numpy as jnp
import numpy as np

from metajax import keys, parallel

_BATCH = 100  # at most so many episodes a dispatch


def make(algorithm, objective, source, *, episodes, seed, chunk='auto', trajectory=False):
  """Compiles the evaluation of an algorithm on the first episodes of a source.

  Args:
    algorithm: built with the inner steps of evaluation.
    objective: its losses and metrics are what is reported.
    source: of the split's episodes.
    episodes: how many.
    seed: of the algorithm's own randomness, if it has any.
    chunk: see `parallel.chunk_size`.
    trajectory: report every inner step instead of the last alone.

  Returns:
    evaluate(params, model_state, resident) -> {metric: (episodes,) float32 array, or (episodes, inner_steps + 1) with
    `trajectory`}; `resident` is `source.resident`, replicated.
  """
  key = parallel.replicate(keys.from_seed(seed))
  size = min(_BATCH, episodes)
  chunk = parallel.chunk_size(chunk, size, elements(source))
  first, count = parallel.own_tasks(size, chunk)

  def metrics(params, model_state, episode, rng):
    def of_adapted(adapted):
      outputs = algorithm.predict(params, model_state, adapted, episode.query.inputs)
      if episode.class_ids.size:
        outputs = outputs[:, : episode.class_ids.size]  # a network may have more outputs than the task has classes
      losses = objective.losses(outputs, episode.query.targets)
      return {'loss': jnp.mean(losses), **objective.metrics(outputs, episode.query.targets)}

    if trajectory:
      # One inner step at a time: all at once would need the memory of as many query sets.
      return jax.lax.map(of_adapted, algorithm.trajectory(params, model_state, episode.support, rng))
    return of_adapted(algorithm.adapt(params, model_state, episode.support, rng))

  def step(state, constants, local):
    params, model_state = state
    resident, key, start = constants

    def chunk_metrics(positions, weights, batch):
      del weights
      tasks = source.decode(resident, batch)
      rngs = jax.vmap(jax.random.fold_in, (None, 0))(key, start + positions)
      return (), jax.vmap(metrics, (None, None, 0, 0))(params, model_state, tasks, rngs)

    return parallel.mean_over_tasks(chunk_metrics, (), local, size)[1]

  step = parallel.over_devices(step)

  def evaluate(params, model_state, resident):
    results = []
    for start in range(0, episodes, size):
      local = parallel.lay_out(source.sample(start + first, count), size, chunk)
      results.append(step((params, model_state), (resident, key, np.int32(start)), local))
    results = jax.device_get(results)
    return {name: np.concatenate([r[name] for r in results])[:episodes] for name in results[0]}

  return evaluate


def summarise(results):
  """Mean over episodes (axis 0) of each metric, and under NAME_ci95 the half width 1.96 std / sqrt(episodes)."""
  summary = {}
  for name, values in results.items():
    values = values.astype(np.float64)
    summary[name] = values.mean(axis=0)
    summary[f'{name}_ci95'] = 1.96 * values.std(axis=0) / np.sqrt(len(values))
  return summary


def elements(source):
  """Input values of one episode."""
  shapes = jax.eval_shape(source.decode, source.resident, source.sample(0, 1))
  return shapes.support.inputs.size + shapes.query.inputs.size

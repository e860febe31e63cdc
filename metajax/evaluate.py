"""Evaluation on fixed episodes: adapt, predict, mean and 95 % interval; of one model, and of several as an ensemble."""

import functools

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

  def metrics(params, model_state, episode, rng):
    of_outputs = functools.partial(score, objective, targets=episode.query.targets)
    if trajectory:
      return jax.vmap(of_outputs)(along(algorithm, params, model_state, episode, rng))
    return of_outputs(_outputs(algorithm, params, model_state, episode, rng))

  return _over_episodes(metrics, source, episodes, seed, chunk)


def make_outputs(algorithm, source, *, episodes, seed, chunk='auto'):
  """Compiles what `ensemble` needs of each model; arguments as in `make`.

  Returns:
    evaluate(params, model_state, resident) -> outputs (episodes, queries, way or values) float32, and the queries'
    targets (episodes, queries) int32, in regression (episodes, queries, values) float32; NumPy arrays.
  """

  def outputs(params, model_state, episode, rng):
    return _outputs(algorithm, params, model_state, episode, rng), episode.query.targets

  return _over_episodes(outputs, source, episodes, seed, chunk)


def ensemble(objective, results):
  """Metrics of the arithmetic mean of several models' outputs; of logits without a softmax.

  As in the code of MAML++ (Antoniou et al. 2019), `evaluated_test_set_using_the_best_models`.

  Args:
    objective: its losses and metrics are what is reported.
    results: for each model what `make_outputs` returns, of the same episodes; may be an iterator, so that one model is
      there at a time.

  Returns:
    {metric: (episodes,) float32 array}; {} of no model.
  """
  total, count, targets = 0.0, 0, None
  for outputs, queries in results:
    total, count, targets = total + outputs.astype(np.float64), count + 1, queries
  if not count:
    return {}
  metrics = jax.jit(jax.vmap(functools.partial(score, objective)))
  return jax.device_get(metrics((total / count).astype(np.float32), targets))


def score(objective, outputs, targets):
  """What is reported of one episode: {metric: scalar}, from outputs (queries, ...) and targets (queries, ...)."""
  each = {'loss': objective.losses(outputs, targets), **objective.metrics(outputs, targets)}
  return jax.tree.map(jnp.mean, each)


def along(algorithm, params, model_state, episode, rng):
  """Outputs on an episode's queries before adaptation and after each inner step, (inner_steps + 1, queries, ...).

  Without an inner loop to watch, those after adaptation alone, (1, queries, ...).
  """
  if algorithm.trajectory is None:
    return _outputs(algorithm, params, model_state, episode, rng)[None]
  support, inputs = episode.support, episode.query.inputs
  if algorithm.predict_along:
    outputs = algorithm.predict_along(params, model_state, support, inputs, rng)
  else:
    # One inner step at a time: all at once would need the memory of as many query sets.
    path = algorithm.trajectory(params, model_state, support, rng)
    outputs = jax.lax.map(lambda adapted: algorithm.predict(params, model_state, adapted, inputs), path)
  return _of_classes(outputs, episode)


def _outputs(algorithm, params, model_state, episode, rng):
  adapted = algorithm.adapt(params, model_state, episode.support, rng)
  return _of_classes(algorithm.predict(params, model_state, adapted, episode.query.inputs), episode)


def _of_classes(outputs, episode):
  """A network may have more outputs than the task has classes."""
  return outputs[..., : episode.class_ids.size] if episode.class_ids.size else outputs


def _over_episodes(function, source, episodes, seed, chunk):
  """Compiles `function(params, model_state, episode, rng)` for the first `episodes` of a source.

  Returns:
    evaluate(params, model_state, resident) -> a pytree like `function`'s, of NumPy arrays with a leading axis of
    `episodes`.
  """
  key = parallel.replicate(keys.from_seed(seed))
  size = min(_BATCH, episodes)
  chunk = parallel.chunk_size(chunk, size, elements(source))
  first, count = parallel.own_tasks(size, chunk)

  def step(state, constants, local):
    params, model_state = state
    resident, key, start = constants

    def of_chunk(positions, weights, batch):
      del weights
      tasks = source.decode(resident, batch)
      rngs = jax.vmap(jax.random.fold_in, (None, 0))(key, start + positions)
      return (), jax.vmap(function, (None, None, 0, 0))(params, model_state, tasks, rngs)

    return parallel.mean_over_tasks(of_chunk, (), local, size)[1]

  step = parallel.over_devices(step)

  def evaluate(params, model_state, resident):
    results = []
    for start in range(0, episodes, size):
      local = parallel.lay_out(source.sample(start + first, count), size, chunk)
      if results:
        # One dispatch at a time: collectives of several that do not depend on one another can block each other.
        results[-1] = jax.device_get(results[-1])
      results.append(step((params, model_state), (resident, key, np.int32(start)), local))
    results[-1] = jax.device_get(results[-1])
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:episodes], *results)

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

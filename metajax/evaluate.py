"""Evaluation on fixed episodes: adapt, predict, mean and 95 % interval; of one model, and of several as an ensemble."""

import functools
import hashlib
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from metajax import keys, parallel, processes

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
    evaluate(params, model_state, resident, partial=None) -> {metric: (episodes,) float32 array, or (episodes,
    inner_steps + 1) with `trajectory`}; `resident` is `source.resident`, replicated. With a `Partial` it resumes.
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


class Partial:
  """The results of an evaluation so far, in a file: one that was interrupted resumes.

  Args:
    folder: where the file goes.
    weights: pytree of what is evaluated, which the file is called after.
  """

  _EVERY = 10  # seconds

  def __init__(self, folder, weights):
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(jax.device_get(weights)):
      digest.update(np.ascontiguousarray(leaf))
    self._path = Path(folder) / f'partial-{digest.hexdigest()}.npz'
    self._time = time.monotonic()

  def read(self):
    """{metric: list of a value, or values, for each episode}; {} where there is nothing that can be read."""
    try:
      with np.load(self._path) as file:
        results = {name: file[name].tolist() for name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
      return {}
    print(f'going on after {len(next(iter(results.values())))} episodes that were evaluated before')
    return results

  def write(self, results):
    """Replaces the file if it is older than some seconds; `results` is a list of {metric: array}."""
    if time.monotonic() - self._time < self._EVERY:
      return
    temporary = self._path.with_suffix('.tmp.npz')
    temporary.parent.mkdir(parents=True, exist_ok=True)
    np.savez(temporary, **{name: np.concatenate([each[name] for each in results if each]) for name in results[-1]})
    temporary.replace(self._path)
    self._time = time.monotonic()

  def remove(self):
    """Removes the file, once the results are elsewhere."""
    self._path.unlink(missing_ok=True)


def _over_episodes(function, source, episodes, seed, chunk):
  """Compiles `function(params, model_state, episode, rng)` for the first `episodes` of a source.

  Returns:
    evaluate(params, model_state, resident, partial=None) -> a pytree like `function`'s, of NumPy arrays with a leading
    axis of `episodes`; for a `Partial` it is a dict.
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

  def batches(params, model_state, resident, done):
    """Yields what comes of each dispatch after the first `done` episodes.

    One is in flight at a time: collectives of several that do not depend on one another can block each other. The host
    lays out the next one meanwhile.
    """
    pending = None
    for start in range(done, episodes, size):
      local = parallel.lay_out(source.sample(start + first, count), size, chunk)
      if pending is not None:
        yield jax.device_get(pending)
      pending = step((params, model_state), (resident, key, np.int32(start)), local)
    if pending is not None:
      yield jax.device_get(pending)

  def evaluate(params, model_state, resident, partial=None):
    results = [_arrays(processes.from_first(partial.read))] if partial else []
    done = sum(len(jax.tree.leaves(result)[0]) for result in results if result)
    if done % size:
      results, done = [], 0
    for result in batches(params, model_state, resident, done):
      results.append(result)
      if partial:
        partial.write(results)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:episodes], *filter(None, results))

  return evaluate


def _arrays(lists):
  return {name: np.array(values, np.float32) for name, values in lists.items()}


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

"""The containers and the two interfaces that everything else is built from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any  # a pytree of arrays


class Examples(NamedTuple):
  inputs: Array  # (n, h, w, c) or (n, d) float32, normalised
  targets: Array  # (n,) int32 in [0, way); (n, d) float32 in regression


class Episode(NamedTuple):
  """One task's data; a meta-batch is the same container with a leading task axis."""

  support: Examples  # n = way * shot
  query: Examples  # n = way * query_shot
  class_ids: Array  # (way,) int32, the split's classes behind targets 0..way-1; (0,) in regression


class Algorithm(NamedTuple):
  """A few-shot learner: pure functions over ONE task, to be mapped over tasks by the caller.

  `params` is whatever the outer loop learns, `model_state` its running statistics (`{}` for most models), `adapted`
  what a task leaves behind (fast weights, prototypes): only `predict` looks inside.
  """

  init: Callable  # (rng, inputs) -> params, model_state
  adapt: Callable  # (params, model_state, support, rng) -> adapted
  predict: Callable  # (params, model_state, adapted, inputs) -> outputs (n, way)
  loss: Callable  # (params, model_state, episode, rng) -> losses (query,) or scalar, (model_state, metrics)
  # Like `adapt`, but with a leading axis of inner_steps + 1: before adaptation, after step 1, 2, ... None where
  # there is no inner loop.
  trajectory: Callable | None = None


class TaskWeighting(NamedTuple):
  """How much each task counts: the outer loss is the mean over tasks of coefficient times loss."""

  init: Callable  # (rng,) -> state
  coefficients: Callable  # (state, class_ids (tasks, way)) -> (tasks,) constants in the outer gradient
  update: Callable  # (state, losses (tasks,), class_ids, rng) -> state, metrics

"""The containers and the two interfaces that everything else is built from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any  # a pytree of arrays


class Examples(NamedTuple):
  inputs: Array  # (n, h, w, c) or (n, d) float32, normalised
  targets: Array  # (n,) integers in [0, way), see `losses.check_labels`; (n, d) float32 in regression


class Episode(NamedTuple):
  """One task's data; a meta-batch is the same container with a leading task axis."""

  support: Examples  # n = way * shot
  query: Examples  # n = way * query_shot
  class_ids: Array  # (way,) int32, the split's classes behind targets 0..way-1; (0,) in regression


class Phase(NamedTuple):
  """A part of training with a loss of its own, compiled when it begins."""

  start: int  # meta-updates done before it
  loss: Callable  # (params, model_state, episode, rng, step): `Algorithm.loss` after so many meta-updates, () int32


class Embedding(NamedTuple):
  """How a learner turns a task's images into features (n, d)."""

  support: Callable  # (params, model_state, inputs) -> features, the model_state that its queries need
  query: Callable  # (params, that model_state, inputs) -> features


class Algorithm(NamedTuple):
  """A few-shot learner: pure functions over ONE task, to be mapped over tasks by the caller.

  `params` is whatever the outer loop learns, `model_state` its running statistics (`{}` for most models) and, under
  'frozen', weights that nothing changes; `adapted` is what a task leaves behind (fast weights, prototypes): only
  `predict` looks inside.
  """

  init: Callable  # (rng, inputs) -> params, model_state
  adapt: Callable  # (params, model_state, support, rng) -> adapted
  predict: Callable  # (params, model_state, adapted, inputs) -> outputs (n, way)
  loss: Callable  # (params, model_state, episode, rng) -> losses (query,) or scalar, (model_state, metrics)
  # Like `adapt`, but with a leading axis of inner_steps + 1: before adaptation, after step 1, 2, ... None where
  # there is no inner loop.
  trajectory: Callable | None = None
  # (params, model_state, support, inputs, rng) -> outputs (inner_steps + 1, n, way), those of `predict` along the
  # trajectory, where there is a cheaper way than a prediction for each step.
  predict_along: Callable | None = None
  # Like `loss`, of several episodes at once: a leading axis of them in, losses (episodes, query) out. None where each
  # is by itself; otherwise they share a pass through the network.
  group_loss: Callable | None = None
  # What training takes in place of `loss`, if it changes with time: the first starts at 0, the others follow in order.
  phases: tuple[Phase, ...] = ()
  # Its network without the head, for a head of another kind; None where there is no such thing.
  embedding: Embedding | None = None
  # (params, model_state, network, statistics) -> the first two, begun with another run's network without its head,
  # and its running statistics. None where a run can only begin with weights of its own kind.
  adopt: Callable | None = None
  # Whether `loss` needs a support set. If not, training's episodes have all of their images in the query set, or are
  # batches of all classes.
  episodic: bool = True


class TaskWeighting(NamedTuple):
  """How much each task counts: the outer loss is the mean over tasks and queries of coefficient times loss.

  `classes` (tasks, query) int32 are the queries' classes in the training split, all 0 in regression; `losses` (tasks,
  query) those before the meta-update, (tasks, 1) of a learner that has one loss a task; metrics are scalars or vectors.
  `coefficients` cannot see the losses that they weight: one pass serves the losses and their gradient. A weighting by
  the losses of the same meta-update has `from_losses`.
  """

  init: Callable  # (rng,) -> state
  coefficients: Callable  # (state, classes) -> (tasks,) or (tasks, query), constants in the outer gradient
  update: Callable  # (state, losses, classes, rng) -> state, metrics
  # (state, rng) -> coefficients (trials, tasks). If there is such a function, every meta-update takes a trial outer
  # step with each of these coefficients, and `update` gets the losses after it, (trials, tasks, query), as one more
  # argument; its rng is the one that was given here.
  trials: Callable | None = None
  # (state, losses, classes) -> coefficients like those of `coefficients`, which this takes the place of. It costs a
  # forward pass: the losses come first, then their gradient with these coefficients as constants.
  from_losses: Callable | None = None

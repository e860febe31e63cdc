"""The gradient of a meta-batch under weights, trial steps, and every weighting with every algorithm."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import outer_loop, parallel, train
from metajax.data.episodes import Source
from metajax.data.table import ClassTable
from metajax.errors import UserError
from metajax.types import Episode, Examples, Phase
from metajax.weighting import spsa, spsa_look_ahead, spsa_per_class, tilted

# A task is its targets: the loss of query q is (w - target_q)^2, its derivative 2 (w - target_q).
TARGETS = np.array([[0.0, 1.0], [2.0, 5.0], [-3.0, 0.5]], np.float32)
W = 0.5


def loss(params, model_state, targets, rng):
  return jnp.square(params['w'] - targets), (model_state, {})


def on_devices(function, chunk=2):
  """What `function(local)` returns inside a step on the meta-batch TARGETS."""
  step = parallel.over_devices(lambda state, constants, local: function(local))
  return jax.device_get(step(jnp.zeros(()), jnp.zeros(()), parallel.lay_out(TARGETS, len(TARGETS), chunk)))


def gradient(local, **coefficients):
  return outer_loop.gradient(
    loss, {'w': jnp.float32(W)}, {}, lambda x: x, local, jax.random.key(0), tasks=len(TARGETS), **coefficients
  )


@pytest.mark.parametrize('chunk', [1, 3])
def test_coefficients_of_tasks_and_of_queries(chunk):
  slopes = 2 * (W - TARGETS)
  of_tasks, of_queries = np.array([1.0, 0.5, -2.0]), np.arange(6.0).reshape(3, 2)
  grads, _, losses, _ = on_devices(lambda local: gradient(local, coefficients=jnp.array(of_tasks)), chunk)
  np.testing.assert_allclose(grads['w'], np.mean(of_tasks * slopes.mean(axis=1)), rtol=1e-6)
  np.testing.assert_allclose(losses, np.square(W - TARGETS), rtol=1e-6)
  grads, *_ = on_devices(lambda local: gradient(local, coefficients=jnp.array(of_queries)), chunk)
  np.testing.assert_allclose(grads['w'], np.mean(of_queries * slopes), rtol=1e-6)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'coefficients': jnp.ones(2)}, r'coefficients have shape \(2,\), but there are 3 tasks'),
    ({'coefficients': jnp.ones((1, 2))}, r'coefficients have shape \(1, 2\), but there are 3 tasks'),
    ({'coefficients': jnp.ones(3), 'trials': jnp.ones((3, 4))}, r'trials have shape \(3, 4\), not \(trials, 3\)'),
  ],
)
def test_coefficients_of_another_number_of_tasks_are_refused(given, message):
  with pytest.raises(UserError, match=message):
    on_devices(lambda local: gradient(local, **given), 1)


def test_trials_are_outer_steps_of_the_optimiser_with_their_own_coefficients():
  coefficients, trials = np.array([1.0, 2.0, 3.0]), np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 4.0]])
  tx = optax.chain(optax.trace(0.9), optax.scale(-0.1))
  params = {'w': jnp.float32(W)}
  opt_state = tx.update({'w': jnp.float32(7.0)}, tx.init(params))[1]  # a momentum from before

  def both(local):
    grads, *_ = gradient(local, coefficients=jnp.array(coefficients), trials=jnp.array(trials))
    losses = outer_loop.trial_losses(
      loss, tx, opt_state, params, {}, grads, lambda x: x, local, jax.random.key(0), tasks=3
    )
    return grads, losses

  grads, losses = on_devices(both)
  expected = np.mean(np.concatenate([coefficients[None], trials]) * (2 * (W - TARGETS)).mean(axis=1), axis=1)
  np.testing.assert_allclose(grads['w'], expected, rtol=1e-6)
  stepped = W - 0.1 * (expected + 0.9 * 7)
  np.testing.assert_allclose(losses, np.square(stepped[:, None, None] - TARGETS), rtol=1e-5)


def test_the_look_ahead_pair_prefers_the_weighting_that_helps(monkeypatch):
  """Task 2 pulls w to where the mean loss is least, task 0 away from there; task 1 pulls nowhere."""
  targets = np.array([[1.0], [0.0], [-4.0]], np.float32)  # the mean loss is least at -1, and w is at 0
  weighting = spsa_look_ahead.make(tasks=3)
  state, change = weighting.init(None), []
  for signs in itertools.product((-1.0, 1.0), repeat=3):
    monkeypatch.setattr(spsa_look_ahead.spsa, 'signs', lambda rng, shape, signs=signs: jnp.array(signs))
    trials = weighting.trials(state, None)
    stepped = -0.1 * np.mean(trials * (0 - 2 * targets[:, 0]), axis=1)
    after = np.square(stepped[:, None, None] - targets)
    moved, metrics = weighting.update(state, np.square(targets), None, None, jnp.array(after))
    np.testing.assert_allclose(metrics['pair'], after.mean(axis=(1, 2)), rtol=1e-6)
    change.append(weighting.coefficients(moved, None) - 1)
  change = np.mean(change, axis=0)
  assert change[2] > 0.1 and change[0] < -0.02


# The whole step on the same tasks; the queries of task t are of the classes CLASSES[t].
CLASSES = np.array([[3, 0], [1, 2], [2, 3]], np.int32)
WEIGHTS = np.array([0.5, 2.0, 1.0, 4.0], np.float32)
RATE = 0.1


def quadratic_step(weighting, weights):
  """A meta-update by gradient descent from w = W: w and weights after it, its metrics, the signs that it drew."""
  order = np.array([[1, 0]], np.int32)  # the first query is of the second class of the episode

  def decode(resident, targets):
    queries = Examples(targets, jnp.broadcast_to(order, targets.shape))
    return Episode(queries, queries, jnp.flip(resident[(targets[:, :1] == TARGETS[:, 0]).argmax(axis=1)], axis=1))

  def step(state, constants, local):
    return train.train_step(state, constants, local, experiment=experiment, tasks=3)

  experiment = experiment_lib.Experiment(
    splits={},
    sources={'train': Source(None, decode, None, 4)},
    resident=None,
    objective=None,
    algorithm=None,
    phases=(Phase(0, lambda params, state, episode, rng, step: loss(params, state, episode.query.inputs, rng)),),
    weighting=weighting,
    tx=optax.sgd(RATE),
    evaluation=None,
    example=None,
  )
  params = {'w': jnp.float32(W)}
  before = weighting.init(None)._replace(update=jnp.int32(1), weights=jnp.array(weights))
  state = train.TrainState(jnp.int32(5), params, {}, experiment.tx.init(params), before)
  rng = jax.random.key(3)
  state, metrics = parallel.over_devices(step)(state, (jnp.array(CLASSES), rng), parallel.lay_out(TARGETS, 3, 2))
  signs = spsa.signs(jax.random.split(jax.random.fold_in(rng, 5))[1], (3,))
  return float(state.params['w']), np.asarray(state.weighting.weights), metrics, np.asarray(signs)


def stepped(coefficients):
  """w after the step with coefficients of tasks, or of queries."""
  coefficients = coefficients if coefficients.ndim == 2 else coefficients[:, None]
  return W - RATE * np.mean(coefficients * 2 * (W - TARGETS))


def test_a_step_weights_tasks_and_moves_their_weights_by_the_losses_before_it():
  weighting = spsa.make(tasks=3, gain=('constant', 0.1), radius=('constant', 0.1))
  w, weights, metrics, signs = quadratic_step(weighting, WEIGHTS[:3])
  np.testing.assert_allclose(w, stepped(1 / WEIGHTS[:3] ** 2), rtol=1e-5)
  losses = np.square(W - TARGETS).mean(axis=1)
  pair = [np.mean(losses / x**2 + np.log(x**2)) for x in (WEIGHTS[:3] + 0.1 * signs, WEIGHTS[:3] - 0.1 * signs)]
  np.testing.assert_allclose(metrics['pair'], pair, rtol=1e-5)
  np.testing.assert_allclose(weights, WEIGHTS[:3] - 0.1 * signs * (pair[0] - pair[1]) / 0.2, rtol=1e-4)
  np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-6)


def test_a_step_weights_queries_by_their_class():
  w, *_ = quadratic_step(spsa_per_class.make(num_classes=4), WEIGHTS)
  np.testing.assert_allclose(w, stepped(1 / WEIGHTS[CLASSES] ** 2), rtol=1e-5)


def test_a_step_tries_both_perturbed_weightings_and_takes_neither():
  def relative(weights):
    return weights**-2 / np.mean(weights**-2)

  weighting = spsa_look_ahead.make(tasks=3, gain=('constant', 0.3), radius=('constant', 0.2))
  w, weights, metrics, signs = quadratic_step(weighting, WEIGHTS[:3])
  np.testing.assert_allclose(w, stepped(relative(WEIGHTS[:3])), rtol=1e-5)
  tried = [stepped(relative(WEIGHTS[:3] * np.exp(side * 0.2 * signs))) for side in (1, -1)]
  pair = [np.mean(np.square(x - TARGETS)) for x in tried]
  np.testing.assert_allclose(metrics['pair'], pair, rtol=1e-5)
  np.testing.assert_allclose(weights, WEIGHTS[:3] * np.exp(-0.3 * signs * (pair[0] - pair[1]) / 0.4), rtol=1e-4)


class Unused(NamedTuple):
  """The state of a weighting that has none."""

  update: jax.Array = jnp.int32(0)
  weights: jax.Array = jnp.zeros(3)


@pytest.mark.parametrize('tilt', [-2.0, 0.0, 0.5])
def test_a_tilted_step_is_the_gradient_of_the_tilted_loss(tilt):
  """Of the losses of the same meta-update, over chunks and devices, in closed form."""

  def tilted_loss(w):
    each = jnp.mean(jnp.square(w - TARGETS), axis=1)
    return jax.nn.logsumexp(tilt * each, b=1 / 3) / tilt if tilt else jnp.mean(each)

  made = tilted.make(tasks=3, tilt=tilt)
  w, _, metrics, _ = quadratic_step(made._replace(init=lambda rng: Unused()), np.zeros(3))
  np.testing.assert_allclose(w, W - RATE * jax.grad(tilted_loss)(W), rtol=1e-5)
  each = np.square(W - TARGETS).mean(1)
  expected = np.exp(tilt * each) / np.exp(tilt * each).mean()
  np.testing.assert_allclose(metrics['weights'], expected, rtol=1e-5)


KINDS = ('spsa', 'spsa_per_class', 'spsa_look_ahead', 'tilted')  # of tasks, of queries, with trials, of the losses
PAIRS = [('maml', weighting) for weighting in config_lib.names('weighting')]
PAIRS += [(name, kind) for name in config_lib.names('algorithm') if name != 'maml' for kind in KINDS]


@functools.cache
def experiment(algorithm, weighting, group=1):
  config = {
    'total_steps': 1,
    'data': {'name': 'glyphs', 'classes': (6, 4, 4), 'images_per_class': 4, 'size': 8}
    | {'tasks': 3, 'group': group, 'way': 3, 'shot': 1, 'query_shot': 2},
    'model': {'name': 'mlp', 'hidden': (4,)},
    'algorithm': {'name': algorithm} | ({'per_step_norm': False} if algorithm == 'mamlpp' else {}),
    'weighting': {'name': weighting},
  }
  return experiment_lib.make(config_lib.complete(config), None)


def traced_step(experiment, run=jax.eval_shape, phase=0):
  step = parallel.over_devices(functools.partial(train.train_step, experiment=experiment, tasks=3, phase=phase))
  state = train.init_state(experiment, seed=0)
  constants = experiment.resident, parallel.replicate(jax.random.key(0))
  return state, run(step, state, constants, parallel.lay_out(experiment.sources['train'].sample(0, 3), 3, 2))


@pytest.mark.smoke
@pytest.mark.parametrize(('algorithm', 'weighting'), PAIRS)
def test_every_algorithm_takes_a_step_with_every_kind_of_weighting(algorithm, weighting, monkeypatch):
  """Traced only; the numbers are those of the tests of each. What goes in can come out: the same shapes and types."""
  monkeypatch.setattr(experiment_lib, 'superclass_ids', lambda data: np.array([0, 0, 1, 1, 2, 2]))
  made = experiment(algorithm, weighting)
  if algorithm == 'reptile' and 'class' in weighting:
    with pytest.raises(UserError, match='one loss for a task'):
      traced_step(made)
    return
  for phase in range(len(made.phases)):
    before, (after, metrics) = traced_step(made, phase=phase)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert {'loss', 'accuracy', 'grad_norm'} <= metrics.keys()
    assert (weighting == 'uniform') or any(name.startswith('weights') for name in metrics)


@pytest.mark.parametrize('algorithm', ['maml', 'protonet'])
def test_a_task_of_several_episodes_has_their_mean_loss(algorithm):
  """Without batch normalisation episodes share nothing, so a group is as good as its episodes by themselves."""
  grouped = experiment(algorithm, 'spsa', group=2)
  _, (_, metrics) = traced_step(grouped, run=lambda step, *args: step(*args))
  single = grouped.algorithm
  params, model_state = (before := train.init_state(grouped, seed=0)).params, before.model_state
  plain = experiment(algorithm, 'uniform').sources['train']
  episodes = plain.decode(plain.resident, plain.sample(0, 6))
  losses = jax.jit(jax.vmap(single.loss, (None, None, 0, None)))(params, model_state, episodes, None)[0]
  np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-5)
  classes = np.take_along_axis(np.asarray(episodes.class_ids), np.asarray(episodes.query.targets), axis=1)
  later = grouped.sources['train'].sample(1, 2)
  assert_same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  assert_same(later, jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), plain.sample(2, 4)))
  seen = train.query_classes(grouped.sources['train'].decode(plain.resident, grouped.sources['train'].sample(0, 3)))
  np.testing.assert_array_equal(seen, classes.reshape(3, -1))


def test_groups_and_classes_of_regression():
  config = {'total_steps': 1, 'data': {'name': 'sinusoid', 'tasks': 3, 'group': 2, 'shot': 4, 'query_shot': 5}}
  config |= {'model': {'name': 'mlp', 'hidden': (4,)}, 'algorithm': {'name': 'maml'}, 'weighting': {'name': 'spsa'}}
  made = experiment_lib.make(config_lib.complete(config), None)
  source = made.sources['train']
  classes = train.query_classes(source.decode(source.resident, source.sample(0, 3)))
  assert classes.shape == (3, 10) and not classes.any()
  before, (after, _) = traced_step(made)
  assert jax.tree.structure(before) == jax.tree.structure(after)


def test_superclasses_are_numbered_by_name():
  table = ClassTable(None, None, None, None, names=('a', 'b', 'c'), superclasses=('tree', 'cat', 'tree'))
  np.testing.assert_array_equal(experiment_lib.superclass_ids(table), [1, 0, 1])
  assert experiment_lib.superclass_ids(table._replace(superclasses=())) is None

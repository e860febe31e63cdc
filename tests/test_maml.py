"""MAML: the closed form of one weight, finite differences of small networks, and what its options promise."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metajax import losses, networks
from metajax.algorithms import anil, maml
from metajax.models import layers, mlp
from metajax.types import Episode, Examples

WAY = 3


def draw_episode(seed, shape, *, way=WAY, shot=2, query_shot=3):
  """Random inputs and balanced labels, in float64 where that is enabled."""
  rng = np.random.default_rng(seed)
  examples = [
    Examples(jnp.array(rng.standard_normal((way * n, *shape))), jnp.repeat(jnp.arange(way), n))
    for n in (shot, query_shot)
  ]
  return Episode(*examples, jnp.arange(way))


def compiled(learner):
  """The same functions, each compiled once."""
  names = 'init', 'adapt', 'predict', 'loss', 'trajectory'
  return learner._replace(**{name: jax.jit(getattr(learner, name)) for name in names})


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), a, b)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# One weight: the support loss is (w - 0.3)^2 and the query loss (w - 2)^2.


class Constant(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.constant(1.5), (1,))
    return jnp.broadcast_to(w[None], (x.shape[0], 1))


def constant_episode():
  support = Examples(jnp.zeros((4, 1)), jnp.full((4, 1), 0.3))
  return Episode(support, Examples(jnp.zeros((5, 1)), jnp.full((5, 1), 2.0)), jnp.zeros(0, jnp.int32))


@pytest.mark.parametrize('checkpoint', [False, True])
@pytest.mark.parametrize('first_order', [False, True])
@pytest.mark.parametrize('steps', [1, 3])
def test_meta_gradient_of_one_weight_is_the_closed_form(steps, first_order, checkpoint):
  learner = maml.make(
    Constant(),
    objective=losses.REGRESSION,
    inner_steps=steps,
    inner_lr=0.2,
    first_order=first_order,
    checkpoint=checkpoint,
  )

  def mean_loss(params):
    values, (model_state, metrics) = learner.loss(params, {}, constant_episode(), None)
    assert values.shape == (5,) and model_state == {} and metrics == {}
    return values.mean()

  with jax.numpy_rank_promotion('raise'):
    params, model_state = learner.init(jax.random.key(0), jnp.zeros((1, 1)))
    value, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
  assert model_state == {} and params['w'] == 1.5
  decay = (1 - 2 * 0.2) ** steps
  fast = 0.3 + decay * (1.5 - 0.3)
  np.testing.assert_allclose(value, (fast - 2) ** 2, rtol=1e-5)
  np.testing.assert_allclose(grads['w'], [2 * (fast - 2) * (1 if first_order else decay)], rtol=1e-5)


# Networks: finite differences, a loop of plain gradient steps.


def mean_loss(learner, model_state=None):
  return lambda params, episode: learner.loss(params, model_state or {}, episode, None)[0].mean()


class TwoBlocks(nn.Module):
  """As much of a Conv4 as has everything: the second block passes derivatives on to the first."""

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      kernel = self.param(f'conv{i}', nn.initializers.glorot_uniform(), (3, 3, x.shape[-1], 2))
      x = layers.ConvBlock('pool', name=f'norm{i}')(x, kernel)
    return nn.Dense(WAY, name='head')(x.reshape(len(x), -1))


@pytest.mark.parametrize(
  ('model', 'shape'), [(mlp.make(WAY, hidden=(5,)), (4,)), (TwoBlocks(), (6, 4, 1))], ids=['mlp', 'blocks']
)
def test_second_order_meta_gradient_is_that_of_finite_differences(model, shape):
  """Central differences in float64 along random directions.

  ReLU and pooling have kinks, but a move of 1e-6 rarely meets one: for these seeds it does not.
  """
  with jax.enable_x64(True):
    episode = draw_episode(1, shape)
    learner = maml.make(model, inner_steps=2, inner_lr=0.1)
    params, model_state = jax.jit(learner.init)(jax.random.key(1), episode.support.inputs)
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float64), params))
    gradient = jax.jit(jax.value_and_grad(lambda flat: mean_loss(learner, model_state)(unravel(flat), episode)))
    _, exact = gradient(flat)
    along = np.random.default_rng(0).standard_normal((20, flat.size))
    differences = [(gradient(flat + 1e-6 * d)[0] - gradient(flat - 1e-6 * d)[0]) / 2e-6 for d in along]
    np.testing.assert_allclose(along @ exact, differences, rtol=1e-5, atol=1e-6 * np.abs(differences).max())


@pytest.fixture(scope='module')
def small():
  """An MLP, its weights and four episodes, stacked."""
  model = mlp.make(WAY, hidden=(8,))
  episodes = jax.tree.map(lambda *x: jnp.stack(x), *[draw_episode(i, (4,)) for i in range(4)])
  params, _ = jax.jit(maml.make(model).init)(jax.random.key(0), episodes.support.inputs[0])
  return model, params, episodes


def first(episodes):
  return jax.tree.map(lambda x: x[0], episodes)


def cross_entropy(model, params, examples):
  log_probabilities = jax.nn.log_softmax(model.apply({'params': params}, examples.inputs))
  return -jnp.mean(log_probabilities[jnp.arange(len(examples.targets)), examples.targets])


def plain_gradient(model, params, examples):
  return jax.device_get(_plain_gradient(model, params, examples))


_plain_gradient = jax.jit(jax.grad(cross_entropy, argnums=1), static_argnums=0)


def gradient_steps(model, params, support, steps, rate, moved):
  """Plain gradient descent on the weights of the layers `moved`, one step after the other."""
  for _ in range(steps):
    grads = plain_gradient(model, params, support)
    params = {
      name: jax.tree.map(lambda p, g: np.asarray(p) - rate * g, layer, grads[name]) if name in moved else layer
      for name, layer in params.items()
    }
  return params


def test_first_order_gradient_is_the_query_gradient_at_the_fast_weights(small):
  model, params, episodes = small
  episode = first(episodes)
  learner = maml.make(model, inner_steps=2, inner_lr=0.5, first_order=True)
  grads = jax.jit(jax.grad(mean_loss(learner)))(params, episode)
  fast = gradient_steps(model, params, episode.support, 2, 0.5, params)
  assert_close(grads, plain_gradient(model, fast, episode.query), rtol=1e-4, atol=1e-6)
  exact = jax.jit(jax.grad(mean_loss(maml.make(model, inner_steps=2, inner_lr=0.5))))(params, episode)
  assert (
    np.max(np.abs(np.subtract(grads['head']['kernel'], exact['head']['kernel']))) > 1e-2
  )  # the second order is not negligible
  (_, (_, metrics)) = jax.jit(learner.loss)(params, {}, episode, None)
  predicted = np.argmax(jax.jit(model.apply)({'params': fast}, episode.query.inputs), axis=-1)
  np.testing.assert_array_equal(metrics['accuracy'], predicted == np.asarray(episode.query.targets))


@pytest.mark.parametrize('make', [maml.make, anil.make])
def test_vmap_over_tasks_is_a_loop_over_tasks(small, make):
  model, params, episodes = small
  gradient = jax.value_and_grad(mean_loss(make(model, inner_steps=2, inner_lr=0.5)))
  together = jax.jit(jax.vmap(gradient, (None, 0)))(params, episodes)
  one = jax.jit(gradient)
  each = [one(params, jax.tree.map(lambda x, i=i: x[i], episodes)) for i in range(4)]
  assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *each), rtol=1e-4, atol=1e-6)


def test_anil_leaves_the_body_bitwise_as_it_was_and_moves_the_head(small):
  model, params, episodes = small
  support = first(episodes).support
  learner = anil.make(model, inner_steps=3, inner_lr=0.5)
  adapted = jax.jit(learner.adapt)(params, {}, support, None).params
  assert adapted.keys() == {'layer0', 'head'}
  assert_equal(adapted['layer0'], params['layer0'])
  assert_close(adapted, gradient_steps(model, params, support, 3, 0.5, ['head']), rtol=1e-4, atol=1e-6)
  assert (adapted['head']['kernel'] != params['head']['kernel']).all()
  grads = jax.jit(jax.grad(mean_loss(learner)))(params, first(episodes))
  assert np.abs(grads['layer0']['kernel']).max() > 1e-3  # the outer loop still moves the body


def test_unknown_inner_params_are_refused_by_name():
  learner = maml.make(mlp.make(WAY), inner_params=('head', 'haed', 'tail'))
  with pytest.raises(ValueError, match=r"\['haed', 'tail'\].*\['head', 'layer0', 'layer1'\]"):
    jax.eval_shape(learner.init, jax.random.key(0), jnp.zeros((1, 4)))


@pytest.mark.parametrize('inner_params', [(), ('head',)])
def test_trajectory_goes_from_the_initial_weights_to_those_of_adapt(small, inner_params):
  model, params, episodes = small
  support = first(episodes).support
  learner = compiled(maml.make(model, inner_steps=3, inner_lr=0.5, inner_params=inner_params))
  trajectory = learner.trajectory(params, {}, support, None)
  assert_equal(jax.tree.map(lambda x: x[0], trajectory.params), params)
  assert_close(jax.tree.map(lambda x: x[-1], trajectory), learner.adapt(params, {}, support, None), rtol=1e-6)
  moved = inner_params or params
  expected = [gradient_steps(model, params, support, steps, 0.5, moved) for steps in range(4)]
  assert_close(trajectory.params, jax.tree.map(lambda *x: jnp.stack(x), *expected), rtol=1e-4, atol=1e-6)
  inputs = first(episodes).query.inputs
  outputs = [model.apply({'params': fast}, inputs) for fast in expected]
  assert_close(learner.predict_along(params, {}, support, inputs, None), jnp.stack(outputs), rtol=1e-4, atol=1e-5)


def test_evaluation_may_take_other_inner_steps_than_training(small):
  model, params, episodes = small
  episode = first(episodes)
  for steps in (0, 7):
    learner = compiled(maml.make(model, inner_steps=steps, inner_lr=0.5))
    adapted = learner.adapt(params, {}, episode.support, None)
    expected = gradient_steps(model, params, episode.support, steps, 0.5, params)
    assert_close(adapted.params, expected, rtol=1e-4, atol=1e-6)
    logits = learner.predict(params, {}, adapted, episode.query.inputs)
    assert_close(logits, model.apply({'params': expected}, episode.query.inputs), rtol=1e-4, atol=1e-5)


# Batch normalisation.


class Normed(nn.Module):
  """Normalises its input, so that the statistics are known, and again after a layer that the inner loop moves."""

  flax: bool = False

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      if self.flax:
        x = nn.relu(nn.BatchNorm(use_running_average=False, name=f'norm{i}')(x))
      else:
        x = nn.relu(layers.BatchNorm(name=f'norm{i}')(x))
      if i == 0:
        x = nn.Dense(4, name='hidden')(x)
    return nn.Dense(WAY, name='head')(x.mean(axis=(1, 2)))


@functools.cache
def normed(mode, **settings):
  """A learner in a mode, its params and state, and an episode."""
  episode = draw_episode(5, (3, 3, 2))
  learner = compiled(maml.make(Normed(), inner_steps=1, inner_lr=0.5, batch_norm=mode, **settings))
  params, model_state = learner.init(jax.random.key(3), draw_episode(6, (3, 3, 2)).support.inputs)
  return learner, params, model_state, episode


@pytest.mark.parametrize('mode', networks.BATCH_NORM_MODES)
def test_a_query_sees_other_queries_in_transductive_mode_alone(mode):
  learner, params, model_state, episode = normed(mode)
  adapted = learner.adapt(params, model_state, episode.support, None)
  queries = episode.query.inputs
  batches = queries, queries[:1], queries.at[1:].multiply(3.0)
  together, one, others = [learner.predict(params, model_state, adapted, inputs) for inputs in batches]
  assert together.shape == (9, WAY)
  if mode == 'transductive':
    assert np.abs(together[0] - others[0]).min() > 1e-3 and np.abs(together[0] - one[0]).min() > 1e-3
  else:
    np.testing.assert_allclose(together[0], one[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(together[0], others[0], rtol=1e-5, atol=1e-6)


def by_hand(params, x, statistics=None):
  """NumPy: logits of `Normed`, and {layer: {mean, variance}} of the batch; the statistics given normalise instead."""
  own, (params, x) = {}, jax.device_get((params, x))
  for layer in ('norm0', 'norm1'):
    own[layer] = {'mean': x.mean((0, 1, 2)), 'var': x.var((0, 1, 2))}
    used = (statistics or own)[layer]
    x = (x - used['mean']) / np.sqrt(used['var'] + 1e-5) * params[layer]['scale'] + params[layer]['bias']
    x = np.maximum(x, 0)
    if layer == 'norm0':
      x = x @ params['hidden']['kernel'] + params['hidden']['bias']
  return x.mean((1, 2)) @ params['head']['kernel'] + params['head']['bias'], own


@pytest.mark.parametrize('mode', networks.BATCH_NORM_MODES)
def test_queries_are_normalised_by_the_statistics_that_the_mode_names(mode):
  learner, params, model_state, episode = normed(mode)
  adapted = learner.adapt(params, model_state, episode.support, None)
  assert np.abs(adapted.params['hidden']['kernel'] - params['hidden']['kernel']).max() > 1e-3
  query_statistics = by_hand(adapted.params, episode.query.inputs)[1]
  statistics = {
    'transductive': query_statistics,
    'support': by_hand(adapted.params, episode.support.inputs)[1],
    'running': model_state['batch_stats'],
  }[mode]
  logits = learner.predict(params, model_state, adapted, episode.query.inputs)
  expected, _ = by_hand(adapted.params, episode.query.inputs, statistics)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

  # Training differs from prediction in mode 'running' alone.
  expected, _ = by_hand(adapted.params, episode.query.inputs, query_statistics if mode == 'running' else statistics)
  values, _ = learner.loss(params, model_state, episode, None)
  np.testing.assert_allclose(values, losses.CLASSIFICATION.losses(expected, episode.query.targets), rtol=1e-4)


def test_trajectory_normalises_each_step_by_its_own_support_statistics():
  learner, params, model_state, episode = normed('support')
  trajectory = learner.trajectory(params, model_state, episode.support, None)
  for step in range(2):
    fast, state = jax.tree.map(lambda x, step=step: x[step], trajectory)
    assert_close(state['batch_stats'], by_hand(fast, episode.support.inputs)[1], rtol=1e-4, atol=1e-6)
  along = learner.predict_along(params, model_state, episode.support, episode.query.inputs, None)
  steps = [jax.tree.map(lambda x, k=k: x[k], trajectory) for k in range(2)]
  outputs = [by_hand(fast, episode.query.inputs, state['batch_stats'])[0] for fast, state in steps]
  assert_close(along, jnp.stack(outputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('momentum', 'settings'), [(0.9, {}), (0.6, {'batch_norm_momentum': 0.6})])
def test_running_mode_averages_the_statistics_of_queries_and_the_others_keep_the_state(momentum, settings):
  learner, params, model_state, episode = normed('running', **settings)
  adapted = learner.adapt(params, model_state, episode.support, None)
  assert_equal(adapted.model_state, model_state)
  updated = learner.loss(params, model_state, episode, None)[1][0]
  _, statistics = by_hand(adapted.params, episode.query.inputs)
  expected = jax.tree.map(
    lambda old, new: momentum * old + (1 - momentum) * new, model_state['batch_stats'], statistics
  )
  assert updated.keys() == {'batch_stats'}
  assert_close(updated['batch_stats'], expected, rtol=1e-4, atol=1e-6)
  for mode in ('transductive', 'support'):
    learner, params, model_state, episode = normed(mode)
    assert_equal(learner.loss(params, model_state, episode, None)[1][0], model_state)


def test_a_model_with_flax_batch_norm_works_in_transductive_mode():
  episode = draw_episode(5, (3, 3, 2))
  results = []
  for flax in (False, True):
    learner = maml.make(Normed(flax), inner_steps=2, inner_lr=0.5)
    params, model_state = jax.jit(learner.init)(jax.random.key(3), episode.support.inputs)
    assert model_state.keys() == {'batch_stats'}
    results.append(jax.jit(jax.value_and_grad(mean_loss(learner, model_state)))(params, episode))
  assert_close(*results, rtol=1e-3, atol=1e-5)


def test_an_unknown_batch_norm_mode_is_refused():
  with pytest.raises(ValueError, match="transductive, support, running, not 'transductiv'"):
    maml.make(mlp.make(WAY), batch_norm='transductiv')

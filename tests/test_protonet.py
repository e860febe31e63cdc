"""Prototypical networks against NumPy, and what normalises in each mode."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from metajax import losses, networks
from metajax.algorithms import protonet
from metajax.errors import UserError
from metajax.models import conv4, layers, mlp
from tests.test_maml import assert_close, draw_episode

WAY, SHOT, QUERIES = 3, 2, 3


class Identity(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x


class Normed(nn.Module):
  """Batch normalisation and nothing else."""

  @nn.compact
  def __call__(self, x):
    return layers.BatchNorm()(x[:, None, None])[:, 0, 0]


def stacked(*seeds, shape=(4,)):
  return jax.tree.map(lambda *x: jnp.stack(x), *[draw_episode(s, shape, way=WAY, shot=SHOT) for s in seeds])


def expected_logits(support, query, scale):
  """Minus scaled mean squared differences to the class means, by a loop."""
  means = [np.mean(support.inputs[np.asarray(support.targets) == k], axis=0) for k in range(WAY)]
  return np.array([[-scale * np.mean(np.square(q - m)) for m in means] for q in np.asarray(query.inputs)])


@pytest.mark.parametrize(('scale', 'learn_scale', 'factor'), [(1.0, True, 1.0), (2.5, False, 2.5), (0.0, False, 4.0)])
def test_logits_and_losses_are_those_of_a_loop(scale, learn_scale, factor):
  learner = protonet.make(Identity(), way=WAY, scale=scale, learn_scale=learn_scale)
  episode = draw_episode(0, (4,))
  params, state = learner.init(jax.random.key(0), episode.support.inputs)
  assert state == {} and ('scale' in params) == learn_scale
  adapted = learner.adapt(params, state, episode.support, None)
  logits = learner.predict(params, state, adapted, episode.query.inputs)
  expected = expected_logits(episode.support, episode.query, factor)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  values, (_, metrics) = learner.loss(params, state, episode, None)
  picked = log_softmax(expected, axis=1)[np.arange(len(expected)), np.asarray(episode.query.targets)]
  np.testing.assert_allclose(values, -picked, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(metrics['accuracy'], expected.argmax(1) == np.asarray(episode.query.targets))


def test_logits_permute_with_the_classes_whatever_the_order_of_the_images():
  learner = protonet.make(mlp.make(None, hidden=(5,)), way=WAY)
  episode = draw_episode(1, (4,))
  params, state = learner.init(jax.random.key(0), episode.support.inputs)

  def logits(support):
    return learner.predict(params, state, learner.adapt(params, state, support, None), episode.query.inputs)

  renamed = jnp.array([2, 0, 1])
  support = episode.support._replace(targets=renamed[episode.support.targets])
  shuffled = jax.tree.map(lambda x: x[::-1], support)
  assert_close(logits(shuffled)[:, renamed], logits(episode.support), rtol=1e-4, atol=1e-6)


def test_the_head_is_left_out_and_way_may_differ():
  conv = protonet.make(conv4.make(WAY, width=2), way=WAY)
  params, state = jax.eval_shape(conv.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
  assert 'head' not in params['embedding'] and 'batch_stats' in state
  params, state = protonet.make(mlp.make(WAY, hidden=(5,)), way=WAY).init(jax.random.key(0), jnp.zeros((1, 4)))
  episode = draw_episode(0, (4,), way=7, shot=1, query_shot=1)
  wider = protonet.make(mlp.make(WAY, hidden=(5,)), way=7)
  adapted = wider.adapt(params, state, episode.support, None)
  assert wider.predict(params, state, adapted, episode.query.inputs).shape == (7, 7)


def normalised(x, by):
  return (x - by.mean(axis=0)) / np.sqrt(by.var(axis=0) + 1e-5)


@pytest.mark.parametrize('mode', networks.BATCH_NORM_MODES)
def test_what_normalises_an_episode_in_evaluation(mode):
  learner = protonet.make(Normed(), way=WAY, batch_norm=mode, learn_scale=False)
  episode = draw_episode(2, (4,))
  params, state = learner.init(jax.random.key(0), episode.support.inputs)
  mean, var = np.arange(4.0), np.arange(1.0, 5.0)
  state = jax.tree.map(lambda x: x, state)
  state['batch_stats']['BatchNorm_0'] = {'mean': jnp.array(mean), 'var': jnp.array(var)}
  support, query = np.asarray(episode.support.inputs), np.asarray(episode.query.inputs)
  by = {'transductive': (support, query), 'support': (support, support)}
  if mode == 'running':
    inputs = [(x - mean) / np.sqrt(var + 1e-5) for x in (support, query)]
  else:
    inputs = [normalised(x, other) for x, other in zip((support, query), by[mode], strict=True)]
  expected = expected_logits(
    *(part._replace(inputs=x) for part, x in zip((episode.support, episode.query), inputs, strict=True)), 1.0
  )
  logits = learner.predict(params, state, learner.adapt(params, state, episode.support, None), episode.query.inputs)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_running_mode_takes_the_statistics_of_all_episodes_of_a_task_and_averages_both_passes():
  learner = protonet.make(Normed(), way=WAY, learn_scale=False, batch_norm_momentum=0.6)
  episodes = stacked(3, 4)
  params, state = learner.init(jax.random.key(0), episodes.support.inputs[0])
  values, (after, _) = learner.group_loss(params, state, episodes, None)
  support, query = (np.asarray(x.inputs).reshape(-1, 4) for x in (episodes.support, episodes.query))
  for k in range(2):
    parts = [jax.tree.map(lambda x, k=k: x[k], part) for part in (episodes.support, episodes.query)]
    parts = [
      p._replace(inputs=normalised(np.asarray(p.inputs), by)) for p, by in zip(parts, (support, query), strict=True)
    ]
    expected = expected_logits(*parts, 1.0)
    picked = log_softmax(expected, axis=1)[np.arange(len(expected)), np.asarray(parts[1].targets)]
    np.testing.assert_allclose(values[k], -picked, rtol=1e-4, atol=1e-5)
  mean = 0.6 * (0.6 * 0 + 0.4 * support.mean(axis=0)) + 0.4 * query.mean(axis=0)
  var = 0.6 * (0.6 * 1 + 0.4 * support.var(axis=0)) + 0.4 * query.var(axis=0)
  assert_close(after['batch_stats']['BatchNorm_0'], {'mean': mean, 'var': var}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('mode', ['transductive', 'support'])
def test_the_other_modes_train_as_they_evaluate_and_keep_the_state(mode):
  learner = protonet.make(Normed(), way=WAY, batch_norm=mode)
  episode = draw_episode(5, (4,))
  params, state = learner.init(jax.random.key(0), episode.support.inputs)
  values, (after, _) = learner.loss(params, state, episode, None)
  logits = learner.predict(params, state, learner.adapt(params, state, episode.support, None), episode.query.inputs)
  np.testing.assert_allclose(values, losses.CLASSIFICATION.losses(logits, episode.query.targets), rtol=1e-5, atol=1e-6)
  assert_close(after, state, rtol=0)
  assert learner.group_loss is None


class Counting(nn.Module):
  """Counts calls with dropout, and shows whether there was any."""

  @nn.compact
  def __call__(self, x):
    calls = self.variable('counters', 'calls', lambda: jnp.zeros(()))
    if self.has_rng('dropout') and self.is_mutable_collection('counters'):
      calls.value += 1
    return x + self.param('bias', nn.initializers.zeros, (4,)) + (100.0 if self.has_rng('dropout') else 0.0)


def test_dropout_is_for_training_alone_and_counted_twice_a_task():
  learner = protonet.make(Counting(), way=WAY)
  episode = draw_episode(6, (4,))
  params, state = learner.init(jax.random.key(0), episode.support.inputs)
  _, (after, _) = learner.loss(params, state, episode, jax.random.key(1))
  assert after['counters']['calls'] == 2
  assert learner.loss(params, state, episode, None)[1][0]['counters']['calls'] == 0
  adapted = learner.adapt(params, state, episode.support, jax.random.key(1))
  assert adapted.prototypes.max() < 50 and adapted.model_state['counters']['calls'] == 0


@pytest.mark.parametrize(
  ('settings', 'text'),
  [(dict(batch_norm='batch'), 'batch_norm is one of'), (dict(objective=losses.REGRESSION), 'regression has none')],
)
def test_settings_that_are_refused(settings, text):
  with pytest.raises(UserError, match=text):
    protonet.make(Identity(), way=WAY, **settings)

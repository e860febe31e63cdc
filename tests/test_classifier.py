"""Classifiers over training classes against loops in NumPy: what a task's classes are, and what evaluation fits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import losses, networks, parallel, train
from metajax.algorithms import classifier
from metajax.data import episodes
from metajax.data.table import ClassTable
from metajax.errors import UserError
from metajax.models import layers, mlp, resnet12
from metajax.types import Episode, Examples
from tests.conftest import TINY
from tests.test_maml import draw_episode
from tests.test_protonet import Counting, Identity, Normed, normalised

CLASSES = 35
IDS = np.array([30, 0, 5, 1, 2])  # as numbers below 5 some are labels of others
SETTINGS = [{}, {'normalize': True, 'bias': True}, {'hidden': 6, 'bias': True}]

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


def make(model=None, way=5, num_classes=CLASSES, **settings):
  return classifier.make(model or Identity(), way=way, num_classes=num_classes, **settings)


def merged_task(seed=0, n=20, d=8):
  """A task of training: all of its images are queries, in any order."""
  rng = np.random.default_rng(seed)
  query = Examples(rng.standard_normal((n, d)).astype(np.float32), rng.permutation(np.arange(n) % len(IDS)))
  return Episode(jax.tree.map(lambda x: x[:0], query), query, IDS)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(('classes', 'bound'), [(64, 0.1414), (351, 0.3312), (60, 0.1369)])
def test_rows_of_each_data_set_are_uniform_up_to_their_bound(classes, bound):
  params, state = make(num_classes=classes).init(jax.random.key(0), jnp.zeros((1, 640)))
  assert state == {} and params.keys() == {'embedding', 'head'} and params['head'].keys() == {'rows'}
  rows = params['head']['rows']
  assert rows.shape == (classes, 640)
  close(max(rows.max(), -rows.min()), bound, rtol=1e-3)
  close(np.histogram(rows, 8)[0] / rows.size, 1 / 8, atol=0.01)


@pytest.mark.parametrize('pixels', [84, 32])
def test_the_network_is_without_its_own_head_and_has_640_features(pixels):
  learner = make(resnet12.make(5, pool=True), num_classes=64)
  x = jax.ShapeDtypeStruct((2, pixels, pixels, 3), jnp.float32)
  params, state = jax.eval_shape(learner.init, jax.random.key(0), x)
  assert sum(p.size for p in jax.tree.leaves(params['embedding'])) == 12_424_320
  assert params['head']['rows'].shape == (64, 640)
  assert jax.eval_shape(learner.embedding.query, params, state, x).shape == (2, 640)


def test_a_hidden_layer_lies_between_features_and_rows_and_biases_are_of_its_features():
  params, _ = make(hidden=100, bias=True).init(jax.random.key(0), jnp.zeros((1, 8)))
  head = params['head']
  assert head['hidden']['kernel'].shape == (8, 100) and head['rows'].shape == (CLASSES, 100)
  assert head['bias'].shape == (CLASSES,) and 0.08 < np.abs(head['bias']).max() <= 0.1
  close(np.abs(head['rows']).max(), np.sqrt(CLASSES / 5 / 100), rtol=1e-3)


@pytest.mark.parametrize('settings', SETTINGS, ids=['rows', 'normalised', 'hidden'])
def test_the_loss_is_cross_entropy_among_the_task_s_own_classes(settings):
  learner, task = make(**settings), merged_task()
  params, state = learner.init(jax.random.key(0), task.query.inputs)
  head = jax.device_get(params['head'])
  features = unit(task.query.inputs) if 'normalize' in settings else task.query.inputs
  if 'hidden' in settings:
    features = np.maximum(features @ head['hidden']['kernel'] + head['hidden']['bias'], 0)

  wanted, correct, d_rows, d_bias = [], [], np.zeros_like(head['rows']), np.zeros(CLASSES)
  for x, target in zip(features, task.query.targets, strict=True):
    logits = [head['rows'][c] @ x + (head['bias'][c] if 'bias' in settings else 0) for c in IDS]
    p = softmax(np.float64(logits))
    wanted.append(-np.log(p[target]))
    correct.append(np.argmax(p) == target)
    for k, c in enumerate(IDS):
      d_rows[c] += (p[k] - (k == target)) * x / 20
      d_bias[c] += (p[k] - (k == target)) / 20

  def mean_loss(params):
    values, (after, metrics) = learner.loss(params, state, task, None)
    return values.mean(), (values, after, metrics)

  gradient, (values, after, metrics) = jax.jit(jax.grad(mean_loss, has_aux=True))(params)
  close(values, wanted)
  np.testing.assert_array_equal(metrics['accuracy'], correct)
  assert after == {} and 0 < np.mean(correct) < 1
  close(gradient['head']['rows'], d_rows)
  others = np.setdiff1d(np.arange(CLASSES), IDS)
  assert not np.any(gradient['head']['rows'][others]) and np.all(np.any(gradient['head']['rows'][IDS], axis=1))
  if 'bias' in settings:
    close(gradient['head']['bias'], d_bias)
    assert not np.any(gradient['head']['bias'][others])


@pytest.mark.parametrize('batch', [0, 12])
def test_each_image_is_classified_by_the_row_of_its_class(batch):
  """Images that show their class's number, and rows that read it."""
  images = np.repeat(255 * np.eye(9, dtype=np.uint8).reshape(9, 3, 3, 1), 4, axis=0)
  table = ClassTable(images, np.arange(0, 36, 4), np.full(9, 4), np.zeros(9, np.int8), tuple('abcdefghi'))
  source = episodes.make_source(table, 'train', way=5, shot=1, query_shot=2, seed=0, merged=True, batch=batch)
  tasks = jax.jit(source.decode)(source.resident, source.sample(0, 30))
  learner = make(mlp.make(None, hidden=()), num_classes=9)
  params = {'embedding': {}, 'head': {'rows': 50 * jnp.eye(9)}}
  values, (_, metrics) = jax.jit(jax.vmap(learner.loss, (None, None, 0, None)))(params, {}, tasks, None)
  assert values.shape == (30, batch or 15) and metrics['accuracy'].min() == 1
  assert values.max() < 1e-6
  if not batch:
    assert any((np.diff(ids) < 0).any() and set(ids) != set(range(5)) for ids in tasks.class_ids.tolist())


class NormedDense(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = layers.BatchNorm(name='norm')(x.reshape(len(x), 1, 1, -1))[:, 0, 0]
    return nn.Dense(3, name='dense')(x)


@pytest.mark.parametrize('tasks', [1, 3])
def test_a_meta_update_takes_the_mean_over_tasks_each_normalised_by_itself(tasks):
  sgd = '--config.optimizer.name=sgd', '--config.optimizer.learning_rate=1.0', '--config.optimizer.momentum=0.0'
  data = '--config.algorithm.name=classifier', '--config.data.size=6', f'--config.data.tasks={tasks}'
  config = config_lib.override(config_lib.load(TINY), [*data, *sgd])
  learner = make(NormedDense(), way=3, num_classes=12, batch_norm_momentum=0.6)
  made = experiment_lib.make(config, None)
  made = made._replace(algorithm=learner, phases=experiment_lib.make_phases(learner, 1))
  source, before = made.sources['train'], train.init_state(made, seed=0)
  step = parallel.over_devices(functools.partial(train.train_step, experiment=made, tasks=tasks))
  constants = made.resident, parallel.replicate(jax.random.key(0))
  after, metrics = step(before, constants, parallel.lay_out(source.sample(0, tasks), tasks, 2))

  images = jax.jit(source.decode)(source.resident, source.sample(0, tasks))
  assert images.query.targets.shape == (tasks, 9)  # 3 classes of 1 + 2 images

  def mean_loss(params, task):
    values, (state, _) = learner.loss(params, before.model_state, task, None)
    return values.mean(), state['batch_stats']['norm']

  gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
  each = [gradient(before.params, jax.tree.map(lambda x, t=t: x[t], images)) for t in range(tasks)]
  (loss, statistics), grads = jax.tree.map(lambda *x: np.mean(x, axis=0), *each)
  close(metrics['loss'], loss)
  jax.tree.map(lambda a, b, g: close(a - b, g, atol=1e-5), before.params, after.params, grads)
  jax.tree.map(close, after.model_state['batch_stats']['norm'], statistics)
  of_task = [np.asarray(x).reshape(9, -1) for x in images.query.inputs]
  close(statistics['mean'], 0.4 * np.mean([x.mean(axis=0) for x in of_task], axis=0), atol=1e-5)
  close(statistics['var'], 0.6 + 0.4 * np.mean([x.var(axis=0) for x in of_task], axis=0), atol=1e-5)


@pytest.mark.parametrize('mode', networks.BATCH_NORM_MODES)
def test_evaluation_fits_logistic_regression_to_features_of_length_1(mode):
  learner = make(Normed(), way=3, batch_norm=mode, head_c=3.0, hidden=5, bias=True)
  episode = draw_episode(1, (4,), shot=4, query_shot=20)
  params, state = learner.init(jax.random.key(0), episode.support.inputs)
  mean, var = np.arange(4.0), np.arange(1.0, 5.0)
  state['batch_stats']['BatchNorm_0'] = {'mean': jnp.array(mean), 'var': jnp.array(var)}
  support, query = np.asarray(episode.support.inputs), np.asarray(episode.query.inputs)
  if mode == 'running':
    features = [(x - mean) / np.sqrt(var + 1e-5) for x in (support, query)]
  else:
    features = normalised(support, support), normalised(query, query if mode == 'transductive' else support)
  reference = LogisticRegression(C=3.0, tol=1e-8).fit(unit(features[0]), episode.support.targets)

  @jax.jit
  def evaluated(params, state):
    adapted = learner.adapt(params, state, episode.support, None)
    logits = learner.predict(params, state, adapted, episode.query.inputs)
    embedded, given = learner.embedding.support(params, state, episode.support.inputs)
    return logits, embedded, learner.embedding.query(params, given, episode.query.inputs)

  logits, *embedded = evaluated(params, state)
  close(softmax(logits, axis=1), reference.predict_proba(unit(features[1])), atol=1e-4)
  jax.tree.map(lambda a, b: close(a, b, atol=1e-5), embedded, list(features))


@pytest.mark.parametrize('mode', networks.BATCH_NORM_MODES)
def test_training_normalises_by_the_task_and_running_mode_averages(mode):
  learner, task = make(Normed(), batch_norm=mode, batch_norm_momentum=0.7), merged_task(d=4)
  params, state = learner.init(jax.random.key(0), task.query.inputs)
  values, (after, _) = jax.jit(learner.loss)(params, state, task, None)
  x = task.query.inputs
  logits = normalised(x, x) @ np.asarray(params['head']['rows'])[IDS].T
  close(values, losses.CLASSIFICATION.losses(logits, task.query.targets), atol=1e-5)
  new = 0.3 if mode == 'running' else 0.0
  expected = {'mean': new * x.mean(axis=0), 'var': (1 - new) + new * x.var(axis=0)}
  jax.tree.map(lambda a, b: close(a, b, atol=1e-5), after['batch_stats']['BatchNorm_0'], expected)


def test_dropout_is_for_training_alone_and_counted_once_a_task():
  learner, task = make(Counting()), merged_task(d=4)
  params, state = learner.init(jax.random.key(0), task.query.inputs)
  assert learner.loss(params, state, task, jax.random.key(1))[1][0]['counters']['calls'] == 1
  assert learner.loss(params, state, task, None)[1][0]['counters']['calls'] == 0
  features, after = learner.embedding.support(params, state, task.query.inputs)
  assert features.max() < 50 and after['counters']['calls'] == 0


def test_a_plain_classifier_has_a_row_of_each_training_class_and_is_tested_on_episodes():
  config = config_lib.override(
    config_lib.load(TINY), ['--config.algorithm.name=classifier', '--config.data.batch=7', '--config.data.size=16']
  )
  made = experiment_lib.make(config, None)
  state = train.init_state(made, seed=0)
  rows = state.params['head']['rows']
  assert rows.shape == (12, 4)
  close(np.abs(rows).max(), 0.5, rtol=0.1)  # sqrt(1 / 4): as many rows as a task has classes
  sizes = [made.sources[split].sample(0, 2)['rows'].shape for split in ('train', 'val', 'test')]
  assert sizes == [(2, 7, 1), (2, 3, 3), (2, 3, 3)]
  source = made.sources['test']

  def outputs(params, model_state):
    episode = jax.tree.map(lambda x: x[0], source.decode(source.resident, source.sample(0, 1)))
    adapted = made.evaluation.adapt(params, model_state, episode.support, None)
    return made.evaluation.predict(params, model_state, adapted, episode.query.inputs)

  assert jax.eval_shape(outputs, state.params, state.model_state).shape == (6, 3)


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (dict(batch_norm='batch'), 'batch_norm is one of'),
    (dict(objective=losses.REGRESSION), 'regression has none'),
    (dict(hidden=-1), 'hidden = -1'),
    (dict(head='svm'), 'a head is one of'),
    (dict(head_c=0.0), 'c = 0.0'),
  ],
)
def test_settings_that_are_refused(settings, text):
  with pytest.raises(UserError, match=text):
    make(**settings)


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (['--config.algorithm.name=maml'], '8: maml learns from episodes'),
    (["--config.data.augment=('rotate',)"], 'rotate turns the classes of an episode'),
    (['--config.eval.way=7'], 'way = 7, but the val split has only 6 classes: choose a smaller config.eval.way'),
    (['--config.eval.query_shot=9'], 'glyph0012 of the val split .* a smaller config.eval.shot or query_shot'),
  ],
)
def test_data_that_is_refused_for_batches(settings, text):
  config = ['--config.algorithm.name=classifier', '--config.data.batch=8', *settings]
  with pytest.raises(UserError, match=text):
    experiment_lib.make(config_lib.override(config_lib.load(TINY), config), None)


def test_evaluation_looks_at_the_test_split_alone_and_batches_need_no_episodes_of_training():
  plain = ['--config.algorithm.name=classifier', '--config.data.batch=8', '--config.data.classes=(12,3,6)']
  episodes = ['--config.data.query_shot=9', '--config.eval.query_shot=2', '--config.eval.way=5']
  config = config_lib.override(config_lib.load(TINY), [*plain, *episodes])
  made = experiment_lib.make(config, None, validated=False)
  assert made.sources.keys() == {'train', 'test'} and made.sources['test'].sample(0, 1)['rows'].shape == (1, 5, 3)
  with pytest.raises(UserError, match='way = 5, but the val split has only 3 classes'):
    experiment_lib.make(config, None)

"""Evaluation: fixed episodes, each counted once, and the interval that papers report."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metajax import evaluate, losses, parallel
from metajax.algorithms import maml
from metajax.data import episodes
from metajax.data.table import ClassTable
from metajax.datasets import sinusoid
from metajax.models import mlp
from metajax.types import Algorithm
from tests.conftest import TINY, start


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  monkeypatch.setattr(evaluate, '_BATCH', 4)


@pytest.fixture(scope='module')
def source():
  """Episodes of 3 ways from 6 classes of random 3x3 images."""
  images = np.random.default_rng(0).integers(0, 256, (30, 3, 3, 1), np.uint8)
  table = ClassTable(images, np.arange(0, 30, 5), np.full(6, 5), np.zeros(6, np.int8), tuple('abcdef'))
  return episodes.make_source(table, 'test', way=3, shot=1, query_shot=2, seed=0)


@pytest.fixture(scope='module')
def learner():
  """MAML whose network has more outputs than the episodes have classes, and its params."""
  algorithm = maml.make(mlp.make(5, hidden=(6,)), inner_steps=3, inner_lr=0.5)
  params, _ = algorithm.init(jax.random.key(0), jnp.zeros((1, 3, 3, 1)))
  return algorithm, params


def run(algorithm, source, num, *, params=None, objective=losses.CLASSIFICATION, **settings):
  evaluate_fn = evaluate.make(algorithm, objective, source, episodes=num, **{'seed': 0, **settings})
  return evaluate_fn(*parallel.replicate((params, {})), parallel.replicate(source.resident))


class Stopped(Exception):
  pass


def test_an_interrupted_evaluation_resumes(source, learner, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(evaluate.Partial, '_EVERY', 0)
  algorithm, params = learner
  starts = []

  def sample(start, count):
    starts.append(start)
    if start == 12 and len(starts) < 9:
      raise Stopped
    return source.sample(start, count)

  evaluate_fn = evaluate.make(
    algorithm, losses.CLASSIFICATION, source._replace(sample=sample), episodes=18, seed=0, trajectory=True
  )
  given = *parallel.replicate((params, {})), parallel.replicate(source.resident)
  whole = run(algorithm, source, 18, params=params, trajectory=True)
  starts.clear()

  def partial(weights=params):
    return evaluate.Partial(tmp_path / 'new', weights)

  with pytest.raises(Stopped):
    evaluate_fn(*given, partial())
  assert starts == [0, 4, 8, 12]
  [file] = (tmp_path / 'new').iterdir()
  with np.load(file) as kept:  # of the dispatch in flight nothing is there yet
    np.testing.assert_array_equal(kept['accuracy'], whole['accuracy'][:8])
  starts[:] = ['again'] * 9
  resumed = evaluate_fn(*given, partial())
  assert starts[9:] == [8, 12, 16] and 'going on after 8 episodes' in capsys.readouterr().out
  for name, values in whole.items():
    np.testing.assert_array_equal(resumed[name], values)

  # Nothing is taken from a damaged file, or from one of other weights.
  file.write_bytes(file.read_bytes()[:100])
  assert partial().read() == {}
  assert partial(jax.tree.map(lambda x: x + 1, params)).read() == {}
  evaluate_fn(*given, partial())
  assert partial().read().keys() == whole.keys()
  partial().remove()
  assert partial().read() == {}


def test_summary_is_the_mean_and_the_normal_interval():
  values = np.random.default_rng(0).random((50, 3)).astype(np.float32)
  summary = evaluate.summarise({'accuracy': values[:, 0], 'loss': values})
  assert summary.keys() == {'accuracy', 'accuracy_ci95', 'loss', 'loss_ci95'}
  np.testing.assert_allclose(summary['accuracy'], values[:, 0].astype(np.float64).sum() / 50)
  np.testing.assert_allclose(summary['accuracy_ci95'], 1.96 * stats.sem(values[:, 0].astype(np.float64), ddof=0))
  np.testing.assert_allclose(summary['loss'], values.mean(0), rtol=1e-6)
  np.testing.assert_allclose(summary['loss_ci95'], 1.96 * stats.sem(values, axis=0, ddof=0), rtol=1e-5)


def test_summary_does_not_lose_digits_of_many_episodes():
  values = np.full(1_000_000, 0.1, np.float32)
  np.testing.assert_allclose(evaluate.summarise({'loss': values})['loss'], np.float64(np.float32(0.1)), rtol=1e-12)


@pytest.mark.parametrize(('num', 'chunk'), [(1, 1), (7, 3), (8, 'auto')])
def test_every_episode_counts_once_whatever_batches_and_chunks(source, learner, num, chunk):
  algorithm, params = learner
  results = run(algorithm, source, num, params=params, chunk=chunk)
  assert results.keys() == {'loss', 'accuracy'} and results['loss'].shape == results['accuracy'].shape == (num,)
  batch = source.decode(source.resident, source.sample(0, num))
  for k in range(num):
    support, query, _ = jax.tree.map(lambda x, k=k: x[k], batch)
    adapted = jax.jit(algorithm.adapt)(params, {}, support, None)
    # Of the five outputs the episode has three.
    logits = np.float64(algorithm.predict(params, {}, adapted, query.inputs))[:, :3]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), query.targets]
    np.testing.assert_allclose(results['loss'][k], losses.mean(), rtol=1e-4)
    np.testing.assert_allclose(results['accuracy'][k], np.mean(logits.argmax(1) == query.targets), rtol=1e-6)


def test_one_dispatch_is_in_flight_at_a_time(source, learner, monkeypatch):
  """Collectives of several wait for each other where devices take them in different orders, and may stand still."""
  algorithm, params = learner
  over_devices, device_get, events = parallel.over_devices, jax.device_get, []

  def recorded(step):
    compiled = over_devices(step)

    def dispatch(*args):
      events.append('dispatch')
      return compiled(*args)

    return dispatch

  def get(x):
    events.append('done')
    return device_get(x)

  monkeypatch.setattr(parallel, 'over_devices', recorded)
  monkeypatch.setattr(evaluate.jax, 'device_get', get)
  run(algorithm, source, 50, params=params)
  assert events == ['dispatch', 'done'] * 13


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, 4])
def test_ten_thousand_episodes_beside_busy_processes(devices, tmp_path):
  """A hundred dispatches whose devices seldom run at the same time; without end where they can block each other."""
  busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(2 * (os.cpu_count() or 1))]
  try:
    process = start(
      f'--config={TINY}',
      f'--workdir={tmp_path / "run"}',
      *('--config.algorithm.name=protonet', '--config.total_steps=0', '--config.eval.episodes=10000'),
      JAX_NUM_CPU_DEVICES=str(devices),
    )
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
  finally:
    for other in busy:
      other.kill()
      other.wait()
  assert len(json.loads((tmp_path / 'run' / 'test_episodes.json').read_text())['accuracy']) == 10_000


def test_trajectory_reports_every_inner_step_and_ends_with_the_evaluation(source, learner):
  algorithm, params = learner
  along = run(algorithm, source, 6, params=params, trajectory=True)
  assert along['loss'].shape == along['accuracy'].shape == (6, 4)
  np.testing.assert_allclose(along['loss'][:, -1], run(algorithm, source, 6, params=params)['loss'], rtol=1e-5)
  untouched = algorithm._replace(adapt=lambda params, model_state, support, rng: maml.Adapted(params, model_state))
  np.testing.assert_allclose(along['loss'][:, 0], run(untouched, source, 6, params=params)['loss'], rtol=1e-5)


def test_an_ensemble_is_the_mean_of_the_logits_in_numpy(source, learner):
  algorithm, params = learner
  members = [
    jax.tree.map(lambda x, k=k: x + 0.3 * np.cos(k + np.arange(x.size)).reshape(x.shape), params) for k in (1, 2, 3)
  ]
  outputs_fn = evaluate.make_outputs(algorithm, source, episodes=7, seed=0)
  resident = parallel.replicate(source.resident)
  results = [outputs_fn(*parallel.replicate((member, {})), resident) for member in members]
  assert results[0][0].shape == (7, 6, 3) and results[0][1].shape == (7, 6)

  batch, adapt = source.decode(source.resident, source.sample(0, 7)), jax.jit(algorithm.adapt)
  logits = np.zeros((7, 6, 3))
  for k in range(7):
    support, query, _ = jax.tree.map(lambda x, k=k: x[k], batch)
    for member in members:
      logits[k] += np.float64(algorithm.predict(member, {}, adapt(member, {}, support, None), query.inputs))[:, :3] / 3
  found = evaluate.ensemble(losses.CLASSIFICATION, iter(results))
  targets = np.asarray(batch.query.targets)
  of_target = np.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
  assert found.keys() == {'loss', 'accuracy'}
  np.testing.assert_allclose(found['loss'], (np.log(np.exp(logits).sum(2)) - of_target).mean(1), rtol=1e-4)
  np.testing.assert_allclose(found['accuracy'], (logits.argmax(2) == targets).mean(1), rtol=1e-6)

  alone = run(algorithm, source, 7, params=members[0])
  one = evaluate.ensemble(losses.CLASSIFICATION, results[:1])
  assert len(np.unique(alone['accuracy'])) > 1
  for name in ('loss', 'accuracy'):
    np.testing.assert_allclose(one[name], alone[name], rtol=1e-5)
  assert evaluate.ensemble(losses.CLASSIFICATION, []) == {}


def witness(adapt, predict):
  """A learner and an objective that report what they were given."""
  objective = losses.Objective(
    losses=lambda outputs, targets: jnp.zeros(targets.shape[0]),
    metrics=lambda outputs, targets: {'support': outputs[0, 0], 'query': outputs[0, 1], 'rng': outputs[0, 2]},
  )
  return Algorithm(None, adapt, predict, None), objective


def test_two_algorithms_meet_the_same_episodes_and_random_numbers_whatever_the_chunks(source):
  def adapt(params, model_state, support, rng):
    return jnp.sum(support.inputs * jnp.arange(27.0).reshape(3, 3, 3, 1)), jax.random.uniform(rng)

  def predict(params, model_state, adapted, inputs):
    support, number = adapted
    return jnp.broadcast_to(jnp.stack([support, jnp.sum(inputs[::2]), number]), (inputs.shape[0], 3))

  def other(params, model_state, support, rng):
    return adapt(params, model_state, support, rng)[0], jnp.float32(-1)

  first, objective = witness(adapt, predict)
  second, _ = witness(other, predict)
  one = run(first, source, 10, objective=objective, chunk=1, seed=3)
  two = run(second, source, 7, objective=objective, chunk=4, seed=5)
  for name in ('support', 'query'):
    assert len(np.unique(one[name])) == 10
    np.testing.assert_allclose(one[name][:7], two[name], rtol=1e-6)
  np.testing.assert_array_equal(two['rng'], -1)

  again = run(first, source, 10, objective=objective, chunk=3, seed=3)
  np.testing.assert_array_equal(again['rng'], one['rng'])
  expected = [jax.random.uniform(jax.random.fold_in(jax.random.key(3), k)) for k in range(10)]
  np.testing.assert_allclose(one['rng'], expected, rtol=1e-6)


class Zero(nn.Module):
  @nn.compact
  def __call__(self, x):
    return self.param('w', nn.initializers.zeros, (1, 1)) * x


def test_regression_reports_the_mean_squared_error():
  source = episodes.make_source(sinusoid.load(None)['test'], 'test', way=None, shot=5, query_shot=5, seed=0)
  algorithm = maml.make(Zero(), objective=losses.REGRESSION, inner_steps=0)
  results = run(algorithm, source, 5, params={'w': jnp.zeros((1, 1))}, objective=losses.REGRESSION)
  assert results.keys() == {'loss'}
  np.testing.assert_allclose(
    results['loss'], np.mean(source.sample(0, 5)['targets'][:, 5:] ** 2, axis=(1, 2)), rtol=1e-5
  )


def test_an_ensemble_of_regressions_is_the_mean_of_their_outputs():
  x, y = np.random.default_rng(0).normal(size=(2, 4, 5, 1)).astype(np.float32)
  found = evaluate.ensemble(losses.REGRESSION, [(w * x, y) for w in (-1.0, 2.0, 5.0)])
  assert found.keys() == {'loss'}
  np.testing.assert_allclose(found['loss'], np.square(2 * x - y).mean(axis=(1, 2)), rtol=1e-5)


def test_elements_are_the_input_values_of_an_episode(source):
  assert evaluate.elements(source) == (3 + 6) * 9

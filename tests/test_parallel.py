"""One device and several, small chunks and large: the same update, the same evaluation, one compilation."""

import itertools
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metajax
from metajax import config as config_lib
from metajax import evaluate, parallel, train
from metajax import experiment as experiment_lib
from metajax.errors import UserError

TASKS = 6
EVALUATED = 7


def build(chunk, batch_norm='running'):
  """A Conv4 on glyphs, and an outer loop whose update is minus the meta-gradient."""
  config = config_lib.complete(
    {
      'total_steps': 3,
      'chunk': chunk,
      'data': {
        'name': 'glyphs',
        'tasks': TASKS,
        'way': 3,
        'shot': 2,
        'query_shot': 2,
        'size': 12,
        'classes': (8, 4, 4),
        'images_per_class': 4,
      },
      'model': {'name': 'conv4', 'width': 8, 'downsample': 'stride'},
      'algorithm': {'name': 'maml', 'inner_steps': 1, 'inner_lr': 0.1, 'first_order': True, 'batch_norm': batch_norm},
      'optimizer': {'name': 'sgd', 'learning_rate': 1.0, 'clip': 0.0},
    }
  )
  return config, experiment_lib.make(config, data_dir=None)


def compile_step(config, experiment):
  """The step as the loop compiles it; a function that makes the numbered batch; what stays the same in every step."""

  def step_fn(state, constants, local):
    return train.train_step(state, constants, local, experiment=experiment, tasks=TASKS)

  source = experiment.sources['train']
  chunk = parallel.chunk_size(config.chunk, TASKS, evaluate.elements(source))
  constants = experiment.resident, parallel.replicate(jax.random.key(0))
  return (
    parallel.over_devices(step_fn, donate=True),
    lambda step: parallel.lay_out(source.sample(step * TASKS, TASKS), TASKS, chunk),
    constants,
  )


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(tree))])


def steps(chunk):
  """Yields what each step computes, as {name: list of numbers}."""
  config, experiment = build(chunk)
  state = parallel.replicate(train.init_state(experiment, seed=0))
  step_fn, make_batch, constants = compile_step(config, experiment)
  for step in itertools.count():
    before = flat(state.params)
    state, metrics = step_fn(state, constants, make_batch(step))
    assert int(state.step) == step + 1
    results = {
      'gradient': before - flat(state.params),
      'model_state': flat(state.model_state),
      'metrics': np.array([metrics[name] for name in ('loss', 'grad_norm', 'accuracy')]),
    }
    yield {name: np.asarray(values, np.float64).tolist() for name, values in results.items()}


def evaluation(chunk):
  """What every episode of an evaluation gives, as {name: list of numbers}."""
  _, experiment = build(chunk, batch_norm='support')
  state = parallel.replicate(train.init_state(experiment, seed=0))
  source = experiment.sources['test']
  evaluate_fn = evaluate.make(
    experiment.evaluation, experiment.objective, source, episodes=EVALUATED, seed=0, chunk=chunk
  )
  results = evaluate_fn(state.params, state.model_state, experiment.resident)
  return {name: np.asarray(values, np.float64).tolist() for name, values in results.items()}


@pytest.fixture(scope='module')
def loop_over_tasks():
  """The same update without vmap, chunks or devices: the mean of the tasks' own gradients, states and metrics."""
  _, experiment = build('auto')
  state = train.init_state(experiment, seed=0)

  def task_loss(params, episode):
    losses, (model_state, metrics) = experiment.algorithm.loss(params, state.model_state, episode, None)
    return losses.mean(), (model_state, metrics['accuracy'].mean())

  gradient = jax.jit(jax.value_and_grad(task_loss, has_aux=True))
  source = experiment.sources['train']
  episodes = source.decode(source.resident, source.sample(0, TASKS))
  results = [gradient(state.params, jax.tree.map(lambda x, t=t: x[t], episodes)) for t in range(TASKS)]
  (loss, (model_state, accuracy)), grads = jax.tree.map(lambda *x: np.mean(x, axis=0), *results)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  return {'gradient': flat(grads), 'model_state': flat(model_state), 'metrics': np.array([loss, norm, accuracy])}


@pytest.fixture(scope='module')
def four_devices(tmp_path_factory):
  """Results of this file, run as a program on a CPU that pretends to be four devices."""
  path = tmp_path_factory.mktemp('four') / 'results.json'
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '4',
    'PYTHONPATH': str(pathlib.Path(metajax.__file__).parents[1]),
  }
  subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True)
  return json.loads(path.read_text())


def assert_same_step(step, expected):
  assert np.abs(expected['gradient']).max() > 0.1
  for name, values in expected.items():
    np.testing.assert_allclose(step[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('chunk', [1, 4, 'auto'])
def test_a_step_in_chunks_is_the_mean_of_a_loop_over_tasks_and_compiled_once(loop_over_tasks, chunk, caplog):
  def compiled():
    return [record for record in caplog.records if 'Finished XLA compilation' in record.getMessage()]

  results = steps(chunk)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    assert_same_step(next(results), loop_over_tasks)
    assert compiled()
    caplog.clear()
    next(results), next(results)  # the state now comes from a step, no longer from initialisation
    assert not compiled()


@pytest.mark.smoke
def test_a_step_on_four_devices_is_the_same(loop_over_tasks, four_devices):
  assert four_devices['devices'] == 4
  for chunk in ('1', 'auto'):
    assert_same_step(four_devices[chunk], loop_over_tasks)


@pytest.mark.smoke
def test_an_evaluation_on_four_devices_is_the_same(four_devices):
  here, there = evaluation(3), four_devices['evaluation']
  assert here.keys() == there.keys() == {'loss', 'accuracy'}
  for name in here:
    assert len(here[name]) == EVALUATED
    np.testing.assert_allclose(here[name], there[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('devices', 'tasks', 'chunk', 'expected'),
  [
    (1, 6, 6, 6),
    (1, 6, 100, 6),  # never more than there are
    (1, 6, 4, 3),  # two even chunks rather than 4 + 2
    (1, 7, 3, 3),
    (1, 7, 1, 1),
    (1, 100, 33, 25),
    (4, 6, 6, 2),  # 6 tasks on 4 devices are at most 2 on each
    (4, 6, 1, 1),
    (4, 100, 10, 9),  # 25 on each
    (4, 3, 2, 1),
    (1, 6, '2', 2),  # from the command line
  ],
)
def test_chunk_size_is_the_most_even_within_what_is_asked(monkeypatch, devices, tasks, chunk, expected):
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  assert parallel.chunk_size(chunk, tasks, elements=784) == expected


@pytest.mark.parametrize(
  ('backend', 'elements', 'expected'),
  [('cpu', 1, 12), ('cpu', 4096 // 4, 4), ('cpu', 10**9, 1), ('gpu', 10**6, 12), ('gpu', 2**22, 4)],
)
def test_automatic_chunks_are_small_on_a_cpu_and_elsewhere_as_large_as_memory_allows(
  monkeypatch, backend, elements, expected
):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  assert parallel.chunk_size('auto', 12, elements) == expected


@pytest.mark.parametrize('chunk', [0, -1, 'all'])
def test_a_chunk_that_is_no_number_of_tasks_is_refused(chunk):
  with pytest.raises(UserError, match=f'config.chunk.*{chunk}'):
    parallel.chunk_size(chunk, 6, 784)


@pytest.mark.parametrize(('tasks', 'chunk'), [(12, 2), (11, 3), (5, 1), (1, 1)])
def test_each_process_makes_the_tasks_of_its_own_devices(monkeypatch, tasks, chunk):
  """Three processes with two devices each; what they lay out is, one after another, the whole meta-batch."""
  monkeypatch.setattr(jax, 'device_count', lambda: 6)
  monkeypatch.setattr(jax, 'local_device_count', lambda: 2)
  monkeypatch.setattr(jax, 'device_put', lambda laid_out, sharding: laid_out)
  found = []
  for process in range(3):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    first, count = parallel.own_tasks(tasks, chunk)
    assert first >= 0 and count >= 1 and first + count <= tasks
    positions, batch = parallel.lay_out({'task': np.arange(first, first + count)}, tasks, chunk)
    assert positions.shape == batch['task'].shape == (2, -(-tasks // (6 * chunk)), chunk)
    found += [(p, t) for p, t in zip(positions.flat, batch['task'].flat, strict=True)]
  assert [p for p, _ in found] == list(range(len(found)))
  assert all(t == p for p, t in found if p < tasks)


@pytest.mark.parametrize(('tasks', 'chunk'), [(6, 2), (7, 3), (1, 1)])
def test_mean_over_tasks_leaves_the_filling_out(tasks, chunk):
  values = np.arange(10.0, 10.0 + tasks, dtype=np.float32)

  def step(state, constants, local):
    def function(positions, weights, batch):
      return jnp.sum(weights * (state['shift'] + batch['value'])), {'value': batch['value'], 'position': positions}

    return parallel.mean_over_tasks(function, state['shift'], local, tasks)

  positions, batch = parallel.lay_out({'value': values}, tasks, chunk)
  assert batch['value'].shape == positions.shape == (1, -(-tasks // chunk), chunk)
  mean, each = parallel.over_devices(step)({'shift': jnp.float32(100)}, jnp.float32(0), (positions, batch))
  np.testing.assert_allclose(mean, 100 + values.mean(), rtol=1e-6)
  np.testing.assert_array_equal(each['value'], values)
  np.testing.assert_array_equal(each['position'], np.arange(tasks))


if __name__ == '__main__':
  results = {'devices': jax.local_device_count(), '1': next(steps(1)), 'auto': next(steps('auto'))}
  pathlib.Path(sys.argv[1]).write_text(json.dumps(results | {'evaluation': evaluation(1)}))


@pytest.mark.parametrize(
  ('environment', 'tasks', 'expected'),
  [
    ({}, 4, [3]),
    ({}, 2, [2]),
    ({'JAX_NUM_CPU_DEVICES': '1'}, 4, []),
    ({'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}, 4, []),
  ],
)
def test_each_core_becomes_a_device_unless_the_environment_decides(monkeypatch, environment, tasks, expected):
  updates = []
  for name in ('JAX_NUM_CPU_DEVICES', 'XLA_FLAGS'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(parallel.os, 'sched_getaffinity', lambda process: {0, 1, 2})
  monkeypatch.setattr(jax.config, 'update', lambda name, value: updates.append(value))
  parallel.use_cores(tasks)
  assert updates == expected

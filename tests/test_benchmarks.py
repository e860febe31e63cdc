"""The benchmarks' drivers on the smallest shapes: what they write, and that they compare the same work."""

import concurrent.futures
import functools
import json
import multiprocessing
import os

import numpy as np
import pytest

from benchmarks import augment, conversion, evaluation, heads, maml_step, memory, parts, rivals, workload

TINY = ['--shape=omniglot', '--image=16x16x1', '--width=4', '--query_shot=2', '--inner_steps=2', '--tasks=2']
train_step = functools.cache(workload.TrainStep)


@pytest.fixture(autouse=True)
def _compile_once(monkeypatch):
  monkeypatch.setattr(workload, 'TrainStep', train_step)


def results(main, folder, *options):
  """What a driver writes for the tiny shape."""
  path = folder / 'results.json'
  main([*TINY, f'--json={path}', *options])
  return json.loads(path.read_text())


def check_step_rows(rows, implementations):
  assert [row['implementation'] for row in rows] == implementations
  for row in rows:
    assert not row['timed_out'] and row['steps'] == 2 and row['order'] == 2 and row['shape'].startswith('omniglot:')
    assert min(row[k] for k in ('step_ms', 'temp_mb', 'compile_s', 'gflops', 'share_of_peak')) > 0
    assert row['tasks_per_second'] == pytest.approx(2e3 / row['step_ms'])
    assert row['loss'] == pytest.approx(rows[0]['loss'], rel=1e-4)
    assert row['grad_norm'] == pytest.approx(rows[0]['grad_norm'], rel=1e-3)


@pytest.mark.slow
def test_meta_update_beside_plain_jax(tmp_path, capsys):
  options = '--order=2', '--rounds=2', '--implementations=metajax,torch_loop,jax_vmap_conv'
  written = results(maml_step.main, tmp_path, *options)
  check_step_rows(written['rows'], ['metajax', 'jax_vmap_conv'])
  assert written['matmul_gflops'] > 0 and written['environment']['cores'] >= 1
  assert next(iter(written['workloads'].values()))['image'] == [16, 16, 1]
  text = capsys.readouterr().out
  assert 'without rows of PyTorch' in text and 'jax_vmap_conv' in text


def test_meta_update_beside_pytorch(tmp_path):
  python = os.environ.get('METAJAX_TORCH_PYTHON')
  if not python:
    pytest.skip('METAJAX_TORCH_PYTHON does not name an interpreter with PyTorch')
  names = ['metajax', 'torch_loop', 'torch_vmap']
  options = '--order=2', '--rounds=2', f'--implementations={",".join(names)}', f'--torch_python={python}'
  rows = results(maml_step.main, tmp_path, *options)['rows']
  check_step_rows(rows, names)
  assert max(row['ratio_to_fastest_torch'] for row in rows[1:]) == 1


def test_what_takes_too_long_is_a_bound(tmp_path):
  work = workload.SHAPES['omniglot']
  rival = rivals.Rival('jax_vmap_conv', tmp_path / 'inputs.npz', work, 2, torch_python=None, limit_s=0.01)
  assert rival.greeting == {} and rival.ask('step') is None
  rival.close()
  row = maml_step.row(work, 2, 'jax_vmap_conv', rival, [], limit_s=0.01)
  assert row['timed_out'] and row['step_ms'] is None and row['tasks_per_second'] is None
  assert row['tasks_per_second_below'] == 4 / 0.01
  assert 'over the limit' in maml_step.table([{**row, 'ratio_to_fastest_torch': None}])


def test_different_work_is_refused():
  same = {'loss': 1.0, 'grad_norm': 2.0}
  maml_step.check_agreement({'a': same, 'b': {'loss': 1.00005, 'grad_norm': 2.001}})
  with pytest.raises(ValueError, match=r'loss of the first step: 1.001 by b, 1.0 by a'):
    maml_step.check_agreement({'a': same, 'b': {**same, 'loss': 1.001}})
  with pytest.raises(ValueError, match='grad_norm'):
    maml_step.check_agreement({'a': same, 'b': {**same, 'grad_norm': 2.01}})


def test_a_rival_that_fails_is_an_error(tmp_path):
  work = workload.SHAPES['omniglot']
  with pytest.raises(rivals.Failed, match='jax_vmap_conv ended without an answer, exit status 1'):
    rivals.Rival('jax_vmap_conv', tmp_path / 'missing.npz', work, 2, torch_python=None, limit_s=60)


def test_operations_are_those_counted_by_hand():
  # One task of one class, image and inner step; 16 -> 8 -> 4 -> 2 -> 1 pixels, two filters, one output.
  work = workload.Workload('', (16, 16, 3), width=2, way=1, query_shot=1, inner_steps=1, tasks=1)
  first, rest = 18 * 3 * 2 * 256, 18 * 2 * 2 * (64 + 16 + 4) + 2 * 2
  query = 3 * rest + 2 * first
  assert workload.useful_flops(work, order=1) == 2 * query
  assert workload.useful_flops(work, order=2) == 9 * rest + 4 * first + query
  assert workload.useful_flops(work._replace(tasks=4, shot=3, query_shot=7), order=1) == 4 * 10 * query


def test_checkpointed_second_order_needs_the_memory_of_first_order(tmp_path):
  (row,) = results(memory.main, tmp_path, '--steps=2', '--meta_batches=2', '--query_shot=15')['rows']
  assert (row['inner_steps'], row['tasks']) == (2, 2)
  checkpointed, second, first = row['temp_mb'].values()
  assert checkpointed <= 1.3 * first and checkpointed < second
  assert row['checkpointed_to_first_order'] == checkpointed / first


@pytest.mark.slow
def test_augmentation_beside_pillow(tmp_path, monkeypatch):
  monkeypatch.setattr(workload, 'TrainStep', train_step.__wrapped__)  # a source cannot be a key of the cache
  names = 'resized_crop', 'crop', 'jitter', 'flip', 'rotate'
  monkeypatch.setattr(augment, 'SEQUENCES', (names,))
  monkeypatch.setattr(augment, 'STEPS', (names,))
  rows = results(augment.main, tmp_path, '--image=16x16x3', '--inner_steps=1', '--rounds=1')['rows']
  assert [row['what'] for row in rows] == ['decode', 'Pillow', 'meta-update']
  assert all(row['augment'] == list(names) and row['step_ms'] > 0 for row in rows)


@pytest.mark.slow
def test_parts_of_mamlpp_beside_maml(tmp_path):
  rows = results(parts.main, tmp_path, '--parts=maml,mamlpp', '--rounds=2')['rows']
  assert [row['part'] for row in rows] == ['maml', 'mamlpp']
  assert rows[0]['memory_ratio'] == 1 < rows[1]['memory_ratio'] and min(row['step_ms'] for row in rows) > 0


@pytest.mark.slow
def test_evaluation_beside_training(tmp_path):
  (row,) = results(evaluation.main, tmp_path, '--order=1', '--episodes=4', '--rounds=1')['rows']
  assert list(row['tasks_per_second']) == ['training, order 1', 'evaluation']
  assert row['evaluation_to_training'] > 0


def test_heads_beside_scikit_learn(tmp_path):
  path = tmp_path / 'results.json'
  heads.main(['--shape=3x2', '--tasks=3', '--features=32', '--spread=0.5', '--rounds=1', f'--json={path}'])
  (row,) = json.loads(path.read_text())['rows']
  assert row['equal_predictions'] > 0.97 and row['ratio'] > 0
  assert all(0.5 < accuracy < 1 for accuracy in row['accuracy'].values())


def test_conversion_is_timed_and_its_memory_taken(tmp_path):
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    for make, width in ((conversion.make_pickles, 84), (conversion.make_folders, 100)):
      (tmp_path / str(width)).mkdir()
      make(tmp_path / str(width), 20, width)
      seconds, memory = pool.submit(conversion.convert, str(tmp_path / str(width))).result()
      assert 0 < seconds < 60 and 0 <= memory < 2e8
      assert np.load(tmp_path / str(width) / 'cache/tiered_imagenet-84/images.npy').shape == (20, 84, 84, 3)

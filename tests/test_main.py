import contextlib
import errno
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression, Ridge

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import losses, main, report, train, writer
from metajax import workdir as workdir_lib
from metajax.algorithms import maml
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError
from tests.conftest import AS_USERS_COMPILE, SMALL_CONV, TINY, records_of, start, tensorboard_events

MLP = '--config.model.name=mlp'  # compiles quickly, where the network does not matter


def run(*arguments):
  return main.main(['metajax', *(str(argument) for argument in arguments)])


@pytest.fixture(scope='module')
def finished(tmp_path_factory, shared_cache):
  """A finished run of the tiny config, and what it printed."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  process = start(f'--config={TINY}', f'--workdir={workdir}', METAJAX_CACHE=str(shared_cache))
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return workdir, output


def test_workdir_holds_what_the_design_names(finished):
  workdir, output = finished
  names = {path.name for path in workdir.iterdir()}
  assert {'config.json', 'metrics.jsonl', 'checkpoints', 'figures', 'test.json'} <= names
  assert any(name.startswith('events.out.tfevents') for name in names)
  figures = {path.name for path in (workdir / 'figures').iterdir()}
  assert figures == {'learning_curves.png', 'inner_steps.png', 'episode.png'}
  for path in (workdir / 'figures').iterdir():
    Image.open(path).verify()

  written = writer.read(workdir)
  assert [r['step'] for r in written if 'train/loss' in r] == [1, 2, 3, 4, 5, 6]
  assert [r['step'] for r in written if 'val/accuracy_ci95' in r] == [3, 6]
  times = [r['time'] for r in written]
  assert times == sorted(times) and times[0] > 0
  assert all(r['tasks_per_second'] > 0 for r in written if 'train/loss' in r)

  result = json.loads((workdir / 'test.json').read_text())
  expected = dict(
    episodes=20,
    way=3,
    shot=1,
    query_shot=2,
    inner_steps=2,
    batch_norm='transductive',
    split='test',
    dataset='glyphs',
    seed=0,
    classes=6,
  )
  assert expected.items() <= result.items()
  assert 0 <= result['accuracy'] <= 1 and result['accuracy_ci95'] > 0 and result['seconds'] > 0
  assert result['checkpoint_step'] in (3, 6)
  assert len(result['by_inner_step']['accuracy']) == 3
  assert result['by_inner_step']['accuracy'][-1] == result['accuracy']
  assert output.splitlines()[-1] == report.test_line(result)


def test_log_has_plain_lines(finished):
  _, output = finished
  lines = output.splitlines()
  assert any(line.startswith('step 4/6: loss ') and 'tasks/s' in line and 'left' in line for line in lines)
  assert any(line.startswith('step 3/6: val loss ') for line in lines)
  assert '\r' not in output and '\x1b' not in output


def test_test_line():
  result = dict(
    accuracy=0.98714,
    accuracy_ci95=0.0021,
    way=5,
    shot=1,
    episodes=600,
    batch_norm='transductive',
    checkpoint_step=12000,
    loss=0.1,
    loss_ci95=0.01,
  )
  line = 'test: 98.71 % ± 0.21 % (5-way 1-shot, 600 episodes, transductive batch norm, checkpoint 12000)'
  assert report.test_line(result) == line
  result |= dict(ensemble_accuracy=0.989, ensemble_accuracy_ci95=0.002, ensemble_checkpoints=[4000, 3500])
  line = 'ensemble of 2: 98.90 % ± 0.20 % (checkpoints 4000, 3500; protocol as below)'
  assert report.ensemble_line(result) == line
  result |= dict(last_accuracy=0.77724, last_accuracy_ci95=0.0021, last_checkpoint_step=12500)
  line = 'last checkpoint: 77.72 % ± 0.21 % (checkpoint 12500; protocol as below)'
  assert report.last_line(result) == line
  result = dict(loss=0.5, loss_ci95=0.25, shot=10, episodes=600, checkpoint_step=7)
  assert report.test_line(result) == 'test: mean squared error 0.5000 ± 0.2500 (10-shot, 600 episodes, checkpoint 7)'


def test_tensorboard_events_are_readable_without_tensorflow(finished):
  workdir, _ = finished
  tags = {(event.step, value.tag) for event in tensorboard_events(workdir) for value in event.summary.value}
  assert {(6, 'train/loss'), (3, 'val/accuracy'), (6, 'time'), (6, 'tasks_per_second'), (6, 'waiting_for_data')} <= tags
  assert {(6, 'figures/learning_curves'), (6, 'figures/inner_steps'), (6, 'figures/episode')} <= tags


def test_eval_mode_takes_the_workdirs_config_and_gives_the_same_numbers(finished, cache, capsys):
  workdir, _ = finished
  before = json.loads((workdir / 'test.json').read_text())
  assert run('--mode=eval', f'--workdir={workdir}') == 0
  after = json.loads((workdir / 'test.json').read_text())
  varying = {'seconds': 0, 'environment': 0}
  assert {**after, **varying} == {**before, **varying}
  assert capsys.readouterr().out.splitlines()[-1] == report.test_line(after)


def test_eval_mode_with_other_options_of_evaluation(finished, cache):
  workdir, _ = finished
  before = (workdir / 'test.json').read_text()
  assert (
    run(
      '--mode=eval',
      f'--config={TINY}:way=2,shot=2',
      f'--workdir={workdir}',
      '--config.eval.inner_steps=4',
      '--config.eval.episodes=7',
      '--config.eval.augment=("crop", "flip")',
    )
    == 0
  )
  result = json.loads((workdir / 'test.json').read_text())
  assert dict(way=2, shot=2, inner_steps=4, episodes=7, augment=['crop', 'flip']).items() <= result.items()
  assert 'augmented by crop and flip' in report.test_line(result)
  (workdir / 'test.json').write_text(before)


def test_eval_mode_with_an_ensemble_of_fewer_checkpoints_than_asked_for(finished, cache, capsys):
  workdir, _ = finished
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  scores = {r['step']: r['val/accuracy'] for r in records if 'val/accuracy' in r}
  members = sorted(scores, key=lambda step: (scores[step], step), reverse=True)  # the later among equals
  assert run('--mode=eval', f'--workdir={workdir}', '--config.eval.ensemble=5') == 0
  lines = capsys.readouterr().out.splitlines()
  result, each = (json.loads((workdir / name).read_text()) for name in ('test.json', 'test_episodes.json'))
  assert result['ensemble_checkpoints'] == each['ensemble_checkpoints'] == members and len(members) == 2
  assert result['ensemble_accuracy'] == np.mean(each['ensemble_accuracy']) and len(each['ensemble_accuracy']) == 20
  assert result['accuracy'] == np.mean(each['accuracy']) and result['checkpoint_step'] == members[0]
  assert 'config.eval.ensemble = 5, but validated checkpoints that can be read: 2; the ensemble is of these' in lines
  assert lines[-2:] == [report.ensemble_line(result), report.test_line(result)]

  assert run('--mode=eval', f'--workdir={workdir}', '--config.eval.ensemble=1') == 0
  result = json.loads((workdir / 'test.json').read_text())
  assert result['ensemble_checkpoints'] == members[:1]
  for name in ('accuracy', 'accuracy_ci95', 'loss', 'loss_ci95'):
    assert result[f'ensemble_{name}'] == pytest.approx(result[name], rel=1e-5)
  assert not any('but validated' in line for line in capsys.readouterr().out.splitlines())


def test_eval_mode_with_the_last_checkpoint_as_well(finished, cache, tmp_path, capsys, monkeypatch):
  """Of the checkpoints of steps 3 and 6 either is made the best; the last is tested as if it were, but once alone."""
  results, tested, make_test = [], [], report.make_test

  def counted(*arguments):
    test_fn = make_test(*arguments)
    return lambda state: (tested.append(int(state.step)), test_fn(state))[1]

  monkeypatch.setattr(report, 'make_test', counted)
  for best in (3, 6):
    workdir = shutil.copytree(finished[0], tmp_path / str(best))
    for step in (3, 6):
      score = {'score': float(step == best)}
      (workdir / 'checkpoints' / str(step) / 'metrics' / 'metrics').write_text(json.dumps(score))
    assert run('--mode=eval', f'--workdir={workdir}', '--config.eval.last=True', '--config.eval.ensemble=1') == 0
    result, each = (json.loads((workdir / name).read_text()) for name in ('test.json', 'test_episodes.json'))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [report.last_line(result), report.ensemble_line(result), report.test_line(result)]
    assert result['checkpoint_step'] == each['checkpoint_step'] == best
    assert result['last_checkpoint_step'] == each['last_checkpoint_step'] == 6
    assert len(each['last_accuracy']) == 20 and result['last_accuracy'] == pytest.approx(np.mean(each['last_accuracy']))
    results.append((result, each))
  assert tested == [3, 6, 6]
  (first, first_each), (last, last_each) = results
  for name in ('accuracy', 'accuracy_ci95', 'loss', 'loss_ci95'):
    assert first[f'last_{name}'] == last[f'last_{name}'] == last[name] != first[name]
  assert first_each['last_accuracy'] == last_each['last_accuracy'] == last_each['accuracy']


# Heads of three classes: logits of the queries, from the features and targets of the support set.


def of_unit(head):
  """A head that is given features of length 1."""

  def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  return lambda support, targets, query: head(unit(support), targets, unit(query))


def means(support, targets):
  return np.stack([support[targets == k].mean(axis=0) for k in range(3)])


def nearest_means(support, targets, query):
  return -np.sum(np.square(query[:, None] - means(support, targets)), axis=-1)


def cosines(support, targets, query):
  directions = means(support, targets)
  return query @ (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T


def logistic_regression(support, targets, query):
  return LogisticRegression(C=3.0, tol=1e-8).fit(support, targets).decision_function(query)


def ridge(support, targets, query):
  return Ridge(alpha=0.5).fit(support, np.eye(3)[targets]).predict(query)


@pytest.mark.parametrize(
  ('algorithm', 'head', 'expected'),
  [
    ('classifier --config.algorithm.head_c=3.0', 'logistic_regression', of_unit(logistic_regression)),
    ('maml', 'ridge --config.eval.head_c=2.0', of_unit(ridge)),
    ('protonet', 'prototype --config.eval.head_normalize=False', nearest_means),
    ('meta_transfer', 'cosine', of_unit(cosines)),
  ],
)
def test_eval_mode_with_a_head_is_a_loop_over_episodes(
  pretrained, cache, tmp_path, capsys, monkeypatch, algorithm, head, expected
):
  if algorithm != 'maml':  # which has an inner loop, and none to draw with a head
    monkeypatch.setattr(report, 'draw', lambda *arguments: None)
  leaky = '--config.model.negative_slope=0.1'  # so that no features are all 0
  overrides = [*SMALL_CONV, leaky, *f'--config.algorithm.name={algorithm}'.split()]
  config = config_lib.override(config_lib.load(TINY), overrides)
  made = experiment_lib.make(config, None)
  state = train.start_from(str(pretrained), train.init_state(made, seed=0), made.algorithm.adopt)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.standard_normal(x.shape)), state.params)
  with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
    checkpoints.save(state._replace(step=np.int32(1), params=params), score=0.0)
  workdir_lib.keep_config(tmp_path, config)
  arguments = f'--config.eval.head={head} --config.eval.shot=2'.split()
  assert run('--mode=eval', f'--workdir={tmp_path}', *arguments) == 0
  printed = capsys.readouterr().out
  result, each = (json.loads((tmp_path / name).read_text()) for name in ('test.json', 'test_episodes.json'))

  source = experiment_lib.make(config_lib.override(config, arguments), None).sources['test']
  episodes = jax.jit(source.decode)(source.resident, source.sample(0, 8))

  @jax.jit
  @jax.vmap
  def embedded(episode):
    features, given = made.algorithm.embedding.support(params, state.model_state, episode.support.inputs)
    return features, made.algorithm.embedding.query(params, given, episode.query.inputs)

  losses = []
  for k, (support, query) in enumerate(zip(*jax.device_get(embedded(episodes)), strict=True)):
    of_support, targets = (np.asarray(x.targets[k]) for x in (episodes.support, episodes.query))
    logits = expected(support, of_support, query)
    assert each['accuracy'][k] == pytest.approx(np.mean(logits.argmax(axis=1) == targets))
    losses.append(-log_softmax(logits, axis=1)[np.arange(6), targets].mean())
  assert result['loss'] == pytest.approx(np.mean(losses), rel=1e-4)
  assert len(set(each['accuracy'])) > 1 and result['head'] == head.split()[0] and 'by_inner_step' not in result
  of_c = {
    'classifier --config.algorithm.head_c=3.0': ' of c = 3',
    'maml': ' of c = 2',
    'protonet': ', features of any length',
  }.get(algorithm, '')
  assert f'{result["head"].replace("_", " ")} head{of_c}, {result["batch_norm"]} batch norm' in printed.splitlines()[-1]
  assert ('head_c' in result) == (' of c' in of_c)


def test_heads_that_there_are_not_and_learners_without_an_embedding_are_refused():
  config = config_lib.override(config_lib.load(TINY), ['--config.eval.head=svm'])
  with pytest.raises(UserError, match='a head is one of logistic_regression, ridge, prototype, cosine'):
    experiment_lib.make(config, None)
  config = config_lib.override(config_lib.load(TINY), ['--config.eval.head=ridge', '--config.algorithm.name=mamlpp'])
  with pytest.raises(UserError, match='mamlpp with these settings has no embedding'):
    experiment_lib.make(config, None)
  without_head_form = maml.make(nn.Dense(3))
  with pytest.raises(UserError, match='no embedding'):
    experiment_lib.with_head(config, without_head_form, losses.CLASSIFICATION, way=3)
  with pytest.raises(UserError, match='regression has none'):
    experiment_lib.with_head(config, without_head_form, losses.REGRESSION, way=3)
  for arguments, text in (
    (['--config.eval.head_c=3'], 'name one'),
    (['--config.eval.head=cosine', '--config.eval.head_c=3'], 'cosine has no c'),
  ):
    with pytest.raises(UserError, match=text):
      experiment_lib.make(config_lib.override(config_lib.load(TINY), arguments), None)


def test_errors_of_the_command_line(finished, cache, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  workdir, _ = finished
  tiny = f'--config={TINY}'
  damaged = tmp_path / 'damaged'
  damaged.mkdir()
  (damaged / 'config.json').write_text('{')
  orphans = tmp_path / 'orphans'
  (orphans / 'checkpoints' / '5').mkdir(parents=True)
  only_train = tmp_path / 'images'
  without_val = tmp_path / 'without_val'
  for split in (only_train / 'train', without_val / 'train', without_val / 'test'):
    for k in range(3):
      folder = split / f'{split.name}_{k}'
      folder.mkdir(parents=True)
      for i in range(4):
        Image.new('L', (8, 8), 9 * i + k).save(folder / f'{i}.png')
  for arguments, message in [
    ((), '--config=NAME is missing'),
    (('--config=none.py',), 'there is no file none.py'),
    ((f'{tiny}:wya=3',), "did you mean 'way'"),
    ((tiny, '--config.algorithm.inner_stepz=1'), "did you mean 'inner_steps'"),
    ((tiny, '--config.seed=x'), 'seed'),
    ((tiny, '--wrokdir=x'), 'wrokdir'),
    ((tiny, '--mode=trian'), 'mode'),
    ((tiny, 'train'), "'train'"),
    (('--mode=eval', '--workdir=nothing'), 'holds no run'),
    (('--mode=eval', f'--workdir={damaged}'), 'config.json is damaged'),
    ((tiny, '--mode=eval', '--workdir=new'), 'holds no run'),
    ((f'{tiny}:way=7',), 'way = 7, but the val split has only 6 classes'),
    ((f'{tiny}:shot=5',), 'only 6 images'),
    ((tiny, '--config.algorithm.batch_norm=none'), 'batch_norm is one of'),
    ((tiny, '--config.algorithm.inner_params=("nose",)'), 'nose'),
    ((tiny, '--config.optimizer.name=adm'), 'name is one of'),
    ((tiny, '--config.model.downsample=x'), 'downsample'),
    ((tiny, '--config.data.placement=x'), 'placement'),
    ((tiny, '--config.data.augment=flop'), "there is no 'flop'"),
    ((tiny, '--config.data.augment=flip,crop'), "there is no 'flip,crop'"),
    ((tiny, '--config.data.normalize=imagenet'), 'these have 1 channel'),
    ((tiny, f'--workdir={workdir}', '--config.data.augment=("flip",)'), 'data.augment differs'),
    ((tiny, f'--workdir={workdir}', '--config.eval.augment=("flip",)'), 'eval.augment differs'),
    ((tiny, f'--workdir={workdir}', '--mode=eval', '--config.data.normalize=bytes'), 'data.normalize differs'),
    ((tiny, '--workdir=another', '--config.chunk=x'), 'chunk'),
    ((tiny, '--workdir=/proc/metajax'), 'cannot write to /proc/metajax'),
    ((tiny, f'--workdir={workdir}', '--config.seed=1', '--config.model.width=5'), 'model.width, seed differ'),
    ((tiny, f'--workdir={workdir}', '--mode=eval', '--config.algorithm.inner_lr=2'), 'algorithm.inner_lr differs'),
    ((tiny, f'--workdir={workdir}', '--mode=eval', '--config.eval.way=4'), 'trained with 3 outputs'),
    ((tiny, f'--workdir={workdir}', '--mode=eval', '--config.eval.inner_lr=1e30'), 'the test diverged'),
    ((f'{tiny}:shot=2', f'--workdir={workdir}', '--mode=eval', '--config.eval.shot=3'), 'config.eval.shot decides'),
    ((tiny, f'--workdir={workdir}', '--mode=eval', '--config.total_steps=7'), 'total_steps differs'),
    ((tiny, f'--workdir={workdir}', '--config.total_steps=3'), 'is at step 6 already'),
    ((tiny, f'--workdir={orphans}'), 'no config.json to tell whose'),
    ((tiny, '--config.data.tasks=0'), 'config.data.tasks = 0'),
    ((tiny, '--config.seed=-1'), 'config.seed = -1'),
    ((tiny, '--config.log_every=-5'), 'config.log_every = -5'),
    ((tiny, '--config.eval.ensemble=-1'), 'config.eval.ensemble = -1'),
    ((tiny, '--config.eval.ensemble=6'), 'only the 5 best checkpoints are kept'),
    (
      (tiny, '--config.eval.ensemble=5', '--config.data.name=folder', f'--config.data.path={without_val}'),
      'has no val split to choose by',
    ),
    ((tiny, '--config.model.width=0'), 'width = 0'),
    ((tiny, '--config.algorithm.inner_steps=-1'), 'inner_steps = -1'),
    ((tiny, '--config.algorithm.name=reptile', '--config.algorithm.inner_batch=0'), 'inner_batch = 0'),
    ((tiny, '--config.optimizer.clip=-1'), 'clip = -1'),
    ((tiny, '--config.model.downsample=pool', '--config.data.size=8'), 'too small to be halved 4 times'),
    ((tiny, '--workdir=none', '--config.data.name=folder', f'--config.data.path={only_train}'), 'no test split'),
    ((tiny, '--workdir=other', '--config.data.name=folder', '--config.data.path=none'), 'none'),
  ]:
    assert run(*arguments) == 2, arguments
    output = capsys.readouterr()
    assert message in output.err and output.err.count('\n') == 1, (arguments, output.err)
    assert output.err.startswith('metajax: ') and 'Traceback' not in output.err


def test_other_errors_keep_their_traceback(cache, tmp_path, monkeypatch):
  config = tmp_path / 'broken.py'
  config.write_text('def get_config():\n  return 1 / 0\n')
  with pytest.raises(ZeroDivisionError):
    run(f'--config={config}')


def test_what_became_of_settings_is_said_once(cache, tmp_path, capsys):
  refused = '--config.eval.episodes=0'  # before anything is read or compiled
  assert run(f'--config={TINY}', f'--workdir={tmp_path}', '--config.algorithm.name=reptile', refused) == 2
  assert capsys.readouterr().out.count('config: kept algorithm.inner_lr=0.1, ') == 1


def test_a_full_disk_ends_with_one_line_and_loses_nothing(cache, tmp_path, monkeypatch, capsys):
  arguments = f'--config={TINY}', f'--workdir={tmp_path / "run"}', '--mode=train', MLP
  write = writer.Writer.write

  def fail(self, step, split, metrics, **times):
    if step == 4:
      raise OSError(errno.ENOSPC, 'No space left on device', str(tmp_path / 'run' / 'metrics.jsonl'))
    write(self, step, split, metrics, **times)

  with monkeypatch.context() as patch:
    patch.setattr(writer.Writer, 'write', fail)
    assert run(*arguments) == 2
  error = capsys.readouterr().err
  assert 'No space left on device' in error and 'make room' in error and error.count('\n') == 1
  assert run(*arguments) == 0
  assert 'from step 3' in capsys.readouterr().out


def test_default_workdir_and_data_dir(tmp_path, monkeypatch):
  monkeypatch.delenv('METAJAX_DATA', raising=False)
  options, overrides = main.parse(['metajax', '--config=configs/a.py:way=20,shot=1', '--config.seed=1'])
  assert options.workdir == os.path.join('runs', 'a-way=20,shot=1')
  assert options.data_dir == os.path.expanduser('~/metajax_data') and overrides == ['--config.seed=1']
  monkeypatch.setenv('METAJAX_DATA', str(tmp_path))
  options, _ = main.parse(['metajax', '--config=configs/a.py'])
  assert (options.workdir, options.data_dir) == (os.path.join('runs', 'a'), str(tmp_path))


def test_regression_run(cache, tmp_path):
  workdir = tmp_path / 'sinusoid'
  assert (
    run(
      '--config=configs/sinusoid.py',
      f'--workdir={workdir}',
      '--config.total_steps=2',
      '--config.eval_every=1',
      '--config.eval.episodes=5',
      '--config.eval.val_episodes=5',
      '--config.eval.ensemble=2',
      '--config.eval.last=True',
    )
    == 0
  )
  result = json.loads((workdir / 'test.json').read_text())
  assert {'loss', 'loss_ci95', 'inner_steps'} <= result.keys() and not {'accuracy', 'way', 'batch_norm'} & result.keys()
  assert sorted(result['ensemble_checkpoints']) == [1, 2] and result['ensemble_loss_ci95'] > 0
  assert result['last_checkpoint_step'] == 2 and result['last_loss_ci95'] > 0
  each = json.loads((workdir / 'test_episodes.json').read_text())
  assert len(each['ensemble_loss']) == len(each['last_loss']) == 5
  assert (workdir / 'figures' / 'regression.png').exists()


def test_a_second_process_on_a_workdir_is_refused_and_sigterm_saves_and_exits_cleanly(cache, tmp_path, capsys):
  workdir = tmp_path / 'run'
  arguments = [
    f'--config={TINY}',
    f'--workdir={workdir}',
    '--config.total_steps=100000',
    MLP,
    '--config.checkpoint_every=0',
    '--config.eval_every=0',
    '--config.optimizer.schedule=constant',
  ]
  process = start(*arguments, METAJAX_CACHE=str(cache))
  try:
    wait_for(lambda: (workdir / 'metrics.jsonl').exists() and (workdir / 'metrics.jsonl').stat().st_size, process)
    assert run(f'--config={TINY}', f'--workdir={workdir}') == 2
    assert f'is in use by process {process.pid} on ' in capsys.readouterr().err
  finally:
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  line = output.splitlines()[-1]
  assert line.startswith('stopped at step ') and 'run the same command again' in line
  step = int(line.split()[3].rstrip(','))
  assert [path.name for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()] == [str(step)]
  # ... and it goes on from there, to a larger total_steps, which a constant schedule allows.
  arguments[2] = f'--config.total_steps={step + 3}'
  assert run(*arguments, '--mode=train') == 0
  assert f'from step {step}:' in capsys.readouterr().out
  steps = [record['step'] for record in writer.read(workdir)]
  assert sorted(set(steps)) == list(range(1, step + 4))


def test_divergence_stops_the_run(cache, tmp_path, capsys):
  workdir = tmp_path / 'run'
  assert (
    run(
      f'--config={TINY}',
      f'--workdir={workdir}',
      '--config.checkpoint_every=1',
      '--config.total_steps=30',
      '--config.data.name=sinusoid',
      '--config.model.name=mlp',
      '--config.optimizer.name=sgd',
      '--config.optimizer.learning_rate=1e6',
    )
    == 2
  )
  error = capsys.readouterr().err
  step = int(error.split(' at step ')[1].split(';')[0])
  assert f'the last good checkpoint is of step {step - 1}' in error and 'inner_lr' in error
  assert error.count('\n') == 1
  assert all(np.isfinite(list(record.values())).all() for record in writer.read(workdir))


def wait_for(condition, process, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    if process.poll() is not None:
      raise AssertionError(process.communicate()[1])
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_a_run_as_users_compile_it_has_the_same_numbers_and_a_progress_bar_on_a_terminal(finished, cache, tmp_path):
  control, terminal = pty.openpty()
  fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))
  process = subprocess.Popen(
    [sys.executable, '-m', 'metajax.main', f'--config={TINY}', f'--workdir={tmp_path}/run', '--mode=train'],
    env={**os.environ, **AS_USERS_COMPILE},
    stdout=subprocess.DEVNULL,
    stderr=terminal,
  )
  os.close(terminal)
  shown = b''
  try:
    while data := os.read(control, 65536):
      shown += data
  except OSError:  # the other end is closed
    pass
  assert process.wait(timeout=60) == 0
  shown = shown.decode()
  assert '6/6' in shown and 'loss' in shown and 'accuracy' in shown and 'tasks/s' in shown and '\r' in shown
  for record, other in zip(records_of(tmp_path / 'run'), records_of(finished[0]), strict=True):
    assert record == pytest.approx(other, rel=1e-4, abs=1e-5)

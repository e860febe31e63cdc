"""Runs that start from another's best weights, and the state of a weighting over a restart."""

import json

import jax
import numpy as np
import pytest

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import main, train, workdir
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError
from tests.conftest import SMALL_CONV, TINY, records_of

SMALL = ['--config.model.name=mlp', '--config.model.hidden=(4,)', '--config.eval.val_episodes=4', '--mode=train']


def run(folder, *arguments, config=TINY):
  return main.main(['metajax', f'--config={config}', f'--workdir={folder}', *SMALL, *arguments])


@pytest.fixture(scope='module')
def baseline(tmp_path_factory, shared_cache):
  folder = tmp_path_factory.mktemp('runs') / 'baseline'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('METAJAX_CACHE', str(shared_cache))
    assert run(folder, '--config.total_steps=3') == 0
  return folder


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_initial_weights_are_the_best_of_the_other_run_to_the_bit(baseline, cache):
  made = experiment_lib.make(workdir.read_config(baseline), None)
  fresh = train.init_state(made, seed=7)
  started = train.start_from(str(baseline), fresh)
  checkpoints = Checkpoints(baseline, read_only=True)
  best = checkpoints.restore(checkpoints.best_steps()[0], fresh)
  assert_same(started.params, best.params)
  assert_same(started._replace(params=fresh.params), fresh)
  with pytest.raises(AssertionError):
    assert_same(started.params, fresh.params)


def test_a_weighted_run_starts_from_a_baseline_and_goes_on_to_the_bit(baseline, cache, tmp_path):
  settings = (
    f'--config.init_from={baseline}',
    '--config.weighting.name=spsa_track',
    '--config.weighting.normalize_every=3',
  )
  assert run(tmp_path / 'whole', '--config.total_steps=4', *settings) == 0
  assert run(tmp_path / 'halves', '--config.total_steps=2', *settings) == 0
  assert run(tmp_path / 'halves', '--config.total_steps=4', *settings) == 0
  train_records = [[r for r in records_of(tmp_path / name) if 'train/loss' in r] for name in ('whole', 'halves')]
  assert train_records[0] == train_records[1]
  assert len(train_records[0]) == 4 and len(train_records[0][-1]['train/weights']) == 2
  config = workdir.read_config(tmp_path / 'whole')
  like = train.init_state(experiment_lib.make(config, None), config.seed)
  whole, halves = (Checkpoints(tmp_path / name, read_only=True).restore(4, like) for name in ('whole', 'halves'))
  assert_same(whole, halves)
  assert whole.weighting.update == 4 and whole.weighting.known and (whole.weighting.before > 0).all()
  assert (tmp_path / 'whole' / 'figures' / 'task_weights.png').stat().st_size > 10_000
  assert not (baseline / 'figures' / 'task_weights.png').exists()


def test_weights_of_another_network_are_refused_by_name(baseline, cache, tmp_path, capsys):
  assert run(tmp_path / 'run', f'--config.init_from={baseline}', config=f'{TINY}:way=2') == 2
  line = capsys.readouterr().err
  assert f'config.init_from: {baseline} has weights of another network' in line
  assert 'params/head/kernel is (4, 3) instead of (4, 2)' in line and 'layer0' not in line
  assert run(tmp_path / 'run', f'--config.init_from={tmp_path / "nothing"}') == 2
  assert 'config.init_from: there is no trained run in' in capsys.readouterr().err


def made_of(*overrides):
  return experiment_lib.make(config_lib.override(config_lib.load(TINY), [*SMALL_CONV, *overrides]), None)


@pytest.mark.parametrize(
  ('algorithm', 'where'),
  [
    ('protonet', lambda state: state.params['embedding']),
    ('maml', lambda state: state.params),
    ('reptile', lambda state: state.params),
    ('maml --config.algorithm.learned_lr=tensor', lambda state: state.params['network']),
    ('meta_transfer', lambda state: state.model_state['frozen']),
    ('classifier', lambda state: state.params['embedding']),
  ],
)
def test_another_learner_begins_with_the_network_and_statistics_of_a_classifier(
  pretrained, cache, capsys, algorithm, where
):
  made = made_of(*f'--config.algorithm.name={algorithm}'.split(), '--config.data.classes=(9, 6, 6)')
  fresh = train.init_state(made, seed=7)
  started = train.start_from(str(pretrained), fresh, made.algorithm.adopt)
  assert capsys.readouterr().out == f'initial weights: the best of {pretrained}, its network\n'
  params, model_state = Checkpoints(pretrained, read_only=True).best_weights()
  network, taken = where(started), params['embedding']
  assert_same({name: network[name] for name in taken}, taken)
  assert_same(started.model_state['batch_stats'], model_state['batch_stats'])
  assert np.any(model_state['batch_stats']['norm0']['mean'])
  # All else is as it was: heads, scales, step sizes, optimiser.
  where(started).update(where(fresh))
  started.model_state['batch_stats'] = fresh.model_state['batch_stats']
  assert jax.tree.structure(started) == jax.tree.structure(fresh)
  assert_same(started, fresh)


def test_a_run_without_meta_updates_is_what_it_begins_with_and_can_go_on(pretrained, cache, tmp_path, capsys):
  settings = [*SMALL_CONV, '--config.algorithm.name=meta_transfer', f'--config.init_from={pretrained}']
  settings.append('--config.optimizer.only=("conv3","head")')

  def train_to(steps, *more):
    arguments = f'--config={TINY}', f'--workdir={tmp_path / "run"}', *settings, f'--config.total_steps={steps}', *more
    assert main.main(['metajax', *arguments]) == 0

  train_to(0)
  assert f'config.total_steps = 0: {tmp_path / "run"} stays as it begins' in capsys.readouterr().out
  assert json.loads((tmp_path / 'run' / 'test.json').read_text())['checkpoint_step'] == 0
  before, model_state = Checkpoints(tmp_path / 'run', read_only=True).best_weights()
  assert all(np.all(x == 1) for x in jax.tree.leaves(before['scale']))
  assert_same(model_state['frozen'], Checkpoints(pretrained, read_only=True).best_weights()[0]['embedding'])
  train_to(1, '--mode=train')
  after, _ = Checkpoints(tmp_path / 'run', read_only=True).best_weights()
  same = jax.tree.map(lambda *x: np.array_equal(*x), before, after)
  assert same == {'scale': {f'conv{i}': i < 3 for i in range(4)}, 'shift': {}, 'head': {'bias': False, 'kernel': False}}


def test_a_classifier_of_the_same_classes_goes_on_with_all_of_it(pretrained, cache, capsys):
  made = made_of('--config.algorithm.name=classifier', '--config.data.batch=8')
  started = train.start_from(str(pretrained), train.init_state(made, seed=7), made.algorithm.adopt)
  assert_same((started.params, started.model_state), Checkpoints(pretrained, read_only=True).best_weights())
  assert capsys.readouterr().out == f'initial weights: the best of {pretrained}\n'
  config = config_lib.override(
    workdir.read_config(pretrained),
    ['--config.model.negative_slope=0.1', '--config.data.normalize=mtl', '--config.data.way=4'],
  )
  train.start_from(str(pretrained), train.init_state(made, seed=7), config=config)
  line = "its network or images were others: data.normalize = 'none', here 'mtl'; model.negative_slope = 0.0, here 0.1"
  assert capsys.readouterr().out.splitlines()[1:] == [line]


@pytest.mark.parametrize(('algorithm', 'more'), [('protonet', 12), ('maml', 12), ('meta_transfer', 12 + 4)])
def test_another_network_of_a_classifier_is_refused_leaf_by_leaf(pretrained, cache, algorithm, more):
  """Statistics first; then kernels, scales and biases, and what is learned of kernels, but no head."""
  made = made_of(f'--config.algorithm.name={algorithm}', '--config.model.width=3')
  with pytest.raises(UserError) as refused:
    train.start_from(str(pretrained), train.init_state(made, seed=0), made.algorithm.adopt)
  assert (
    f'{pretrained} has weights of another network: model_state/batch_stats/norm0/mean is (4,) instead of (3,); '
    in (str(refused.value))
  )
  assert f'norm3/var is (4,) instead of (3,); and {more} more. Choose' in str(refused.value)


def test_a_network_for_each_inner_step_and_one_that_does_not_lie_apart_are_refused(pretrained, baseline, cache):
  made = made_of('--config.algorithm.name=mamlpp', '--config.algorithm.multi_step_epochs=0')
  with pytest.raises(UserError, match='can only begin with weights of its own kind'):
    train.start_from(str(pretrained), train.init_state(made, seed=0), made.algorithm.adopt)
  made = made_of('--config.algorithm.name=protonet', '--config.model.name=mlp', '--config.model.hidden=(4,)')
  with pytest.raises(UserError, match='params/embedding/layer0/bias is missing'):
    train.start_from(str(baseline), train.init_state(made, seed=0), made.algorithm.adopt)


def test_settings_of_sequences_come_back_from_the_command_line_and_from_a_file():
  config = config_lib.override(
    config_lib.load(TINY), ['--config.weighting.name=spsa', "--config.weighting.gain=('step',0.5,10,0.9)"]
  )
  assert config.weighting.gain == ('step', 0.5, 10, 0.9)
  assert config_lib.differences(config, config_lib.from_json(config_lib.to_json(config))) == []
  assert json.loads(config_lib.to_json(config))['weighting']['radius'] == ['power', 15.0, 1 / 24]
  with pytest.raises(UserError, match='gain'):
    experiment_lib.make(
      config_lib.override(config_lib.load(TINY), ['--config.weighting.name=spsa', "--config.weighting.gain=('x',)"]),
      None,
    )


def test_a_setting_that_one_data_set_lacks_is_no_difference():
  """`folder` has a crop, glyphs has none and crops nothing."""
  of_glyphs, of_folder = (
    config_lib.override(config_lib.load(TINY), [*SMALL_CONV, *more])
    for more in ([], ['--config.data.name=folder', '--config.data.path=x'])
  )
  assert not [line for line in train._differing(of_folder, of_glyphs) if 'crop' in line]
  of_folder = config_lib.override(of_folder, ['--config.data.crop=0.5'])
  assert 'data.crop = 0.0, here 0.5' in train._differing(of_folder, of_glyphs)
  assert 'data.crop = 0.5, here 0.0' in train._differing(of_glyphs, of_folder)

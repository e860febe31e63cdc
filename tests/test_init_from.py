"""Runs that start from another's best weights, and the state of a weighting over a restart."""

import json

import jax
import numpy as np
import pytest

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import main, train, workdir, writer
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError
from tests.conftest import TINY

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
  train_records = [[r for r in writer.read(tmp_path / name) if 'train/loss' in r] for name in ('whole', 'halves')]
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

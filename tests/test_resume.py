import json
import shutil

import pytest

from metajax import main
from tests import kill_and_resume
from tests.conftest import TINY, start


def tiny(*overrides):
  return [f'--config={TINY}', '--config.data.augment=("crop", "jitter", "flip", "rotate")', *overrides]


def tinier(*overrides):
  return tiny('--config.model.name=mlp', '--config.model.hidden=(8,)', *overrides)


def test_killed_at_random_moments_the_run_ends_the_same(cache, tmp_path):
  """The short form of `python -m tests.kill_and_resume`."""
  arguments = tiny('--config.total_steps=60', '--config.eval_every=20', '--config.checkpoint_every=7')
  assert len(list(kill_and_resume.check(arguments, tmp_path, kills=2))) >= 2


def test_differences_would_be_seen(cache, tmp_path):
  """The comparison that the test above relies on tells two runs of different seeds apart."""
  outcomes = []
  for seed in (0, 1):
    assert main.main(['metajax', *tinier(f'--config.seed={seed}', f'--workdir={tmp_path / str(seed)}')]) == 0
    outcomes.append(kill_and_resume.outcome(tmp_path / str(seed)))
  found = kill_and_resume.differences(*outcomes)
  assert 'metrics' in found and 'test' in found and any('params' in name for name in found)
  assert kill_and_resume.differences(outcomes[0], outcomes[0]) == []


def test_a_run_goes_on_after_its_latest_checkpoint_was_damaged(cache, tmp_path, capsys):
  arguments = ['metajax', *tinier(f'--workdir={tmp_path / "run"}')]
  assert main.main(arguments) == 0
  expected = kill_and_resume.outcome(tmp_path / 'run')
  capsys.readouterr()
  latest = tmp_path / 'run' / 'checkpoints' / '6'
  data = max(latest.rglob('*'), key=lambda path: path.stat().st_size if path.is_file() else 0)
  data.write_bytes(data.read_bytes()[:10])
  assert main.main(arguments) == 0
  assert f'checkpoint {latest} cannot be read' in capsys.readouterr().out
  assert kill_and_resume.differences(expected, kill_and_resume.outcome(tmp_path / 'run')) == []


def test_a_checkpoint_of_four_devices_goes_on_on_one_and_the_other_way_round(cache, tmp_path):
  def run(name, devices, steps):
    arguments = tinier(
      f'--workdir={tmp_path / name}',
      '--mode=train',
      f'--config.total_steps={steps}',
      '--config.optimizer.name=sgd',
      '--config.optimizer.learning_rate=0.01',
    )
    process = start(*arguments, METAJAX_CACHE=str(cache), JAX_NUM_CPU_DEVICES=str(devices))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f'{devices} cpu device(s)' in output
    return [json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]

  run('1', 1, 3)
  shutil.copytree(tmp_path / '1', tmp_path / '1 to 4')
  run('4 to 1', 4, 3)
  expected = run('1', 1, 6)
  for records in (run('1 to 4', 4, 6), run('4 to 1', 1, 6)):
    for record, other in zip(records, expected, strict=True):
      assert record == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_config_that_failed_at_the_start_leaves_the_workdir_free(cache, tmp_path, capsys):
  workdir = f'--workdir={tmp_path / "run"}'
  assert main.main(['metajax', *tinier(workdir, '--config.data.shot=100')]) == 2
  assert main.main(['metajax', *tinier(workdir, '--config.total_steps=1', '--mode=train')]) == 0
  assert (tmp_path / 'run' / 'config.json').exists()

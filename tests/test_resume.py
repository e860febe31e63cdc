import shutil

import jax
import pytest

from metajax import main, writer
from tests import kill_and_resume
from tests.conftest import TINY, records_of, start


def tiny(*overrides):
  augmented = '--config.data.augment=("crop", "jitter", "flip", "rotate")'
  return [f'--config={TINY}', augmented, '--config.model.name=mlp', '--config.model.hidden=(8,)', *overrides]


def test_killed_at_random_moments_the_run_ends_the_same(cache, tmp_path):
  """The short form of `python -m tests.kill_and_resume`."""
  arguments = tiny('--config.total_steps=60', '--config.eval_every=20', '--config.checkpoint_every=7')
  assert len(list(kill_and_resume.check(arguments, tmp_path, kills=2))) >= 2


def test_differences_would_be_seen(cache, tmp_path):
  """The comparison that the test above relies on tells two runs of different seeds apart."""
  outcomes = []
  for seed in (0, 1):
    assert main.main(['metajax', *tiny(f'--config.seed={seed}', f'--workdir={tmp_path / str(seed)}')]) == 0
    outcomes.append(kill_and_resume.outcome(tmp_path / str(seed)))
  found = kill_and_resume.differences(*outcomes)
  assert 'metrics' in found and 'test' in found and any('params' in name for name in found)
  assert kill_and_resume.differences(outcomes[0], outcomes[0]) == []


@pytest.mark.smoke
def test_a_run_goes_on_after_its_latest_checkpoint_was_damaged(cache, tmp_path, capsys):
  arguments = ['metajax', *tiny(f'--workdir={tmp_path / "run"}')]
  assert main.main(arguments) == 0
  expected = kill_and_resume.outcome(tmp_path / 'run')
  capsys.readouterr()
  latest = tmp_path / 'run' / 'checkpoints' / '6'
  data = max(latest.rglob('*'), key=lambda path: path.stat().st_size if path.is_file() else 0)
  data.write_bytes(data.read_bytes()[:10])
  assert main.main(arguments) == 0
  assert f'checkpoint {latest} cannot be read' in capsys.readouterr().out
  assert kill_and_resume.differences(expected, kill_and_resume.outcome(tmp_path / 'run')) == []


def test_a_checkpoint_of_four_devices_goes_on_on_fewer_and_the_other_way_round(cache, tmp_path, capsys):
  def settings(name, steps):
    outer = '--config.optimizer.name=sgd', '--config.optimizer.learning_rate=0.01'
    return tiny(f'--workdir={tmp_path / name}', '--mode=train', f'--config.total_steps={steps}', *outer)

  def on_four(name, steps):
    process = start(*settings(name, steps), METAJAX_CACHE=str(cache), JAX_NUM_CPU_DEVICES='4')
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert '4 cpu device(s)' in output

  def here(name, steps):
    assert main.main(['metajax', *settings(name, steps)]) == 0
    assert f'{jax.device_count()} cpu device(s)' in capsys.readouterr().out and jax.device_count() < 4

  here('few', 3)
  shutil.copytree(tmp_path / 'few', tmp_path / 'few to four')
  here('few', 6)
  on_four('few to four', 6)
  on_four('four to few', 3)
  here('four to few', 6)
  for name in ('few', 'few to four', 'four to few'):  # the time of training goes on over a restart
    times = [record['time'] for record in writer.read(tmp_path / name)]
    assert times == sorted(times) and times[0] > 0
  expected, *others = (records_of(tmp_path / name) for name in ('few', 'few to four', 'four to few'))
  for each in others:
    for record, other in zip(each, expected, strict=True):
      assert record == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_config_that_failed_at_the_start_leaves_the_workdir_free(cache, tmp_path, capsys):
  workdir = f'--workdir={tmp_path / "run"}'
  assert main.main(['metajax', *tiny(workdir, '--config.data.shot=100')]) == 2
  assert main.main(['metajax', *tiny(workdir, '--config.total_steps=1', '--mode=train')]) == 0
  assert (tmp_path / 'run' / 'config.json').exists()

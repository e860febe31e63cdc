"""What validation decides, beside plain loops, and in runs that are cut off."""

import json
import shutil

import numpy as np
import pytest

from metajax import compare, history, main, sweep, writer
from metajax import config as config_lib
from metajax.errors import UserError
from tests import kill_and_resume
from tests.conftest import TINY


def pytorch_factors(scores, factor, patience):
  """ReduceLROnPlateau(mode='max') as PyTorch writes it, of positive scores; the factor after each."""
  rate, best, bad, seen = 1.0, -np.inf, 0, []
  for score in scores:
    if score > best * (1 + 1e-4):
      best, bad = score, 0
    else:
      bad += 1
    if bad > patience:
      rate, bad = rate * factor, 0
    seen.append(rate)
  return seen


def steps_until_stop(scores, patience):
  """EarlyStopping(mode='max', min_delta=0) as Lightning writes it: after how many validations training ends."""
  best, waited = -np.inf, 0
  for number, score in enumerate(scores, 1):
    if score > best:
      best, waited = score, 0
    else:
      waited += 1
      if waited >= patience:
        return number
  return None


def prefixes(scores):
  return [list(scores[:n]) for n in range(1, len(scores) + 1)]


def test_the_fifth_bad_validation_in_a_row_makes_a_tenth_of_the_step_size():
  rising, flat = [0.5, 0.6], [0.6] * 11
  found = [history.plateau_factor(known, 0.1, 4) for known in prefixes(rising + flat)]
  np.testing.assert_allclose(found, [1, 1, *[1] * 4, *[0.1] * 5, *[0.01] * 2])
  assert history.plateau_factor([], 0.1, 4) == 1
  assert history.plateau_factor([0.6, *np.linspace(0.6, 0.60005, 5)], 0.1, 4) == 0.1  # too little to count
  assert history.plateau_factor([0.6, *np.linspace(0.6, 0.6001, 5)], 0.1, 4) == 1


@pytest.mark.parametrize('patience', [0, 2, 4])
def test_falls_and_end_are_pytorch_s_on_random_scores(patience):
  for seed in range(20):
    scores = np.random.default_rng(seed).integers(1, 10, 40) / 10
    found = [history.plateau_factor(known, 0.1, patience) for known in prefixes(scores)]
    np.testing.assert_allclose(found, pytorch_factors(scores, 0.1, patience), rtol=1e-12)
    if patience:
      ends = [history.exhausted(known, patience) for known in prefixes(scores)]
      assert ends.index(True) + 1 == steps_until_stop(scores, patience)


def test_training_ends_after_fifteen_validations_in_a_row_without_a_higher_score():
  scores = [0.5, 0.4, *[0.5] * 3, 0.6, *[0.6] * 15]
  assert [history.exhausted(known, 15) for known in prefixes(scores)] == [False] * 20 + [True]
  assert not history.exhausted(scores, 0)


def test_losses_that_rise_slowly_do_not_count_as_better():
  """By PyTorch's threshold, (1 + 1e-4) times a negative best, each of these is better than the one before."""
  scores = [-1 - 5e-5 * k for k in range(6)]
  assert history.plateau_factor(scores, 0.1, 4) == 0.1
  assert history.plateau_factor([-1 + 2e-4 * k for k in range(6)], 0.1, 4) == 1


def tiny(*overrides):
  network = '--config.model.name=mlp', '--config.model.hidden=(8,)'
  return ['metajax', f'--config={TINY}', *network, *(str(override) for override in overrides)]


PLATEAU = (
  *('--config.optimizer.name=sgd', '--config.optimizer.learning_rate=0.05', '--config.optimizer.schedule=plateau'),
  *('--config.optimizer.plateau_factor=0.5', '--config.optimizer.plateau_patience=0', '--config.eval_every=2'),
  *('--config.checkpoint_every=1', '--config.total_steps=40', '--config.stop_patience=5', '--config.log_every=1'),
)


def test_a_run_ends_early_and_one_that_was_cut_off_ends_as_it(cache, tmp_path, capsys):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert main.main(tiny(*PLATEAU, f'--workdir={whole}')) == 0
  output = capsys.readouterr().out
  expected = kill_and_resume.outcome(whole)
  scores = [record['val/accuracy'] for record in writer.read(whole) if 'val/accuracy' in record]
  end = 2 * len(scores)
  assert steps_until_stop(scores, 5) == len(scores) and end < 40
  assert f'no better validation in 5 evaluations: training ends at step {end} of 40' in output
  assert output.splitlines()[-1].startswith('test: ')
  [factor] = (value for name, value in expected['arrays'].items() if name.endswith("['factor']"))
  assert factor == pytorch_factors(scores, 0.5, 0)[-1] < 1 and f'step size times {factor:g}' in output

  # What a run leaves that was killed after its earliest checkpoint that is still there.
  earliest, *later = expected['steps']
  shutil.copytree(whole, parts)
  for step in later:
    shutil.rmtree(parts / 'checkpoints' / str(step))
  (parts / 'test.json').unlink()
  assert not history.finished(parts, config_lib.from_json((parts / 'config.json').read_text()), earliest)
  assert main.main(tiny(*PLATEAU, f'--workdir={parts}')) == 0
  assert f'from step {earliest}:' in capsys.readouterr().out
  assert kill_and_resume.differences(expected, kill_and_resume.outcome(parts)) == []

  # The same command trains no further, and tests.
  assert main.main(tiny(*PLATEAU, f'--workdir={parts}')) == 0
  output = capsys.readouterr().out
  assert f'ended early, at step {end} of 40' in output and 'training ' not in output and '\ntest: ' in output
  assert kill_and_resume.differences(expected, kill_and_resume.outcome(parts)) == []

  # It is finished to whoever asks.
  cell = sweep.Cell('parts', 'parts', str(parts), [], config_lib.from_json((parts / 'config.json').read_text()))
  assert sweep.finished(cell)
  assert compare.main(['compare', str(whole), str(parts)]) == 0
  assert 'not trained to its end' not in capsys.readouterr().out

  (parts / 'metrics.jsonl').write_text('')
  assert not sweep.finished(cell)
  assert main.main(tiny(*PLATEAU, f'--workdir={parts}')) == 2
  assert f'has 0 of the {len(scores)} validations up to step {end}' in capsys.readouterr().err


def test_validation_at_the_end_alone_is_no_part_of_the_history(tmp_path):
  """A run of 5 meta-updates, validated after 2, 4 and at its end, goes on like one that was to have 10."""
  records = [{'step': step, 'val/loss': 2.0, 'val/accuracy': step / 10} for step in (2, 4, 5)]
  records.insert(2, {'step': 4, 'train/loss': 1.0})
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  settings = [f'--config.{setting}' for setting in ('stop_patience=1', 'eval_every=2', 'total_steps=5')]
  config = config_lib.override(config_lib.load(TINY), settings)
  assert history.scores(tmp_path, config, 5) == [0.2, 0.4] and history.scores(tmp_path, config, 3) == [0.2]
  assert history.finished(tmp_path, config, 5) and not history.finished(tmp_path, config, 4)
  assert history.score({'loss': 0.25}) == -0.25
  assert history.scores(tmp_path / 'none', config_lib.load(TINY), 5) == []  # nothing goes by it


@pytest.mark.parametrize(
  ('settings', 'splits', 'text'),
  [
    (['stop_patience=-1'], 'val', 'stop_patience = -1'),
    (['stop_patience=3'], '', 'stop_patience = 3 goes by validation, but glyphs has no val split'),
    (['stop_patience=3', 'eval_every=0'], 'val', 'but config.eval_every = 0'),
    (['optimizer.schedule=plateau'], '', "'plateau' goes by validation, but glyphs has no val split"),
    (['optimizer.schedule=plateau', 'eval_every=0'], 'val', "'plateau' goes by validation, but config.eval_every = 0"),
  ],
)
def test_settings_without_validation_are_refused(settings, splits, text):
  config = config_lib.override(config_lib.load(TINY), [f'--config.{setting}' for setting in settings])
  with pytest.raises(UserError, match=text):
    history.check(config, {'train', splits})
  history.check(config_lib.load(TINY), {'train'})

import json

import numpy as np
import pytest
from scipy import stats

from metajax import config, reproduce
from tests.conftest import ROOT, TINY

TINY_CELL = reproduce.Cell('tiny', f'{TINY}:way=2', 58.9, 'nobody', 0.01, 1.9, ('--config.model.name=mlp',))


def test_cells_are_configs_that_can_be_made():
  assert len({cell.name for cell in reproduce.CELLS}) == len(reproduce.CELLS)
  for cell in reproduce.CELLS:
    config.override(config.load(cell.config), cell.overrides)
    assert not cell.start or cell.start in [other.name for other in reproduce.CELLS]


def result(accuracy, ci95=0.01, commit='abc'):
  test = {'accuracy': accuracy, 'accuracy_ci95': ci95, 'environment': {'commit': commit, 'machine': '2 x CPU'}}
  return {'command': 'metajax train', 'steps': 60_000, 'hours': 1.25, 'test': test}


def test_table(tmp_path):
  cells = [TINY_CELL, TINY_CELL._replace(name='other', ci95=None), TINY_CELL._replace(name='third')]
  accuracies = [0.5, 0.52, 0.57]
  for name, seed, each in [
    ('tiny', 0, result(0.5432, 0.0123)),
    *zip(['other'] * 3, range(3), map(result, accuracies), strict=True),
  ]:
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / f'seed{seed}.json').write_text(json.dumps(each))
  _, _, tiny, other, third = reproduce.table(cells, tmp_path).splitlines()
  assert tiny == '| `tiny` | 58.9 ± 1.9 | 54.32 ± 1.23 | 0 | 60,000 | 1.2 | 2 x CPU | abc | nobody |'
  half = 100 * stats.t.ppf(0.975, 2) * stats.sem(accuracies)
  assert f'| 58.9 | {100 * np.mean(accuracies):.2f} ± {half:.2f} | 0, 1, 2 |' in other
  assert 'not run: about 0.01 h' in third


def test_the_page_says_what_the_results_say():
  """`metajax reproduce --table > docs/results_table.md` makes it."""
  assert (ROOT / 'docs' / 'results_table.md').read_text() == reproduce.table(reproduce.CELLS, ROOT / 'results') + '\n'


def test_a_cell_is_run_kept_and_skipped(cache, tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(reproduce, 'CELLS', (TINY_CELL,))
  folders = f'--workdir={tmp_path / "runs"}', f'--results={tmp_path / "results"}'
  assert reproduce.main(['reproduce', 'ti*', '--seeds=3', *folders]) == 0
  found = json.loads((tmp_path / 'results' / 'tiny' / 'seed3.json').read_text())
  assert found['test'] == json.loads((tmp_path / 'runs' / 'tiny-seed3' / 'test.json').read_text())
  assert found['test']['seed'] == 3 and found['steps'] == 6 and found['hours'] >= 0
  assert found['command'].endswith('--config.model.name=mlp --config.seed=3')
  assert 'finished already' not in capfd.readouterr().out
  assert reproduce.main(['reproduce', 'tiny', '--seeds=3', *folders]) == 0
  assert 'finished already' in capfd.readouterr().out
  assert reproduce.main(['reproduce', '--list', *folders]) == 0
  assert 'done' in capfd.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'why'), [(['nothing'], "there is no cell 'nothing'"), (['tiny', '--seeds=a'], '--seeds takes whole')]
)
def test_command_lines_that_are_refused(arguments, why, capsys):
  assert reproduce.main(['reproduce', *arguments]) == 2
  assert why in capsys.readouterr().err

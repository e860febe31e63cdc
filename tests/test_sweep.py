import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from metajax import compare, config, main, report, sweep, workdir
from metajax.errors import UserError
from tests.conftest import ROOT, TINY

GRID = f'--config={TINY}', '--over', 'seed=0,1', 'shot=1,2', '--config.eval.episodes=8'


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, cache):
  monkeypatch.chdir(tmp_path)


def run(*arguments):
  return sweep.main(['sweep', *arguments])


def cells_of(*arguments):
  options, axes, fixed = sweep.parse(['sweep', *arguments])
  return sweep.plan(axes, options.config, options.workdir, options.data_dir, fixed)


def leave(arguments, values=None, ensemble=None):
  """What a run of `metajax.main` with these arguments leaves when it is done; the config."""
  options, overrides = main.parse(['main', *arguments])
  given = config.override(config.load(options.config), overrides)
  values = np.float32(accuracies(given) if values is None else values)
  folder = Path(options.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  workdir.keep_config(folder, given)
  each = {
    'protocol': {**report.protocol(given), 'batch_norm': 'transductive', 'dataset_notes': [], 'test_data': None},
    **report.adaptation(given),
    'checkpoint_step': given.total_steps,
    'accuracy': values.tolist(),
  }
  if ensemble is not None:
    each |= {'ensemble_accuracy': ensemble.tolist(), 'ensemble_checkpoints': [6]}
  result = {'episodes': len(values), 'checkpoint_step': given.total_steps}
  (folder / 'test_episodes.json').write_text(json.dumps(each))
  (folder / 'test.json').write_text(json.dumps(result))
  score = folder / 'checkpoints' / str(given.total_steps) / 'metrics' / 'metrics'
  score.parent.mkdir(parents=True, exist_ok=True)
  score.write_text(json.dumps({'score': 0.5}))
  return given


def accuracies(given):
  return np.float32(np.random.default_rng([given.seed, given.data.shot]).integers(0, 7, given.eval.episodes) / 6)


@pytest.fixture
def started(monkeypatch):
  """Stands in for the processes: the command lines of those that were started.

  `started.does`, by the cell's name, is called instead of leaving what a run leaves, and returns the exit status.
  """

  class Started(list):
    does = {}  # noqa: RUF012

  calls = Started()

  class Process:
    def __init__(self, command):
      calls.append(command)
      assert command[:3] == [sys.executable, '-m', 'metajax.main']
      self.told = []

    def wait(self, timeout=None):
      arguments = calls[-1][3:]
      name = Path(main.parse(['main', *arguments])[0].workdir).name
      if name in calls.does:
        return calls.does[name](self)
      leave(arguments)
      return 0

    def terminate(self):
      self.told.append('terminate')

  calls.does = {}
  monkeypatch.setattr(subprocess, 'Popen', Process)
  return calls


def names(started):
  return [Path(main.parse(['main', *command[3:]])[0].workdir).name for command in started]


def table_of(output):
  lines = next(block for block in output.split('\n\n') if block.startswith('run ')).splitlines()
  heads, *rows = ([cell.strip() for cell in line.split('  ') if cell] for line in lines)
  return [dict(zip(heads, row, strict=True)) for row in rows]


def test_printed_commands_are_those_of_the_grid(capsys):
  inner = "algorithm.inner_params=('head','conv0'),()"
  assert run(f'--config={TINY}:way=2', '--over', 'seed=0,3', inner, 'shot=1', '--print', '--data_dir=a b') == 0
  lines = capsys.readouterr().out.splitlines()
  assert all(line.startswith('python -m metajax.main ') for line in lines)
  options, overrides = zip(*(main.parse(shlex.split(line)[2:]) for line in lines), strict=True)
  assert [each.workdir for each in options] == [
    f'runs/tiny-way=2/algorithm.inner_params={params},shot=1,seed={seed}'
    for seed in (0, 3)
    for params in ('head,conv0', 'none')
  ]
  assert {each.data_dir for each in options} == {'a b'}
  configs = [config.override(config.load(each.config), more) for each, more in zip(options, overrides, strict=True)]
  found = [(each.data.way, each.data.shot, each.seed, each.algorithm.inner_params) for each in configs]
  assert found == [(2, 1, seed, params) for seed in (0, 3) for params in (('head', 'conv0'), ())]


def test_keys_are_settings_where_every_config_has_them_and_else_shorthands():
  assert [sweep.is_setting(key) for key in ('seed', 'total_steps', 'data.way', 'way', 'data', 'steps')] == [
    *(True, True, True),
    *(False, False, False),
  ]
  [cell] = cells_of(f'--config={ROOT}/configs/mtm_maml.py:way=2', '--over=data=fc100', 'method=sin', 'total_steps=7')
  assert cell.config.data.name == 'fc100' and cell.config.weighting.name == 'sin' and cell.config.total_steps == 7
  assert cell.arguments[0] == f'--config={ROOT}/configs/mtm_maml.py:way=2,data=fc100,method=sin'
  first, second = cells_of(f'--config={TINY}', '--over', 'algorithm.name=maml,protonet')
  assert [first.config.algorithm.name, second.config.algorithm.name] == ['maml', 'protonet']


@pytest.mark.parametrize(
  'text, values',
  [
    ('0,1,2', ['0', '1', '2']),
    ("('a','b'),()", ["('a','b')", '()']),
    ("((1,2),3),[4,5],'x,(y',z", ['((1,2),3)', '[4,5]', "'x,(y'", 'z']),
    ('a', ['a']),
  ],
)
def test_values_keep_the_commas_within_brackets_and_quotes(text, values):
  assert sweep.split_values(text) == values


def test_settings_that_go_with_a_value():
  own = 'algorithm.name=maml+algorithm.inner_lr=0.5+shot=2,maml+algorithm.inner_params=(),protonet'
  cells = cells_of(f'--config={TINY}', '--over', 'seed=1,2', own)
  assert [cell.name for cell in cells[:3]] == [
    'algorithm.inner_lr=0.5,algorithm.name=maml,shot=2,seed=1',
    'algorithm.inner_params=none,algorithm.name=maml,seed=1',
    'algorithm.name=protonet,seed=1',
  ]
  first, second, third = (cell.config for cell in cells[3:])
  assert (first.algorithm.inner_lr, first.data.shot, first.seed) == (0.5, 2, 2)
  assert (second.algorithm.inner_lr, second.data.shot, second.algorithm.inner_params) == (0.1, 1, ())
  assert third.algorithm.name == 'protonet' and third.data.shot == 1
  options, overrides = main.parse(['main', *cells[3].arguments])  # as the run is to read them
  assert config.differences(config.override(config.load(options.config), overrides), first) == []
  [cell] = cells_of(f'--config={TINY}', '--over', 'optimizer.learning_rate=1e+3', 'init_from="a+b=c"')
  assert (cell.config.optimizer.learning_rate, cell.config.init_from) == (1000, '"a+b=c"')


def test_a_cell_has_the_same_name_in_whatever_order_the_grid_is_written():
  one = cells_of(f'--config={TINY}', '--over', 'seed=0,1', 'shot=1,2', 'algorithm.first_order=True')
  other = cells_of(f'--config={TINY}', '--over', 'algorithm.first_order=True', 'shot=2,1', '--over=seed=1,0')
  assert {cell.name for cell in one} == {cell.name for cell in other} and one[0].name != other[0].name
  assert (one[0].name, one[0].row) == ('algorithm.first_order=True,shot=1,seed=0', 'algorithm.first_order=True,shot=1')
  [alone] = cells_of(f'--config={TINY}:way=2', '--over', 'seed=5')
  assert alone.row == 'tiny-way=2'


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--over', 'seed=0'], '--config=NAME is missing'),
    ([f'--config={TINY}'], '--over KEY=VALUE,VALUE is missing'),
    ([f'--config={TINY}', '--over', 'seed=0', 'shot'], "such as seed=0,1,2, not 'shot'"),
    ([f'--config={TINY}', '--over', 'seed=0,,1'], "not 'seed=0,,1'"),
    ([f'--config={TINY}', '--over', 'seed=0', 'seed=1'], '--over has seed twice'),
    ([f'--config={TINY}:shot=1', '--over', 'shot=1,2'], 'shot is given for all cells, and again in --over'),
    ([f'--config={TINY}', '--over', 'seed=1', '--config.seed=2'], 'seed is given for all cells'),
    ([f'--config={TINY}', '--over', 'shot=1+seed=1,2', 'seed=2'], '--over has seed twice'),
    ([f'--config={TINY}', '--over', 'shot=1+seed=1+seed=2'], '--over has seed twice'),
    ([f'--config={TINY}', '--over', 'shot=1+seed=1', '--config.seed=2'], 'seed is given for all cells'),
    ([f'--config={TINY}', '--over', 'shot=1+seed=,2'], "not 'shot=1+seed=,2'"),
    (
      [f'--config={TINY}', '--over', 'algorithm.name=maml,protonet+algorithm.inner_lr=1'],
      "cell algorithm.inner_lr=1,algorithm.name=protonet: command line: config.algorithm has no setting 'inner_lr'",
    ),
    (['--config=none.py', '--over', 'seed=0'], 'there is no file none.py'),
    ([f'--config={TINY}', '--over', 'seed=0,x'], 'cell seed=x: command line: '),
    ([f'--config={TINY}', '--over', 'shot=1,2,x'], 'cell shot=x: --config: shot takes a value such as shot=1'),
    ([f'--config={TINY}', '--over', 'shto=1'], "no key 'shto'; did you mean 'shot'"),
    ([f'--config={TINY}', '--over', 'inner_lr=1'], 'settings of such a name are algorithm.inner_lr, eval.inner_lr'),
    ([f'--config={TINY}', '--over', 'algorithm.inner_lrr=1'], "has no setting 'inner_lrr'; did you mean 'inner_lr'"),
    ([f'--config={TINY}', '--over', 'algorithm.inner_lr=0.1,0.10'], 'are the same run'),
    ([f'--config={TINY}', '--over', 'init_from=a/b,a-b'], 'a/b and a-b would share runs/tiny/init_from=a-b'),
    ([f'--config={TINY}', '--over', f'init_from={300 * "a"}'], 'is too long for the name of a folder'),
    ([*GRID, '--print', '--slurm'], '--print and --slurm do not go together'),
    ([*GRID, '--cell=0', '--csv=x'], '--cell and --csv do not go together'),
    ([*GRID, '--cell=4'], 'the cells are 0 to 3'),
    ([*GRID, '--cells=4'], 'cells'),
  ],
)
def test_errors_are_one_line_before_anything_runs(started, capsys, arguments, message):
  assert run(*arguments) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1 and error.startswith('metajax: '), error
  assert not started


def test_a_folder_of_another_run_is_found_before_the_first_cell(started, capsys):
  leave(cells_of(*GRID)[3].arguments)
  assert run(*GRID, '--config.model.width=5') == 2
  error = capsys.readouterr().err
  assert 'cell shot=2,seed=1: ' in error and 'made with another config: model.width differs' in error
  assert not started


def test_a_test_of_an_unfinished_cell_does_not_finish_it(started):
  cell = cells_of(*GRID)[0]
  leave(cell.arguments)
  assert sweep.finished(cell)
  (Path(cell.workdir) / 'checkpoints' / str(cell.config.total_steps)).rename(Path(cell.workdir) / 'checkpoints' / '1')
  assert not sweep.finished(cell)


def test_finished_cells_are_skipped_and_others_run(started, capsys):
  cells = cells_of(*GRID)
  leave(cells[1].arguments)
  leave(cells[2].arguments)
  (Path(cells[2].workdir) / 'test.json').unlink()  # killed before its test
  longer = leave([*cells[3].arguments, '--config.total_steps=3'])  # of a sweep with fewer meta-updates
  assert longer.total_steps != cells[3].config.total_steps
  assert run(*GRID) == 0
  assert names(started) == ['shot=1,seed=0', 'shot=1,seed=1', 'shot=2,seed=1']
  assert [command[3:] for command in started] == [cells[k].arguments for k in (0, 2, 3)]
  output = capsys.readouterr().out
  assert '[2/4] shot=2,seed=0: finished already' in output and '4 of 4 cells are finished' in output

  started.clear()
  assert run(*GRID) == 0 and not started


def test_a_cell_that_fails_is_told_of_and_the_others_go_on(started, capsys):
  started.does = {'shot=2,seed=0': lambda process: 2, 'shot=1,seed=1': lambda process: -signal.SIGKILL}
  assert run(*GRID) == 1
  assert len(started) == 4
  output, errors = capsys.readouterr()
  assert '2 of 4 cells are finished' in output
  assert errors.splitlines() == [
    'metajax: cell shot=2,seed=0 is not finished: exit status 2',
    'metajax: cell shot=1,seed=1 is not finished: killed by SIGKILL',
  ]


def test_a_cell_that_another_sweep_is_at_is_left_to_it(started, capsys):
  cells = cells_of(*GRID)
  with workdir.locked(cells[0].workdir, '.sweep.lock'):
    assert run(*GRID) == 1
  assert names(started) == [cell.name for cell in cells[1:]]
  assert f'cell {cells[0].name} is not finished: --workdir: {cells[0].workdir} is in use by' in capsys.readouterr().err

  def runs(process):
    with pytest.raises(UserError, match='in use'), workdir.locked(cells[0].workdir, '.sweep.lock'):
      pass
    with workdir.locked(cells[0].workdir):  # the run's own is free
      leave(started[-1][3:])
    return 0

  started.does = {cells[0].name: runs}
  assert run(*GRID) == 0

  (Path(cells[3].workdir) / 'test.json').unlink()
  with workdir.locked(cells[0].workdir, '.sweep.lock'):
    (Path(cells[0].workdir) / 'test.json').unlink()
    started.does = {cells[3].name: lambda process: len([leave(cells[k].arguments) for k in (0, 3)]) - 2}
    assert run(*GRID) == 0  # the other one was done first


def test_sigterm_is_handed_on_and_stops_the_sweep(started, capsys):
  before = signal.getsignal(signal.SIGTERM)

  def told(process):
    os.kill(os.getpid(), signal.SIGTERM)
    assert process.told == ['terminate']
    return 0

  started.does = {'shot=2,seed=0': told}
  assert run(*GRID) == 128 + signal.SIGTERM
  assert names(started) == ['shot=1,seed=0', 'shot=2,seed=0']
  assert signal.getsignal(signal.SIGTERM) is before
  assert capsys.readouterr().err == 'metajax: stopped; run the same command again to resume\n'


@pytest.mark.parametrize('of_terminal', [True, False])
def test_interruption_stops_at_once(started, capsys, of_terminal):
  waits = []

  def interrupted(process):
    waits.append(list(process.told))
    if len(waits) == 1:
      raise KeyboardInterrupt
    if len(waits) == 2 and not of_terminal:
      raise subprocess.TimeoutExpired('', 10)
    return 130

  started.does = {'shot=1,seed=0': interrupted}
  assert run(*GRID) == 130
  assert len(started) == 1 and waits == ([[], []] if of_terminal else [[], [], ['terminate']])
  assert 'interrupted' in capsys.readouterr().err


def test_one_cell_alone_takes_the_place_of_the_process(monkeypatch, capsys):
  calls = []
  monkeypatch.setattr(os, 'execv', lambda path, command: calls.append((path, command)))
  cells = cells_of(*GRID)
  assert run(*GRID, '--cell=2') == 0
  assert calls == [(sys.executable, [sys.executable, '-m', 'metajax.main', *cells[2].arguments])]
  leave(cells[2].arguments)
  assert run(*GRID, '--cell=2') == 0 and len(calls) == 1
  assert capsys.readouterr().out.endswith('shot=1,seed=1: finished already\n')


def test_slurm_array_has_a_task_for_each_cell(capsys):
  assert run(*GRID, '--slurm', '--workdir=a b') == 0
  words = shlex.split(capsys.readouterr().out)
  at = words.index('launch/slurm.sbatch')
  assert words[0] == 'sbatch' and '--array=0-3' in words[:at] and words[at + 1 :] == [*GRID, '--workdir=a b']


def test_table_over_seeds(started, tmp_path, capsys):
  grid = f'--config={TINY}', '--over', 'seed=0,1,2', 'shot=1,2', '--config.eval.episodes=40', '--workdir=grid'
  cells = cells_of(*grid)
  apart = np.tile([-0.05, 0.05], 20)  # whose standard deviation is 0.05
  for cell in cells[:-1]:
    leave(cell.arguments, ensemble=0.9 + 0.01 * cell.config.seed + apart if cell.config.data.shot == 1 else None)
  assert run(*grid, '--table', '--csv=new/table.csv', '--markdown=table.md') == 0
  assert not started
  output = capsys.readouterr().out
  assert output.startswith('5 of 6 cells are finished\n')

  with Path('new/table.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [(row['run'], row['seeds'], row['shot']) for row in rows] == [('shot=1', '3', '1'), ('shot=2', '2', '2')]
  for row, shot, seeds in zip(rows, (1, 2), (3, 2), strict=True):
    values = [accuracies(cell.config).astype(float) for cell in cells if cell.config.data.shot == shot][:seeds]
    means = np.mean(values, axis=1)
    low, high = stats.t.interval(0.95, seeds - 1, loc=means.mean(), scale=stats.sem(means))
    np.testing.assert_allclose(float(row['accuracy']), np.mean(values))
    np.testing.assert_allclose(float(row['accuracy_ci95']), 1.96 * stats.sem(np.mean(values, axis=0), ddof=0))
    np.testing.assert_allclose(float(row['seeds_ci95']), (high - low) / 2)
    np.testing.assert_allclose(float(row['seeds_std']), stats.tstd(means))
  np.testing.assert_allclose(float(rows[0]['ensemble']), 0.91, rtol=1e-6)
  np.testing.assert_allclose(float(rows[0]['ensemble_ci95']), 1.96 * 0.05 / np.sqrt(40), rtol=1e-6)
  np.testing.assert_allclose(float(rows[0]['ensemble_seeds_ci95']), stats.t.ppf(0.975, 2) * 0.01 / 3**0.5, rtol=1e-5)
  assert rows[1]['ensemble'] == rows[0]['difference'] == ''

  first, second = table_of(output)
  assert list(first) == [
    *('run', 'seeds', 'shot', 'accuracy', '95 % over seeds', 'std of seeds'),
    *('ensemble accuracy', 'ensemble, 95 % over seeds'),
  ]
  assert first['ensemble accuracy'] == '91.00 % ± 1.55 %' and second['ensemble accuracy'] == '-'
  assert first['95 % over seeds'] == f'± {100 * float(rows[0]["seeds_ci95"]):.2f} %'
  assert Path('table.md').read_text().startswith('glyphs, 3-way, ')

  words = shlex.split(output.splitlines()[-1].removeprefix('differences: '))
  assert words[:3] == ['python', '-m', 'metajax.compare']
  options, named, _ = compare.parse(words[2:])
  assert options.mixed and named == {
    f'shot:{shot}': [cell.workdir for cell in cells[:-1] if cell.config.data.shot == shot] for shot in (1, 2)
  }


def test_table_of_nothing(capsys):
  assert run(*GRID, '--table') == 0
  assert capsys.readouterr().out == '0 of 4 cells are finished\n'


def test_a_run_in_a_process_of_its_own(monkeypatch):
  """What is started is `metajax.main` of this package: it finds the run's lock taken, and its status comes back."""
  [cell] = cells_of(f'--config={TINY}', '--over', 'seed=0')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  with workdir.locked(cell.workdir):
    assert sweep.run([cell]) == ({'seed=0': 'exit status 2'}, False)

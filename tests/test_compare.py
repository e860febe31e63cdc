import csv
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from metajax import compare, config, main, report, workdir
from metajax.checkpoint import Checkpoints
from tests.conftest import TINY
from tests.test_checkpoint import listing, state_at


def run(*arguments):
  return compare.main(['compare', *(str(argument) for argument in arguments)])


@pytest.fixture
def make(tmp_path, cache):
  """A function that makes a workdir as a tested run leaves it, without its checkpoints."""

  def make_workdir(
    name, values, *overrides, quantity='accuracy', batch_norm='transductive', notes=(), data='abc', **more
  ):
    folder = tmp_path / name
    folder.mkdir()
    given = config.override(config.load(TINY), [f'--config.eval.episodes={len(values)}', *overrides])
    workdir.keep_config(folder, given)
    results = {
      'protocol': {**report.protocol(given), 'batch_norm': batch_norm, 'dataset_notes': list(notes), 'test_data': data},
      **report.adaptation(given),
      'checkpoint_step': 6,
      quantity: np.float32(values).tolist(),
      **{name: np.asarray(value).tolist() for name, value in more.items()},
    }
    (folder / 'test_episodes.json').write_text(json.dumps(results))
    return folder

  return make_workdir


def accuracies(seed, n=600):
  return np.random.default_rng(seed).integers(0, 76, n) / 75


def read_csv(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def table_of(output):
  """Lines of the table that was printed, cells by their heads."""
  lines = output.split('\n\n')[1].splitlines()
  heads, *rows = ([cell for cell in line.split('  ') if cell] for line in lines)
  return [dict(zip([head.strip() for head in heads], map(str.strip, row), strict=True)) for row in rows]


def test_a_difference_that_only_pairing_shows(make, tmp_path, capsys):
  """Episodes are equally hard for both: b is better by 0.04 and 0.06 in turns, far less than episodes differ."""
  a = np.tile([0.2, 0.2, 0.8, 0.8], 25)
  b = a + np.tile([0.04, 0.06], 50)
  assert run(make('a', a), make('b', b), f'--csv={tmp_path / "table.csv"}') == 0
  first, second = read_csv(tmp_path / 'table.csv')
  np.testing.assert_allclose(float(first['accuracy']), 0.5, atol=1e-7)
  np.testing.assert_allclose(float(first['accuracy_ci95']), 1.96 * 0.3 / 10, atol=1e-7)
  np.testing.assert_allclose(float(second['difference']), 0.05, atol=1e-7)
  np.testing.assert_allclose(float(second['difference_ci95']), 1.96 * 0.01 / 10, atol=1e-7)
  assert float(first['accuracy']) + float(first['accuracy_ci95']) > float(second['accuracy'])
  assert first['difference'] == '' and second['paired'] == 'True'
  assert capsys.readouterr().out.splitlines() == [
    'glyphs, 3-way, 1-shot, 2 queries a class, 100 episodes, test split, transductive batch norm, episode seed 0, '
    'data.classes=[12, 6, 6], data.images_per_class=6, data.seed=0, data.size=28',
    '',
    'run  seeds          accuracy   difference to a',
    'a        1  50.00 % ± 5.88 %                 -',
    'b        1  55.00 % ± 5.88 %  +5.00 % ± 0.20 %',
  ]


def test_seeds_are_averaged_on_each_episode_and_their_spread_is_shown(make, tmp_path, capsys):
  values = {name: [accuracies(3 * k + seed) for seed in range(3)] for k, name in enumerate(('maml', 'ours'))}
  folders = {
    name: [make(f'{name}{seed}', each, f'--config.seed={seed}') for seed, each in enumerate(of_name)]
    for name, of_name in values.items()
  }
  arguments = [f'{name}={",".join(map(str, of_name))}' for name, of_name in folders.items()]
  assert run(*arguments, f'--csv={tmp_path / "table.csv"}') == 0
  maml, ours = read_csv(tmp_path / 'table.csv')
  values = {name: np.float32(each).astype(float) for name, each in values.items()}
  differences = [sum(values['ours'][seed][k] - values['maml'][seed][k] for seed in range(3)) / 3 for k in range(600)]
  np.testing.assert_allclose(float(ours['accuracy']), values['ours'].mean())
  np.testing.assert_allclose(float(ours['difference']), np.mean(differences))
  np.testing.assert_allclose(float(ours['difference_ci95']), 1.96 * stats.sem(differences, ddof=0))
  np.testing.assert_allclose(float(maml['seeds_std']), stats.tstd([each.mean() for each in values['maml']]))
  by_seed = [b.mean() - a.mean() for a, b in zip(values['maml'], values['ours'], strict=True)]
  np.testing.assert_allclose(float(ours['seedwise']), np.mean(by_seed))
  np.testing.assert_allclose(float(ours['seedwise_std']), stats.tstd(by_seed))
  assert json.loads(ours['workdirs']) == [str(folder) for folder in folders['ours']]
  row = table_of(capsys.readouterr().out)[1]
  assert row['seeds'] == '3' and row['difference, seed by seed'].endswith(f' std {100 * stats.tstd(by_seed):.2f} %')

  assert run(folders['maml'][0], arguments[1]) == 0  # one seed against three: nothing to take seed by seed
  rows = table_of(capsys.readouterr().out)
  assert [row['std of seeds'] for row in rows] == ['-', f'{100 * float(ours["seeds_std"]):.2f} %']
  assert 'difference, seed by seed' not in rows[0]


def test_ensembles_are_numbers_of_their_own_with_differences_of_their_own(make, tmp_path, capsys):
  values, table = [accuracies(10 + k, 40) for k in range(3)], tmp_path / 'table.csv'
  of_ensemble = [dict(ensemble_accuracy=each, ensemble_checkpoints=[6, 4]) for each in values]
  a, b, c, d, e = (
    make(name, accuracies(k, 40), *overrides, **more)
    for k, (name, overrides, more) in enumerate(
      [
        ('a', (), of_ensemble[0]),
        ('b', (), {}),
        ('c', (), of_ensemble[1]),
        ('d', ('--config.eval.shot=2',), of_ensemble[2] | {'ensemble_checkpoints': [6]}),
        ('e', ('--config.eval.shot=2',), {}),
      ]
    )
  )

  def check(row, mean, difference, ci95):
    np.testing.assert_allclose(float(row['ensemble']), mean.mean(), rtol=1e-6)
    np.testing.assert_allclose(float(row['ensemble_ci95']), 1.96 * stats.sem(mean, ddof=0), rtol=1e-6)
    np.testing.assert_allclose(float(row['ensemble_difference']), difference, atol=1e-7)
    np.testing.assert_allclose(float(row['ensemble_difference_ci95']), ci95, rtol=1e-6)

  assert run('--mixed', a, b, c, d, e, f'--csv={table}') == 0
  rows, output = read_csv(table), capsys.readouterr().out
  half = 1.96 * stats.sem(values[1] - values[0], ddof=0)
  check(rows[2], values[1], np.mean(values[1] - values[0]), half)
  unpaired = 1.96 * np.hypot(*(stats.sem(values[k], ddof=0) for k in (0, 2)))
  check(rows[3], values[2], values[2].mean() - values[0].mean(), unpaired)
  assert rows[0]['ensemble_difference'] == rows[1]['ensemble'] == rows[4]['ensemble_difference'] == ''
  cells = [row['difference of ensembles to a'] for row in table_of(output)]
  assert cells[2] == f'{100 * np.mean(values[1] - values[0]):+.2f} % ± {100 * half:.2f} %'
  assert [cell.endswith('*') for cell in cells] == [False, False, False, True, False]
  assert cells[0] == cells[1] == cells[4] == '-'
  assert f'ensembles are of different sizes: 2 in {a}, 2 in {c}, 1 in {d}' in output

  assert run(b, a, c, '--episodes=30', f'--csv={table}') == 0  # the first has none to compare with
  rows, output = read_csv(table), capsys.readouterr().out
  assert 'ensemble accuracy' in output and 'difference of ensembles' not in output
  np.testing.assert_allclose(float(rows[1]['ensemble']), values[0][:30].mean(), rtol=1e-6)

  f = make('f', accuracies(5, 40), **of_ensemble[2])
  assert run(f'pair={a},{c}', f'half={b},{f}', f'--csv={table}') == 0
  pair, half = read_csv(table)
  np.testing.assert_allclose(float(pair['ensemble']), np.mean(values[:2]), rtol=1e-6)
  mean_of_both = np.mean(values[:2], axis=0)
  np.testing.assert_allclose(float(pair['ensemble_ci95']), 1.96 * stats.sem(mean_of_both, ddof=0), rtol=1e-6)
  assert half['ensemble'] == ''


def test_last_checkpoints(make, tmp_path, capsys):
  best, last = ([accuracies(10 * k + i, 40) for i in range(2)] for k in range(2))
  of_ensemble = dict(ensemble_accuracy=best[0], ensemble_checkpoints=[6])
  a, b = (
    make(name, best[i], last_accuracy=last[i], last_checkpoint_step=8 + i, **of_ensemble) for i, name in enumerate('ab')
  )
  csv_file, markdown, png = (tmp_path / name for name in ('table.csv', 'table.md', 'figure.png'))
  assert run('--last', a, b, f'--csv={csv_file}', f'--markdown={markdown}', f'--figure={png}') == 0
  output, rows = capsys.readouterr().out, read_csv(csv_file)
  difference = last[1] - last[0]
  np.testing.assert_allclose(float(rows[0]['accuracy']), last[0].mean(), rtol=1e-6)
  np.testing.assert_allclose(float(rows[1]['difference']), difference.mean(), atol=1e-7)
  np.testing.assert_allclose(float(rows[1]['difference_ci95']), 1.96 * stats.sem(difference, ddof=0), rtol=1e-6)
  assert [(row['checkpoint_steps'], row['checkpoints'], row['ensemble']) for row in rows] == [
    ('[8]', 'last', ''),
    ('[9]', 'last', ''),
  ]
  assert ', last checkpoints, ' in output.splitlines()[0] and 'ensemble' not in output
  text = f'| {100 * difference.mean():+.2f} % ± {196 * stats.sem(difference, ddof=0):.2f} % |'
  assert markdown.read_text().startswith(output.splitlines()[0]) and text in markdown.read_text()
  with Image.open(png) as image:
    assert image.format == 'PNG'

  assert run(a, b) == 0
  output = capsys.readouterr().out
  assert 'last' not in output and 'ensemble' in output
  given = workdir.read_config(a)
  methods = {which: [compare.read(a, given, None, last=which == 'last')] for which in ('best', 'last')}
  row = compare.compare(methods)[1]  # of one run
  assert row.paired and row.difference == pytest.approx(np.mean(last[0] - best[0]), abs=1e-7)


def test_regression_compares_losses(make, tmp_path, capsys):
  regression = '--config.data.name=sinusoid', '--config.data.shot=10'
  given = dict(quantity='loss', batch_norm=None)
  maml = make('maml', [0.5, 0.75], *regression, **given)
  oracle = make('oracle', [0.25, 0.0], *regression, '--config.data.oracle=True', **given)
  assert run(maml, oracle) == 0
  output = capsys.readouterr().out
  assert output.startswith('sinusoid, ') and '10-shot, 2 queries, 2 episodes' in output
  assert table_of(output)[1] == {
    'run': 'oracle',
    'seeds': '1',
    'mean squared error': '0.1250 ± 0.1732',
    'difference to maml': '-0.5000 ± 0.3465',
  }
  assert run('--mixed', make('images', [0.5, 0.5]), oracle) == 2
  assert 'accuracy (images) cannot be compared with loss (oracle)' in capsys.readouterr().err


NOT_PROTOCOL = (
  '--config.model.width=5',
  '--config.algorithm.inner_steps=3',
  '--config.eval.inner_steps=4',
  '--config.data.tasks=3',
  '--config.data.augment=("flip",)',
  '--config.data.normalize=bytes',
  '--config.data.placement=host',
  '--config.total_steps=7',
  '--config.seed=3',
)


def test_what_is_no_protocol_may_differ(make):
  trained = ('--config.data.way=6', '--config.data.shot=2', '--config.eval.way=3', '--config.eval.shot=1')
  assert run(make('a', [0.5] * 4), make('b', [0.25] * 4, *NOT_PROTOCOL, *trained)) == 0


@pytest.mark.parametrize(
  'overrides, found, message',
  [
    (['--config.eval.way=2'], {}, 'way is 3 in {a}, but 2 in {b}'),
    (['--config.data.shot=2'], {}, 'shot is 1 in {a}, but 2 in {b}'),
    (['--config.data.query_shot=5'], {}, 'query_shot is 2 in {a}, but 5 in {b}'),
    (['--config.eval.query_shot=5', '--config.eval.seed=1'], {}, 'query_shot is 2 in {a}, but 5 in {b}; episode_seed'),
    (['--config.eval.augment=("flip",)'], {}, 'augment is [] in {a}, but ["flip"] in {b}'),
    (['--config.eval.episodes=3'], {}, 'episodes is 4 in {a}, but 3 in {b}'),
    (['--config.data.images_per_class=7'], {}, 'data.images_per_class is 6 in {a}, but 7 in {b}'),
    (['--config.data.name=omniglot'], {}, 'dataset is "glyphs" in {a}, but "omniglot" in {b}; data.'),
    ([], {'batch_norm': 'running'}, 'batch_norm is "transductive" in {a}, but "running" in {b}'),
    ([], {'notes': ['class x is missing']}, 'dataset_notes is [] in {a}, but ["class x is missing"] in {b}'),
  ],
)
def test_other_protocols_are_refused(make, capsys, overrides, found, message):
  episodes = 3 if '--config.eval.episodes=3' in overrides else 4
  folders = {'a': make('a', [0.5] * 4), 'b': make('b', [0.5] * episodes, *overrides, **found)}
  assert run(*folders.values()) == 2
  error = capsys.readouterr().err
  assert message.format(**folders) in error and '--mixed' in error and error.count('\n') == 1


def test_of_splits_listed_the_test_split_alone_counts(make, capsys):
  def omniglot(name, rotations):
    return make(name, [0.5] * 4, '--config.data.name=omniglot', f'--config.data.rotations={rotations}')

  a, b, c = omniglot('a', ('train', 'test')), omniglot('b', ('test',)), omniglot('c', ('train',))
  assert run(a, b) == 0
  assert run(a, c) == 2
  assert f'data.rotations is ["test"] in {a}, but [] in {c}' in capsys.readouterr().err


def test_mixed_protocols_are_compared_and_marked(make, tmp_path, capsys):
  values = [accuracies(seed) for seed in range(4)]
  first = make('first', values[0])
  other = make('other', values[1], '--config.eval.shot=2')
  running = make('running', values[2], batch_norm='running')  # the same episodes all the same
  png, markdown = tmp_path / 'new' / 'figure.png', tmp_path / 'table.md'
  files = f'--csv={tmp_path / "table.csv"}', f'--markdown={markdown}', f'--figure={png}'
  assert run('--mixed', first, other, running, *files) == 0
  output = capsys.readouterr().out
  rows = read_csv(tmp_path / 'table.csv')
  assert [row['paired'] for row in rows] == ['', 'False', 'True']
  np.testing.assert_allclose(float(rows[1]['difference']), values[1].mean() - values[0].mean(), atol=1e-7)
  separate = [1.96 * stats.sem(each, ddof=0) for each in values[:2]]
  np.testing.assert_allclose(float(rows[1]['difference_ci95']), np.sqrt(np.sum(np.square(separate))), rtol=1e-6)
  np.testing.assert_allclose(
    float(rows[2]['difference_ci95']), 1.96 * stats.sem(values[2] - values[0], ddof=0), rtol=1e-6
  )
  assert [row['difference to first'].endswith(' *') for row in table_of(output)] == [False, True, False]
  assert [row['shot'] for row in table_of(output)] == ['1', '2', '1']
  assert '* unpaired: not the same episodes as first' in output and 'batch norm,' not in output.splitlines()[0]
  lines = markdown.read_text().splitlines()
  assert lines[0] == output.splitlines()[0] and lines[2].startswith('| run | seeds | shot | batch_norm | accuracy |')
  assert len({line.count('|') for line in lines[2:7]}) == 1 and lines[-1].startswith(r'\* unpaired')
  with Image.open(png) as image:
    assert image.format == 'PNG' and image.size[0] > 1000

  assert run('--mixed', f'row={first},{other}', running) == 2
  assert 'they cannot be one row, row' in capsys.readouterr().err


def test_more_episodes_than_wanted_are_cut(make, tmp_path):
  a, b = make('a', accuracies(0, 8)), make('b', accuracies(1, 6))
  assert run(a, b, '--episodes=5', f'--csv={tmp_path / "table.csv"}') == 0
  row = read_csv(tmp_path / 'table.csv')[1]
  np.testing.assert_allclose(float(row['difference']), np.mean(accuracies(1, 6)[:5] - accuracies(0, 8)[:5]), atol=1e-7)
  assert row['episodes'] == '5'


def test_names_and_folders(make, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for name in ('o-way=5,shot=1', 'o-way=5', 'x', 'o'):
    make(name, accuracies(0, 4))
  assert run('o-way=5,shot=1', 'name=o-way=5,shot=1') == 2
  assert 'is the same folder' in capsys.readouterr().err
  for argument, expected in [
    ('o-way=5,shot=1', ('o-way=5,shot=1', ['o-way=5,shot=1'])),
    ('n=o-way=5,shot=1', ('n', ['o-way=5,shot=1'])),
    ('n=o-way=5,x,o-way=5,shot=1', ('n', ['o-way=5', 'x', 'o-way=5,shot=1'])),
    ('n=x,o', ('n', ['x', 'o'])),
    ('./x/', ('x', ['./x/'])),
    ('runs/absent-way=5', ('absent-way=5', ['runs/absent-way=5'])),
  ]:
    _, named, _ = compare.parse(['compare', argument, str(make(f'other {argument.replace("/", "")}', [0.5]))])
    assert next(iter(named.items())) == expected


def test_errors_of_the_command_line(make, tmp_path, capsys):
  a, b = make('a', [0.5] * 4), make('b', [0.5] * 4)
  untrained = make('untrained', [0.5] * 4)
  (untrained / 'test_episodes.json').unlink()
  damaged = make('damaged', [0.5] * 4)
  (damaged / 'config.json').write_text('{')
  (tmp_path / 'empty').mkdir()
  for arguments, message in [
    ([], 'at least two workdirs'),
    ([a], 'at least two workdirs'),
    ([a, tmp_path / 'empty'], f'{tmp_path}/empty holds no run'),
    ([a, tmp_path / 'none'], f'{tmp_path}/none holds no run'),
    ([a, f'n={tmp_path}/none,{b}'], f'{tmp_path}/none holds no run'),
    ([a, untrained], f'{untrained} holds no checkpoint to evaluate, and there is no test_episodes.json: train first'),
    ([a, b, '--episodes=5'], 'test_episodes.json has 4 of 5 episodes'),
    ([a, b, '--config.eval.inner_steps=3'], 'and test_episodes.json is of another inner_steps: train first'),
    ([a, b, '--config.eval.shot=2', '--config.seed=1'], '--config.seed=1: the runs are trained, only settings of'),
    ([a, b, '--config.eval.haed=ridge'], "config.eval has no setting 'haed'; did you mean 'head'?"),
    ([a, damaged], 'config.json is damaged'),
    ([a, a], 'the same folder'),
    ([a, f'{tmp_path}/./a/'], 'the same folder'),
    ([a, f'b={a}'], 'the same folder'),
    ([a, f'a={b}'], f'two runs are called a: name them, as in NAME={b}'),
    ([f'n={a}', f'n={b}'], 'two runs are called n'),
    ([f'={a}', b], 'none of DIR'),
    ([f'n={a},', b], 'none of DIR'),
    ([a, b, '--episdoes=5'], 'episdoes'),
    ([a, b, '--episodes=0'], 'episodes'),
    ([a, b, '--episodes=x'], 'episodes'),
    ([a, b, '--figure=x.pdf'], 'ends in .png'),
    ([a, b, f'--csv={tmp_path}'], f'cannot write {tmp_path}'),
    ([a, b, f'--markdown={a}/config.json/x'], 'cannot write'),
  ]:
    assert run(*arguments) == 2, arguments
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1 and error.startswith('metajax: '), (arguments, error)


@pytest.mark.parametrize(
  'text, why',
  [
    ('{', 'damaged (JSONDecodeError'),
    ('[]', 'damaged'),
    ('{"protocol": 3, "accuracy": []}', 'damaged'),
    ({'accuracy': [0.5, 0.5]}, 'damaged (ValueError: not one number for each episode'),
    ({'accuracy': [0.5, float('nan'), 0.5, 0.5]}, 'damaged'),
    ({'accuracy': [0.5, 'x', 0.5, 0.5]}, 'damaged'),
    ({'inner_steps': 9}, 'is of another inner_steps'),
    ({'protocol.shot': 9}, 'is of another shot'),
    ({'protocol.data.new': 9}, 'is of another data.new'),
    ({'checkpoint_step': 2}, 'is of checkpoint 2, and now 6 is the best'),
    ({'ensemble_checkpoints': [6]}, "damaged (KeyError: 'ensemble_accuracy'"),
    ({'ensemble_checkpoints': [6], 'ensemble_accuracy': [0.5]}, 'damaged (ValueError: not one number for each episode'),
  ],
)
def test_stored_episodes_that_will_not_do(make, text, why):
  folder = make('a', [0.5] * 4)
  path = folder / 'test_episodes.json'
  if isinstance(text, dict):
    stored = json.loads(path.read_text())
    for key, value in text.items():
      group, dot, name = key.partition('.')
      (stored[group] if dot else stored)[name or key] = value
    text = json.dumps(stored)
  given = workdir.read_config(folder)
  assert compare._stored(folder, given, 6)[1] is compare._stored(folder, given, None)[1] is None
  path.write_text(text)
  assert f'test_episodes.json {why}' in compare._stored(folder, given, 6)[1].replace(' is damaged', ' damaged')


def test_what_is_stored_of_the_last_checkpoint(make):
  stored, name = {'last_accuracy': [0.25] * 4, 'last_checkpoint_step': 8}, 'test_episodes.json'
  without, of_8 = make('without', [0.5] * 4), make('of_8', [0.5] * 4, **stored)
  damaged = make('damaged', [0.5] * 4, **stored | {'last_accuracy': [0.25] * 3})
  for folder, step, found, why_not in [
    (without, 6, [0.5] * 4, None),  # the best was the last
    (without, 8, None, f'{name} is of checkpoint 6, and now 8 is the last'),
    (without, None, None, f'{name} says nothing of the last checkpoint'),
    (of_8, 8, [0.25] * 4, None),
    (of_8, None, [0.25] * 4, None),
    (of_8, 6, None, f'{name} is of checkpoint 8, and now 6 is the last'),
    (damaged, 8, None, f'{name} is damaged (ValueError: not one number for each episode)'),
  ]:
    result, why = compare._stored(folder, workdir.read_config(folder), step, last=True)
    assert (result and result['accuracy'], why) == (found, why_not), (folder, step)


def test_any_test_that_fits_is_read(make):
  a = make('a', [0.5] * 4)
  given = workdir.read_config(a)
  (a / 'tests').mkdir()
  for name, changes in {'x': {'ensemble_checkpoints': [6], 'ensemble_accuracy': [1.0] * 4}, 'y': {}}.items():
    (a / 'tests' / name).mkdir()
    stored = json.loads((a / 'test_episodes.json').read_text()) | {'accuracy': [0.25] * 4} | changes
    (a / 'tests' / name / 'test_episodes.json').write_text(json.dumps(stored))
  assert compare._stored(a, given, 6)[0]['ensemble_checkpoints'] == [6]
  shutil.rmtree(a / 'tests' / 'x')
  assert compare._stored(a, given, 6)[0]['accuracy'] == [0.5] * 4  # the last test's before others
  (a / 'test_episodes.json').unlink()
  assert compare._stored(a, given, 6)[0]['accuracy'] == [0.25] * 4
  (a / 'tests' / 'y' / 'test_episodes.json').write_text(json.dumps({**stored, 'protocol': {'episodes': 4}}))
  assert compare._stored(a, given, 6) == (None, 'there is no test_episodes.json')
  (a / 'tests' / 'y' / 'test_episodes.json').rename(a / 'test_episodes.json')
  assert compare._stored(a, given, 6) == (None, 'test_episodes.json is of an older version')


def test_runs_of_other_test_classes_are_not_compared(make, capsys):
  a, b, c = make('a', [0.5] * 4), make('b', [0.5] * 4, data='def'), make('c', [0.5] * 4)
  assert run(a, b, c) == 2
  assert f'test classes or their images are not the same in {a} and {c}, {b}' in capsys.readouterr().err


def test_notes(make, capsys):
  a, b, c = make('a', [0.5] * 4), make('b', [0.5] * 4), make('c', [0.5] * 4, '--config.model.width=5')
  checkpoints = Checkpoints(a)
  checkpoints.save(state_at(5))
  checkpoints.close()
  path = a / 'test_episodes.json'
  path.write_text(path.read_text().replace('"checkpoint_step": 6', '"checkpoint_step": 5'))
  assert run(a, f'pair={b},{c}') == 0
  _, _, notes = capsys.readouterr().out.split('\n\n')
  assert notes.splitlines() == [
    f'a: {a} is not trained to its end (step 5 of 6)',
    'pair: its runs differ in more than their seeds: model.width',
  ]


def test_what_is_read_equals_what_is_evaluated(cache, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report, 'draw', lambda *arguments: None)
  monkeypatch.setattr(report, 'draw_training', lambda *arguments: None)
  folders = [tmp_path / name for name in ('a', 'b')]
  for seed, folder in enumerate(folders):
    small = '--config.total_steps=2', '--config.checkpoint_every=1', '--config.eval.episodes=6'
    small += '--config.eval.val_episodes=2', '--config.eval.last=True'
    given = f'--config={TINY}', f'--workdir={folder}', f'--config.seed={seed}', '--config.model.name=mlp', *small
    assert main.main(['metajax', *given]) == 0
    shutil.rmtree(folder / 'tests')  # the same results, which would do as well
    (folder / 'checkpoints' / '3.orbax-checkpoint-tmp-0').mkdir()  # as if the next one were being written
    each, summary = (json.loads((folder / name).read_text()) for name in ('test_episodes.json', 'test.json'))
    assert len(each['accuracy']) == 6 and np.float32(each['accuracy']).mean(dtype=float) == summary['accuracy']
    assert each['checkpoint_step'] == summary['checkpoint_step'] == each['last_checkpoint_step'] == 2
  capsys.readouterr()

  def compared(damage, *options):
    path, table = folders[0] / 'test_episodes.json', tmp_path / 'table.csv'
    whole = path.read_text()
    if damage == 'episodes':
      path.write_text(whole[:100])
    elif damage == 'step':
      path.write_text(whole.replace('checkpoint_step": 2', 'checkpoint_step": 0'))
    with workdir.locked(folders[0]):  # as if it were training
      before = [listing(folder) for folder in folders]
      assert run(*folders, *options, f'--csv={table}') == 0
      assert [listing(folder) for folder in folders] == before
    path.write_text(whole)
    return capsys.readouterr().out, table.read_text()

  outputs = [compared(damage) for damage in ('nothing', 'episodes', 'step')]
  assert all(text == outputs[0][1] for _, text in outputs)
  assert 'evaluating' not in outputs[0][0]
  assert f'{folders[0]}: test_episodes.json is damaged' in outputs[1][0] and str(folders[1]) not in outputs[1][0]
  assert 'test_episodes.json is of checkpoint 0, and now 2 is the best: evaluating its best' in outputs[2][0]

  (folders[0] / 'checkpoints' / '1' / 'metrics' / 'metrics').write_text('{"score": 2}')  # now better than the last
  (read, read_table), (evaluated, evaluated_table) = (compared(damage, '--last') for damage in ('nothing', 'step'))
  assert read_table == evaluated_table and 'evaluating' not in read
  assert 'test_episodes.json is of checkpoint 0, and now 2 is the last: evaluating its last checkpoint' in evaluated

  workdir.forget_test(folders[0])
  assert not list(itertools.chain(*(folders[0].glob(name) for name in ('test.json', 'test_episodes.json'))))

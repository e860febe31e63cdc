"""A workdir whose files are not what a run has left: one line, and nothing lost in silence."""

import shutil

import pytest

from metajax import main
from tests.conftest import TINY

SETTINGS = '--config.model.name=mlp', '--config.optimizer.schedule=constant', '--config.eval.episodes=4'


def run(folder, *arguments):
  return main.main(['metajax', f'--config={TINY}', f'--workdir={folder}', *SETTINGS, *arguments])


@pytest.fixture(scope='module')
def trained(tmp_path_factory, shared_cache):
  folder = tmp_path_factory.mktemp('damage') / 'trained'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('METAJAX_CACHE', str(shared_cache))
    assert run(folder) == 0
  return folder


@pytest.fixture
def copy(trained, tmp_path, cache):
  return shutil.copytree(trained, tmp_path / 'copy')


@pytest.mark.parametrize('name', ['config.json', 'data.json', 'metrics.jsonl', 'test.json', 'test_episodes.json'])
def test_a_folder_in_the_place_of_a_file(copy, name, capsys):
  (copy / name).unlink()
  (copy / name).mkdir()
  assert run(copy, '--config.total_steps=8') == 2  # it goes on, so it needs them all
  assert name in (errors := capsys.readouterr().err) and errors.count('\n') == 1


@pytest.mark.parametrize('name', ['checkpoints', 'tests'])
def test_a_file_in_the_place_of_a_folder(copy, name, capsys):
  shutil.rmtree(copy / name)
  (copy / name).touch()
  assert run(copy, '--mode=train_and_eval') == 2
  assert f'{name}' in (errors := capsys.readouterr().err) and errors.count('\n') == 1


@pytest.mark.parametrize('line', ['[]', '{"a": 1}', '{"step": true}', '{"step": "2"}', '{', '', '\xff'])
def test_a_line_that_is_no_record(copy, line, capsys):
  with (copy / 'metrics.jsonl').open('a', encoding='latin-1') as file:
    file.write(f'{line}\n')
  assert run(copy, '--config.total_steps=8') == 2
  assert 'metrics.jsonl is damaged in line 9 ' in (errors := capsys.readouterr().err) and errors.count('\n') == 1


@pytest.mark.parametrize('kept', [(0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 3, 4, 5, 6, 7), (0, 1, 2), ()])
def test_lost_records_are_counted(copy, kept, capsys):
  lines = (copy / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (copy / 'metrics.jsonl').write_text(''.join(lines[k] for k in kept))
  assert run(copy, '--config.total_steps=7', '--mode=train') == 0
  said = f'has lost {8 - len(kept)} of 8 records up to step 6' in capsys.readouterr().out
  assert said == (len(kept) < 8)


def test_a_longer_run_of_a_schedule_with_an_end_is_shown_the_way_on(copy, capsys):
  cosine = [x.replace('constant', 'cosine') for x in SETTINGS]
  arguments = ['metajax', f'--config={TINY}', f'--workdir={copy.parent / "cosine"}', *cosine]
  assert main.main([*arguments, '--mode=train']) == 0
  assert main.main([*arguments, '--config.total_steps=9']) == 2
  assert f'total_steps differs from its config.json: choose another workdir, with --config.init_from={copy.parent}' in (
    capsys.readouterr().err
  )

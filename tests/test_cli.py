"""`metajax COMMAND`, and how configs are found."""

import os
import pty
import re
import subprocess
import sys
import tomllib

import pytest

import metajax
from metajax import cli, compare
from metajax import config as config_lib
from metajax import main as main_lib
from metajax.errors import UserError
from tests.conftest import ROOT, TINY, start

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())


def run(capsys, *arguments):
  """Exit status, output and errors of `metajax ARGUMENTS`."""
  try:
    status = cli.main(['metajax', *arguments])
  except SystemExit as error:
    status = error.code
  return status, *capsys.readouterr()


def test_help_lists_the_commands_with_an_example(capsys):
  for arguments in ((), ('--help',), ('-h',), ('help',)):
    status, output, errors = run(capsys, *arguments)
    assert (status, errors) == (0, '')
    assert all(re.search(rf'^  {name} +\w', output, re.MULTILINE) for name in cli.COMMANDS)
    assert 'example: metajax train --config=quickstart' in output


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_each_command_has_help_with_an_example(name, capsys):
  status, output, errors = run(capsys, name, '--help')
  assert (status, errors) == (0, '')
  assert f'\nmetajax {name} ' in output and f'example: metajax {name} ' in output
  assert max(map(len, output.splitlines())) <= 120


def test_help_of_training_lists_the_shipped_configs(capsys):
  _, output, _ = run(capsys, 'train', '--help')
  listed = re.findall(r'^  (\w+) +\S', output.partition('\nconfigs:\n')[2], re.MULTILINE)
  assert listed == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_each_command_is_a_module_too(name):
  result = subprocess.run(
    [sys.executable, '-m', f'metajax.{name}', '--help'], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert f'example: metajax {name} ' in result.stdout and result.stderr == ''


def test_version_is_that_of_the_package(capsys):
  status, output, _ = run(capsys, '--version')
  assert status == 0 and output.startswith(f'metajax {metajax.__version__}, Python 3.')
  assert PROJECT['tool']['setuptools']['dynamic']['version'] == {'attr': 'metajax.__version__'}


def test_an_unknown_command_is_one_line(capsys):
  status, output, errors = run(capsys, 'trian')
  assert (status, output) == (2, '') and "did you mean 'train'?" in errors and errors.count('\n') == 1


def test_train_then_eval_and_compare_by_command(capsys, tmp_path, cache):
  for seed in (0, 1):
    arguments = f'--config={TINY}', '--config.model.name=mlp', f'--config.seed={seed}', f'--workdir={tmp_path}/{seed}'
    status, output, _ = run(capsys, 'train', *arguments)
    assert status == 0 and output.splitlines()[-1].startswith('test: ')
  status, output, _ = run(capsys, 'eval', f'--workdir={tmp_path}/0', '--config.eval.episodes=7')
  assert status == 0 and '7 episodes' in output.splitlines()[-1]
  status, output, errors = run(capsys, 'compare', f'{tmp_path}/0', f'{tmp_path}/1', '--episodes=5')
  assert status == 0 and '5 episodes' in output, errors


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['eval'], '--workdir=DIR is missing'),
    (['eval', '--workdir=none'], 'none holds no run'),
    (['eval', '--workdir=none', '--mode=train'], "Unknown command line flag 'mode'"),
    (['train'], '--config=NAME is missing'),
    (['train', '--config=quikstart'], "did you mean 'quickstart'"),
    (['train', '--config=elsewhere/quickstart.py'], 'the shipped config is --config=quickstart'),
    (['sweep', '--config=quickstart'], '--over KEY=VALUE,VALUE is missing'),
    (['compare', '--fast'], "Unknown command line flag 'fast'"),
    (['data', 'omniglott'], "did you mean 'omniglot'"),
  ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
  status, output, errors = run(capsys, *arguments)
  assert (status, output) == (2, '') and message in errors and errors.count('\n') == 1


def test_the_home_folder_is_known_by_its_sign(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  options, _ = main_lib.parse(['', '--config=~/a.py', '--workdir=~/runs/b=~', '--data_dir=~/c'])
  assert (options.config, options.workdir) == (f'{tmp_path}/a.py', f'{tmp_path}/runs/b=~')
  assert options.data_dir == f'{tmp_path}/c'
  _, named, _ = compare.parse(['', 'a=~/b,~/c', 'd=~/e', '--csv=~/f'])
  assert named == {'a': [f'{tmp_path}/b', f'{tmp_path}/c'], 'd': [f'{tmp_path}/e']}
  config = config_lib.override(config_lib.load('quickstart'), ['--config.init_from=~/g'])
  assert config.init_from == f'{tmp_path}/g'


def test_configs_are_found_by_name_and_by_path(tmp_path, monkeypatch):
  by_path = config_lib.load(str(ROOT / 'configs' / 'maml_mini.py') + ':way=7')
  monkeypatch.chdir(tmp_path)
  assert config_lib.load('maml_mini:way=7') == by_path
  (tmp_path / 'maml_mini').write_text('a log')
  (tmp_path / 'quickstart').mkdir()
  assert config_lib.load('maml_mini:way=7') == by_path and config_lib.load('quickstart')
  (tmp_path / 'mine').write_text('a log')
  with pytest.raises(UserError, match='mine is not a Python file'):
    config_lib.load('mine')
  with pytest.raises(UserError, match='there is no file'):
    config_lib.load(':way=7')


def test_a_file_that_is_no_config_yet_does_not_matter_to_the_others(tmp_path, monkeypatch, capsys):
  (tmp_path / 'good.py').write_text('"""Good (2026)."""')
  (tmp_path / 'silent.py').write_text('x = 1')
  (tmp_path / 'broken.py').write_text('def')
  (tmp_path / '.#open.py').symlink_to('nowhere')
  monkeypatch.setattr(config_lib, '__file__', str(tmp_path / 'metajax' / 'config.py'))
  (tmp_path / 'metajax').mkdir()
  (tmp_path / 'configs').mkdir()
  for path in tmp_path.glob('*.py'):
    path.rename(tmp_path / 'configs' / path.name)
  assert cli.list_configs() == '  good    Good\n  silent  '


@pytest.mark.parametrize(
  ('spec', 'parts'),
  [
    ('maml_mini', ('maml_mini', '')),
    ('maml_mini:way=5,shot=1', ('maml_mini', 'way=5,shot=1')),
    ('a/b.py:data=tfds:x', ('a/b.py', 'data=tfds:x')),
    (r'C:\a\b.py:way=5', (r'C:\a\b.py', 'way=5')),
    ('c:/a/b.py', ('c:/a/b.py', '')),
    ('c:way=5', ('c', 'way=5')),
  ],
)
def test_a_config_string_follows_a_colon(spec, parts):
  assert config_lib.split_spec(spec) == parts


def test_the_package_holds_every_folder_of_code_and_every_config():
  folders = {path.parent.relative_to(ROOT) for path in (ROOT / 'metajax').rglob('*.py')}
  packages = {'.'.join(folder.parts) for folder in folders}
  assert {*packages, 'metajax.configs'} == set(PROJECT['tool']['setuptools']['packages'])
  assert PROJECT['tool']['setuptools']['package-dir'] == {'metajax.configs': 'configs'}


def test_nothing_private_of_jax_is_used():
  for folder in ('metajax', 'configs', 'benchmarks'):
    for path in (ROOT / folder).rglob('*.py'):
      assert not re.search(r'\bjax\._src\b|\bjaxlib\b', path.read_text()), path


def test_requirements_name_what_the_code_imports():
  """Each import of another package is required, or an extra's."""
  names = {
    'tensorflow_datasets': 'tensorflow-datasets',
    'PIL': 'pillow',
    'absl': 'absl-py',
    'orbax': 'orbax-checkpoint',
  }
  required = {re.match(r'[\w-]+', line)[0] for line in (ROOT / 'requirements.txt').read_text().splitlines()}
  imported = set()
  for path in [*(ROOT / 'metajax').rglob('*.py'), *(ROOT / 'configs').glob('*.py')]:
    imported |= set(re.findall(r'^ *(?:import|from) (\w+)', path.read_text(), re.MULTILINE))
  others = {name for name in imported if name not in sys.stdlib_module_names} - {'metajax', 'tensorflow', 'msvcrt'}
  assert {names.get(name, name) for name in others} <= required
  assert {'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml_collections', 'tensorflow-datasets'} <= required


def test_a_stream_outlasts_its_reader():
  reader, number = os.pipe()
  with os.fdopen(number, 'w') as stream:
    lasting = cli._Lasting(stream)
    print('read', file=lasting, flush=True)
    assert os.read(reader, 100) == b'read\n'
    os.close(reader)
    for _ in range(2):
      print('unread', file=lasting, flush=True)
    assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    assert not lasting.isatty()


def test_a_stream_outlasts_its_terminal():
  terminal, number = pty.openpty()
  with os.fdopen(number, 'w') as stream:
    lasting = cli._Lasting(stream)
    os.close(terminal)
    print('unread', file=lasting, flush=True)
    assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev


def test_a_full_disk_is_told_of_again_after_whoever_passes_over_it():
  with open('/dev/full', 'w') as stream:
    lasting = cli._Lasting(stream)
    for _ in range(2):
      with pytest.raises(OSError, match=r'No space left .*standard output'):
        print('lost', file=lasting, flush=True)
  with open('/dev/full', 'w') as stream:
    print('lost', file=cli._Lasting(stream, whole=False), flush=True)


def test_nothing_is_printed_to_streams_that_are_closed(monkeypatch):
  monkeypatch.setattr(sys, 'stdout', None)
  monkeypatch.setattr(sys, 'stderr', None)
  with cli.lasting_streams():
    print('nowhere')
    assert not sys.stderr.isatty()
  assert sys.stdout is None


@pytest.mark.parametrize('closed', ['', '>&-', '2>&-', '>&- 2>&-', '>/dev/full'])
def test_commands_without_streams(closed):
  """As a shell starts them."""
  version = 'import sys; from metajax import cli; sys.exit(cli.main())'
  for command in ('-m metajax.data glyphs --check', f'-c "{version}" --version'):
    ended = subprocess.run(
      ['sh', '-c', f'{sys.executable} {command} {closed}'], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == (2 if 'full' in closed else 0), ended.stderr
    assert 'Traceback' not in ended.stderr and ended.stderr.count('\n') == (1 if 'full' in closed else 0)


def test_an_error_that_cannot_be_printed_keeps_its_status():
  command = f'{sys.executable} -m metajax.data omniglott 2>/dev/full'
  assert subprocess.run(['sh', '-c', command], cwd=ROOT).returncode == 2


def test_a_run_goes_on_when_nobody_reads_its_log_any_more(cache, tmp_path):
  process = start(f'--config={TINY}', f'--workdir={tmp_path}', '--config.model.name=mlp')
  assert process.stdout.readline()
  process.stdout.close()
  errors = process.stderr.read()
  assert process.wait() == 0, errors
  assert errors == '' and (tmp_path / 'test.json').exists()

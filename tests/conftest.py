import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

from metajax import main, writer
from metajax.data import __main__ as data_command
from metajax.data import download
from metajax.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / 'tests' / 'tiny.py')

# Compiling takes most of the time of tests. Here, and in processes that tests start, XLA leaves out most optimisations
# of machine code and generates it in one piece, up to jax 0.10 by the older of its two ways: a third of the time
# together, and the same program before. A process that is to compile as users do is given AS_USERS_COMPILE. XLA reads
# its flags at JAX's first use.
AS_USERS_COMPILE = {'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
QUICK = '--xla_cpu_parallel_codegen_split_count=1'
if jax.__version_info__ < (0, 11):  # XLA aborts at a flag that it does not know
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{AS_USERS_COMPILE["XLA_FLAGS"]} {QUICK}'.strip()
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def shared_cache(tmp_path_factory):
  """A cache folder that outlives the test: programs compiled by one process serve the next."""
  return tmp_path_factory.mktemp('cache')


@pytest.fixture
def cache(shared_cache, monkeypatch):
  monkeypatch.setenv('METAJAX_CACHE', str(shared_cache))
  return shared_cache


# A network of four features, and the run of a plain classifier that has trained it, for runs that begin with it.
SMALL_CONV = ['--config.data.size=16', '--config.eval.val_episodes=4', '--config.eval.episodes=8']


@pytest.fixture(scope='session')
def pretrained(tmp_path_factory, shared_cache):
  folder = tmp_path_factory.mktemp('runs') / 'pretrained'
  plain = '--config.algorithm.name=classifier', '--config.data.batch=8'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('METAJAX_CACHE', str(shared_cache))
    arguments = *SMALL_CONV, *plain, '--config.total_steps=2', '--mode=train', f'--workdir={folder}'
    assert main.main(['metajax', f'--config={TINY}', *arguments]) == 0
  return folder


@pytest.fixture
def tables(tmp_path, monkeypatch):
  """An empty folder for converted tables, no network, and nothing of the person who runs the tests."""

  def fetch(remote, folder):
    raise UserError(f'cannot download {remote.name} to {folder}: no network')

  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  monkeypatch.setattr(download, 'fetch', fetch)
  return tmp_path / 'cache'


@pytest.fixture
def data(tmp_path):
  """An empty folder for the files of data sets."""
  (tmp_path / 'data').mkdir()
  return tmp_path / 'data'


@pytest.fixture(scope='session')
def omniglot_dir():
  """The folder with the real Omniglot archives."""
  folder = Path(os.environ.get('METAJAX_TEST_OMNIGLOT') or ROOT.parent / 'shared' / 'data' / 'omniglot')
  if not (folder / 'images_background.zip').exists():
    pytest.skip(f'no Omniglot archives in {folder}; METAJAX_TEST_OMNIGLOT names another folder')
  return folder


def prepare(arguments):
  """Runs `metajax data`; returns the exit status."""
  return data_command.main(['metajax data', *arguments])


def start(*arguments, **environment):
  """Starts metajax in a process of its own."""
  return subprocess.Popen(
    [sys.executable, '-m', 'metajax.main', *arguments],
    cwd=ROOT,
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def records_of(workdir):
  """The records of `metrics.jsonl` without the times, which differ from run to run."""
  return [{k: v for k, v in record.items() if k not in writer.TIMES} for record in writer.read(workdir)]


def tensorboard_events(workdir):
  """The TensorBoard events of a workdir, read without TensorFlow."""
  for path in sorted(Path(workdir).glob('events.out.tfevents*')):
    data, position = path.read_bytes(), 0
    while position < len(data):  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
      length = int.from_bytes(data[position : position + 8], 'little')
      yield Event.FromString(data[position + 12 : position + 12 + length])
      position += 16 + length

"""What is missing on macOS or Windows, or not installed, is taken away here, and everything must go on."""

import errno
import json
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from metajax import system, watch, workdir
from metajax.data import containers, prepared, table
from metajax.errors import UserError
from tests.conftest import ROOT, TINY


class Msvcrt:
  """Windows' module, with its errors and its locks of byte ranges, as far as it is used."""

  LK_NBLCK = 2

  def __init__(self):
    self.held = {}

  def locking(self, descriptor, mode, count):
    assert (mode, count) == (self.LK_NBLCK, 1)
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    place = os.fstat(descriptor).st_ino, start
    holder = self.held.get(place)
    if holder is not None and holder != descriptor:
      try:
        os.fstat(holder)
        raise OSError(errno.EACCES, 'Permission denied')
      except OSError as error:
        if error.errno != errno.EBADF:  # closed: Windows has let go of it
          raise
    self.held[place] = descriptor


@pytest.fixture(params=['fcntl', 'msvcrt'])
def locks(request, monkeypatch):
  if request.param == 'msvcrt':
    monkeypatch.setattr(system, 'fcntl', None)
    monkeypatch.setattr(system, 'msvcrt', Msvcrt())


def test_a_workdir_is_locked_and_says_by_whom(locks, tmp_path):
  refused = pytest.raises(UserError, match=f'in use by process {os.getpid()} on ')
  with workdir.locked(tmp_path / 'run'), refused, workdir.locked(tmp_path / 'run'):
    pass
  with workdir.locked(tmp_path / 'run'):
    pass


def test_a_lock_is_waited_for(locks, tmp_path, monkeypatch):
  naps = []
  first = (tmp_path / 'lock').open('w')

  def sleep(seconds):
    naps.append(seconds)
    first.close()

  monkeypatch.setattr(system.time, 'sleep', sleep)
  system.lock(first)
  with (tmp_path / 'lock').open('w') as second:
    system.lock(second)
  assert len(naps) == 1


def test_without_locks_a_workdir_is_refused_and_a_table_is_made_unlocked(tmp_path, monkeypatch):
  monkeypatch.setattr(system, 'fcntl', None)
  with pytest.raises(UserError, match='cannot be locked'), workdir.locked(tmp_path / 'run'):
    pass
  with table.locked(tmp_path / 'table.lock') as held:
    assert held is False


@pytest.mark.parametrize(('quota', 'expected'), [('max 100000', 8), ('250000 100000', 3), (None, 8)])
def test_cores_are_at_most_a_containers_share(monkeypatch, quota, expected):
  def read(path):
    if quota is None:
      raise FileNotFoundError(path)
    return f'{quota}\n'

  monkeypatch.setattr(system.Path, 'read_text', read)
  monkeypatch.setattr(system.os, 'sched_getaffinity', lambda _: range(8))
  assert system.cores() == expected
  monkeypatch.delattr(system.os, 'sched_getaffinity')
  monkeypatch.setattr(system.os, 'cpu_count', lambda: 8)
  assert system.cores() == expected


def test_files_may_be_open_where_there_is_no_limit(monkeypatch):
  monkeypatch.setattr(system, 'resource', None)
  assert system.allow_open_files(10**9) is None


def test_images_are_gathered_where_the_disk_cannot_be_asked(tmp_path, monkeypatch):
  truth = np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1)
  np.save(tmp_path / 'images.npy', truth)
  images = np.load(tmp_path / 'images.npy', mmap_mode='r')
  assert isinstance(images.base, mmap.mmap)
  monkeypatch.delattr(mmap, 'MADV_WILLNEED')
  np.testing.assert_array_equal(table.gather(images, np.array([4, 0])), truth[[4, 0]])


def test_without_c_the_last_word_is_left_to_jax(monkeypatch):
  def no_library(name):
    raise TypeError('bad argument type for built-in operation')  # CDLL(None) on Windows

  monkeypatch.setattr(watch.ctypes, 'CDLL', no_library)
  watch.on_abort(print)


def python(program, cache):
  """What a program printed, which must end well."""
  environment = {**os.environ, 'METAJAX_CACHE': str(cache)}
  run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  return run.stdout


POOR = """
import sys
# Other packages have their own ways: they see the system as it is.
import flax.linen, h5py, jax, matplotlib.figure, ml_collections, numpy, optax, orbax.checkpoint, tensorboardX, tqdm
import jax.experimental.multihost_utils, scipy.special
for name in ('fcntl', 'resource', 'termios', 'pty', 'pwd', 'grp', 'posix_ipc', 'syslog'):
  sys.modules[name] = None
import mmap, os, pathlib, signal
for name in ('sched_getaffinity', 'uname', 'fork', 'forkpty', 'posix_fadvise', 'getuid', 'geteuid', 'sysconf', 'mkfifo',
             'killpg', 'setsid', 'statvfs', 'getloadavg'):
  if hasattr(os, name):
    delattr(os, name)
os.process_cpu_count = os.cpu_count  # as there
for name in ('SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGALRM', 'SIGKILL', 'SIGQUIT'):
  delattr(signal, name)
for name in [name for name in dir(mmap) if name.startswith('MADV_')]:
  delattr(mmap, name)
# macOS and Windows have no such files
def gone(path, *args, open=pathlib.Path.open, **kwargs):
  if str(path).startswith('/sys/fs'):
    raise FileNotFoundError(2, 'No such file or directory', str(path))
  return open(path, *args, **kwargs)
pathlib.Path.open = gone
"""


def test_a_run_goes_through_where_everything_of_linux_is_missing(tmp_path, shared_cache):
  """All modules are imported, and the smallest run is trained, resumed and tested."""
  program = f"""{POOR}
from metajax import system
class Msvcrt:  # there is a lock on every system
  LK_NBLCK = 2
  def locking(self, *args):
    pass
system.msvcrt = Msvcrt()
import importlib, pkgutil, metajax
for module in pkgutil.walk_packages(metajax.__path__, 'metajax.'):
  importlib.import_module(module.name)
from metajax import main
arguments = ['metajax', '--config={TINY}', '--workdir={tmp_path}/run']
assert main.main([*arguments, '--mode=train', '--config.total_steps=2']) == 0
assert main.main([*arguments, '--config.total_steps=4']) == 0
"""
  python(program, shared_cache)
  assert json.loads((tmp_path / 'run' / 'test.json').read_text())['episodes'] == 20


def test_few_runs_need_tensorflow_datasets_h5py_and_matplotlib(tmp_path, shared_cache):
  """Without them all modules but the one that draws are imported, a run is trained, tested and compared."""
  program = f"""
import sys
for name in ('tensorflow_datasets', 'h5py', 'matplotlib', 'tensorflow'):
  sys.modules[name] = None
import importlib, pkgutil, metajax, benchmarks
for module in pkgutil.walk_packages(metajax.__path__, 'metajax.'):
  if module.name != 'metajax.figures':
    importlib.import_module(module.name)
for module in pkgutil.iter_modules(benchmarks.__path__):
  if module.name not in ('rivals', 'torch_maml'):  # these need PyTorch
    importlib.import_module(f'benchmarks.{{module.name}}')
from benchmarks import maml_step
tiny = ['--shape=omniglot', '--image=16x16x1', '--width=4', '--query_shot=2', '--inner_steps=2', '--tasks=2']
maml_step.main([*tiny, '--order=1', '--rounds=1', '--implementations=metajax'])
from metajax import compare, main
for seed in (0, 1):
  arguments = ['metajax', '--config={TINY}', '--config.model.name=mlp', f'--config.seed={{seed}}']
  assert main.main([*arguments, f'--workdir={tmp_path}/{{seed}}']) == 0
runs = ['{tmp_path}/0', '{tmp_path}/1']
assert compare.main(['metajax compare', *runs]) == 0
assert compare.main(['metajax compare', *runs, '--figure={tmp_path}/figure.png']) == 2
"""
  output = python(program, shared_cache)
  line = 'no figures: drawing figures needs matplotlib, which is not installed: pip install matplotlib'
  assert output.count('no figures') == 1 and line in output.splitlines()
  assert output.count('\ntest: ') == 2 and not (tmp_path / '0' / 'figures').exists()


@pytest.mark.parametrize('name', ['h5py', 'tensorflow_datasets'])
def test_data_that_needs_a_package_says_which(name, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match=f'x needs {name.replace("_", "-")}, which is not installed: pip install'):
    system.package(name, 'x')
  with pytest.raises(ModuleNotFoundError):  # metajax itself is never missing
    system.package('metajax.nothing', 'x')
  if name == 'h5py':
    (tmp_path / 'a.hdf5').touch()
    format = containers.hdf5(('a.hdf5',), lambda key: key)
    with pytest.raises(UserError, match=r'reading .*a\.hdf5 needs h5py'):
      format.read(format.find(tmp_path), tmp_path)
  else:
    with pytest.raises(UserError, match=r'reading TFDS cifar10 in .* needs tensorflow-datasets'):
      prepared.read('cifar10', tmp_path)

"""What a machine may lack, behind one function each: parts of an operating system, packages that few runs need."""

import contextlib
import errno
import hashlib
import importlib
import importlib.metadata
import math
import mmap
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np

import metajax
from metajax.errors import UserError

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None
try:
  import msvcrt
except ImportError:  # everywhere else
  msvcrt = None
try:
  import resource
except ImportError:  # Windows
  resource = None

# Packages that few runs need.
_OPTIONAL = ('matplotlib', 'tensorflow_datasets', 'importlib_resources', 'h5py', 'pillow_heif')
_LOCKED_BYTE = 2**30  # Windows locks bytes, and nobody else can read those: this one lies behind all text
_WAIT_SECONDS = 0.2


def package(name, purpose):
  """Imports a module that metajax can do without.

  Args:
    name: str, of a package, or of a module of metajax that imports one.
    purpose: what needs it, the beginning of an error.

  Raises:
    UserError: the package is not installed.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name not in _OPTIONAL:  # metajax itself, or what an optional package needs and lacks
      raise
    missing = error.name.replace('_', '-')
    raise UserError(f'{purpose} needs {missing}, which is not installed: pip install {missing}') from None


def environment():
  """What a number was made with, to stand beside it: {'metajax', 'commit', 'python', 'jax', 'flax', 'machine': str}.

  'commit' is None away from a git checkout, and ends in '+' where that has changes.
  """
  import jax  # only here, so that this module can be imported before JAX is set up

  device, count = jax.devices()[0], jax.device_count()
  kind = device.device_kind if device.platform != 'cpu' else _processor()
  return {
    'metajax': metajax.__version__,
    'commit': _commit(),
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in ('jax', 'flax')},
    'machine': f'{count} x {kind}',
  }


def source_digest():
  """16 hexadecimal digits for the Python files of metajax as they are installed here."""
  digest = hashlib.blake2b(digest_size=8)
  root = Path(__file__).parent
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root).as_posix()}\0'.encode() + path.read_bytes())
  return digest.hexdigest()


def _commit():
  root = Path(__file__).parent.parent
  if not (root / '.git').exists():
    return None
  try:
    ask = ('git', '-C', str(root), 'describe', '--always', '--abbrev=12', '--exclude=*', '--dirty=+')
    return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def _processor():
  with contextlib.suppress(OSError):
    for line in Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def try_lock(file):
  """Locks an open file until it is closed, however the process ends.

  Args:
    file: opened for writing.

  Returns:
    True, or at once False if another process holds the lock.

  Raises:
    OSError: the file system, or the platform, has no locks.
  """
  if fcntl:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    return True
  if msvcrt:
    position = file.tell()
    file.seek(_LOCKED_BYTE)
    try:
      msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
      if error.errno in (errno.EACCES, errno.EDEADLK):
        return False
      raise
    finally:
      file.seek(position)
    return True
  raise OSError(errno.ENOTSUP, 'this platform has no file locks')


def lock(file):
  """Like `try_lock`, but waits for the process that holds the lock."""
  while not try_lock(file):
    time.sleep(_WAIT_SECONDS)


def cores():
  """How many CPU cores this process may use; a container's share can be smaller than what it sees."""
  usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  with contextlib.suppress(OSError, ValueError):  # Linux alone has this file; 'max' means no limit
    quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
    usable = min(usable, math.ceil(int(quota) / int(period)))
  return usable


def allow_open_files(needed):
  """Raises this process's limit of open files to `needed` if it is lower.

  Returns:
    None, or the limit if the system does not allow more.
  """
  if resource is None:  # Windows has no such limit
    return None
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY or soft >= needed:
    return None
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
  except ValueError:
    return hard
  return None


def read_ahead(images, rows):
  """Asks the disk for rows of a memory map, all at once and nothing else; does nothing where it cannot be asked.

  Args:
    images: (rows, ...) memory map of a whole file.
    rows: (...) integers.
  """
  if not hasattr(mmap, 'MADV_WILLNEED'):  # Windows
    return
  start, size = images.offset % mmap.ALLOCATIONGRANULARITY, images.strides[0]  # the map begins at a whole page
  for first in (start + rows.ravel().astype(np.int64) * size).tolist():
    page = first - first % mmap.PAGESIZE
    images.base.madvise(mmap.MADV_WILLNEED, page, first + size - page)

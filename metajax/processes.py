"""Several processes as one run: how they find one another, agree, and end together.

Process 0 alone reads and writes the workdir, logs and draws; what the others need of it they are sent, so that no
folder has to be shared. They meet at the coordination service of `jax.distributed`, which lives in process 0. One
process on its own needs nothing of this, and does nothing of it.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple

import jax
import numpy as np
from jax._src import clusters, distributed  # there is no public way to the key-value store
from jax.experimental import multihost_utils
from tqdm import tqdm

from metajax import parallel
from metajax.errors import UserError

LOST = 3  # exit status: another process is missing or gone; the same command goes on with the run
_START_SECONDS = 300  # that all processes have to come together
_BEAT_SECONDS = 1  # between two signs of life
_SILENT_SECONDS = 30  # without one, after which a process counts as lost
_HEARTBEAT_SECONDS = 45  # the same of JAX's own, which ends in an abort: for when process 0 is the one that is silent
_LEAVE_SECONDS = 5  # that the others have to leave before process 0 takes the service with it
_FOR_EVER = 10**9  # milliseconds: the watch ends whoever waits in vain

_watch = None  # in a run of several processes, the `_Watch` of this one


class Place(NamedTuple):
  """A process's place in a run of several."""

  coordinator: str  # 'host:port' where process 0 listens
  processes: int
  index: int
  gpus: list[int] | None  # those of the machine's that are its own; None for all it sees


class Nothing:
  """Stands where process 0 has something that there is one of in a run: whatever is asked of it, it does nothing."""

  def __getattr__(self, name):
    return lambda *args, **kwargs: None

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    return None


def find_place(coordinator=None, processes=None, index=None):
  """Reads the place in a run from flags, and what they leave open from a cluster's environment.

  Slurm and Open MPI are known. A cluster's step of one task, such as an interactive shell, is one process.

  Args:
    coordinator: 'host:port', or None.
    processes: how many, or None.
    index: of this one, or None.

  Returns:
    Place, or None for a process on its own.

  Raises:
    UserError: the flags are incomplete or do not fit together.
  """
  gpus = None
  if (size := int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1))) > 1:  # first: mpirun may itself have come by srun
    cluster, rank = clusters.OmpiCluster, int(os.environ['OMPI_COMM_WORLD_RANK'])
    local_rank, local_size = (int(os.environ[f'OMPI_COMM_WORLD_LOCAL_{name}']) for name in ('RANK', 'SIZE'))
  # Not SLURM_NTASKS: that is the allocation's, in an interactive shell too.
  elif (size := int(os.environ.get('SLURM_STEP_NUM_TASKS', 1))) > 1:
    cluster, rank = clusters.SlurmCluster, int(os.environ['SLURM_PROCID'])
    local_rank, local_size = int(os.environ['SLURM_LOCALID']), _slurm_tasks_on_node()
  else:
    cluster = None
  if cluster:
    processes, index = processes or size, rank if index is None else index
    # One GPU for each process, unless the cluster has hidden the others already.
    if local_size > 1 and ',' in os.environ.get('CUDA_VISIBLE_DEVICES', ','):
      gpus = [local_rank]
    if not coordinator:
      try:
        coordinator = cluster.get_coordinator_address(None, os.environ.get('JAX_COORDINATOR_PORT'))
      except (KeyError, RuntimeError):
        raise UserError(
          f'command line: {size} processes, but this {cluster.name} does not tell where process 0 is: '
          '--coordinator=HOST:PORT is needed'
        ) from None
  flags = {'--coordinator=HOST:PORT': coordinator, '--num_processes': processes, '--process_id': index}
  if all(value is None for value in flags.values()) or processes == 1:
    return None
  for name, value in flags.items():
    if value is None:
      raise UserError(f'command line: {name} is missing; several processes need {", ".join(flags)}')
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise UserError(f'command line: --coordinator is HOST:PORT of process 0, not {coordinator!r}')
  if not 0 <= index < processes:
    raise UserError(f'command line: --process_id={index} is none of 0 to {processes - 1} (--num_processes={processes})')
  return Place(coordinator, processes, index, gpus)


def _slurm_tasks_on_node():
  """From '2(x3),1' and the node's number."""
  counts = []
  for part in os.environ['SLURM_STEP_TASKS_PER_NODE'].split(','):
    count, times = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part).groups()
    counts += [int(count)] * int(times or 1)
  return counts[int(os.environ['SLURM_NODEID'])]


def start(place):
  """Joins the run: waits for the others, and from then on watches them. To be called before JAX meets its devices.

  Raises:
    UserError: the others did not come, or have other numbers of devices.
  """
  global _watch
  host = place.coordinator.rpartition(':')[0]
  if place.index == 0:
    absent = f'some of --num_processes={place.processes} did not come to --coordinator={place.coordinator}'
  else:
    absent = f'process 0 does not answer at --coordinator={place.coordinator}'
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # one log, even of libraries: only errors are told
  deadline = threading.Timer(
    _START_SECONDS, _exit, (LOST, f'metajax: {absent} for {_START_SECONDS} s: start them all again')
  )
  deadline.daemon = True
  deadline.start()
  jax.config.update('jax_enable_preemption_service', False)  # it would swallow SIGTERM, outside of training too
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.processes,
      place.index,
      local_device_ids=place.gpus,
      cluster_detection_method='deactivate',
      initialization_timeout=2 * _START_SECONDS,  # ours comes first: after its own JAX aborts
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      # Whoever reaches the port can join: where all processes are here, nobody else need reach it.
      coordinator_bind_address=place.coordinator if host in ('localhost', '127.0.0.1') else None,
    )
  except jax.errors.JaxRuntimeError as error:
    reason = f'--coordinator={place.coordinator}: {str(error).splitlines()[0]}'
    if place.index == 0:
      raise UserError(reason) from None
    # Such as a process 0 that is still there from before this process was lost and started again.
    _exit(LOST, f'metajax: {reason}')
  _watch = _Watch(place, distributed.global_state.client)
  jax.devices()  # all come together for this a last time
  deadline.cancel()
  if jax.device_count() != place.processes * jax.local_device_count():
    counts = sorted(len(jax.local_devices(process_index=k)) for k in range(place.processes))
    raise UserError(f'the processes have {counts[0]} to {counts[-1]} devices: each must have as many as the others')
  # Connects all devices while all processes are here: at a first collective gloo waits for the last for 30 s only, and
  # the training step, which one may find compiled and another not, would be too late for that.
  bool(parallel.anywhere(False))


def is_first():
  """Whether this is process 0, as one on its own is."""
  return not _watch or _watch.place.index == 0


def on_first(make, *args):
  """What `make(*args)` returns on process 0; `Nothing` on the others."""
  return make(*args) if is_first() else Nothing()


def from_first(function):
  """What `function` returns on process 0, on all; it is called there alone, and returns what JSON can hold."""
  if not _watch:
    return function()
  return _watch.send(function()) if is_first() else _watch.receive()


def arrays_from_first(function, like):
  """Like `from_first`, for a pytree of NumPy arrays that has the structure, shapes and dtypes of `like`."""
  if not _watch:
    return function()
  made = []
  from_first(lambda: made.append(function()))  # wait here: how long a collective is waited for is not ours to say
  tree = made[0] if made else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
  leaves, structure = jax.tree.flatten(tree)
  # The broadcast adds zeros, and -0.0 + 0.0 is 0.0: every bit arrives only as bytes.
  received = multihost_utils.broadcast_one_to_all(np.frombuffer(b''.join(x.tobytes() for x in leaves), np.uint8))
  parts = np.split(received, np.cumsum([x.nbytes for x in leaves])[:-1])
  return structure.unflatten(
    [np.frombuffer(part.tobytes(), x.dtype).reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
  )


def first_then_others(function):
  """Calls `function` on process 0 and then on the others, so that they find on disk what it has left there."""
  if is_first():
    result = function()
    from_first(lambda: None)
    return result
  from_first(None)
  return function()


def finish():
  """Leaves a run that is done, once all others are done as well."""
  if _watch:
    _watch.finish()


def fail(status, text, *, by_device=False):
  """Ends all processes of the run; returns if there is this one alone.

  Args:
    status: what all exit with.
    text: what one of them prints on stderr.
    by_device: the error came from a device, so it may be another process that is lost: the watch is given time to see.
  """
  if _watch:
    _watch.fail(status, text, by_device)


def _exit(status, text=None):
  """Ends this process at once, whatever its threads wait for."""
  if text:
    tqdm.write(text, file=sys.stderr)  # above the progress bar, if there is one
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class _Watch:
  """Each process's sign of life and the first failure, as keys of the coordination service that a thread looks at."""

  def __init__(self, place, client):
    self.place, self._client = place, client
    self._messages = 0
    self._over = False
    if place.index:
      self._explain_abort()
    self._give_sign('here')
    threading.Thread(target=self._run, name='watch', daemon=True).start()

  def send(self, value):
    self._client.key_value_set(self._next_message(), json.dumps(value))
    return value

  def receive(self):
    return json.loads(self._client.blocking_key_value_get(self._next_message(), _FOR_EVER))

  def _next_message(self):
    self._messages += 1  # all processes send and receive in the same order
    return f'metajax/message/{self._messages}'

  def finish(self):
    self._client.wait_at_barrier('metajax/finish', _FOR_EVER)
    self._over = True
    jax.distributed.shutdown()

  def fail(self, status, text, by_device):
    if by_device:
      time.sleep(_SILENT_SECONDS + 10 * _BEAT_SECONDS)
    elif self.place.index:  # what fails everywhere is for process 0 to say, which has the log
      time.sleep(3 * _BEAT_SECONDS)
    if not self._claim(status):
      time.sleep(_SILENT_SECONDS)  # the thread ends this process
    self._leave(status, text)

  def _claim(self, status):
    """Whether this process is the first to fail, and so the one that says why."""
    try:
      self._client.key_value_set('metajax/watch/failed', json.dumps([self.place.index, status]))
    except jax.errors.JaxRuntimeError:
      return False
    return True

  def _leave(self, status, text=None):
    """Exits; process 0, in which the service lives, after the others."""
    if text:
      tqdm.write(text, file=sys.stderr)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._give_sign('left')
      deadline = time.monotonic() + _LEAVE_SECONDS
      while self.place.index == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
        if all(sign == 'left' for index, (_, sign) in self._look()[0].items() if index):
          break
    _exit(status)

  def _give_sign(self, sign):
    value = json.dumps([os.uname().nodename, sign])
    self._client.key_value_set(f'metajax/watch/{self.place.index}', value, allow_overwrite=True)

  def _look(self):
    """{process: [host, sign]}, and the first failure: (process, status) or None."""
    found = self._client.key_value_dir_get('metajax/watch/')
    found = {key.rpartition('/')[2]: json.loads(value) for key, value in found}
    failed = found.pop('failed', None)
    return {int(index): value for index, value in found.items()}, failed

  def _run(self):
    last, since = {}, {}  # by process, its last sign and when it was first seen
    for beat in itertools.count():
      time.sleep(_BEAT_SECONDS)
      if self._over:
        return
      try:
        self._give_sign(beat)
        signs, failed = self._look()
      except jax.errors.JaxRuntimeError:
        continue  # process 0 is out of reach: if that is for good, JAX aborts
      if failed and failed[0] != self.place.index:
        self._leave(failed[1])
      for index, sign in signs.items():
        if sign != last.get(index):
          last[index], since[index] = sign, time.monotonic()
        # Process 0, which has the log, is given the time to be the first to say so.
        elif time.monotonic() - since[index] > _SILENT_SECONDS + 2 * _BEAT_SECONDS * (self.place.index > 0):
          self._leave(LOST, self._lost(index, sign[0]) if self._claim(LOST) else None)

  def _lost(self, index, host):
    return (
      f'metajax: process {index} of {self.place.processes} (on {host}) has died or does not answer, so the others end '
      'as well: run the same command again to go on from the last checkpoint'
    )

  def _explain_abort(self):
    """Has the last word when process 0 dies: JAX then aborts the others at once, in C++, past all of Python."""
    host, _, port = self.place.coordinator.rpartition(':')

    def explain(number):
      if self._over:
        return
      try:
        socket.create_connection((host, int(port)), timeout=5).close()
      except OSError:
        _exit(LOST, self._lost(0, host))

    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)  # kept, as C does not
    ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

"""Several processes as one run: how they find one another, agree, and end together.

Process 0 alone reads and writes the workdir, logs and draws; it sends the others what they need, so that no folder has
to be shared. They meet at the coordinator's port, from then on watch one another (`metajax.watch`), and start JAX's own
coordination service, which lives in process 0. A process on its own needs none of this.
"""

import contextlib
import os
import re
import sys
import threading
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from metajax import parallel, watch
from metajax.errors import UserError
from metajax.watch import LOST, exit_at_once

_START_SECONDS = 300  # that all processes have to come together
# Without a sign of life, after which JAX aborts a process: long after the watch, which also says why.
_HEARTBEAT_SECONDS = 4 * watch.SILENT_SECONDS

_watch = None  # in a run of several processes, the `watch.Watch` of this one


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
    cluster, rank = 'Open MPI', int(os.environ['OMPI_COMM_WORLD_RANK'])
    local_rank, local_size = (int(os.environ[f'OMPI_COMM_WORLD_LOCAL_{name}']) for name in ('RANK', 'SIZE'))
  # Not SLURM_NTASKS: that is the allocation's, in an interactive shell too.
  elif (size := int(os.environ.get('SLURM_STEP_NUM_TASKS', 1))) > 1:
    cluster, rank = 'Slurm', int(os.environ['SLURM_PROCID'])
    local_rank, local_size = int(os.environ['SLURM_LOCALID']), _slurm_tasks_on_node()
  else:
    cluster = None
  if cluster:
    processes, index = processes or size, rank if index is None else index
    # One GPU for each process, unless the cluster has hidden the others already.
    if local_size > 1 and ',' in os.environ.get('CUDA_VISIBLE_DEVICES', ','):
      gpus = [local_rank]
    coordinator = coordinator or (_open_mpi_coordinator() if cluster == 'Open MPI' else _slurm_coordinator())
    if not coordinator:
      raise UserError(
        f'command line: {size} processes, but this {cluster} does not tell where process 0 is: '
        '--coordinator=HOST:PORT is needed'
      )
  flags = {'--coordinator=HOST:PORT': coordinator, '--num_processes': processes, '--process_id': index}
  if all(value is None for value in flags.values()) or processes == 1:
    return None
  for name, value in flags.items():
    if value is None:
      raise UserError(f'command line: {name} is missing; several processes need {", ".join(flags)}')
  if not re.fullmatch(r'.+:\d+', coordinator) or int(coordinator.rpartition(':')[2]) >= 2**16:
    raise UserError(f'command line: --coordinator is HOST:PORT of process 0, not {coordinator!r}')
  if not 0 <= index < processes:
    raise UserError(f'command line: --process_id={index} is none of 0 to {processes - 1} (--num_processes={processes})')
  return Place(coordinator, processes, index, gpus)


def _slurm_coordinator():
  """HOST:PORT of the step's first node, from 'node[003-004],other'; None if Slurm does not say."""
  first = re.match(r'([^,\[]+)(?:\[([^-,\]]+))?', os.environ.get('SLURM_STEP_NODELIST', ''))
  job = os.environ.get('SLURM_JOB_ID')
  return first and job and f'{"".join(filter(None, first.groups()))}:{_port(int(job))}'


def _open_mpi_coordinator():
  """HOST:PORT of the launcher, from '4096.0;tcp://10.0.0.1,10.1.0.1:34911'; None from Open MPI 5 on."""
  uri = os.environ.get('OMPI_MCA_orte_hnp_uri', '')  # noqa: SIM112
  uri = re.match(r'(\d+)\..*?(?:tcp://([^,:;]+)|tcp6://\[([^,\]]+))', uri)
  return uri and f'{uri[2] or uri[3]}:{_port(int(uri[1]) // 2**12)}'  # the job's number is a multiple of 2^12


def _port(job):
  """$JAX_COORDINATOR_PORT, else one of the highest 4096, by the job's number: jobs that share a machine differ."""
  return os.environ.get('JAX_COORDINATOR_PORT') or 2**16 - 2**12 + job % 2**12


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
    UserError: the coordinator's port is not to be had, or the processes have different numbers of devices.
  """
  global _watch
  host, _, port = place.coordinator.rpartition(':')
  host, port, door = host.strip('[]'), int(port), None
  if place.index == 0:
    absent = f'some of --num_processes={place.processes} did not connect to --coordinator={place.coordinator}'
    try:
      door = watch.listen(host, port)
    except OSError as error:
      reason = (error.strerror or str(error)).partition(' (while')[0]
      raise UserError(
        f'--coordinator={place.coordinator}: process 0 cannot listen on port {port} ({reason}): choose another'
      ) from None
  else:
    absent = f'process 0 did not answer at --coordinator={place.coordinator}'
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # one log, even of libraries: only errors are told
  deadline = _deadline(absent)
  _watch = watch.Watch(place.index, place.processes, host, port, door)
  deadline.cancel()
  service = f'{place.coordinator.rpartition(":")[0]}:{from_first(lambda: _free_port(host, port + 1))}'
  deadline = _deadline(f"all processes met, but could not all connect to JAX's service at {service}")
  jax.config.update('jax_enable_preemption_service', False)  # it would swallow SIGTERM, outside of training too
  jax.distributed.initialize(
    service,
    place.processes,
    place.index,
    local_device_ids=place.gpus,
    cluster_detection_method='deactivate',
    initialization_timeout=2 * _START_SECONDS,  # ours comes first: after its own JAX aborts
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    # Whoever reaches the port can join: where all processes are here, nobody else need reach it.
    coordinator_bind_address=service if host in ('localhost', '127.0.0.1') else None,
  )
  jax.devices()  # all come together for this
  if jax.device_count() != place.processes * jax.local_device_count():
    counts = sorted(len(jax.local_devices(process_index=k)) for k in range(place.processes))
    raise UserError(f'the processes have {counts[0]} to {counts[-1]} devices: each must have as many as the others')
  # Connects all devices while all processes are here: at a first collective gloo waits for the last for 30 s only, and
  # the training step, which one may find compiled and another not, would be too late for that.
  parallel.anywhere(False)
  deadline.cancel()


def _deadline(absent):
  """A timer that ends this process, with the line why, unless it is cancelled in time."""
  line = f'metajax: {absent} within {_START_SECONDS} s: start all processes again'
  timer = threading.Timer(_START_SECONDS, exit_at_once, (LOST, line))
  timer.daemon = True
  timer.start()
  return timer


def _free_port(host, wanted):
  """The port that is wanted if it is free, else any that is."""
  for port in (wanted, 0):
    with contextlib.suppress(OSError, OverflowError), watch.listen(host, port) as free:
      return free.getsockname()[1]
  raise UserError(f'process 0 finds no free port on {host}')


def is_first():
  """Whether this is process 0, as one on its own is."""
  return not _watch or _watch.index == 0


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


def agree(facts):
  """Looks whether all processes have the same facts, {what: value that JSON can hold}.

  Raises:
    UserError: this process has others than process 0.
  """
  of_first = from_first(lambda: facts)
  if differing := [what for what, value in facts.items() if of_first.get(what) != value]:
    each = '; '.join(f'{what} is {facts[what]!r}, there {of_first.get(what)!r}' for what in differing)
    raise UserError(f'process {_watch.index} is not as process 0: {each}. Start all with the same command and code')


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
    jax.distributed.shutdown()


def fail(status, text, *, by_device=False):
  """Ends all processes of the run; returns if there is this one alone.

  Args:
    status: what all exit with.
    text: what one of them prints on stderr.
    by_device: the error came from a device, so it may be another process that is lost: the watch is given time to see.
  """
  if _watch:
    _watch.fail(status, text, by_device)

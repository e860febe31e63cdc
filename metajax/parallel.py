"""Tasks over chunks and devices: the only module that knows how many of each there are.

A meta-batch is laid out as (devices, chunks, tasks of a chunk): `pmap` takes the first axis, `scan` the second, `vmap`
the third. Where the tasks do not divide evenly, copies of weight zero fill up, so that any number of tasks gives the
same update on any number of devices. State is replicated and has no device axis: a checkpoint fits every machine.

Devices are those of all processes of the run, each process's in a row. Each process makes the tasks of its own devices
alone; arrays here are always those of its own devices, and only inside a step do all of them meet.
"""

import contextlib
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax import system
from metajax.errors import UserError

_AXIS = 'devices'
# Input values of a chunk: on a CPU one task of images, many of a few numbers; elsewhere ten tasks of mini-ImageNet.
_CPU_CHUNK_ELEMENTS, _CHUNK_ELEMENTS = 4096, 2**24


def chunk_size(chunk, tasks, elements):
  """How many tasks a `vmap` takes at once.

  Args:
    chunk: a number, or 'auto': on a CPU what its cache holds, elsewhere what its memory does.
    tasks: in the meta-batch.
    elements: input values of one task.

  Raises:
    UserError: `chunk` is something else.
  """
  local = math.ceil(tasks / jax.device_count())
  if chunk == 'auto':
    chunk = max(1, (_CPU_CHUNK_ELEMENTS if jax.default_backend() == 'cpu' else _CHUNK_ELEMENTS) // elements)
  elif not str(chunk).isdecimal() or int(chunk) < 1:
    raise UserError(f"config.chunk is 'auto' or a number of tasks, not {chunk!r}")
  return math.ceil(local / math.ceil(local / min(int(chunk), local)))  # the most even chunks of at most this size


def use_cores(tasks):
  """Makes each core of a CPU a device of its own, as far as there are tasks; to be called before JAX is first used.

  Two cores that work on a task each are half as fast again as both on one task after the other. An image table costs
  no more: CPU devices share the memory that it is mapped to. Whoever sets $JAX_NUM_CPU_DEVICES, or the flag of XLA that
  was there before it, has precedence.
  """
  flag = 'xla_force_host_platform_device_count'
  if 'JAX_NUM_CPU_DEVICES' not in os.environ and flag not in os.environ.get('XLA_FLAGS', ''):
    with contextlib.suppress(RuntimeError):  # in use already, by whoever called this as a library
      jax.config.update('jax_num_cpu_devices', max(1, min(system.cores(), tasks)))


def own_tasks(tasks, chunk):
  """Which tasks of a meta-batch this process makes: (first, count); a process that is left without makes the last."""
  positions = _positions(tasks, chunk)
  first = min(int(positions.flat[0]), tasks - 1)
  return first, min(positions.size, tasks - first)


def lay_out(batch, tasks, chunk):
  """Puts a host batch on this process's devices, as (devices, chunks, chunk, ...).

  Args:
    batch: its own tasks, a leading axis of the count that `own_tasks` names.
    tasks: in the whole meta-batch.
    chunk: tasks that one `vmap` takes.

  Returns:
    positions: (devices, chunks, chunk) int32, a task's place in the meta-batch; from `tasks` on they are filling.
    batch: in that layout, filled up with copies of the first task.
  """
  positions = _positions(tasks, chunk)
  rows = np.where(positions < tasks, positions - positions.flat[0], 0)
  laid_out = positions, jax.tree.map(lambda x: x[rows], batch)
  return jax.device_put(laid_out, NamedSharding(_mesh(), PartitionSpec(_AXIS)))


def replicate(tree):
  """Puts a pytree, the same on all processes, on every device."""
  return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def over_devices(step, *, donate=False):
  """Compiles `step(state, constants, local) -> replicated results` for all devices.

  `state` and `constants` are replicated, `local` is what `lay_out` returns; `donate` gives the memory of `state` to
  the results. Inside, `mean_over_tasks` and `gather_tasks` meet the other devices. `constants` must hold an array.
  All processes must call what is compiled here in the same order.
  """
  donated = (0,) if donate else ()
  return jax.pmap(step, axis_name=_AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=donated)


def over_devices_with_flag(step, *, donate=False):
  """Like `over_devices`, of a step during which all processes agree on a flag.

  That is part of the step itself. As a dispatch of its own it would have a collective that does not depend on those of
  the step, and such collectives can block each other.

  Returns:
    compiled(state, constants, local, flag) -> what `step` returns; whether `flag` is true on any process. A process on
    its own has that at once, several when the devices have come to it.
  """
  if jax.process_count() == 1:
    compiled = over_devices(step, donate=donate)
    return lambda state, constants, local, flag: (compiled(state, constants, local), flag)

  def step_and_flag(state, constants, local):
    local, flag = local
    return step(state, constants, local), jax.lax.pmax(flag, _AXIS)

  compiled = over_devices(step_and_flag, donate=donate)
  devices = jax.local_device_count()
  return lambda state, constants, local, flag: compiled(state, constants, (local, np.full(devices, flag)))


def mean_over_tasks(function, like, local, tasks):
  """Runs `function` chunk by chunk on every device.

  Args:
    function: (positions (chunk,), weights (chunk,), batch with a leading axis of chunk) -> sums, each: `sums` any
      pytree that is a sum over the chunk's tasks times their weight, `each` one with a leading axis of chunk. The
      weights make the mean over the meta-batch of it, 0 for filling.
    like: arrays of the shapes and types of `sums`; to find them out would take tracing `function` twice.
    local: this device's part of what `lay_out` returns.
    tasks: in the meta-batch.

  Returns:
    the means over the meta-batch; `each` of all tasks, (tasks, ...).
  """

  def add(total, chunk):
    positions, batch = chunk
    weights = jnp.where(positions < tasks, jax.lax.axis_size(_AXIS) / tasks, 0.0)
    sums, each = function(positions, weights, batch)
    return jax.tree.map(jnp.add, total, sums), each

  sums, each = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), local)
  return jax.lax.pmean(sums, _AXIS), gather_tasks(each, tasks)


def gather_tasks(tree, tasks):
  """Arrays (chunks, chunk, ...) of every device as (tasks, ...), the filling cut off."""

  def gather(x):
    x = jax.lax.all_gather(x, _AXIS)
    return x.reshape(math.prod(x.shape[:3]), *x.shape[3:])[:tasks]

  return jax.tree.map(gather, tree)


def anywhere(flag):
  """Whether `flag` is true on any process; nothing else may be in flight on the devices."""
  if jax.process_count() == 1:
    return flag
  return bool(_any_device(np.full(jax.local_device_count(), flag)))


_any_device = jax.pmap(lambda flag: jax.lax.pmax(flag, _AXIS), axis_name=_AXIS, out_axes=None)


def _positions(tasks, chunk):
  """Places in the meta-batch on this process's devices, (devices, chunks, chunk) int32."""
  devices = jax.local_device_count()
  chunks = math.ceil(tasks / (jax.device_count() * chunk))
  first = jax.process_index() * devices * chunks * chunk
  return np.arange(first, first + devices * chunks * chunk, dtype=np.int32).reshape(devices, chunks, chunk)


@functools.cache
def _mesh():
  return Mesh(np.array(jax.local_devices()), (_AXIS,))

"""Checkpoints that survive being killed while written, and say so when they are damaged."""

import contextlib
import functools
import json
import logging
import shutil
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from metajax.errors import UserError, first_line

KEEP_BEST = 5
_REMOVED = 'removed'  # folder of checkpoints on their way out
_KEEP_LATEST = 2  # the one before the latest too, should the latest turn out damaged


class Checkpoints:
  """The checkpoints of one workdir: the latest two and the best five by validation.

  State is written as host arrays, so a checkpoint does not depend on how many devices there were. Of several processes
  process 0 alone has them.

  Args:
    workdir: folder of the run.
    read_only: change nothing on disk, so that a run may be using the workdir; needs no permission to write, and no
      checkpoints to be there. Only to look and to restore.
  """

  def __init__(self, workdir, read_only=False):
    self.directory, self._read_only = Path(workdir).absolute() / 'checkpoints', read_only
    # Only process 0 has checkpoints: those of others must not be waited for, and then Orbax makes no folder.
    options = {
      'multiprocessing_options': ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
      'create': False,
    }
    if read_only:
      # Lightly: the manager would stop at a damaged score, and at a checkpoint that a run is just removing.
      options |= {'read_only': True, 'save_interval_steps': 0, 'lightweight_initialize': True}
    else:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._clear()
      self._set_unscored_aside()
      options |= {
        'preservation_policy': _LatestAndBest(),
        'best_fn': lambda metrics: metrics['score'],  # never called: it makes the manager keep the metrics
        'cleanup_tmp_directories': True,
        'todelete_subdir': _REMOVED,
      }
    with _without_warnings():
      self._manager = ocp.CheckpointManager(
        self.directory, options=ocp.CheckpointManagerOptions(**options), item_names=('state', 'checksum')
      )

  def save(self, state, score=None, seconds=0.0, records=0):
    """Starts writing a state.

    Args:
      state: NamedTuple of arrays, with its `step`.
      score: of its validation, higher is better; None if there was none.
      seconds: of training so far.
      records: in `metrics.jsonl` so far.
    """
    self._clear()
    state = jax.tree.map(np.array, jax.device_get(state))  # copies: the step reuses the memory of its state
    checksum = {'crc32': {field: _checksum(value) for field, value in state._asdict().items()}}
    with _disk_errors(self.directory):
      self._manager.save(
        int(state.step),
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), checksum=ocp.args.JsonSave(checksum)),
        metrics={'score': None if score is None else float(score), 'seconds': seconds, 'records': records},
      )

  def restore(self, step, like):
    """The state of a step, shaped as the pytree `like`; raises whatever reading a damaged one raises.

    Raises:
      ValueError: it has other arrays, which are named.
    """
    try:
      state = self._restore(step, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like), like._fields)
    except Exception:
      _check_arrays(self._restore(step, None, ()), like)  # fails as well, if it is damaged
      raise
    _check_arrays(state, like)
    return state

  def _restore(self, step, like, fields):
    """The state of a step, of which `fields` are checked; without `like` as nested dicts, lists and NumPy arrays."""
    _pass_over_late_readers()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), checksum=ocp.args.JsonRestore())
    restored = self._manager.restore(step, args=args)
    state = restored.state if like is None else restored.state._asdict()
    for field in fields:
      if _checksum(state[field]) != restored.checksum['crc32'][field]:
        raise ValueError(f'the checksum of its {field} does not match')
    return restored.state

  def restore_first_sound(self, steps, like):
    """The state of the first of `steps` that can be read, and those before it that cannot, {step: why}.

    Raises:
      UserError: there are checkpoints, but none can be read. Starting anew would be a silent loss.
    """
    return self._first_sound(steps, lambda step: self.restore(step, like))

  def restore_validated(self, like):
    """Yields the states of the checkpoints that were validated and can be read, the best first; read one at a time."""
    return self._sound(self.validated_steps(), lambda step: self.restore(step, like), {})

  def best_weights(self):
    """What the best checkpoint that can be read has learned, whatever else is in it.

    The rest of the state, such as the optimiser's, need not be known and may be damaged.

    Returns:
      params, model_state: nested dicts of NumPy arrays (sequences as lists), bit by bit as they were saved.

    Raises:
      UserError: there is no checkpoint, or none can be read.
    """
    if not (steps := self.best_steps()):
      raise UserError(f'{self.directory} holds no checkpoint yet: train first')
    fields = 'params', 'model_state'
    state, _ = self._first_sound(steps, lambda step: self._restore(step, None, fields))
    return tuple(state[field] for field in fields)

  def _first_sound(self, steps, read):
    damaged = {}
    for state in self._sound(steps, read, damaged):
      return state, damaged
    raise UserError(
      f'no checkpoint in {self.directory} can be read (damaged, or of another version of metajax): '
      f'move the folder away to start anew, or choose another --workdir'
    )

  def _sound(self, steps, read, damaged):
    """Yields what `read(step)` returns where it can; the others go into `damaged`, {step: why}."""
    for step in steps:
      try:
        state = read(step)
      except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        damaged[step] = first_line(error)
        print(f'checkpoint {self.directory / str(step)} cannot be read ({damaged[step]}): trying the next')
        continue
      yield state

  def _clear(self):
    """Empties the folder that the manager moves old checkpoints to: one that is half removed is none any more."""
    shutil.rmtree(self.directory / _REMOVED, ignore_errors=True)

  def set_aside(self, steps):
    """Moves damaged checkpoints out of the way, to `damaged_checkpoints`, so that their steps can be saved again."""
    for step in steps:
      self._move_aside(self.directory / str(step))
      self._manager.reload()

  def _set_unscored_aside(self):
    """The manager reads all scores when it starts and stops at one that is damaged: those go first, by name."""
    for folder in sorted(self.directory.glob('[0-9]*')):
      if not folder.name.isdigit():
        continue  # being written when the run was killed: the manager removes it
      try:
        _read_score(folder)
      except _NO_SCORE as error:
        print(f'checkpoint {folder} cannot be read (its score: {first_line(error)}): moved to damaged_checkpoints')
        self._move_aside(folder)

  def _move_aside(self, folder):
    aside = self.directory.parent / 'damaged_checkpoints' / folder.name
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)

  def steps(self):
    """Steps of all checkpoints, the latest first; waits for the one being written."""
    with _disk_errors(self.directory):
      self._manager.wait_until_finished()
    return sorted(self._manager.all_steps(), reverse=True)

  def best_steps(self):
    """Steps of all checkpoints, the best by validation first, those never validated last."""
    return [step for _, step in self._ranks()]

  def validated_steps(self):
    """Steps of the checkpoints that were validated, the best first."""
    return [step for score, step in self._ranks() if score > -np.inf]

  def _ranks(self):
    """(score, step) of all checkpoints, see `_rank`, the best first."""
    ranks = []
    for step in self.steps():
      folder = self.directory / str(step)
      try:
        ranks.append(_rank(_read_score(folder), step))
      except _NO_SCORE as error:  # only where they are not set aside
        if folder.exists():  # else the run has removed it
          print(f'checkpoint {folder} cannot be read (its score: {first_line(error)}): left out')
    return sorted(ranks, reverse=True)

  def seconds(self, step):
    """Seconds of training before a checkpoint; 0 where it does not say, or there is none."""
    return float(self._said(step, 'seconds'))

  def records(self, step):
    """Records in `metrics.jsonl` when a checkpoint was saved; 0 likewise."""
    return int(self._said(step, 'records'))

  def _said(self, step, name):
    try:
      return _read_metrics(self.directory / str(step)).get(name, 0)
    except _NO_SCORE:
      return 0

  def close(self):
    """Waits until everything is on disk."""
    with _disk_errors(self.directory):
      self._manager.close()
    if not self._read_only:
      self._clear()


def _check_arrays(found, wanted):
  if differing := mismatches(found, wanted):
    more = f' and {len(differing) - 4} more' if len(differing) > 4 else ''
    raise ValueError(f'it is of another network or optimiser: {", ".join(differing[:4])}{more}')


def mismatches(found, wanted):
  """What keeps one pytree of arrays from taking the place of another: a phrase for each leaf, by its path."""
  found, wanted = (
    {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape for path, x in jax.tree.leaves_with_path(tree)}
    for tree in (found, wanted)
  )
  both = sorted(found.keys() & wanted.keys())
  return [
    *(f'{name} is {found[name]} instead of {wanted[name]}' for name in both if found[name] != wanted[name]),
    *(f'{name} is missing' for name in sorted(wanted.keys() - found.keys())),
    *(f'{name} has no place' for name in sorted(found.keys() - wanted.keys())),
  ]


class _LatestAndBest:
  """Which checkpoints stay. Orbax's own BestN keeps whatever there is while there are few, validated or not."""

  def should_preserve(self, checkpoints, *, context):
    del context
    latest = [info.step for info in checkpoints][-_KEEP_LATEST:]
    scores = [(info.metrics['score'], info.step) for info in checkpoints if info.metrics]
    best = sorted(_rank(score, step) for score, step in scores if score is not None)[-KEEP_BEST:]
    kept = {*latest, *(step for _, step in best)}
    return [info.step in kept for info in checkpoints]


_NO_SCORE = OSError, ValueError, KeyError, TypeError  # what reading a damaged score raises


def _read_score(folder):
  """The validation score of a checkpoint, None if it was not validated."""
  return _read_metrics(folder)['score']


def _read_metrics(folder):
  return json.loads((folder / 'metrics' / 'metrics').read_text())


def _rank(score, step):
  """What to sort by: validation score, later first among equals; never validated comes last."""
  return (score if score is not None and np.isfinite(score) else -np.inf, step)


def _checksum(tree):
  """Of all leaves, in an order that does not depend on whether a NamedTuple has become a dict."""
  leaves = {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in jax.tree.leaves_with_path(tree)}
  crc = 0
  for name in sorted(leaves):
    crc = zlib.crc32(np.ascontiguousarray(leaves[name]).tobytes(), crc)
  return crc


@contextlib.contextmanager
def _without_warnings():
  """Orbax warns of a folder that is opened read-only, as is meant."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


@functools.cache
def _pass_over_late_readers():
  """Passes over errors of TensorStore's readers that come after the first one has ended Orbax's reading.

  Each of them finds the event loop closed, and Python would print a traceback of it.
  """
  before = sys.unraisablehook

  def hook(unraisable):
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == 'Event loop is closed'):
      before(unraisable)

  sys.unraisablehook = hook


@contextlib.contextmanager
def _disk_errors(folder):
  """Orbax reports a full disk by errors of several kinds, of a save before, at whatever call comes next."""
  try:
    yield
  except (OSError, ValueError) as error:
    if 'RESOURCE_EXHAUSTED' not in str(error) and 'No space left' not in str(error):
      raise
    raise UserError(f'no room for a checkpoint in {folder}: make room, then run the same command again') from error

"""Checkpoints that survive being killed while written, and say so when they are damaged."""

import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from metajax.errors import UserError, first_line

_KEEP_BEST = 5
_KEEP_LATEST = 2  # the one before the latest too, should the latest turn out damaged


class Checkpoints:
  """The checkpoints of one workdir: the latest two and the best five by validation.

  State is written as host arrays, so a checkpoint does not depend on how many devices there were.
  """

  def __init__(self, workdir):
    self.directory = Path(workdir).absolute() / 'checkpoints'
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(_KEEP_LATEST),
        checkpoint_managers.BestN(
          get_metric_fn=_score, n=_KEEP_BEST, keep_checkpoints_without_metrics=False
        ),
      ]
    )
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=('state', 'checksum'))

  def save(self, state, score=None):
    """Starts writing `state`; `score` is its validation score, higher is better, None if there is none."""
    state = jax.tree.map(np.array, jax.device_get(state))  # copies: the step reuses the memory of its state
    self._manager.save(
      int(state.step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), checksum=ocp.args.JsonSave({'crc32': _checksum(state)})
      ),
      metrics=None if score is None else {'score': float(score)},
    )

  def restore(self, step, like):
    """The state of a step, shaped as the pytree `like`; raises whatever reading a damaged one raises."""
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), checksum=ocp.args.JsonRestore())
    restored = self._manager.restore(step, args=args)
    if _checksum(restored.state) != restored.checksum['crc32']:
      raise ValueError('its checksum does not match')
    return restored.state

  def restore_first_sound(self, steps, like):
    """The state of the first of `steps` that can be read, and the steps before it, which cannot.

    Raises:
      UserError: there are checkpoints, but none can be read. Starting anew would be a silent loss.
    """
    damaged = {}
    for step in steps:
      try:
        return self.restore(step, like), damaged
      except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        damaged[step] = first_line(error)
        print(f'checkpoint {self.directory / str(step)} cannot be read ({damaged[step]}): trying the one before it')
    raise UserError(
      f'no checkpoint in {self.directory} can be read (damaged, or of another version of metajax): '
      f'move the folder away to start anew, or choose another --workdir'
    )

  def set_aside(self, steps):
    """Moves damaged checkpoints out of the way, to `damaged_checkpoints`, so that their steps can be saved again."""
    for step in steps:
      aside = self.directory.parent / 'damaged_checkpoints' / str(step)
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      (self.directory / str(step)).rename(aside)
      self._manager.reload()

  def steps(self):
    """Steps of all checkpoints, the latest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def best_steps(self):
    """Steps of all checkpoints, the best by validation first, those never validated last."""
    scores = {step: self._manager.metrics(step) for step in self.steps()}
    return sorted(scores, key=lambda step: (scores[step]['score'] if scores[step] else -np.inf, step), reverse=True)

  def close(self):
    """Waits until everything is on disk."""
    self._manager.close()


def _score(metrics):
  return metrics['score']


def _checksum(state):
  crc = 0
  for leaf in jax.tree.leaves(state):
    crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
  return crc

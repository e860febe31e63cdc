"""A trace of a few meta-updates, for whoever wants to see where their time goes."""

import re
from pathlib import Path

import jax

from metajax.errors import UserError


class Profile:
  """Traces the meta-updates that a config's `profile` names into `WORKDIR/profile`.

  Args:
    setting: 'FIRST:LAST', both included; '' for none.
    total: meta-updates of the run.
    workdir: folder of the run.

  Raises:
    UserError: the setting is something else, or the run does not get that far.
  """

  def __init__(self, setting, total, workdir):
    self._first = self.last = 0
    self._folder = Path(workdir) / 'profile'
    self._running = False
    if not setting:
      return
    match = re.fullmatch(r'(\d+):(\d+)', setting)
    if match:
      self._first, self.last = int(match[1]), int(match[2])
    if not match or not 1 <= self._first <= self.last:
      raise UserError(f'config.profile is FIRST:LAST, meta-updates such as 10:20, not {setting!r}')
    if self.last > total:
      raise UserError(f'config.profile = {setting}, but the last meta-update is config.total_steps = {total}')

  def step(self, number, function, *arguments):
    """Calls `function`; waits for its results only where the trace ends."""
    if not self._first <= number <= self.last:
      return function(*arguments)
    if not self._running:
      jax.block_until_ready(arguments)  # else the trace has the end of the meta-updates before
      jax.profiler.start_trace(self._folder)
      self._running = True
    with jax.profiler.StepTraceAnnotation('meta-update', step_num=number):
      results = function(*arguments)
    if number == self.last:
      jax.block_until_ready(results)
      self.close()
    return results

  def close(self):
    """Writes what has been traced, if that has not been done."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

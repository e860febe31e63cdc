"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

import sys
import time

from tqdm import tqdm

_REMARKABLE = 0.02  # share of the time waiting for data from which on the log says so


class Progress:
  """Progress over `total` meta-updates; `metrics` are those of a recent one.

  Args:
    total: meta-updates of the run.
    start: those that are done.
    tasks: in a meta-batch.
    seconds: that the run has trained before.
  """

  def __init__(self, total, start, tasks, seconds=0.0):
    self._total, self._tasks = total, tasks
    self._since = time.perf_counter(), start
    self._began = self._since[0] - seconds
    self._paused = self._waited = 0.0
    self._shown = {}
    self._bar = None
    if sys.stderr.isatty():
      shape = '{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
      self._bar = tqdm(total=total, initial=start, bar_format=shape, dynamic_ncols=True, smoothing=0.02)

  def update(self, step, metrics):
    """Moves the bar to `step`; smooths what it shows, since one meta-batch is noisy."""
    if self._bar is None:
      return
    for name in ('loss', 'accuracy'):
      if name in metrics:
        value = float(metrics[name])
        self._shown[name] = 0.95 * self._shown.get(name, value) + 0.05 * value
    self._bar.update(step - self._bar.n)
    rate = self._bar.format_dict['rate']
    speed = f', {_rate(rate * self._tasks)} tasks/s' if rate else ''
    self._bar.set_postfix_str(readable(self._shown) + speed, refresh=False)

  def log(self, step, metrics):
    """Shows a line for the log, if there is no bar.

    Returns:
      'time', see `seconds`; since the last call and without pauses 'tasks_per_second' and 'waiting_for_data', the share
      of the time.
    """
    now = time.perf_counter()
    before, start = self._since
    seconds = max(now - before - self._paused, 1e-9)
    rate, waiting = (step - start) / seconds, self._waited / seconds
    self._since, self._paused, self._waited = (now, step), 0.0, 0.0
    if self._bar is None:
      left = tqdm.format_interval((self._total - step) / rate) if rate else '?'
      remark = f', {100 * waiting:.0f} % of the time waiting for data' if waiting > _REMARKABLE else ''
      speed = f'{_rate(rate * self._tasks)} tasks/s'
      self.say(f'step {step}/{self._total}: {readable(metrics)}, {speed}, {left} left{remark}')
    return {'time': self.seconds(), 'tasks_per_second': rate * self._tasks, 'waiting_for_data': waiting}

  def seconds(self):
    """Seconds of training so far, in earlier processes too: compiling the first step counts, pauses do not."""
    return time.perf_counter() - self._began

  def pause(self, seconds):
    """Leaves time spent on something else than training out of the speed and of the time."""
    self._paused += seconds
    self._began += seconds

  def waited(self, seconds):
    """Adds time that the loop has waited for its next batch."""
    self._waited += seconds

  def say(self, line):
    """Prints a line, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr) if self._bar is not None else print(line, flush=True)

  def close(self):
    if self._bar is not None:
      self._bar.close()


def readable(metrics):
  """'loss 0.1234, accuracy 97.10 %', from a dict of numbers with or without their intervals."""
  parts = []
  for name in ('loss', 'accuracy'):
    if name in metrics:
      ci95 = metrics.get(f'{name}_ci95')
      parts.append(f'{name} {_quantity(name, metrics[name])}' + (f' ± {_quantity(name, ci95)}' if ci95 else ''))
  return ', '.join(parts)


def _rate(value):
  """Three significant digits, of large numbers all before the point."""
  return f'{value:.3g}' if value < 999.5 else f'{value:.0f}'


def _quantity(name, value):
  return f'{100 * float(value):.2f} %' if name == 'accuracy' else f'{float(value):.4f}'

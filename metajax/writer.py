"""Metrics on disk: JSON lines that a resumed run continues exactly, and TensorBoard events."""

import json
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import summary as summaries
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from metajax.errors import UserError, first_line, optional
from metajax.files import write_atomically

TIMES = 'time', 'tasks_per_second'  # in records: all that differs between two runs that are otherwise the same
_OF_FIGURES = '.figures'  # how the name of their events file ends


class Events:
  """A TensorBoard events file. Where it cannot be written a line says so once, and nothing more is.

  tensorboardX's own writer has a thread, without which, after an error, whoever adds events waits for ever.

  Args:
    workdir: folder that the file goes to.
    suffix: how its name ends.
  """

  def __init__(self, workdir, suffix=''):
    self._file = None
    self._attempt(lambda: setattr(self, '_file', EventsWriter(str(Path(workdir) / 'events'), suffix)))

  def add(self, step, **content):
    """Adds an event with the fields of `tensorboardX.proto.event_pb2.Event`."""
    if self._file is not None:
      event = event_pb2.Event(step=step, wall_time=time.time(), **content)
      self._attempt(lambda: self._file.write_event(event))

  def flush(self):
    if self._file is not None:
      self._attempt(self._file.flush)

  def close(self):
    if self._file is not None:
      self._attempt(self._file.close)

  def _attempt(self, function):
    try:
      function()
    except OSError as error:
      self._file = None
      print(f'TensorBoard events cannot be written ({error.strerror}): the run goes on without them')


class Writer:
  """Writes `metrics.jsonl` and TensorBoard events of one workdir.

  Whatever lies beyond `step`, the step that the run goes on from, was written by a run that was cut off: it goes, and
  is written again.

  Args:
    workdir: of the run.
    step: see above.
    before: records that there were at that step; if there are fewer now, a line says so.
  """

  def __init__(self, workdir, step, before=0):
    self._path = Path(workdir) / 'metrics.jsonl'
    kept = [record for record in read(workdir) if record['step'] <= step]
    if len(kept) < before:
      print(f'{self._path} has lost {before - len(kept)} of {before} records up to step {step}: curves have a gap')
    self.records = len(kept)
    write_atomically(self._path, ''.join(_line(record) for record in kept))
    self._file = self._path.open('a')
    self._events = Events(workdir)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._events.add(step + 1, session_log=start)  # what TensorBoard has from there on was cut off

  def write(self, step, split, metrics, **times):
    """Adds {'step': step, 'split/name': value, ..., 'time': seconds, ...}.

    Args:
      step: meta-updates so far.
      split: 'train' or 'val'.
      metrics: {name: value}, scalars, and vectors as lists.
      **times: of `TIMES` those that are known, and others for TensorBoard alone.
    """
    metrics = {f'{split}/{name}': np.asarray(value, np.float64).tolist() for name, value in metrics.items()}
    kept = {name: float(f'{times[name]:.6g}') for name in TIMES if name in times}
    self._file.write(_line({'step': step, **metrics, **kept}))
    self.records += 1
    self._file.flush()
    self._event(step, {**metrics, **(times if split == 'train' else {})})

  def _event(self, step, metrics):
    """Adds values to the TensorBoard events."""
    for name, value in metrics.items():
      if isinstance(value, list):
        self._event(step, {f'{name}/{i}': x for i, x in enumerate(value)})
      else:
        self._events.add(step, summary=summaries.scalar(name, value))

  def sync(self):
    """Everything so far is on disk when this returns: to be called before the step's checkpoint is."""
    os.fsync(self._file.fileno())
    self._events.flush()

  def close(self):
    self._file.close()
    self._events.close()


@optional('figures in TensorBoard')
def add_figures(workdir):
  """Puts the PNGs of `figures` into the TensorBoard events, at the last step that was recorded.

  They have an events file of their own, which takes the place of the one before: there is one of each figure, however
  often it is drawn.
  """
  step = max((record['step'] for record in read(workdir)), default=0)
  for path in Path(workdir).glob(f'events.out.tfevents.*{_OF_FIGURES}'):
    path.unlink()
  events = Events(workdir, _OF_FIGURES)
  for path in sorted((Path(workdir) / 'figures').glob('*.png')):
    with Image.open(path) as image:
      pixels = np.asarray(image.convert('RGB'))
    events.add(step, summary=summaries.image(f'figures/{path.stem}', pixels, dataformats='HWC'))
  events.close()


def read(workdir):
  """The records of `metrics.jsonl`; a last line cut off in the middle is left out.

  Raises:
    UserError: a line is no record.
  """
  path = Path(workdir) / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  return [_record(path, number, line) for number, line in enumerate(lines, 1) if line.endswith(b'\n')]


def _record(path, number, line):
  try:
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get('step')) is not int:
      raise ValueError('it is no record of a step')
    return record
  except ValueError as error:
    raise UserError(f'{path} is damaged in line {number} ({first_line(error)}): mend or remove it') from None


def _line(record):
  return json.dumps(record) + '\n'

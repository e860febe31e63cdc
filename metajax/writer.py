"""Metrics on disk: JSON lines that a resumed run continues exactly, and TensorBoard events."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from metajax.errors import UserError, first_line, optional
from metajax.files import write_atomically

TIMES = 'time', 'tasks_per_second'  # in records: all that differs between two runs that are otherwise the same
_OF_FIGURES = '.figures'  # how the name of their events file ends


class Writer:
  """Writes `metrics.jsonl` and TensorBoard events of one workdir.

  Whatever lies beyond `step`, the step that the run goes on from, was written by a run that was cut off: it goes, and
  is written again.
  """

  def __init__(self, workdir, step):
    self._path = Path(workdir) / 'metrics.jsonl'
    kept = [record for record in read(workdir) if record['step'] <= step]
    write_atomically(self._path, ''.join(_line(record) for record in kept))
    self._file = self._path.open('a')
    self._events = SummaryWriter(str(workdir), purge_step=step + 1)

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
    self._file.flush()
    self._event(step, {**metrics, **(times if split == 'train' else {})})

  def _event(self, step, metrics):
    """Adds values to the TensorBoard events."""
    for name, value in metrics.items():
      if isinstance(value, list):
        self._event(step, {f'{name}/{i}': x for i, x in enumerate(value)})
      else:
        self._events.add_scalar(name, value, step)

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
  with SummaryWriter(str(workdir), filename_suffix=_OF_FIGURES) as events:
    for path in sorted((Path(workdir) / 'figures').glob('*.png')):
      with Image.open(path) as image:
        events.add_image(f'figures/{path.stem}', np.asarray(image.convert('RGB')), step, dataformats='HWC')


def read(workdir):
  """The records of `metrics.jsonl`; a last line cut off in the middle is left out."""
  path = Path(workdir) / 'metrics.jsonl'
  try:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('\n')]
  except ValueError as error:
    raise UserError(f'{path} is damaged ({first_line(error)}): mend or remove it') from None


def _line(record):
  return json.dumps(record) + '\n'

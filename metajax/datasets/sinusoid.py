"""Sine waves of random amplitude and phase: the regression tasks of Finn et al. 2017, section 5.1. Embedded."""

import numpy as np

from metajax.data.episodes import Functions


def load(data_dir, *, oracle=False):
  """Tasks y = a sin(x - p), a in [0.1, 5], p in [0, pi], x in [-5, 5], all uniform.

  Args:
    data_dir: not used, the tasks are drawn.
    oracle: inputs are (x, a, p) instead of (x,), for the upper bound that knows the task.

  Returns:
    {split: Functions}; the splits differ by their random numbers.
  """
  del data_dir

  def sample(rng, tasks, points):
    amplitude = rng.uniform(0.1, 5.0, (tasks, 1, 1))
    phase = rng.uniform(0.0, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5.0, 5.0, (tasks, points, 1))
    y = amplitude * np.sin(x - phase)
    inputs = [x, np.broadcast_to(amplitude, x.shape), np.broadcast_to(phase, x.shape)] if oracle else [x]
    return np.concatenate(inputs, axis=-1), y

  return {split: Functions(sample) for split in ('train', 'val', 'test')}

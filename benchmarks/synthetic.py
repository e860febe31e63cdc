"""A data set of random images, for what depends on their number and size alone."""

import os
from pathlib import Path

import numpy as np

from metajax.data.table import ClassTable


def load(data_dir, *, size=28, channels=1, classes=64, images_per_class=600):
  """Makes the table (classes * images_per_class, size, size, channels) in `data_dir` once, and maps it.

  What the page cache holds of the file is dropped, as if the machine had just been started.
  """
  path = Path(data_dir) / f'{classes}x{images_per_class}x{size}x{size}x{channels}.npy'
  if not path.exists():
    images = np.lib.format.open_memmap(path, 'w+', np.uint8, shape=(classes * images_per_class, size, size, channels))
    rng = np.random.default_rng(0)
    for rows in np.split(images, classes):
      rows[:] = rng.integers(0, 256, rows.shape, np.uint8)
    images.flush()
  with path.open('rb') as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  counts = np.full(classes, images_per_class)
  names = tuple(str(k) for k in range(classes))
  images = np.load(path, mmap_mode='r')
  return {'train': ClassTable(images, np.cumsum(counts) - counts, counts, np.zeros(classes, np.int8), names)}

"""A data set of random images, for what depends on their number and size alone."""

import os
from pathlib import Path

import numpy as np

from metajax.data.table import ClassTable


def load(data_dir, *, size=28, channels=1, classes=64, images=38_400):
  """Makes the table (images, size, size, channels) in `data_dir` once, and maps it.

  Images are dealt to the classes evenly. What the page cache holds of the file is dropped, as if the machine had just
  been started.
  """
  path = Path(data_dir) / f'{images}x{size}x{size}x{channels}.npy'
  counts = np.array([len(part) for part in np.array_split(range(images), classes)])
  if not path.exists():
    rng = np.random.default_rng(0)
    header = {'descr': '|u1', 'fortran_order': False, 'shape': (images, size, size, channels)}
    with path.open('wb') as file:  # which, unlike a memory map, may be larger than memory
      np.lib.format.write_array_header_1_0(file, header)
      for count in counts:
        file.write(rng.bytes(int(count) * size * size * channels))
  with path.open('rb') as file:
    os.fsync(file.fileno())
    if hasattr(os, 'posix_fadvise'):  # Linux alone
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  names = tuple(str(k) for k in range(classes))
  rows = np.load(path, mmap_mode='r')
  return {'train': ClassTable(rows, np.cumsum(counts) - counts, counts, np.zeros(classes, np.int8), names)}

"""Converted image tables: what every image data set becomes, once per image size."""

from typing import NamedTuple

import numpy as np


class ClassTable(NamedTuple):
  """The classes of one split and where their images lie.

  Splits of one data set share `images` (usually a read-only memory map), so that one copy on the device serves
  training and evaluation. A class may be a rotated copy of another: it shares that one's rows and has other `turns`.
  """

  images: np.ndarray  # (rows, h, w, c) uint8, all classes of the data set, sorted by class
  starts: np.ndarray  # (classes,) int64, first row of each class of this split
  counts: np.ndarray  # (classes,) int64, images of each class
  turns: np.ndarray  # (classes,) int8, counter-clockwise quarter turns applied to the class's images
  names: tuple[str, ...]  # (classes,)

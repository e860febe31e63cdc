"""Glyphs: an embedded data set of characters that nobody ever wrote, in the manner of Omniglot.

Lake et al. 2015 describe a handwritten character as a few pen strokes that relate to each other, drawn anew by every
hand. Here a class is two to four random strokes and each of its images another hand's attempt at them. No file and no
network is needed, and class k depends on the seed and on k alone, however many classes or images are asked for.
"""

import numpy as np

from metajax.data.table import ClassTable
from metajax.errors import UserError

CONTROLS = 5  # control points of a stroke
DOTS = 40  # points that a stroke is drawn with, up to two pen widths apart
LEVELS = 15  # grey levels above zero: few, so that another machine's last bits seldom change a pixel


def load(data_dir, *, size=28, classes=(400, 100, 100), images_per_class=20, seed=0):
  """Draws the data set; all of it is embedded and `data_dir` is ignored.

  Args:
    data_dir: not used.
    size: height and width of the images in pixels.
    classes: numbers of meta-train, meta-val and meta-test classes.
    images_per_class: drawings of each class.
    seed: another one gives other characters.

  Returns:
    {'train', 'val', 'test'} -> ClassTable; they share images (rows, size, size, 1) uint8, ink 255 on 0.

  Raises:
    UserError: a number is out of range.
  """
  del data_dir
  if len(classes) != 3 or min(*classes, size, images_per_class) < 1 or seed < 0:
    wrong = f'size={size}, classes={tuple(classes)}, images_per_class={images_per_class}, seed={seed}'
    raise UserError(f'glyphs: {wrong}: needs three numbers of classes, all numbers positive and the seed not negative')
  images = np.empty((sum(classes), images_per_class, size, size, 1), np.uint8)
  for k in range(len(images)):
    rng = np.random.default_rng((seed, k))
    images[k, ..., 0] = _draw(*_hands(rng, _character(rng), images_per_class), size)
  images = images.reshape(-1, size, size, 1)

  tables, first = {}, 0
  for split, num in zip(('train', 'val', 'test'), classes, strict=True):
    ids = np.arange(first, first + num, dtype=np.int64)
    names = tuple(f'glyph{k:04d}' for k in ids)
    counts = np.full(num, images_per_class, np.int64)
    tables[split] = ClassTable(images, ids * images_per_class, counts, np.zeros(num, np.int8), names)
    first += num
  return tables


def _character(rng):
  """A class: control points (strokes, CONTROLS, 2) as (x, y), its bounding box centred on 0 with a longer side of 1."""
  strokes = []
  for _ in range(rng.choice([2, 3, 4], p=[0.35, 0.4, 0.25])):
    # A pen that turns evenly draws lines (no bend), arcs and loops (up to most of a circle); waver adds S and Z shapes.
    bend = rng.choice([0.0, rng.uniform(-1.3, 1.3)], p=[0.35, 0.65])
    waver = rng.choice([0.0, 0.8], p=[0.65, 0.35]) * rng.standard_normal(CONTROLS - 1)
    heading = rng.uniform(0, 2 * np.pi) + bend * np.arange(CONTROLS - 1) + waver
    steps = rng.uniform(0.18, 0.36) * np.stack([np.cos(heading), np.sin(heading)], -1)
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
    # Most strokes touch an earlier one, one of their points on one of its points; the others lie anywhere.
    anchor = rng.uniform(-0.4, 0.4, 2)
    if strokes and rng.random() < 0.7:
      anchor = strokes[rng.integers(len(strokes))][rng.integers(CONTROLS)]
    strokes.append(path - path[rng.integers(CONTROLS)] + anchor)
  points = np.stack(strokes)
  low, high = points.min((0, 1)), points.max((0, 1))
  sides = np.maximum(high - low, 1e-3)
  return (points - (low + high) / 2) / np.sqrt(sides * sides.max())  # the root: half way from slim to square


def _hands(rng, character, num):
  """Draws a character by `num` hands.

  Returns control points (num, strokes, CONTROLS, 2) and pen widths (num,), where the image is the unit square.
  """
  noise = rng.standard_normal((num, character.size + 2 * len(character) + 7))  # a row is a hand
  points, places, hand = np.split(noise, [character.size, character.size + 2 * len(character)], axis=1)
  points = character + 0.022 * points.reshape(num, *character.shape) + 0.03 * places.reshape(num, -1, 1, 2)
  turn, shear, stretch, shift, weight = np.split(hand, [1, 2, 4, 6], axis=1)
  cos, sin = np.cos(0.2 * turn), np.sin(0.2 * turn)
  affine = np.stack([np.hstack([cos, 0.15 * shear - sin]), np.hstack([sin, cos])], 1)
  affine *= 0.7 * np.exp(0.12 * stretch[:, :, None])
  points = np.einsum('nij,nspj->nspi', affine, points) + 0.5 + 0.035 * shift[:, None, None]
  return points, 0.023 * np.exp(0.15 * weight[:, 0])


def _draw(strokes, widths, size):
  """Renders control points (n, strokes, CONTROLS, 2) with pens of `widths` (n,): (n, size, size) uint8."""
  curve = SPLINE @ strokes
  dots = ((curve[:, :, 1:] + curve[:, :, :-1]) / 2).reshape(len(strokes), -1, 2)
  lengths = np.linalg.norm(np.diff(curve, axis=2), axis=-1).reshape(len(strokes), -1, 1)
  # A Gaussian along a line adds up to a ridge, exp(-distance^2 / (2 width^2)), whose level 1/2 is the stroke's edge.
  widths = widths[:, None, None]
  x, y = np.moveaxis((dots / (np.sqrt(2) * widths)).astype(np.float32), -1, 0)[..., None]
  centres = ((np.arange(size) + 0.5) / (size * np.sqrt(2) * widths)).astype(np.float32)
  # Squares beyond 20 are cut off: subnormal numbers would take most of the time.
  bumps = [np.exp(-np.minimum(np.square(z - centres), 20)) for z in (x, y)]
  splats = (lengths / (np.sqrt(2 * np.pi) * widths)).astype(np.float32) * bumps[0]
  ridge = np.swapaxes(bumps[1], 1, 2) @ splats
  # The ridge's slope at its edge is 0.59 / width: this makes the edge one pixel wide, or as narrow as the pen allows.
  ink = np.clip((ridge - 0.5) * np.maximum(widths * size / 0.59, 1) + 0.5, 0, 1)
  return (np.rint(ink * LEVELS) * (255 // LEVELS)).astype(np.uint8)


def _spline():
  """Catmull-Rom: (DOTS, CONTROLS) matrix from control points to points on the smooth curve through them."""
  t = np.linspace(0, CONTROLS - 1, DOTS)
  segment = np.minimum(t.astype(int), CONTROLS - 2)
  u = t - segment
  weights = np.stack([-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, u**3 - u**2], 1) / 2
  neighbours = np.clip(segment[:, None] + np.arange(-1, 3), 0, CONTROLS - 1)  # the end points count twice
  return np.einsum('dn,dnc->dc', weights, np.eye(CONTROLS)[neighbours])


SPLINE = _spline()

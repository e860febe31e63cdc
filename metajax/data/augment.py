"""Augmentation and normalisation of images, on the device inside the compiled step.

What the field's code does to each image on the host with torchvision, as pure functions of a random key. Images are
augmented on the scale [0, 1] and normalised afterwards, so the padding of a crop is black whatever the constants are.

`crop`: as RandomCrop(side, padding): zeros around the image, an eighth of its side but at most 8 pixels wide (8 at 84
  pixels, 4 at 32, as in the code of MetaOptNet and what followed it), cut back to its size anywhere, for each image.
`resized_crop`: as RandomResizedCrop(side): a box of 0.08 to 1 of the image's area and an aspect of 3/4 to 4/3, anywhere
  in it, resized to the image's size bilinearly, for each image. Of ten boxes the first that fits the image is taken;
  where none does, which happens to elongated images alone, the first is cut to it (torchvision: a box in the centre).
  Pillow rounds to bytes, this does not.
`flip`: as RandomHorizontalFlip(): left and right change places, in each image with probability 1/2.
`jitter`: as ColorJitter(.4, .4, .4) of tensors: brightness, contrast and saturation times factors from [0.6, 1.4], in
  random order, clipped to [0, 1] after each, for each image. Grey images have no saturation to change.
`rotate`: one of 0 to 3 quarter turns for each class of an episode, its support and query images alike, as in MAML++.
"""

import jax
import jax.numpy as jnp
import numpy as np

from metajax import keys
from metajax.errors import UserError

# Mean and standard deviation on the scale [0, 1], one number or one for each of red, green and blue.
NORMALIZE = {
  # Torchmeta, pytorch-maml, MTM's MAML half, Meta-Transfer Learning in TensorFlow; r2d2, whose constants are not used.
  'none': ((0.0,), (1.0,)),
  # learn2learn's mini-ImageNet: bytes as they are, 0 to 255.
  'bytes': ((0.0,), (1 / 255,)),
  # MAML++ on mini-ImageNet.
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  # MAML++ on Omniglot: ink 0 on paper 1, where our tables hold ink 255 on 0.
  'mamlpp_omniglot': ((1.0,), (-1.0,)),
  # mini- and tiered-ImageNet in MetaOptNet, RFS (transform A), learn2learn and BMTL (`lee2019`), MTM's ProtoNet half.
  'metaoptnet_mini': (
    (120.39586422 / 255, 115.59361427 / 255, 104.54012653 / 255),
    (70.68188272 / 255, 68.27635443 / 255, 72.54505529 / 255),
  ),
  # CIFAR-FS and FC100 in MetaOptNet and MTM's ProtoNet half; the latter's test script has them for every data set.
  'metaoptnet_cifar': (
    (129.37731888 / 255, 124.10583864 / 255, 112.47758569 / 255),
    (68.20947949 / 255, 65.43124043 / 255, 70.45866994 / 255),
  ),
  # CIFAR-FS and FC100 in RFS (transform D) and BMTL (`lee2019` and `normalize`).
  'rfs_cifar': ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
  # Meta-Transfer Learning in PyTorch, every data set; RFS on mini-ImageNet (transforms B and C).
  'mtl': ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
}
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R 601, as in Pillow and torchvision
_JITTER = 0.4
_AREA, _ASPECT, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of resized crops


def check(shape, dtype, names, constants):
  """Looks whether inputs of a shape can be augmented and normalised like that.

  Args:
    shape: of an image, (h, w, c); inputs of another rank can only stay as they are.
    dtype: of the images; floats can only stay as they are.
    names: of augmentations, in the order in which they are applied.
    constants: a name in NORMALIZE.

  Raises:
    UserError: they cannot.
  """
  if len(shape) != 3 or dtype != np.uint8:
    if names or constants != 'none':
      raise UserError(
        f'config.data: inputs {dtype} {shape} are not images (h, w, c) of uint8: leave out augment and normalize'
      )
    return
  height, width, channels = shape
  for name in names:
    if name not in AUGMENTATIONS:
      raise UserError(f'augment = {names}: there is no {name!r}; known: {", ".join(AUGMENTATIONS)}')
    if names.count(name) > 1:
      raise UserError(f'augment = {names}: {name} is there more than once')
  if 'rotate' in names and height != width:
    raise UserError(f'augment = {names}: images of {height} x {width} pixels are not square, leave rotate out')
  if 'jitter' in names and channels not in (1, 3):
    raise UserError(f'augment = {names}: images of {channels} channels are neither grey nor RGB, leave jitter out')
  if constants not in NORMALIZE:
    raise UserError(f'config.data.normalize = {constants!r}: there is no such name; known: {", ".join(NORMALIZE)}')
  if len(NORMALIZE[constants][0]) not in (1, channels):
    scalars = ', '.join(name for name, (mean, _) in NORMALIZE.items() if len(mean) == 1)
    raise UserError(
      f'config.data.normalize = {constants!r} is of RGB images, these have {channels} channel(s): choose of {scalars}'
    )


def seeds(seed, start, count):
  """What the host sends of `count` episodes from number `start` on: (count, 3) uint32, the seed and their numbers."""
  words = np.broadcast_to(keys.words(seed), (count, 2))
  return np.column_stack([words, np.arange(start, start + count, dtype=np.uint32)])


def rng(seeds, split):
  """The key of one episode of a split (its index), from its row of `seeds`."""
  # Training folds the numbers of its steps, from 0 on, into the same seed: splits count down from the other end.
  key = jax.random.fold_in(keys.from_words(seeds[:2]), np.uint32(2**32 - 1 - split))
  return jax.random.fold_in(key, seeds[2])


def augment(rng, images, names):
  """Augments the images of one episode.

  Args:
    rng: a key.
    images: (way, n, h, w, c) uint8.
    names: of augmentations, in the order in which they are applied.

  Returns:
    (way, n, h, w, c) float32 in [0, 1].
  """
  rngs = dict(zip(names, jax.random.split(rng, len(names)), strict=True))
  # Jitter treats all pixels of an image alike, so flips and turns after it may as well come before, where they move
  # bytes and are one with the crop. A crop after it adds black pixels, which the mean before it does not know, or takes
  # away others, which it does.
  after = names[names.index('jitter') + 1 :] if 'jitter' in names else ()
  late = after if 'crop' in after or 'resized_crop' in after else ()
  images = _move(images, [(name, rngs[name]) for name in names if name not in ('jitter', *late)])
  if images.dtype == jnp.float32:
    # Resized: XLA would make each pixel anew for whoever looks at it (jitter does many times), but for a loop between.
    images = jax.lax.map(lambda of_class: of_class / 255, images)
  else:
    images = images.astype(jnp.float32) / 255
  if 'jitter' in names:
    images = jitter(images, *_draw_jitter(rngs['jitter'], images.shape))
  return _move(images, [(name, rngs[name]) for name in late])


def jitter(images, factors, order):
  """Changes brightness (0), contrast (1) and saturation (2) of images, clipping to [0, 1] after each.

  Args:
    images: (..., h, w, c) in [0, 1].
    factors: (..., k), those of brightness, contrast and saturation.
    order: (..., k) a permutation of them: 0, 1, 2 for RGB images; 0, 1 for grey ones, of which a pixel is its own grey.

  Returns:
    images (..., h, w, c) in [0, 1].
  """
  factors = jnp.take_along_axis(factors, order, axis=-1)[..., None, None, None, :]
  order = order[..., None, None, None, :]
  for k in range(order.shape[-1]):
    grey = _grey(images)
    # All three blend the image with another: black, the mean of its grey image, its grey image.
    mean = grey.mean((-3, -2, -1), keepdims=True)
    other = jnp.where(order[..., k] == 0, 0.0, jnp.where(order[..., k] == 1, mean, grey))
    images = jnp.clip(factors[..., k] * images + (1 - factors[..., k]) * other, 0, 1)
  return images


def normalize(images, constants):
  """Images (..., c) on the scale [0, 1], minus mean and over standard deviation of a name in NORMALIZE."""
  if constants == 'none':
    return images
  mean, std = (np.array(values).reshape((1,) * (images.ndim - 1) + (-1,)) for values in NORMALIZE[constants])
  return (images - np.float32(mean)) * np.float32(1 / std)


def _move(images, moves):
  """Moves and resizes, all at once: images (way, n, h, w, c), moves [(name, rng)]; zeros come in from outside."""
  if not moves:
    return images
  way, n, height, width, _ = images.shape
  c, i = jnp.arange(way).reshape(-1, 1, 1, 1), jnp.arange(n).reshape(1, -1, 1, 1)

  # An image is a function of places y and x, integers that broadcast with (way, n, h, w), that returns their pixels,
  # (..., c). Each move asks the image before it, so there are no images in between.
  def image(y, x):
    return images.at[c, i, y, x].get(mode='promise_in_bounds')

  for name, rng in moves:
    if name == 'resized_crop':
      image = _resized(image, _draw_boxes(rng, images.shape), height, width)
    else:
      before = _with_zeros_around(image, height, width) if name == 'crop' else image  # the others stay inside
      image = _moved(before, _MOVES[name], rng, images.shape)
  return image(jnp.arange(height).reshape(1, 1, -1, 1), jnp.arange(width).reshape(1, 1, 1, -1))


def _with_zeros_around(image, height, width):
  def look_up(y, x):
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return jnp.where(inside[..., None], image(jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)), 0)

  return look_up


def _moved(image, move, rng, shape):
  return lambda y, x: image(*move(rng, shape, y, x))


def _resized(image, boxes, height, width):
  """A box of an image at the whole image's size: the pixel centres of both lie on the same lines, ends are held."""
  top, left, box_height, box_width = (x[..., None, None] for x in boxes)

  def neighbours(place, start, length, side):
    place = start + jnp.clip((place + 0.5) * length / side - 0.5, 0, length - 1)
    before = jnp.floor(place).astype(jnp.int32)
    return before, jnp.minimum(before + 1, start + length - 1), (place - before)[..., None]

  def look_up(y, x):
    y0, y1, down = neighbours(y, top, box_height, height)
    x0, x1, right = neighbours(x, left, box_width, width)
    corners = (image(y, x).astype(jnp.float32) for y in (y0, y1) for x in (x0, x1))
    upper_left, upper_right, lower_left, lower_right = corners
    upper = upper_left + right * (upper_right - upper_left)
    lower = lower_left + right * (lower_right - lower_left)
    return upper + down * (lower - upper)

  return look_up


def _draw_boxes(rng, shape):
  """Top, left, height and width in pixels of a resized crop of each image of a shape (way, n, h, w, c): (way, n)."""
  way, n, *sides, _ = shape
  rng_area, rng_aspect, *rngs = jax.random.split(rng, 4)
  area = np.prod(sides) * jax.random.uniform(rng_area, (way, n, _TRIES), minval=_AREA[0], maxval=_AREA[1])
  low, high = np.log(_ASPECT)
  aspect = jnp.exp(jax.random.uniform(rng_aspect, (way, n, _TRIES), minval=low, maxval=high))
  lengths = [jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area / aspect, area * aspect)]
  fits = (lengths[0] <= sides[0]) & (lengths[1] <= sides[1])
  first = jnp.argmax(fits, axis=-1, keepdims=True)  # 0 where there is none
  lengths = [jnp.take_along_axis(x, first, axis=-1)[..., 0] for x in lengths]
  lengths = [jnp.clip(x, 1, side) for x, side in zip(lengths, sides, strict=True)]
  starts = (jax.random.randint(k, (way, n), 0, s - x + 1) for k, s, x in zip(rngs, sides, lengths, strict=True))
  return *starts, *lengths


def _crop(rng, shape, y, x):
  way, n, *sides, _ = shape
  pads = [min(8, side // 8) for side in sides]
  dy, dx = (jax.random.randint(k, (way, n, 1, 1), -p, p + 1) for k, p in zip(jax.random.split(rng), pads, strict=True))
  return y + dy, x + dx


def _flip(rng, shape, y, x):
  way, n, _, width, _ = shape
  return y, jnp.where(jax.random.bernoulli(rng, 0.5, (way, n, 1, 1)), width - 1 - x, x)


def _rotate(rng, shape, y, x):
  turns, last = jax.random.randint(rng, (shape[0], 1, 1, 1), 0, 4), shape[2] - 1
  turns = [turns == k for k in range(4)]
  return jnp.select(turns, [y, x, last - y, last - x]), jnp.select(turns, [x, last - y, last - x, y])


def _draw_jitter(rng, shape):
  """Factors and orders for images of a shape (way, n, h, w, c): each (way, n, k), of grey images k = 2, of others 3."""
  rng_factor, rng_order = jax.random.split(rng)
  shape = (*shape[:2], 2 if shape[-1] == 1 else 3)
  factors = jax.random.uniform(rng_factor, shape, minval=1 - _JITTER, maxval=1 + _JITTER)
  return factors, jnp.argsort(jax.random.uniform(rng_order, shape), axis=-1)


def _grey(images):
  if images.shape[-1] == 1:
    return images
  return sum(weight * images[..., k : k + 1] for k, weight in enumerate(_GREY))


_MOVES = {'crop': _crop, 'flip': _flip, 'rotate': _rotate}
AUGMENTATIONS = ('crop', 'flip', 'jitter', 'resized_crop', 'rotate')

"""Few-shot episodes: which images make up episode number k, and how they become arrays on the device.

Episode k of a split is a pure function of (seed, split, k): the same after a restart, on any number of devices, for
every algorithm. The host does index arithmetic alone; gathering, rotating, augmenting and scaling run inside the
compiled step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.data import augment as augmentation
from metajax.data.table import ClassTable, gather
from metajax.errors import UserError
from metajax.types import Episode, Examples

SPLITS = ('train', 'val', 'test')
_BLOCK = 256  # episodes drawn by one random generator: NumPy's cost per call is spread over them


class Functions(NamedTuple):
  """A family of regression tasks in place of a table of images."""

  sample: Callable  # (rng, tasks, points) -> inputs (tasks, points, d), targets (tasks, points, 1)


class Source(NamedTuple):
  """Where the loop's batches come from: the host draws numbers, the device makes episodes of them."""

  sample: Callable  # (first episode's number, count) -> batch, a pytree of NumPy arrays with a leading task axis
  decode: Callable  # (resident, batch) -> Episode with a leading task axis; pure, called inside the compiled step
  resident: Any  # what `decode` needs on the device in every step (the image table), put there once; or ()
  num_classes: int  # 0 in regression


def choose(uniform, n):
  """Draws k of n without replacement, in random order: a Fisher-Yates shuffle cut off after k steps.

  Args:
    uniform: (..., k) in [0, 1), independent.
    n: (...,) integers >= k.

  Returns:
    (..., k) int64, distinct along the last axis, every ordered choice equally likely.
  """
  k = uniform.shape[-1]
  first = np.arange(k)
  swaps = first + (uniform * (n[..., None] - first)).astype(np.int64)
  chosen = swaps.copy()
  for i in range(1, k):
    # What lies at position `swaps[i]` by now: if an earlier step t swapped it away, what lay at t before that step.
    position = chosen[..., i]
    for t in range(i - 1, -1, -1):
      position = np.where(swaps[..., t] == position, t, position)
    chosen[..., i] = position
  return chosen


def _by_block(draw):
  """Turns `draw(block)`, a dict of arrays with a leading axis of _BLOCK episodes, into `sample(start, count)`."""
  draw = functools.lru_cache(maxsize=2)(draw)

  def sample(start, count):
    parts = []
    for block in range(start // _BLOCK, (start + count - 1) // _BLOCK + 1):
      first = block * _BLOCK
      rows = slice(max(start - first, 0), min(start + count - first, _BLOCK))
      parts.append({name: array[rows] for name, array in draw(block).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  return sample


def image_source(
  table: ClassTable, split, *, way, shot, query_shot, seed, placement='device', augment=(), normalize='none'
):
  """Classification episodes from the classes of one split.

  Classes are drawn without replacement and their order is the labels' order, so labels are permuted in every episode;
  images of a class are drawn without replacement, the first `shot` for support, the others for query.

  Args:
    table: the split's classes.
    split: 'train', 'val' or 'test'; part of the random seed.
    way, shot, query_shot: classes, support and query images per class.
    seed: of the episodes.
    placement: 'device' keeps the whole uint8 table there and sends indices; 'host' gathers images ahead of the step.
    augment: names of augmentations, see `metajax.data.augment`; those of an episode are part of it, so a function of
      (seed, split, k) as well.
    normalize: a name in `augment.NORMALIZE`.

  Raises:
    UserError: the split has too few classes, a class too few images, or the images cannot be augmented or normalised
      like that.
  """
  classes, images = len(table.names), shot + query_shot
  where = 'config.data' if split == 'train' else 'config.eval'
  if way > classes:
    raise UserError(f'way = {way}, but the {split} split has only {classes} classes: choose a smaller {where}.way')
  if (table.counts < images).any():
    c = int(table.counts.argmin())
    raise UserError(
      f'shot + query_shot = {images}, but class {table.names[c]} of the {split} split has only '
      f'{table.counts[c]} images: choose a smaller {where}.shot or query_shot'
    )
  prepare, load = _loader(table, split, seed, placement, augment, normalize)

  @_by_block
  def draw(block):
    rng = np.random.default_rng((seed, SPLITS.index(split), block))
    uniform = rng.random((_BLOCK, way * (1 + images)))
    class_ids = choose(uniform[:, :way], np.full(_BLOCK, classes))
    picks = choose(uniform[:, way:].reshape(_BLOCK, way, images), table.counts[class_ids])
    rows = table.starts[class_ids][..., None] + picks
    return {'rows': rows.astype(np.int32), 'class_ids': class_ids.astype(np.int32), 'turns': table.turns[class_ids]}

  def sample(start, count):
    return prepare(draw(start, count), start, count)

  def decode(resident, batch):
    images = load(resident, batch)
    targets = jnp.broadcast_to(jnp.arange(way, dtype=jnp.int32)[:, None], images.shape[:3])

    def flat(x):
      return x.reshape(x.shape[0], -1, *x.shape[3:])

    return Episode(
      support=Examples(flat(images[:, :, :shot]), flat(targets[:, :, :shot])),
      query=Examples(flat(images[:, :, shot:]), flat(targets[:, :, shot:])),
      class_ids=batch['class_ids'],
    )

  return Source(sample, decode, table.images if placement == 'device' else (), classes)


def batch_source(table: ClassTable, split, *, batch, seed, placement='device', augment=(), normalize='none'):
  """Batches of images of all classes, for learners that know no episodes.

  In every epoch each image comes once, in a new random order; a batch may end one epoch and begin the next. Batch k is
  a function of (seed, split, k), like an episode, and has the form of one: of all classes in their order, without
  support, its images are the queries and their targets the classes.

  Args:
    batch: images.
    (others as in `image_source`)

  Raises:
    UserError: the images cannot be augmented or normalised like that.
  """
  if 'rotate' in augment:
    raise UserError(
      f'config.data.augment = {augment}: rotate turns the classes of an episode, and batches know none; leave it out'
    )
  prepare, load = _loader(table, split, seed, placement, augment, normalize)
  classes, ends = len(table.names), np.cumsum(table.counts)

  @functools.lru_cache(maxsize=2)
  def order(epoch):
    return np.random.default_rng((seed, SPLITS.index(split), epoch, 1)).permutation(ends[-1])

  def sample(start, count):
    positions = np.arange(start * batch, (start + count) * batch)
    epochs, positions = np.divmod(positions, ends[-1])
    chosen = np.concatenate([order(epoch)[positions[epochs == epoch]] for epoch in np.unique(epochs)])
    class_ids = np.searchsorted(ends, chosen, side='right').reshape(count, batch)
    rows = table.starts[class_ids] + chosen.reshape(count, batch) - (ends - table.counts)[class_ids]
    drawn = {'rows': rows[..., None].astype(np.int32), 'turns': table.turns[class_ids]}
    return {**prepare(drawn, start, count), 'targets': class_ids.astype(np.int32)}

  def decode(resident, batch):
    images, targets = load(resident, batch)[:, :, 0], batch['targets']
    return Episode(
      support=Examples(images[:, :0], targets[:, :0]),
      query=Examples(images, targets),
      class_ids=jnp.broadcast_to(jnp.arange(classes, dtype=jnp.int32), (len(targets), classes)),
    )

  return Source(sample, decode, table.images if placement == 'device' else (), classes)


def _loader(table, split, seed, placement, augment, normalize):
  """How rows of a table become images: what the host does to a batch, and what the device does.

  Arguments as in `image_source`.

  Returns:
    prepare: (batch with 'rows' (count, classes, n) and 'turns' (count, classes), first number, count) -> batch.
    load: (resident, batch) -> images (count, classes, n, ...) float32.
  """
  augmentation.check(table.images.shape[1:], table.images.dtype, augment, normalize)
  rotated, scale = bool(table.turns.any()), 255 if table.images.dtype == np.uint8 else 1

  def prepare(batch, start, count):
    if placement == 'host':
      batch['images'] = gather(table.images, batch.pop('rows'))
    if augment:
      batch['seeds'] = augmentation.seeds(seed, start, count)
    return batch

  def augment_one(seeds, images):
    return augmentation.augment(augmentation.rng(seeds, SPLITS.index(split)), images, augment)

  def load(resident, batch):
    images = batch['images'] if placement == 'host' else resident[batch['rows']]
    if rotated:
      images = jax.vmap(jax.vmap(_turn))(images, batch['turns'])
    images = jax.vmap(augment_one)(batch['seeds'], images) if augment else images.astype(jnp.float32) / scale
    return augmentation.normalize(images, normalize)

  return prepare, load


def _turn(images, turns):
  """Rotates images (n, h, w, c) counter-clockwise by `turns` (scalar) quarter turns."""
  return jnp.stack([jnp.rot90(images, k, axes=(1, 2)) for k in range(4)])[turns]


def function_source(functions: Functions, split, *, shot, query_shot, seed):
  """Regression episodes: each task a function, `shot` points of it for support and `query_shot` for query."""

  @_by_block
  def draw(block):
    rng = np.random.default_rng((seed, SPLITS.index(split), block))
    inputs, targets = functions.sample(rng, _BLOCK, shot + query_shot)
    return {'inputs': inputs.astype(np.float32), 'targets': targets.astype(np.float32)}

  def decode(resident, batch):
    del resident
    inputs, targets = batch['inputs'], batch['targets']
    return Episode(
      support=Examples(inputs[:, :shot], targets[:, :shot]),
      query=Examples(inputs[:, shot:], targets[:, shot:]),
      class_ids=jnp.zeros((inputs.shape[0], 0), jnp.int32),
    )

  return Source(draw, decode, (), 0)


def grouped(source, group):
  """The same episodes, `group` after one another at a time: batches and episodes have a second axis of them."""
  if group == 1:
    return source

  def sample(start, count):
    batch = source.sample(start * group, count * group)
    return jax.tree.map(lambda x: x.reshape(count, group, *x.shape[1:]), batch)

  def decode(resident, batch):
    episodes = source.decode(resident, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch))
    return jax.tree.map(lambda x: x.reshape(len(x) // group, group, *x.shape[1:]), episodes)

  return source._replace(sample=sample, decode=decode)


def make_source(
  data, split, *, way, shot, query_shot, seed, merged=False, batch=0, placement='auto', augment=(), normalize='none'
):
  """Episodes of one split, from a table of images or from functions.

  Args:
    merged: whether the support images are queries too, and there is no support set.
    batch: images of a batch of all classes, see `batch_source`; 0 for episodes.
    (others as in `image_source` and `function_source`)

  Raises:
    UserError: a setting does not fit the data.
  """
  for name, value in (('shot', shot), ('query_shot', query_shot)):
    if value < 1:
      raise UserError(f'{name} = {value}: at least 1 is needed')
  if merged:
    shot, query_shot = 0, shot + query_shot
  if isinstance(data, Functions):
    if augment or batch or normalize != 'none':
      raise UserError('config.data: regression has no images: leave augment = (), batch = 0 and normalize = none')
    return function_source(data, split, shot=shot, query_shot=query_shot, seed=seed)
  if way is None or way < 2:
    raise UserError(f'way = {way}: classification needs at least 2 classes')
  if placement == 'auto':
    placement = place(data.images)
  if placement not in ('device', 'host'):
    raise UserError(f"config.data.placement is 'auto', 'device' or 'host', not {placement!r}")
  images = dict(seed=seed, placement=placement, augment=augment, normalize=normalize)
  if batch:
    return batch_source(data, split, batch=batch, **images)
  return image_source(data, split, way=way, shot=shot, query_shot=query_shot, **images)


def place(images, budget=None):
  """Where a table lies: on the 'device' if it takes at most `budget` bytes there, else on the 'host'.

  The budget is a quarter of the device's memory by default, 2 GiB where it does not say.
  """
  if budget is None:
    stats = jax.local_devices()[0].memory_stats() or {}
    budget = stats.get('bytes_limit', 8 << 30) // 4
  return 'device' if images.nbytes <= budget else 'host'

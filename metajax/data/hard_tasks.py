"""Hard tasks: episodes of the classes that the learner did worst on.

Meta-Transfer Learning (Sun et al. 2019, Algorithms 1 and 2): in some meta-updates on random tasks, of each task the
class of the lowest query accuracy is collected; some on tasks of these classes follow, with new images of them; then
the collection is emptied and all begins again. What the paper leaves open is decided here:

- Tasks of fewer collected classes than `way` are filled up with random classes of the split.
- Of classes of equal accuracy the one with the greater loss is collected.
- A meta-update is of as many tasks as there are in a meta-batch; of one each, as Algorithm 1 reads, with tasks = 1.
- Accuracies are of the queries after adaptation, before the meta-update.

What was collected is part of the training state, so a resumed run is the run that was never stopped. The device draws
hard tasks itself: the host, which is ahead of it, cannot know their classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.errors import UserError


class HardTasks(NamedTuple):
  """When tasks are hard, and of which classes."""

  init: Callable  # () -> collected classes (random_updates * tasks,) int32, -1 where there is none
  redraw: Callable  # (collected, step, batch, rngs) -> batch, drawn anew if `step` is one of hard tasks
  collect: Callable  # (collected, step, classes, correct, losses) -> collected; the last three (tasks, query)


def make(table, *, way, images, tasks, random_updates, hard_updates):
  """Hard tasks of a split.

  Args:
    table: its ClassTable, whose images are on the device.
    way: classes of an episode.
    images: of each class in it, support and query together.
    tasks: in a meta-batch.
    random_updates: meta-updates on random tasks, whose classes are collected.
    hard_updates: meta-updates on hard tasks that follow them.

  Raises:
    UserError: `random_updates` is less than 1.
  """
  if random_updates < 1:
    raise UserError(f'config.data.random_updates = {random_updates}: hard tasks need at least 1 before them')
  size, cycle = random_updates * tasks, random_updates + hard_updates
  classes, most = len(table.counts), int(table.counts.max())
  starts, counts, turns = table.starts.astype(np.int32), table.counts.astype(np.int32), table.turns

  def init():
    return jnp.full(size, -1, jnp.int32)

  def draw(collected, rng):
    """Of one episode: class_ids (way,), rows (way, images), turns (way,)."""
    rng_class, rng_label, rng_image = jax.random.split(rng, 3)
    # The collected classes in a random order, then the others; labels are of neither first.
    late = jnp.ones(classes).at[jnp.where(collected < 0, classes, collected)].set(0, mode='drop')
    class_ids = jnp.argsort(late + jax.random.uniform(rng_class, (classes,)))[:way].astype(jnp.int32)
    class_ids = jax.random.permutation(rng_label, class_ids)
    order = jax.random.uniform(rng_image, (way, most)) + (np.arange(most) >= jnp.asarray(counts)[class_ids, None])
    picks = jax.lax.top_k(-order, images)[1]
    rows = jnp.asarray(starts)[class_ids, None] + picks
    return {'class_ids': class_ids, 'rows': rows, 'turns': jnp.asarray(turns)[class_ids]}

  def redraw(collected, step, batch, rngs):
    def hard(batch):
      return {**batch, **jax.vmap(draw, (None, 0))(collected, rngs)}

    return jax.lax.cond(step % cycle < random_updates, lambda batch: batch, hard, batch)

  def collect(collected, step, classes, correct, losses):
    same = classes[:, :, None] == classes[:, None]

    def of_class(values):  # the mean over the queries of the same class
      return jnp.sum(same * values[:, None], axis=-1) / jnp.sum(same, axis=-1)

    losses = of_class(jnp.broadcast_to(losses, correct.shape))
    rank = jnp.lexsort((-losses, of_class(correct)), axis=-1)[:, :1]
    worst = jnp.take_along_axis(classes, rank, axis=-1)[:, 0]
    position = step % cycle
    added = jax.lax.dynamic_update_slice(collected, worst, (position * tasks,))
    return jnp.where(position == cycle - 1, -1, jnp.where(position < random_updates, added, collected))

  return HardTasks(init, redraw, collect)

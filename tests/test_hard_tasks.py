"""Hard tasks: which classes are collected, what is drawn of them, and when the collection is emptied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import main, train, workdir
from metajax.checkpoint import Checkpoints
from metajax.data import hard_tasks
from metajax.data.table import ClassTable
from metajax.errors import UserError
from tests.conftest import TINY, records_of

COUNTS = np.array([5, 4, 6, 4, 5, 7, 4])
STARTS = np.cumsum(COUNTS) - COUNTS
TURNS = np.array([0, 1, 2, 3, 0, 1, 2], np.int8)
TABLE = ClassTable(np.zeros((COUNTS.sum(), 1, 1, 1), np.uint8), STARTS, COUNTS, TURNS, tuple('abcdefg'))


def make(tasks=2, way=3, images=4, random_updates=2, hard_updates=3):
  return hard_tasks.make(
    TABLE, way=way, images=images, tasks=tasks, random_updates=random_updates, hard_updates=hard_updates
  )


def test_the_class_of_the_lowest_accuracy_is_collected_from_each_task_and_all_are_forgotten_in_the_end():
  hard = make()
  classes = np.array([[4, 4, 4, 0, 0, 0, 6, 6, 6], [1, 1, 1, 2, 2, 2, 3, 3, 3]])
  correct = np.array([[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0, 1, 1, 0]], np.float32)
  losses = np.array([[9, 9, 9, 1, 1, 1, 0, 0, 0], [0.3, 0.3, 0.3, 0.3, 0.3, 0.4, 9, 9, 9]], np.float32)
  collect = jax.jit(hard.collect)
  found = hard.init()
  assert found.tolist() == [-1] * 4
  found = collect(found, 0, classes, correct, losses)
  assert found.tolist() == [0, 2, -1, -1]  # 2 and 1 are equal, 2 has the greater loss
  found = collect(found, 1, classes[::-1], correct[::-1], losses[::-1])
  assert found.tolist() == [0, 2, 2, 0]
  for step in (2, 3):
    assert collect(found, step, classes, 1 - correct, losses).tolist() == [0, 2, 2, 0]  # of hard tasks none is
  assert collect(found, 4, classes, correct, losses).tolist() == [-1] * 4
  assert collect(hard.init(), 5, classes, correct, losses).tolist() == [0, 2, -1, -1]


def redrawn(hard, collected, step, tasks=300):
  batch = {
    'class_ids': np.zeros((tasks, 3), np.int32),
    'rows': np.zeros((tasks, 3, 4), np.int32),
    'turns': np.zeros((tasks, 3), np.int8),
  }
  rngs = jax.random.split(jax.random.key(step), tasks)
  return batch, jax.device_get(jax.jit(hard.redraw)(jnp.array(collected), step, batch, rngs))


def test_hard_tasks_are_of_the_collected_classes_with_images_that_are_theirs_and_differ():
  hard = make()
  _, batch = redrawn(hard, [5, 1, 6, 1], step=2)
  ids = batch['class_ids']
  assert set(map(tuple, np.sort(ids).tolist())) == {(1, 5, 6)}
  assert len(set(map(tuple, ids.tolist()))) == 6  # in every order
  np.testing.assert_array_equal(batch['turns'], TURNS[ids])
  picks = batch['rows'] - STARTS[ids][..., None]
  assert picks.min() == 0 and (picks < COUNTS[ids][..., None]).all()
  assert (np.diff(np.sort(picks), axis=-1) > 0).all()
  assert len(set(map(tuple, picks[ids == 5].tolist()))) > 200  # 300 of 840 orders
  for position in range(4):
    assert set(picks[ids == 5][:, position]) == set(range(7))


def test_too_few_collected_classes_are_filled_up_with_random_ones():
  _, batch = redrawn(make(), [5, -1, 5, 2], step=7)
  ids = batch['class_ids']
  assert ((ids == 5).sum(1) == 1).all() and ((ids == 2).sum(1) == 1).all()
  assert set(ids.ravel()) == set(range(7)) and all(len(set(row)) == 3 for row in ids.tolist())


@pytest.mark.parametrize('step', [0, 1, 5, 6])
def test_random_tasks_stay_as_the_host_drew_them(step):
  before, after = redrawn(make(), [5, 1, 6, 1], step, tasks=5)
  jax.tree.map(np.testing.assert_array_equal, before, after)


def run(folder, *arguments):
  small = '--config.model.name=mlp', '--config.model.hidden=(4,)', '--config.eval.val_episodes=4', '--mode=train'
  hard = '--config.data.hard_updates=2', '--config.data.random_updates=3'
  return main.main(['metajax', f'--config={TINY}', f'--workdir={folder}', *small, *hard, *arguments])


def test_a_run_collects_as_a_loop_would_and_a_resumed_one_is_the_same_to_the_bit(cache, tmp_path):
  """Stopped between random tasks and the hard ones that they lead to."""
  assert run(tmp_path / 'whole', '--config.total_steps=8') == 0
  assert run(tmp_path / 'parts', '--config.total_steps=4') == 0
  assert run(tmp_path / 'parts', '--config.total_steps=8') == 0
  records = [[r for r in records_of(tmp_path / name) if 'train/loss' in r] for name in ('whole', 'parts')]
  assert records[0] == records[1]
  config = workdir.read_config(tmp_path / 'whole')
  like = train.init_state(experiment_lib.make(config, None), 0)
  whole, parts = (Checkpoints(tmp_path / name, read_only=True).restore(8, like) for name in ('whole', 'parts'))
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  at_4 = Checkpoints(tmp_path / 'whole', read_only=True).restore(6, like)
  assert (whole.hard >= 0).all() and at_4.hard.tolist()[2:] == [-1] * 4 and (at_4.hard[:2] == whole.hard[:2]).all()


def test_the_host_cannot_draw_them(cache, tmp_path, capsys):
  assert run(tmp_path / 'run', '--config.data.placement=host') == 2
  assert 'config.data.hard_updates: the device draws hard tasks' in capsys.readouterr().err


def test_the_number_of_random_updates_is_nothing_without_hard_ones():
  config = config_lib.override(config_lib.load(TINY), ['--config.data.random_updates=5'])
  with pytest.raises(UserError, match='random_updates is for hard tasks'):
    experiment_lib.make(config, None)


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('--config.data.group=2', 'group = 1'),
    ('--config.data.random_updates=0', 'random_updates = 0'),
    ('--config.algorithm.name=classifier --config.data.batch=4', 'batch = 0'),
  ],
)
def test_what_hard_tasks_cannot_be_of_is_refused(override, message):
  config = config_lib.override(config_lib.load(TINY), ['--config.data.hard_updates=2', *override.split()])
  with pytest.raises(UserError, match=message):
    experiment_lib.make(config, None)

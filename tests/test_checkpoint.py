import contextlib
import errno
import json
import re
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import checkpoint, writer
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError


class State(NamedTuple):
  step: Any
  params: Any
  model_state: Any
  opt_state: Any


def state_at(step):
  values = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
  params = {'w': jnp.asarray(values), 'b': jnp.arange(3)}
  model_state = {'norm': {'mean': jnp.full(3, 0.1 * step)}}
  return State(jnp.int32(step), params, model_state, optax.adam(1e-3).init(params))


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype


def test_keeps_the_best_five_and_the_latest_two(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  scores = [0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.2, 0.3, None, 0.15]
  for step, score in enumerate(scores, start=1):
    checkpoints.save(state_at(step), score)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == [10, 9, 6, 5, 4, 3, 1]
  assert checkpoints.best_steps() == [1, 3, 4, 5, 6, 10, 9]
  assert_same(checkpoints.restore(3, state_at(0)), state_at(3))
  checkpoints.close()


def test_a_checkpoint_knows_how_long_was_trained_before_it(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state_at(1), None, 12.5)
  checkpoints.save(state_at(2), 0.5)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  assert [checkpoints.seconds(step) for step in (1, 2, 3)] == [12.5, 0, 0]
  path = tmp_path / 'checkpoints' / '1' / 'metrics' / 'metrics'
  path.write_text('{"score": null}')  # of an earlier version
  assert checkpoints.seconds(1) == 0
  checkpoints.close()


def test_save_copies_the_state_that_the_next_step_overwrites(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  increase = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  state, expected = state_at(1), state_at(1)
  checkpoints.save(state)
  for _ in range(20):
    state = increase(state)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  assert_same(checkpoints.restore(1, expected), expected)
  checkpoints.close()


def largest_file(folder):
  return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, damage):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2, 3):
    checkpoints.save(state_at(step), 0.5)
  checkpoints.close()
  damage(largest_file(tmp_path / 'checkpoints' / '3'))
  checkpoints = Checkpoints(tmp_path)
  state, damaged = checkpoints.restore_first_sound(checkpoints.steps(), state_at(0))
  assert_same(state, state_at(2))
  assert list(damaged) == [3]
  assert f'checkpoint {tmp_path}/checkpoints/3 cannot be read' in capsys.readouterr().out
  checkpoints.set_aside(damaged)
  assert checkpoints.steps() == [2, 1] and (tmp_path / 'damaged_checkpoints' / '3').is_dir()
  checkpoints.save(state_at(3), 0.5)  # its step is free again
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  assert_same(checkpoints.restore(3, state_at(0)), state_at(3))
  checkpoints.close()


@pytest.mark.parametrize('damage', [truncate, lambda path: path.write_text(''), lambda path: path.unlink()])
def test_a_checkpoint_with_a_damaged_score_is_named_and_moved_aside(tmp_path, capsys, damage):
  checkpoints = Checkpoints(tmp_path)
  for step, score in ((1, 0.5), (2, 0.7), (3, 0.6)):
    checkpoints.save(state_at(step), score)
  checkpoints.close()
  damage(tmp_path / 'checkpoints' / '2' / 'metrics' / 'metrics')
  checkpoints = Checkpoints(tmp_path)
  assert f'checkpoint {tmp_path}/checkpoints/2 cannot be read' in capsys.readouterr().out
  assert checkpoints.best_steps() == [3, 1] and (tmp_path / 'damaged_checkpoints' / '2').is_dir()
  checkpoints.close()


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step, score in enumerate([-1.0, np.nan, -0.5, np.nan, -3.0], start=1):
    checkpoints.save(state_at(step), score)
  assert checkpoints.best_steps() == [3, 1, 5, 4, 2]
  checkpoints.close()


def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)

  def fail(*args, **kwargs):
    raise ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device')

  monkeypatch.setattr(checkpoints._manager, 'save', fail)
  with pytest.raises(UserError, match='no room for a checkpoint'):
    checkpoints.save(state_at(1))
  checkpoints.close()


def test_nothing_is_lost_when_no_checkpoint_can_be_read(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state_at(1))
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  other = state_at(0)._replace(params={'w': jnp.zeros((2, 2))})
  with pytest.raises(UserError, match=r'no checkpoint in .* can be read'):
    checkpoints.restore_first_sound(checkpoints.steps(), other)
  assert checkpoints.steps() == [1]
  checkpoints.close()


def test_validated_states_come_one_by_one_the_best_first_without_those_damaged(tmp_path, capsys):
  checkpoints = Checkpoints(tmp_path)
  for step, score in enumerate([0.3, 0.9, 0.5, np.nan, None], start=1):
    checkpoints.save(state_at(step), score)
  checkpoints.close()
  truncate(largest_file(tmp_path / 'checkpoints' / '3'))
  checkpoints = Checkpoints(tmp_path, read_only=True)
  assert checkpoints.validated_steps() == [2, 3, 1]
  states = checkpoints.restore_validated(state_at(0))
  assert_same(next(states), state_at(2))
  assert capsys.readouterr().out == ''
  assert_same(next(states), state_at(1))
  assert f'checkpoint {tmp_path}/checkpoints/3 cannot be read' in capsys.readouterr().out
  assert list(states) == []
  checkpoints.close()


def listing(folder):
  return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob('*')]}


def test_read_only_changes_nothing_on_disk(tmp_path, capsys):
  checkpoints = Checkpoints(tmp_path)
  for step, score in ((1, 0.5), (2, 0.7), (3, 0.6)):
    checkpoints.save(state_at(step), score)
  checkpoints.close()
  (tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp-0' / 'state').mkdir(parents=True)  # as if being written
  truncate(tmp_path / 'checkpoints' / '2' / 'metrics' / 'metrics')
  before = listing(tmp_path)
  checkpoints = Checkpoints(tmp_path, read_only=True)
  assert checkpoints.steps() == [3, 2, 1] and checkpoints.best_steps() == [3, 1]
  assert f'checkpoint {tmp_path}/checkpoints/2 cannot be read (its score' in capsys.readouterr().out
  assert_same(checkpoints.restore(3, state_at(0)), state_at(3))
  checkpoints.best_weights()
  checkpoints.close()
  assert listing(tmp_path) == before


def test_read_only_where_there_are_no_checkpoints(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'none', read_only=True)
  assert checkpoints.steps() == checkpoints.best_steps() == []
  with pytest.raises(UserError, match='holds no checkpoint yet'):
    checkpoints.best_weights()
  checkpoints.close()
  assert list(tmp_path.iterdir()) == []


def test_best_weights_are_those_saved_and_need_nothing_of_the_rest(tmp_path):
  class Pair(NamedTuple):
    second: Any  # not in the order of the alphabet
    first: Any

  params = {'pair': Pair(jnp.float32(np.pi), jnp.arange(3)), 'steps': tuple(jnp.float32(k) for k in range(12))}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state_at(1)._replace(params=params, model_state={}, opt_state=()), 0.9)
  checkpoints.save(state_at(2), 0.1)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, read_only=True)
  found, model_state = checkpoints.best_weights()
  expected = {'pair': params['pair']._asdict(), 'steps': list(params['steps'])}
  assert_same(found, jax.tree.map(np.asarray, expected))
  assert model_state == {} and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
  checkpoints.close()


@pytest.mark.parametrize('field', ['params', 'model_state'])
def test_best_weights_are_of_the_best_that_is_sound(tmp_path, capsys, field):
  checkpoints = Checkpoints(tmp_path)
  for step, score in ((1, 0.5), (2, 0.8), (3, 0.6)):
    checkpoints.save(state_at(step), score)
  checkpoints.close()

  def damage(step, field):
    path = tmp_path / 'checkpoints' / str(step) / 'checksum' / 'metadata'
    checksum = json.loads(path.read_text())
    checksum['crc32'][field] ^= 1
    path.write_text(json.dumps(checksum))

  damage(2, field)
  damage(3, 'opt_state')  # is not asked for
  checkpoints = Checkpoints(tmp_path, read_only=True)
  params, model_state = checkpoints.best_weights()
  assert_same([params, model_state], [state_at(3).params, state_at(3).model_state])
  assert f'checkpoints/2 cannot be read (the checksum of its {field} does not match)' in capsys.readouterr().out
  for step in (1, 3):
    damage(step, field)
  with pytest.raises(UserError, match=r'no checkpoint in .* can be read'):
    checkpoints.best_weights()
  checkpoints.close()


def test_writer_drops_what_lies_beyond_the_checkpoint_and_a_line_cut_off(tmp_path):
  first = writer.Writer(tmp_path, 0)
  for step in range(1, 5):
    first.write(step, 'train', {'loss': 1 / step}, time=1.234567, waiting_for_data=0.5)
  first.close()
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_text()
  with path.open('a') as file:
    file.write('{"step": 5, "train/lo')
  second = writer.Writer(tmp_path, 2)
  assert [record['step'] for record in writer.read(tmp_path)] == [1, 2]
  for step in (3, 4):
    second.write(step, 'train', {'loss': 1 / step}, time=1.234567)
  second.close()
  assert path.read_text() == whole
  assert json.loads(whole.splitlines()[2]) == {'step': 3, 'train/loss': 1 / 3, 'time': 1.23457}


def test_events_on_a_full_disk_cost_a_line(tmp_path, monkeypatch, capsys):
  log = writer.Writer(tmp_path, 0)
  log.write(1, 'train', {'loss': 1.0})

  def full(file, event):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(writer.EventsWriter, '_write_serialized_event', full)
  for step in range(2, 30):  # more than a queue would hold
    log.write(step, 'train', {'loss': 1.0, 'accuracy': 0.5})
  log.close()
  assert capsys.readouterr().out == (
    'TensorBoard events cannot be written (No space left on device): the run goes on without them\n'
  )
  assert len(writer.read(tmp_path)) == 29


def test_a_checkpoint_that_is_half_removed_is_dropped_quietly(tmp_path, capsys):
  checkpoints = Checkpoints(tmp_path)
  for step in range(1, 5):
    checkpoints.save(state_at(step))
  checkpoints.steps()
  gone = tmp_path / 'checkpoints' / 'removed'
  # The last one that was removed has been moved in one go, and would be deleted by the next call.
  assert gone.is_dir() and not (tmp_path / 'checkpoints' / '2').exists()
  next(
    path for path in gone.rglob('metrics') if path.is_file()
  ).unlink()  # as if the run was killed in the middle of it
  again = Checkpoints(tmp_path)
  assert again.steps() == [4, 3] and not gone.exists() and not (tmp_path / 'damaged_checkpoints').exists()
  again.close()
  checkpoints.close()
  assert capsys.readouterr().out == ''


def test_reading_says_nothing_of_its_own(tmp_path, caplog):
  with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
    checkpoints.save(state_at(1))
  Checkpoints(tmp_path, read_only=True).close()
  assert not [record for record in caplog.records if 'read only' in record.message]
  # Readers of TensorStore that find the event loop closed, after another has ended it, are no news.
  told = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'unraisablehook', told.append)
    checkpoint._pass_over_late_readers.cache_clear()
    checkpoint._pass_over_late_readers()
    late, other = (types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ('Event loop is closed', 'other'))
    sys.unraisablehook(late)
    sys.unraisablehook(other)
  checkpoint._pass_over_late_readers.cache_clear()
  assert told == [other]


@pytest.mark.parametrize(
  ('change', 'why'),
  [
    (lambda params: params.pop('w'), 'params/w has no place'),
    (lambda params: params.update(new=np.zeros(3)), 'params/new is missing'),
    (lambda params: params.update(w=np.zeros(7)), r'params/w is \(.*\) instead of \(7,\)'),
  ],
)
def test_an_array_that_does_not_fit_is_named(tmp_path, change, why, capsys):
  with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
    checkpoints.save(state_at(1))
    like = state_at(0)
    change(like.params)
    with pytest.raises(UserError, match='can be read'):
      checkpoints.restore_first_sound([1], like)
  assert re.search(why, capsys.readouterr().out)

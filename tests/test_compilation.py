"""One compilation per program and run, and none in the loop."""

import contextlib

import jax

from metajax import config as config_lib
from metajax import train, writer
from tests.conftest import TINY, start


@contextlib.contextmanager
def recorded(monkeypatch):
  """The list of what happens, in order: programs that are compiled, by name, and metrics written, (split, step)."""
  events, write = [], writer.Writer.write

  def on_duration(name, seconds, **details):
    if name == '/jax/core/compile/backend_compile_duration':
      events.append(details['fun_name'])

  def record(self, step, split, metrics, **times):
    events.append((split, step))
    write(self, step, split, metrics)

  jax.clear_caches()  # what other tests have compiled would not be compiled again
  monkeypatch.setattr(writer.Writer, 'write', record)
  jax.monitoring.register_event_duration_secs_listener(on_duration)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(on_duration)


def test_each_program_is_compiled_once_and_none_in_the_loop(cache, tmp_path, monkeypatch):
  settings = [
    '--config.eval_every=2',
    '--config.checkpoint_every=3',
    '--config.model.name=mlp',
    '--config.eval.ensemble=3',
    '--config.eval.last=True',
  ]
  config = config_lib.override(config_lib.load(TINY), settings)

  def run(total_steps, mode):
    config.total_steps = total_steps
    with recorded(monkeypatch) as events:
      train.run(config, tmp_path / 'run', data_dir=tmp_path, mode=mode)
    return events

  # By the name that jax gives what runs on all devices, `_fun` is the meta-update, then validation, then the test, of
  # the best checkpoint and of the last, then the outputs of the ensemble's members, one program for all three.
  begin, validation, test = ['jit(init)', 'jit(_fun)'], 'jit(_fun)', ['jit(_fun)'] * 2 + ['jit(score)', 'jit(predict)']
  t = [('train', step) for step in range(11)]
  new = [*begin, *t[1:3], validation, ('val', 2), *t[3:5], ('val', 4), t[5], ('val', 5), *test]
  restored = [*begin, t[6], validation, ('val', 6), *t[7:9], ('val', 8), *t[9:11], ('val', 10)]
  assert run(5, 'train_and_eval') == new
  assert run(10, 'train') == restored


def test_a_second_run_reads_every_program_from_the_cache(tmp_path):
  """In processes of their own: what a process has compiled it does not look up again."""

  def programs():
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'cache' / 'xla').glob('*-cache')}

  def run(name):
    arguments = f'--config={TINY}', f'--workdir={tmp_path / name}', '--mode=train', '--config.model.name=mlp'
    process = start(*arguments, METAJAX_CACHE=str(tmp_path / 'cache'))
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors

  run('first')
  compiled = programs()
  assert len(compiled) == 3  # initial weights, meta-update, validation
  run('second')
  assert programs() == compiled

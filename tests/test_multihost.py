"""Several processes as one run: real processes on loopback, two CPU devices each."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from metajax import main, processes
from metajax.errors import UserError
from tests import kill_and_resume
from tests.conftest import ROOT, TINY, start

LOCAL = str(ROOT / 'launch' / 'local.sh')
SETTINGS = (
  f'--config={TINY}',
  '--config.model.name=mlp',  # compiles quickly
  '--config.algorithm.learned_lr=tensor_step',
  '--config.algorithm.multi_step_epochs=1',
  '--config.algorithm.inner_steps=2',
  '--config.algorithm.epoch=5',  # the next phase begins in the middle
  '--config.data.random_updates=2',
  '--config.data.hard_updates=2',
  '--config.data.tasks=5',  # four devices get two tasks each, three of them filling
  '--config.optimizer.name=sgd',
  '--config.optimizer.learning_rate=0.1',
  '--config.total_steps=10',
  '--config.eval_every=5',
  '--config.checkpoint_every=5',
  '--config.log_every=1',
  '--config.eval.episodes=7',
  '--config.eval.ensemble=2',
  '--config.eval.last=True',
)
ENDLESS = '--mode=train', '--config.total_steps=100000', '--config.eval_every=0', '--config.checkpoint_every=1'


def environment(cache, devices=2):
  return {
    'METAJAX_CACHE': str(cache),
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_PLATFORMS': 'cpu',
  }


def pair(cache, *arguments):
  """Two processes with two devices each."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  flags = f'--coordinator=127.0.0.1:{port}', '--num_processes=2'
  return [start(*arguments, *flags, f'--process_id={k}', **environment(cache)) for k in range(2)]


def ends(run, seconds=400):
  """(exit status, output, errors) of each process; none of them outlives a test that fails."""
  try:
    return [(process.wait(seconds), *process.communicate()) for process in run]
  finally:
    for process in run:
      process.kill()


def here(*arguments):
  """Runs in the process of the tests, on as many devices as it has."""
  assert main.main(['metajax', *arguments]) == 0


def local_sh(cache, *arguments):
  """`launch/local.sh -n 2`, which is told the interpreter."""
  return subprocess.Popen(
    [LOCAL, '-n', '2', *arguments],
    cwd=ROOT,
    env={**os.environ, **environment(cache), 'PYTHON': sys.executable},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def steps_done(workdir):
  path = workdir / 'metrics.jsonl'
  return path.read_text().count('"train/loss"') if path.exists() else 0


def wait_for_steps(workdir, count, run):
  deadline = time.monotonic() + 400
  while steps_done(workdir) < count:
    assert time.monotonic() < deadline and all(process.poll() is None for process in run)
    time.sleep(0.05)


def assert_same_run(a, b):
  """Parameters after the last step, metrics on the way and test result, to 1e-5."""
  a, b = kill_and_resume.outcome(a), kill_and_resume.outcome(b)
  assert a['arrays'].keys() == b['arrays'].keys() and a['steps'] == b['steps']
  assert sum('params' in name for name in a['arrays']) == 2 * 6  # weights and step sizes of three layers
  for name, value in a['arrays'].items():
    np.testing.assert_allclose(value, b['arrays'][name], rtol=0, atol=1e-5, err_msg=name)
  records = [[json.loads(line) for line in side['metrics'].splitlines()] for side in (a, b)]
  assert [r.keys() for r in records[0]] == [r.keys() for r in records[1]]
  for record, other in zip(*records, strict=True):
    for name in record:
      np.testing.assert_allclose(record[name], other[name], rtol=0, atol=1e-4, err_msg=name)
  assert a['test'].keys() == b['test'].keys()
  ensemble = 'ensemble_loss', 'ensemble_checkpoints'
  for name in ('loss', 'loss_ci95', 'accuracy', 'checkpoint_step', 'last_loss', *ensemble):
    assert a['test'][name] == pytest.approx(b['test'][name], abs=1e-4), name


@pytest.fixture(scope='module')
def two(tmp_path_factory, shared_cache):
  """Ten updates on two processes of two devices each, started by local.sh; the workdir, and what was printed."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  [(status, output, errors)] = ends([local_sh(shared_cache, *SETTINGS, f'--workdir={workdir}')])
  assert status == 0, errors
  return workdir, output


@pytest.fixture(scope='module')
def killed(two, tmp_path_factory, shared_cache):
  """Kills the second of two processes; the wait for the first is spent on the tests before the one that asks."""
  workdir = tmp_path_factory.mktemp('killed') / 'run'
  run = pair(shared_cache, *SETTINGS, f'--workdir={workdir}', *ENDLESS)
  wait_for_steps(workdir, 3, run)
  run[1].kill()

  def survivor():
    return workdir, ends(run)[0]

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    yield pool.submit(survivor)


@pytest.fixture(scope='module')
def one(killed, tmp_path_factory, shared_cache):
  """The same on one process with one device."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  [(status, _, errors)] = ends([start(*SETTINGS, f'--workdir={workdir}', **environment(shared_cache, devices=1))])
  assert status == 0, errors
  return workdir


@pytest.mark.smoke
def test_two_processes_give_the_same_as_one_process_with_one_device(two, one):
  assert_same_run(two[0], one)


def lines_of(output):
  """Metajax's lines, but for what another model keeps of the settings.

  Gloo greets for each process, a few words at a time, so that two greetings may be mixed.
  """
  words = r'\[Gloo\] Rank |is connected to|peer ranks\.|Expected number of connected peer ranks is :'
  lines = [line for line in output.splitlines() if re.sub(words, '', line).strip(' 0123456789')]
  return [line for line in lines if not line.startswith('config: ')]


def test_there_is_one_log_and_one_of_everything(two):
  workdir, output = two
  lines = lines_of(output)
  assert '4 cpu device(s) of 2 processes' in lines[0]
  assert [line.split(':')[0] for line in lines if 'tasks/s' in line] == [f'step {k}/10' for k in range(1, 11)]
  # training, steps, phase, validations, then figures, last checkpoint, ensemble and test
  assert len(lines) == 1 + 10 + 1 + 2 + 4, output
  assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['10', '5']
  assert len(list(workdir.glob('events.*'))) == 2 and len(list((workdir / 'figures').iterdir())) == 5


def test_a_run_of_two_processes_goes_on_on_one(two, one, cache, tmp_path, capsys):
  workdir = shutil.copytree(two[0], tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '10')  # as if it had been killed before
  here(*SETTINGS, f'--workdir={workdir}')
  assert 'from step 5:' in capsys.readouterr().out
  assert_same_run(workdir, one)


def test_a_run_of_one_process_goes_on_on_two_after_a_damaged_checkpoint_too(one, shared_cache, tmp_path):
  """Process 0 alone finds the damage; all restore the one before."""
  workdir = shutil.copytree(one, tmp_path / 'run')
  for path in (workdir / 'checkpoints' / '10' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])
  (first, output, errors), second = ends(pair(shared_cache, *SETTINGS, f'--workdir={workdir}'))
  assert (first, *second) == (0, 0, '', ''), errors
  assert f'{workdir}/checkpoints/10 cannot be read' in output and 'from step 5:' in output
  assert_same_run(workdir, one)


def test_sigterm_to_one_process_ends_all_at_one_step(shared_cache, tmp_path):
  run = pair(shared_cache, *SETTINGS, f'--workdir={tmp_path}/run', *ENDLESS, '--config.checkpoint_every=0')
  wait_for_steps(tmp_path / 'run', 3, run)
  run[1].send_signal(signal.SIGTERM)
  (first, output, errors), second = ends(run)
  assert (first, *second) == (0, 0, '', ''), errors
  step = steps_done(tmp_path / 'run')
  assert f'stopped at step {step}, checkpoint saved' in output.splitlines()[-1]
  assert [path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == [str(step)]


def test_a_refusal_by_process_0_ends_both_with_one_line(two, shared_cache):
  run = local_sh(shared_cache, *SETTINGS, f'--workdir={two[0]}', '--config.seed=1')
  [(status, output, errors)] = ends([run])
  assert status == 2 and lines_of(output) == []
  assert errors.count('\n') == 1 and errors.startswith('metajax: ') and 'seed differs' in errors


def test_a_mistake_that_all_find_is_told_once(shared_cache, tmp_path):
  (first, _, errors), second = ends(pair(shared_cache, *SETTINGS, f'--workdir={tmp_path}', '--config.data.way=7'))
  assert (first, *second) == (2, 2, '', '')
  assert errors.count('\n') == 1 and 'only 6 classes' in errors


def assert_goes_on(workdir):
  """The run goes on, without a gap in what it has written."""
  steps = steps_done(workdir)
  here(*SETTINGS, f'--workdir={workdir}', *ENDLESS, f'--config.total_steps={steps + 3}')
  records = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert sorted(set(records)) == list(range(1, steps + 4))


@pytest.mark.smoke
def test_when_process_0_is_killed_the_other_says_so_and_the_run_goes_on(cache, tmp_path):
  workdir = tmp_path / 'run'
  run = pair(cache, *SETTINGS, f'--workdir={workdir}', *ENDLESS)
  wait_for_steps(workdir, 3, run)
  run[0].kill()
  _, (status, output, errors) = ends(run)
  assert status == processes.LOST and output == ''  # how soon, `tests/kill_processes.py` measures
  line = errors.splitlines()[-1]
  assert line.startswith('metajax: process 0 of 2 (on 127.0.0.1) has died') and 'run the same command again' in line
  assert_goes_on(workdir)


def test_local_sh_forwards_signals(shared_cache, tmp_path):
  workdir = tmp_path / 'run'
  run = local_sh(shared_cache, *SETTINGS, f'--workdir={workdir}', *ENDLESS)
  wait_for_steps(workdir, 2, [run])
  run.send_signal(signal.SIGTERM)
  [(status, output, errors)] = ends([run])
  assert status == 0 and 'checkpoint saved' in output.splitlines()[-1], errors


@pytest.mark.parametrize(('arguments', 'message'), [(('-n', 'x'), "not 'x'"), (('-n',), "not ''")])
def test_local_sh_refuses_what_is_no_number(arguments, message):
  result = subprocess.run([LOCAL, *arguments], capture_output=True, text=True)
  assert result.returncode == 2 and message in result.stderr and result.stderr.count('\n') == 1


def test_when_another_process_is_killed_process_0_ends_at_once_and_the_run_goes_on(killed, cache):
  workdir, (status, _, errors) = killed.result()
  assert status == processes.LOST
  assert errors.count('\n') == 1 and errors.startswith('metajax: process 1 of 2 (on ') and 'has died' in errors
  assert 'run the same command again' in errors
  assert_goes_on(workdir)


SLURM = {
  'SLURM_JOB_ID': '4096',
  'SLURM_NTASKS': '8',
  'SLURM_STEP_NUM_TASKS': '8',
  'SLURM_STEP_NODELIST': 'node[003-004]',
  'SLURM_STEP_TASKS_PER_NODE': '4(x2)',
  'SLURM_NODEID': '1',
  'SLURM_PROCID': '6',
  'SLURM_LOCALID': '2',
}
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1,10.1.0.1:34911',
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_RANK': '0',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '1',
}
ADDRESS = 'host:1234'


@pytest.mark.parametrize(
  ('flags', 'environment', 'place'),
  [
    ((None, None, None), {}, None),
    ((None, 1, None), {}, None),
    ((ADDRESS, 3, 2), {}, (ADDRESS, 3, 2, None)),
    ((None, None, None), SLURM, ('node003:61440', 8, 6, [2])),
    ((ADDRESS, None, None), SLURM, (ADDRESS, 8, 6, [2])),
    ((None, None, None), {**SLURM, 'CUDA_VISIBLE_DEVICES': '0'}, ('node003:61440', 8, 6, None)),  # --gpus-per-task=1
    ((None, None, None), {**SLURM, 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, ('node003:61440', 8, 6, [2])),
    ((None, None, None), {**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '7,1'}, ('node003:61440', 8, 6, None)),  # all GPUs
    ((None, None, None), {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}, None),  # an interactive shell, srun -n 1
    ((None, None, None), {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'}, None),  # the batch script
    ((None, None, None), OPEN_MPI, ('10.0.0.1:61441', 2, 1, None)),
    (
      (None, None, None),
      {**OPEN_MPI, 'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1:34911;tcp6://[fe80::1]:34912'},
      ('10.0.0.1:61441', 2, 1, None),
    ),
    (
      (None, None, None),
      {**OPEN_MPI, 'OMPI_MCA_orte_hnp_uri': '4096.0;tcp6://[fe80::1,fe80::2]:34912'},
      ('fe80::1:61441', 2, 1, None),
    ),
    ((None, None, None), {**OPEN_MPI, **SLURM}, ('10.0.0.1:61441', 2, 1, None)),  # mpirun in a Slurm job
    ((None, None, None), {'OMPI_COMM_WORLD_SIZE': '1', 'KUBERNETES_SERVICE_HOST': 'x'}, None),
  ],
)
def test_a_process_finds_its_place(flags, environment, place, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert processes.find_place(*flags) == place


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((ADDRESS, None, None), '--num_processes is missing'),
    ((ADDRESS, 2, None), '--process_id is missing'),
    ((None, 2, 0), '--coordinator=HOST:PORT is missing'),
    (('host', 2, 0), 'is HOST:PORT'),
    (('host:99999', 2, 0), 'is HOST:PORT'),
    ((ADDRESS, 2, 2), '--process_id=2 is none of 0 to 1'),
    ((ADDRESS, 2, -1), '--process_id=-1'),
    ((ADDRESS, 0, 0), '--num_processes=0'),
  ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, message):
  with pytest.raises(UserError, match=message):
    processes.find_place(*flags)


def test_an_open_mpi_that_does_not_tell_where_process_0_is(monkeypatch):
  for name in OPEN_MPI.keys() - {'OMPI_MCA_orte_hnp_uri'}:
    monkeypatch.setenv(name, OPEN_MPI[name])
  with pytest.raises(UserError, match='--coordinator=HOST:PORT is needed'):
    processes.find_place()


def test_wrong_flags_end_with_one_line(capsys):
  assert main.main(['metajax', f'--config={TINY}', '--coordinator=a:1', '--num_processes=2', '--process_id=5']) == 2
  assert main.main(['metajax', f'--config={TINY}', '--num_processes=two']) == 2
  assert capsys.readouterr().err.count('\n') == 2


def test_a_port_in_use_is_told_at_once(shared_cache):
  with socket.socket() as holder:
    holder.bind(('127.0.0.1', 0))
    holder.listen()
    port = holder.getsockname()[1]
    flags = f'--coordinator=127.0.0.1:{port}', '--num_processes=2', '--process_id=0'
    [(status, output, errors)] = ends([start(*SETTINGS, *flags, **environment(shared_cache))])
  assert (status, output) == (2, '')
  assert errors.count('\n') == 1 and f'cannot listen on port {port} (Address already in use)' in errors


@pytest.mark.parametrize(
  ('index', 'message'), [(0, 'some of --num_processes=2 did not connect'), (1, 'process 0 did not answer at')]
)
def test_processes_that_do_not_meet_end_with_one_line(index, message):
  code = f"""
from metajax import processes
processes._START_SECONDS = 1
processes.start(processes.Place('127.0.0.1:9', 2, {index}, None))
"""
  if index == 0:
    code = code.replace(':9', ':0')
  result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == processes.LOST
  assert message in result.stderr and 'within 1 s' in result.stderr and result.stderr.count('\n') == 1


def test_processes_with_other_settings_end_before_they_train(cache, tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    flags = f'--coordinator=127.0.0.1:{probe.getsockname()[1]}', '--num_processes=2', f'--workdir={tmp_path / "run"}'
  others = [], ['--config.optimizer.learning_rate=0.2']
  run = [start(*SETTINGS, *more, *flags, f'--process_id={k}', **environment(cache)) for k, more in enumerate(others)]
  (first, _, _), (second, _, errors) = ends(run)
  assert (first, second) == (2, 2) and steps_done(tmp_path / 'run') == 0
  assert errors.startswith('metajax: process 1 is not as process 0: settings is') and errors.count('\n') == 1


def test_what_processes_must_agree_on(monkeypatch):
  monkeypatch.setattr(processes, '_watch', types.SimpleNamespace(index=1, receive=lambda: {'jax': '1', 'flax': '2'}))
  processes.agree({'jax': '1'})
  with pytest.raises(UserError, match=r"process 1 is not as process 0: flax is '3', there '2'\."):
    processes.agree({'jax': '1', 'flax': '3'})

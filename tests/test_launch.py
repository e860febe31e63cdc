"""The scripts of launch/ with stand-ins for what a cluster has; tests/test_multihost.py runs local.sh for real."""

import os
import signal
import subprocess
import time

import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / 'launch'
CONFIGS = LAUNCH.parent / 'configs'


def stand_in(folder, name, script):
  """A program of this name that notes how it was called, then runs `script`."""
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\necho {name} "$@" >>"{folder}/calls"\n{script}\n')
  path.chmod(0o755)


def run(folder, *command, stop=None, **environment):
  """Runs a command with the stand-ins first on the path; returns its status and the calls."""
  environment = {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}', **environment}
  process = subprocess.Popen(command, env=environment, cwd=folder)
  if stop:
    while not (folder / 'pid').exists():
      time.sleep(0.05)
    process.send_signal(stop)
  return process.wait(60), (folder / 'calls').read_text().splitlines()


UNTIL_TOLD = 'trap "exit 0" TERM; echo $$ >new && mv new pid; while :; do sleep 0.05; done'


@pytest.mark.parametrize(
  ('exits', 'losses', 'requeued'), [(0, 0, False), (2, 0, False), (3, 4, True), (137, 0, True), (3, 5, False)]
)
def test_slurm_goes_on_with_a_run_that_lost_a_process(tmp_path, exits, losses, requeued):
  (tmp_path / 'metajax-7.losses').write_text(losses * 'status 3\n')
  stand_in(tmp_path, 'srun', f'exit {exits}')
  stand_in(tmp_path, 'scontrol', '')
  status, calls = run(
    tmp_path, 'bash', str(LAUNCH / 'slurm.sbatch'), '--config=a', '--workdir=b c',
    SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID='7',
  )  # fmt: skip
  assert status == exits and 'python -m metajax.main --config=a --workdir=b c' in calls[0]
  assert calls[1:] == (['scontrol requeue 7'] if requeued else [])


def test_slurm_saves_before_the_time_limit_and_goes_back_into_the_queue(tmp_path):
  stand_in(tmp_path, 'srun', UNTIL_TOLD)
  stand_in(tmp_path, 'scancel', 'kill -TERM $(cat pid)')
  stand_in(tmp_path, 'scontrol', '')
  environment = dict(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID='7')
  status, calls = run(tmp_path, 'bash', str(LAUNCH / 'slurm.sbatch'), stop=signal.SIGUSR1, **environment)
  assert status == 0 and calls[1:] == ['scancel --signal=TERM 7.0', 'scontrol requeue 7']


def test_slurm_array_runs_a_cell_of_a_grid(tmp_path):
  stand_in(tmp_path, 'srun', '')
  environment = dict(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID='7', SLURM_ARRAY_TASK_ID='4')
  script = str(LAUNCH / 'slurm.sbatch')
  status, calls = run(tmp_path, 'bash', script, '--config=a', '--over', 'seed=0,1', **environment)
  assert status == 0 and len(calls) == 1
  assert calls[0].endswith(' python -m metajax.sweep --config=a --over seed=0,1 --cell=4')


@pytest.fixture
def job():
  service, job = yaml.safe_load_all((LAUNCH / 'kubernetes.yaml').read_text())
  assert (service['kind'], job['kind']) == ('Service', 'Job')
  assert job['spec']['template']['spec']['subdomain'] == service['metadata']['name']
  return job['spec']


def test_kubernetes_numbers_agree(job):
  [container] = job['template']['spec']['containers']
  script = container['command'][2]
  assert job['completionMode'] == 'Indexed' and job['template']['spec']['restartPolicy'] == 'Never'
  assert job['completions'] == job['parallelism'] and f'--num_processes={job["parallelism"]} ' in script
  assert job['podFailurePolicy']['rules'][0]['onExitCodes']['containerName'] == container['name']


@pytest.mark.parametrize(
  ('script', 'stop', 'tested', 'expected'),
  [
    ('exit 0', None, True, 0),
    ('exit 2', None, False, 2),
    ('exit 3', None, False, 3),
    (UNTIL_TOLD, signal.SIGTERM, False, 3),  # saved and stopped: the job must not count as done
    (UNTIL_TOLD, signal.SIGTERM, True, 0),
  ],
)
def test_kubernetes_pod_ends_well_only_when_the_run_is_done(job, tmp_path, script, stop, tested, expected):
  stand_in(tmp_path, 'python', script)
  if tested:
    (tmp_path / 'test.json').write_text('{}')
  [container] = job['template']['spec']['containers']
  status, calls = run(tmp_path, *container['command'], stop=stop, WORKDIR=str(tmp_path), JOB_COMPLETION_INDEX='1')
  assert status == expected
  assert calls[0].endswith('--coordinator=metajax-0.metajax:8476 --num_processes=2 --process_id=1')


def test_local_sh_deals_out_the_gpus(tmp_path):
  stand_in(tmp_path, 'python', 'echo $CUDA_VISIBLE_DEVICES >>"$(dirname "$0")/gpus"')
  stand_in(tmp_path, 'nvidia-smi', 'printf "0\\n1\\n2\\n3\\n"')
  local_sh = 'env', '-u', 'CUDA_VISIBLE_DEVICES', '-u', 'JAX_PLATFORMS', str(LAUNCH / 'local.sh')
  status, calls = run(tmp_path, *local_sh, '-n', '2', '--config=a')
  assert status == 0 and sorted(call[-1] for call in calls if 'metajax.main --config=a' in call) == ['0', '1']
  assert sorted((tmp_path / 'gpus').read_text().split()) == ['0,1', '2,3']
  assert run(tmp_path, *local_sh, '-n', '3')[0] == 2


@pytest.mark.parametrize('script', ['local.sh', 'slurm.sbatch', 'mtm.sh'])
def test_scripts_parse(script):
  subprocess.run(['bash', '-n', LAUNCH / script], check=True)


# What a run leaves, in the --workdir among its arguments.
TESTED = 'for x in "$@"; do [[ $x == --workdir=* ]] && mkdir -p "${x#*=}" && touch "${x#*=}/test.json"; done; true'


def weigh_tasks(folder, config, string, *arguments, **environment):
  """Runs mtm.sh; its status, and the calls of Python."""
  return run(folder, 'bash', str(LAUNCH / 'mtm.sh'), str(CONFIGS / config), string, *arguments, **environment)


def test_task_weighting_trains_the_baseline_then_each_method_from_it_and_compares(tmp_path):
  stand_in(tmp_path, 'python', TESTED)
  environment = dict(SEEDS='0 3', METHODS='uniform baseline spsa', RUNS='r')
  status, calls = weigh_tasks(tmp_path, 'mtm_maml.py', 'data=fc100,way=5', '--x=a b', '--data_dir=d', **environment)
  config = f'python -m metajax.main --config={CONFIGS}/mtm_maml.py:data=fc100,way=5,method='
  expected = []
  for seed in (0, 3):
    expected.append(f'{config}baseline --workdir=r/baseline-{seed} --config.seed={seed} --x=a b --data_dir=d')
    for method in ('uniform', 'spsa'):
      rest = f'--config.seed={seed} --config.init_from=r/baseline-{seed} --x=a b --data_dir=d'
      expected.append(f'{config}{method} --workdir=r/{method}-{seed} {rest}')
  rows = ' '.join(f'{method}=r/{method}-0,r/{method}-3' for method in ('uniform', 'spsa', 'baseline'))
  files = '--markdown=r/comparison.md --csv=r/comparison.csv --figure=r/comparison.png'
  expected.append(f'python -m metajax.compare {rows} --data_dir=d {files}')
  assert status == 0 and calls == expected


@pytest.mark.parametrize('status', [2, 3])
def test_task_weighting_stops_at_a_run_that_fails(tmp_path, status):
  stand_in(tmp_path, 'python', f'[[ $* != *method=spsa* ]] || exit {status}; {TESTED}')
  ended, calls = weigh_tasks(tmp_path, 'mtm_protonet.py', 'way=5', METHODS='uniform spsa backprop')
  assert ended == status and len(calls) == 3 and 'method=pretrain' in calls[0]
  assert 'runs/mtm-protonet-way=5/uniform-0' in calls[1]


def test_task_weighting_does_not_start_from_a_baseline_that_was_stopped(tmp_path):
  stand_in(tmp_path, 'python', '')
  ended, calls = weigh_tasks(tmp_path, 'mtm_maml.py', 'way=5')
  assert ended == 1 and len(calls) == 1

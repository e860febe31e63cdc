"""Other formulations of the same work, each in a process of its own, asked for one step at a time.

The process gets a file of data and weights, prints one JSON line {"ready": true, "loss": ..., "grad_norm": ...,
"compile_s": ...} when it is ready (before it, if it compiles ahead, {"compiled": true, ...}), then answers each line of
its input: "step" with {"seconds": ..., "loss": ...} after one meta-update, "memory" with {"peak_mb": ...}.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
TORCH = ('torch_loop', 'torch_vmap', 'torch_compile')


class Failed(RuntimeError):
  """A process ended by itself where an answer was due."""


def write_inputs(path, episodes, params):
  """Writes a meta-batch (leading axis of tasks) and the weights to start from, under 'params/conv0' and so on."""
  arrays = {
    f'{part}_{field}': getattr(getattr(episodes, part), field)
    for part in ('support', 'query')
    for field in ('inputs', 'targets')
  }
  for key, value in jax.tree_util.tree_leaves_with_path({'params': params}):
    arrays[jax.tree_util.keystr(key, simple=True, separator='/')] = value
  np.savez(path, **arrays)


class Rival:
  """One such process, killed when an answer takes longer than `limit_s` seconds: then the answer is None."""

  def __init__(self, implementation, inputs, workload, order, *, torch_python, limit_s):
    if implementation in TORCH:
      program = [torch_python, str(Path(__file__).parent / 'torch_maml.py')]
    else:
      program = [sys.executable, '-m', 'benchmarks.plain_maml']
    self._name, self._limit_s, self._over = implementation, limit_s, False
    self._process = subprocess.Popen(
      [
        *program,
        f'--implementation={implementation}',
        f'--order={order}',
        f'--inputs={inputs}',
        f'--steps={workload.inner_steps}',
        f'--inner_lr={workload.inner_lr}',
      ],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.greeting = self._answer() or {}
    if 'compiled' in self.greeting:
      self.greeting |= self._answer() or {}  # compiling and the first step have the whole limit each

  def ask(self, command):
    """Sends 'step' or 'memory' and waits for the answer."""
    if self._over:
      return None
    self._process.stdin.write(f'{command}\n')
    self._process.stdin.flush()
    return self._answer()

  def close(self):
    """Ends the process."""
    self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()

  def _answer(self):
    timer = threading.Timer(self._limit_s, self._process.kill)
    start = time.monotonic()
    timer.start()
    line = self._process.stdout.readline()
    timer.cancel()
    if line:
      return json.loads(line)
    self._over = time.monotonic() - start >= self._limit_s
    if not self._over:
      raise Failed(f'{self._name} ended without an answer, exit status {self._process.wait()}; its errors are above')
    return None

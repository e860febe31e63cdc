"""MAML as most JAX code writes it, behind the protocol of `rivals`: `vmap` over tasks of `lax`'s own convolution.

Convolution by `lax.conv_general_dilated`, pooling by `lax.reduce_window` (through Flax's `max_pool`), batch
normalisation before ReLU and pooling, inner steps unrolled. Nothing of metajax is used.
"""

import argparse
import functools
import json
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


def logits(params, x):
  """Conv4 with max pooling and batch statistics: images (n, h, w, c) to (n, way)."""
  for i in range(4):
    x = jax.lax.conv_general_dilated(x, params[f'conv{i}'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    norm = params[f'norm{i}']
    x = (x - mean) / jnp.sqrt(var + 1e-5) * norm['scale'] + norm['bias']
    x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
  return x.reshape(len(x), -1) @ params['head']['kernel'] + params['head']['bias']


def loss(params, inputs, targets):
  """Mean cross entropy."""
  return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), targets).mean()


def task_loss(params, task, *, order, steps, inner_lr):
  """Query loss after `steps` steps of gradient descent on the support set."""
  for _ in range(steps):
    grads = jax.grad(loss)(params, *task['support'])
    if order == 1:
      grads = jax.lax.stop_gradient(grads)
    params = jax.tree.map(lambda p, g: p - inner_lr * g, params, grads)
  return loss(params, *task['query'])


def read_inputs(path):
  """Weights as nested dictionaries, and the tasks' data."""
  params, tasks = {}, {}
  with np.load(path) as arrays:
    for key in arrays:
      if not key.startswith('params/'):
        continue
      *groups, name = key.split('/')[1:]
      place = params
      for group in groups:
        place = place.setdefault(group, {})
      place[name] = arrays[key]
    tasks = {part: (arrays[f'{part}_inputs'], arrays[f'{part}_targets']) for part in ('support', 'query')}
  return jax.device_put((params, tasks))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--implementation', choices=['jax_vmap_conv'], default='jax_vmap_conv')
  parser.add_argument('--order', type=int, choices=[1, 2], required=True)
  parser.add_argument('--inputs', required=True)
  parser.add_argument('--steps', type=int, required=True)
  parser.add_argument('--inner_lr', type=float, required=True)
  options = parser.parse_args()
  params, tasks = read_inputs(options.inputs)
  settings = {'order': options.order, 'steps': options.steps, 'inner_lr': options.inner_lr}
  tx = optax.adam(1e-3)
  opt_state = tx.init(params)

  def meta_update(params, opt_state, tasks):
    def outer_loss(params):
      return jax.vmap(functools.partial(task_loss, **settings), (None, 0))(params, tasks).mean()

    value, grads = jax.value_and_grad(outer_loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, {'loss': value, 'grad_norm': optax.tree.norm(grads)}

  start = time.perf_counter()
  compiled = jax.jit(meta_update, donate_argnums=(0, 1)).lower(params, opt_state, tasks).compile()
  say(compiled=True, compile_s=time.perf_counter() - start)

  params, opt_state, metrics = compiled(params, opt_state, tasks)
  say(ready=True, **{k: float(v) for k, v in metrics.items()})
  for line in sys.stdin:
    if line.strip() == 'memory':
      say(peak_mb=compiled.memory_analysis().temp_size_in_bytes / 1e6)
      continue
    start = time.perf_counter()
    params, opt_state, metrics = jax.block_until_ready(compiled(params, opt_state, tasks))
    say(seconds=time.perf_counter() - start, loss=float(metrics['loss']))


def say(**answer):
  """Prints one line of JSON."""
  print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()

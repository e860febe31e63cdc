"""One MAML meta-update in PyTorch, the peer that benchmarks/maml_step.py times metajax against.

A step is the meta-gradient of a batch of tasks and one update of Adam. Shapes are those of the arrays in --inputs.

  TORCH_PYTHON benchmarks/torch_maml.py --implementation=torch_loop --order=2 --inputs=FILE.npz

--inputs holds support_inputs (tasks, n, h, w, c), support_targets (tasks, n), query_inputs, query_targets, and the
weights as params/conv0 .. params/conv3 (3, 3, in, out), params/norm0/scale, params/norm0/bias, .., params/head/kernel
(h * w * c, way), params/head/bias. One line of JSON tells that all is ready; then each line of standard input, `step`
or `memory`, is answered by one.
"""

import argparse
import ctypes
import functools
import json
import resource
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

BLOCKS = 4
EPSILON = 1e-5


def keep_freed_memory():
  """Tells glibc's malloc to keep what is freed: else it maps every large activation anew, page fault by page fault."""
  m_trim_threshold, m_mmap_max = -1, -4
  libc = ctypes.CDLL(None)
  libc.mallopt(m_trim_threshold, 2**31 - 1)
  libc.mallopt(m_mmap_max, 0)


def load(path, device):
  """Weights [conv, scale, bias] * 4 + [head weight, head bias] and [support x, y, query x, y]; images are NCHW."""
  with np.load(path) as file:
    arrays = {name: torch.from_numpy(file[name]) for name in file.files}
  params = []
  for i in range(BLOCKS):
    kernel = arrays[f'params/conv{i}'].permute(3, 2, 0, 1).contiguous()
    params += [kernel, arrays[f'params/norm{i}/scale'], arrays[f'params/norm{i}/bias']]
  head = arrays['params/head/kernel']  # its rows are in the order (h, w, c), those of NCHW flattened in (c, h, w)
  width, way = params[0].shape[0], head.shape[1]
  params += [head.reshape(-1, width, way).permute(2, 1, 0).reshape(way, -1), arrays['params/head/bias']]
  batch = []
  for part in ('support', 'query'):
    batch += [arrays[f'{part}_inputs'].permute(0, 1, 4, 2, 3).contiguous(), arrays[f'{part}_targets'].long()]
  return [p.to(device) for p in params], [x.to(device) for x in batch]


def forward(params, x):
  """Logits (n, way) of Conv4 on images x (n, c, h, w), normalised by the batch's own statistics."""
  for i in range(BLOCKS):
    kernel, scale, bias = params[3 * i : 3 * i + 3]
    x = F.conv2d(x, kernel, padding=1)
    x = F.batch_norm(x, None, None, scale, bias, training=True, momentum=0.0, eps=EPSILON)
    x = F.relu(F.max_pool2d(x, 2))  # in this order: ReLU and its gradients have a quarter of the pixels
  return F.linear(x.flatten(1), params[-2], params[-1])


def loss_fn(params, inputs, targets):
  return F.cross_entropy(forward(params, inputs), targets)


def torch_loop(params, batch, options):
  """Loss and meta-gradient by autograd, task by task: each graph is freed before the next is built."""
  total, sums = 0.0, [torch.zeros_like(p) for p in params]
  for support_inputs, support_targets, query_inputs, query_targets in zip(*batch, strict=True):
    initial = fast = [p.detach().requires_grad_() for p in params]
    for _ in range(options.steps):
      loss = loss_fn(fast, support_inputs, support_targets)
      grads = torch.autograd.grad(loss, fast, create_graph=options.order == 2)
      if options.order == 1:  # no graph from one step to the next: the gradient at the fast weights is what counts
        fast = [(p - options.inner_lr * g).detach().requires_grad_() for p, g in zip(fast, grads, strict=True)]
        initial = fast
      else:
        fast = [p - options.inner_lr * g for p, g in zip(fast, grads, strict=True)]
    loss = loss_fn(fast, query_inputs, query_targets)
    torch._foreach_add_(sums, torch.autograd.grad(loss, initial))
    total += loss.detach()
  tasks = len(batch[0])
  return total / tasks, torch._foreach_div(sums, tasks)


def of_task(order, steps, inner_lr):
  """A function of weights and one task's batch to meta-gradient and loss, by torch.func."""

  def outer_loss(params, support_inputs, support_targets, query_inputs, query_targets):
    fast = params
    for _ in range(steps):
      grads = torch.func.grad(loss_fn)(fast, support_inputs, support_targets)
      if order == 1:
        grads = [g.detach() for g in grads]
      fast = [p - inner_lr * g for p, g in zip(fast, grads, strict=True)]
    return loss_fn(fast, query_inputs, query_targets)

  return torch.func.grad_and_value(outer_loss)


def torch_vmap(params, batch, options):
  """Loss and meta-gradient by torch.func, all tasks at once."""
  all_tasks = torch.func.vmap(of_task(options.order, options.steps, options.inner_lr), in_dims=(None, 0, 0, 0, 0))
  grads, losses = all_tasks(params, *batch)
  return losses.mean(), [g.mean(0) for g in grads]


@functools.cache
def compiled(order, steps, inner_lr):
  return torch.compile(of_task(order, steps, inner_lr), fullgraph=True)


@torch.no_grad()
def torch_compile(params, batch, options):
  """Loss and meta-gradient by torch.func and torch.compile, task by task."""
  function = compiled(options.order, options.steps, options.inner_lr)
  total, sums = 0.0, [torch.zeros_like(p) for p in params]
  for task in zip(*batch, strict=True):
    grads, loss = function(params, *task)
    torch._foreach_add_(sums, list(grads))
    total += loss
  tasks = len(batch[0])
  return total / tasks, torch._foreach_div(sums, tasks)


def resident_mb():
  """What lies in memory of this process now."""
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def peak_mb():
  """The most that has."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  implementations = {f.__name__: f for f in (torch_loop, torch_vmap, torch_compile)}
  parser.add_argument('--implementation', choices=implementations, required=True)
  parser.add_argument('--order', type=int, choices=(1, 2), default=2)
  parser.add_argument('--inputs', required=True)
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--inner_lr', type=float, default=0.01)
  parser.add_argument('--device', default='cpu')
  options = parser.parse_args()
  device = torch.device(options.device)
  if device.type == 'cpu':
    keep_freed_memory()
  before = resident_mb()
  params, batch = load(options.inputs, device)
  meta_gradient = implementations[options.implementation]
  optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)

  def step():
    start = time.perf_counter()
    loss, grads = meta_gradient(params, batch, options)
    for p, g in zip(params, grads, strict=True):
      p.grad = g
    optimizer.step()
    if device.type == 'cuda':
      torch.cuda.synchronize()
    return time.perf_counter() - start, float(loss), grads

  seconds, loss, grads = step()
  norm = float(torch.stack([g.norm() for g in grads]).norm())
  ready = {'ready': True, 'torch': torch.__version__, 'threads': torch.get_num_threads()}
  print(json.dumps({**ready, 'loss': loss, 'grad_norm': norm, 'compile_s': seconds}), flush=True)
  for line in sys.stdin:
    if line.strip() == 'memory':
      answer = {'peak_mb': peak_mb() - before if device.type == 'cpu' else torch.cuda.max_memory_allocated() / 1e6}
    else:
      seconds, loss, _ = step()
      answer = {'seconds': seconds, 'loss': loss}
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()

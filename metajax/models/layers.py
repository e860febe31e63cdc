"""Layers that stay fast when every task has weights of its own.

Under `vmap` over tasks an ordinary convolution becomes a grouped one, and its gradients reverse windows: both are slow
spots of XLA. Here a convolution is a matrix product, and so are all its derivatives; pooling is a reshape and a
maximum; normalisation runs after pooling, on a quarter of the pixels.
"""

import flax.linen as nn
import jax.numpy as jnp


def conv3x3(x, kernel, stride=1):
  """3x3 convolution with one pixel of zero padding, as patches times a matrix.

  Args:
    x: (n, h, w, c).
    kernel: (3, 3, c, features).
    stride: pixels between outputs.

  Returns:
    (n, ceil(h / stride), ceil(w / stride), features).
  """
  h, w, c = x.shape[1:]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [padded[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)]
  patches = jnp.concatenate(shifted, axis=-1)  # (n, h', w', 9 c), ordered as the kernel's rows
  return patches @ kernel.reshape(9 * c, -1)


def max_pool2x2(x):
  """2x2 max pooling with stride 2 of (n, h, w, c); an odd last row or column is dropped."""
  n, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class BatchNormReluPool(nn.Module):
  """Batch normalisation (Ioffe & Szegedy 2015), ReLU and, if asked, 2x2 max pooling, in that order.

  Which statistics normalise is the caller's choice, by what `apply` is given, so that there is no flag to forget:

  - 'batch_stats' mutable, or absent: those of this batch; if mutable, the collection returns them as they are (the
    learner averages them if it wants running statistics).
  - 'batch_stats' given and not mutable: the given ones, each example by itself.

  Pooling commutes with increasing functions, so it comes first and the rest runs on a quarter of the pixels: exact,
  with the sign of the scale taken care of.
  """

  pool: bool = False
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x):
    """Maps (n, h, w, c) to the same shape, or (n, h // 2, w // 2, c)."""
    features = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (features,))
    bias = self.param('bias', nn.initializers.zeros, (features,))
    mutable = self.is_mutable_collection('batch_stats')
    if self.has_variable('batch_stats', 'mean') and not mutable:
      mean, var = self.get_variable('batch_stats', 'mean'), self.get_variable('batch_stats', 'var')
    else:
      mean = jnp.mean(x, axis=(0, 1, 2))
      var = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
      if mutable:  # before training: a standard normal, as in Flax, whatever batch `init` happened to see
        self.put_variable('batch_stats', 'mean', jnp.zeros(features) if self.is_initializing() else mean)
        self.put_variable('batch_stats', 'var', jnp.ones(features) if self.is_initializing() else var)
    if self.pool:
      sign = jnp.where(scale >= 0, 1.0, -1.0)
      x = sign * max_pool2x2(sign * x)
    return nn.relu((x - mean) * (scale / jnp.sqrt(var + self.epsilon)) + bias)

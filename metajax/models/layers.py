"""What few-shot networks are made of: batch normalisation, blocks of convolution, normalisation and pooling, DropBlock.

Which statistics normalise is the caller's choice, by what `apply` is given, so that there is no flag to forget:

- 'batch_stats' mutable, or absent: those of this batch; if mutable, the collection returns them as they are (the
  learner averages them if it wants running statistics).
- 'batch_stats' given and not mutable: the given ones, each example by itself.

So it is with dropout, plain or DropBlock: it is active if and only if `rngs` has a key 'dropout'. What grows with the
number of such calls reads it from the collection 'counters' and, where that is mutable, counts on.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metajax.errors import UserError
from metajax.models import convolution

_FEW_CHANNELS = 4  # up to so many, convolution and pooling are one


class BatchNorm(nn.Module):
  """Batch normalisation (Ioffe & Szegedy 2015) with the statistics that the top of this file describes.

  Attributes:
    epsilon: added to the variance.
    affine: whether it has parameters, a scale and a bias of each feature.
  """

  epsilon: float = 1e-5
  affine: bool = True

  @nn.compact
  def __call__(self, x):
    """Maps (n, h, w, features) to the same shape."""
    scale, bias = _affine(self, x.shape[-1]) if self.affine else (1.0, 0.0)
    statistics = _chosen_statistics(self, x.shape[-1], lambda: _statistics(x))
    factor, summand = _factor_and_summand(statistics, scale, bias, self.epsilon)
    return x * factor + summand


class ConvBlock(nn.Module):
  """3x3 convolution, batch normalisation, ReLU or LeakyReLU, and downsampling, in that order.

  Pooling commutes with increasing functions, so it comes before normalisation and ReLU, which then run on a quarter of
  the pixels: exact, with the minimum in place of the maximum where the scale is negative. Parameters and statistics are
  float32 whatever `dtype` is.

  Attributes:
    downsample: 'pool' (2x2 maximum), 'stride' (of the convolution, 2) or 'no'.
    negative_slope: of LeakyReLU, at least 0; 0 for ReLU.
    epsilon: added to the variance.
    dtype: of products and activations; None for that of the arguments.
  """

  downsample: str = 'pool'
  negative_slope: float = 0.0
  epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, x, kernel):
    """Maps (n, h, w, c) and a kernel (3, 3, c, features) to (n, h', w', features); sizes are halved, or kept."""
    features = kernel.shape[-1]
    scale, bias = _affine(self, features)
    dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    x, h, w = x.astype(dtype), *x.shape[1:3]

    if self.downsample == 'pool' and x.shape[-1] <= _FEW_CHANNELS and h % 2 == w % 2 == 0:
      x = convolution.squares(x)
      statistics = _chosen_statistics(self, features, lambda: _product_statistics(x, kernel.astype(dtype)))
      factor, summand = _factor_and_summand(statistics, scale, bias, self.epsilon)
      kernel = convolution.pooling_kernel((kernel * factor).astype(dtype))
      return convolution.pooled_relu(x, kernel, summand, self.negative_slope).astype(dtype)

    x = _convolved(x, kernel.astype(dtype), self.downsample)
    statistics = _chosen_statistics(self, features, lambda: _statistics(x))
    if self.downsample == 'pool':
      x = convolution.top2x2(x, jnp.where(scale >= 0, 1, -1).astype(dtype))
    factor, summand = _factor_and_summand(statistics, scale, bias, self.epsilon)
    return convolution.relu(x * factor + summand, self.negative_slope).astype(dtype)


class LayerNormBlock(nn.Module):
  """`ConvBlock` with layer normalisation (Ba et al. 2016) in place of that of batches: of each image by itself.

  As in MAML++ (Antoniou et al. 2019): over all pixels and channels, without a scale, with a bias of each pixel and
  channel. The convolution's own bias does not cancel here. Attributes are those of `ConvBlock`.
  """

  downsample: str = 'pool'
  negative_slope: float = 0.0
  epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, x, kernel, bias):
    """Maps (n, h, w, c), a kernel (3, 3, c, features) and its bias (features,) to (n, h', w', features)."""
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    x = _convolved(x, kernel, self.downsample) + bias
    x = _normalised_images(x, self.epsilon) + self.param('bias', nn.initializers.zeros, x.shape[1:])
    x = convolution.relu(x, self.negative_slope).astype(kernel.dtype)
    return convolution.max_pool2x2(x) if self.downsample == 'pool' else x


class DropBlock(nn.Module):
  """DropBlock (Ghiasi et al. 2018): drops squares of each channel, ever more of them up to `rate` of all entries.

  As in MetaOptNet's released code, whose counter counted validation's calls too. Active as the top of this file
  describes; 'calls' in 'counters' is the number of calls so far, float32 so that it can be averaged over tasks like
  statistics.

  Attributes:
    rate: of the entries dropped at last.
    block_size: side of the squares, in pixels.
    ramp: the call, counted from 1, that reaches `rate`; those before approach it in equal steps.
  """

  rate: float
  block_size: int
  ramp: int

  @nn.compact
  def __call__(self, x):
    """Maps (n, h, w, c) to the same shape.

    Raises:
      UserError: a square does not fit into the image.
    """
    h, w = x.shape[1:3]
    if self.block_size > min(h, w):
      raise UserError(f'DropBlock: a map of {h} x {w} pixels has no room for squares of block_size = {self.block_size}')
    if self.is_initializing():
      self.put_variable('counters', 'calls', jnp.zeros((), jnp.float32))
    elif self.has_rng('dropout'):
      calls = self.variable('counters', 'calls').value + 1
      if self.is_mutable_collection('counters'):
        self.put_variable('counters', 'calls', calls)
      probability = seed_probability(ramped(self.rate, calls, self.ramp), self.block_size, h, w)
      n, c, margin = x.shape[0], x.shape[-1], self.block_size - 1
      seeds = jax.random.bernoulli(self.make_rng('dropout'), probability, (n, h - margin, w - margin, c))
      x = dropped(x, seeds, self.block_size)
    return x


def ramped(rate, calls, ramp):
  """Growth from 0 by equal steps to `rate`, which it has from `ramp` calls on."""
  return rate * jnp.minimum(calls / ramp, 1)


def seed_probability(rate, block_size, h, w):
  """Of a pixel to begin a square, among those where one fits, so that about `rate` of h x w pixels are dropped.

  Ghiasi et al. 2018, equation 1; it neglects that squares overlap, so that somewhat fewer are.
  """
  return rate / block_size**2 * (h * w) / ((h - block_size + 1) * (w - block_size + 1))


def dropped(x, seeds, block_size):
  """x (n, h, w, c) without the squares that begin at `seeds`, the rest scaled up by the share that is left.

  Args:
    x: (n, h, w, c).
    seeds: (n, h - block_size + 1, w - block_size + 1, c), True at the upper left pixel of a square.
    block_size: side of the squares.

  Returns:
    (n, h, w, c).
  """
  h, w = x.shape[1:3]
  margin = (block_size - 1, block_size - 1)
  seeds = jnp.pad(seeds, ((0, 0), margin, margin, (0, 0)))
  rows = functools.reduce(jnp.logical_or, (seeds[:, i : i + h] for i in range(block_size)))
  drop = functools.reduce(jnp.logical_or, (rows[:, :, i : i + w] for i in range(block_size)))
  left = jnp.maximum(x.size - jnp.sum(drop), 1)  # where nothing is left, derivatives are 0 and not NaN
  return jnp.where(drop, 0, x * (x.size / left).astype(x.dtype))


def check_size(x, halvings):
  """Raises UserError where images (n, h, w, c) have too few pixels to be halved so often."""
  h, w = x.shape[1:3]
  if min(h, w) < 2**halvings:
    needed = f'at least {2**halvings} x {2**halvings} are needed'
    raise UserError(f'images of {h} x {w} pixels are too small to be halved {halvings} times: {needed}')


def _convolved(x, kernel, downsample):
  return convolution.strided_conv3x3(x, kernel) if downsample == 'stride' else convolution.conv3x3(x, kernel)


def _affine(module, features):
  """The parameters scale and bias of a normalising module."""
  scale = module.param('scale', nn.initializers.ones, (features,))
  return scale, module.param('bias', nn.initializers.zeros, (features,))


def _chosen_statistics(module, features, of_batch):
  """Mean and variance (features,) that normalise: those of `of_batch()`, or those given."""
  mutable = module.is_mutable_collection('batch_stats')
  if module.has_variable('batch_stats', 'mean') and not mutable:
    return module.get_variable('batch_stats', 'mean'), module.get_variable('batch_stats', 'var')
  mean, var = of_batch()
  if mutable:  # before training: a standard normal, as in Flax, whatever batch `init` happened to see
    module.put_variable('batch_stats', 'mean', jnp.zeros(features) if module.is_initializing() else mean)
    module.put_variable('batch_stats', 'var', jnp.ones(features) if module.is_initializing() else var)
  return mean, var


def _statistics(x):
  """Mean and variance over examples and pixels of (n, h, w, features), (features,) each."""
  # The mean of squares in place of squared differences: nothing of the size of x is kept for the derivatives but x.
  x = _at_least_float32(x)
  mean = jnp.mean(x, axis=(0, 1, 2))
  return mean, jnp.maximum(jnp.mean(jnp.square(x), axis=(0, 1, 2)) - jnp.square(mean), 0)


def _normalised_images(x, epsilon):
  """Each image of (n, h, w, features) less its mean, by its standard deviation."""
  x = _at_least_float32(x)
  x = x - jnp.mean(x, axis=(1, 2, 3), keepdims=True)
  return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=(1, 2, 3), keepdims=True) + epsilon)


def _product_statistics(squares, kernel):
  """Mean and variance of all outputs of a convolution with the kernel (3, 3, c, features), without computing them.

  With the patches' mean m and covariance C, an output of weights k has mean m k and variance k' C k.
  """
  kernel = convolution.pooling_kernel(_at_least_float32(kernel))
  center, covariance = convolution.patch_moments(_at_least_float32(squares))
  means = jnp.matmul(center, kernel, precision='highest').reshape(4, -1)
  variances = jnp.sum(kernel * jnp.matmul(covariance, kernel, precision='highest'), axis=0).reshape(4, -1)
  mean = jnp.mean(means, axis=0)
  return mean, jnp.maximum(jnp.mean(variances + jnp.square(means - mean), axis=0), 0)


def _factor_and_summand(statistics, scale, bias, epsilon):
  """Normalisation as x * factor + summand, (features,) each: fewer passes over x than with its mean taken off first."""
  mean, var = statistics
  factor = scale / jnp.sqrt(var + epsilon)
  return factor, bias - mean * factor


def _at_least_float32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))

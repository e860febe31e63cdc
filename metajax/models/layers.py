"""What few-shot networks are made of: batch normalisation, and blocks of convolution, normalisation and pooling.

Which statistics normalise is the caller's choice, by what `apply` is given, so that there is no flag to forget:

- 'batch_stats' mutable, or absent: those of this batch; if mutable, the collection returns them as they are (the
  learner averages them if it wants running statistics).
- 'batch_stats' given and not mutable: the given ones, each example by itself.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from metajax.models import convolution

_FEW_CHANNELS = 4  # up to so many, convolution and pooling are one


class BatchNorm(nn.Module):
  """Batch normalisation (Ioffe & Szegedy 2015) with the statistics that the top of this file describes."""

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x):
    """Maps (n, h, w, features) to the same shape."""
    scale, bias = _affine(self, x.shape[-1])
    mean, var = _chosen_statistics(self, x.shape[-1], lambda: _statistics(x))
    return (x - mean) * (scale / jnp.sqrt(var + self.epsilon)) + bias


class ConvBlock(nn.Module):
  """3x3 convolution, batch normalisation, ReLU and downsampling, in that order.

  Pooling commutes with increasing functions, so it comes before normalisation and ReLU, which then run on a quarter of
  the pixels: exact, with the minimum in place of the maximum where the scale is negative. Parameters and statistics are
  float32 whatever `dtype` is.

  Attributes:
    downsample: 'pool' (2x2 maximum), 'stride' (of the convolution, 2) or 'no'.
    epsilon: added to the variance.
    dtype: of products and activations; None for that of the arguments.
  """

  downsample: str = 'pool'
  epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, x, kernel):
    """Maps (n, h, w, c) and a kernel (3, 3, c, features) to (n, h', w', features); sizes are halved, or kept."""
    features = kernel.shape[-1]
    scale, bias = _affine(self, features)
    dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    sign = jnp.where(scale >= 0, 1, -1).astype(dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    n, h, w, c = x.shape

    if self.downsample == 'pool' and c <= _FEW_CHANNELS and h % 2 == w % 2 == 0:
      patches, kernel = convolution.pooling_patches(x), convolution.pooling_kernel(kernel)
      mean, var = _chosen_statistics(self, features, lambda: _product_statistics(patches, kernel))
      x = convolution.top_of_product(patches, kernel, sign).reshape(n, h // 2, w // 2, features)
    else:
      x = convolution.strided_conv3x3(x, kernel) if self.downsample == 'stride' else convolution.conv3x3(x, kernel)
      mean, var = _chosen_statistics(self, features, lambda: _statistics(x))
      if self.downsample == 'pool':
        x = convolution.top2x2(x, sign)
    return nn.relu((x - mean) * (scale / jnp.sqrt(var + self.epsilon)) + bias).astype(dtype)


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


def _product_statistics(patches, kernel):
  """Mean and variance of all outputs of patches (rows, k) times kernel (k, 4 * features), without the product.

  With the patches' mean m and covariance C, an output of weights k has mean m k and variance k' C k.
  """
  patches, kernel = _at_least_float32(patches), _at_least_float32(kernel)
  center = jnp.mean(patches, axis=0)
  means = (center @ kernel).reshape(4, -1)
  variances = jnp.sum(kernel * (convolution.second_moments(patches, center) @ kernel), axis=0).reshape(4, -1)
  mean = jnp.mean(means, axis=0)
  return mean, jnp.mean(variances + jnp.square(means - mean), axis=0)


def _at_least_float32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))

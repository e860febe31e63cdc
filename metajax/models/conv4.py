"""The four-block convolutional network of the few-shot literature."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from metajax.errors import UserError
from metajax.models import layers


class Conv4(nn.Module):
  """Four blocks of 3x3 convolution, normalisation, (Leaky)ReLU and downsampling, then a linear head.

  Finn et al. 2017, section 5.2: Omniglot uses 64 filters and strided convolutions, the last 2x2 map averaged to 64
  features; mini-ImageNet 32 filters and max pooling, flattened to 800 features. Glorot-uniform kernels, zero biases,
  as in the original. The convolutions have no bias in front of batch normalisation, where it would cancel.
  """

  num_outputs: int | None
  width: int = 64
  downsample: str = 'pool'
  norm: str = 'batch'
  negative_slope: float = 0.0
  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    """Maps images (n, h, w, c) to logits (n, num_outputs), or to features (n, d) if there are no outputs."""
    pool = self.downsample == 'pool'
    if pool:
      layers.check_size(x, halvings=4)
    block = layers.LayerNormBlock if self.norm == 'layer' else layers.ConvBlock
    for i in range(4):
      conv = [self.param(f'conv{i}', nn.initializers.glorot_uniform(), (3, 3, x.shape[-1], self.width))]
      if self.norm == 'layer':
        conv.append(self.param(f'conv{i}_bias', nn.initializers.zeros, (self.width,)))
      x = block(self.downsample, self.negative_slope, dtype=self.dtype, name=f'norm{i}')(x, *conv)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x.reshape(x.shape[0], -1) if pool else x.mean(axis=(1, 2))
    if self.num_outputs is None:
      return x
    return nn.Dense(self.num_outputs, kernel_init=nn.initializers.glorot_uniform(), name='head')(x)


def make(num_outputs, *, width=64, downsample='pool', norm='batch', negative_slope=0.0, bfloat16=False):
  """Conv4 of `width` filters, without a head if `num_outputs` is None.

  `downsample` is 'pool' (2x2 max pooling, flattened) or 'stride' (2, averaged); `norm` is 'batch', or 'layer' for layer
  normalisation behind convolutions with a bias. `negative_slope` makes ReLU LeakyReLU, with 0.01 in MAML++ (Antoniou et
  al. 2019). `bfloat16` is for products and activations of the four blocks; parameters, statistics and the head stay
  float32.
  """
  if downsample not in ('pool', 'stride'):
    raise UserError(f"downsample is 'pool' or 'stride', not {downsample!r}")
  if norm not in ('batch', 'layer'):
    raise UserError(f"norm is 'batch' or 'layer', not {norm!r}")
  if width < 1:
    raise UserError(f'width = {width}: at least 1 is needed')
  if not 0 <= negative_slope < 1:
    raise UserError(f'negative_slope = {negative_slope}: from 0 to below 1 is needed')
  return Conv4(num_outputs, width, downsample, norm, negative_slope, jnp.bfloat16 if bfloat16 else None)

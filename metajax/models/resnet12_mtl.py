"""The ResNet-12 of Meta-Transfer Learning (Sun et al. 2019), as their TensorFlow code has it; see also `resnet12`."""

import flax.linen as nn
import jax.numpy as jnp

from metajax.models import convolution, layers, resnet12

_GLOROT = nn.initializers.glorot_uniform()


class ResNet12(nn.Module):
  """Four residual blocks, each of which halves the image, an average over what is left, then a linear head or none.

  The average is over all pixels, in the original over 5 x 5: the same 512 features from 80 to 95 pixels, and here from
  images of other sizes too. Dropout follows each block, active if `apply` is given a key 'dropout', see `layers`.

  Attributes: see `make`; `num_outputs` None for no head.
  """

  num_outputs: int | None
  widths: tuple[int, ...] = (64, 128, 256, 512)
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x):
    """Maps images (n, h, w, c) to logits (n, num_outputs); without a head to features (n, widths[-1])."""
    layers.check_size(x, halvings=len(self.widths))
    for i, width in enumerate(self.widths):
      x = convolution.max_pool2x2(ResidualBlock(width, name=f'block{i}')(x))
      x = nn.Dropout(self.dropout)(x, deterministic=not self.has_rng('dropout'))
    x = x.mean(axis=(1, 2))
    return x if self.num_outputs is None else nn.Dense(self.num_outputs, kernel_init=_GLOROT, name='head')(x)


class ResidualBlock(nn.Module):
  """3x3 convolutions with bias, normalisation and LeakyReLU, one after the other, plus a 1x1 convolution alone.

  Normalisation has no parameters: the original's has an offset that is never trained and stays 0. Statistics of the
  batch cancel the biases, and what shifts them (see `scale_shift`), up to rounding.

  Attributes:
    width: channels of the result.
    convolutions: how many of 3x3.
  """

  width: int
  convolutions: int = 3

  @nn.compact
  def __call__(self, x):
    """Maps (n, h, w, c) to (n, h, w, width)."""
    kernel = self.param('shortcut', _GLOROT, (x.shape[-1], self.width))
    shortcut = jnp.matmul(*nn.dtypes.promote_dtype(x, kernel))
    for i in range(self.convolutions):
      kernel = self.param(f'conv{i}', _GLOROT, (3, 3, x.shape[-1], self.width))
      bias = self.param(f'conv{i}_bias', nn.initializers.zeros, (self.width,))
      x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
      x = layers.BatchNorm(epsilon=1e-3, affine=False, name=f'norm{i}')(convolution.conv3x3(x, kernel) + bias)
      x = nn.leaky_relu(x, 0.1)
    return x + shortcut


def make(num_outputs, *, widths=(64, 128, 256, 512), dropout=0.1):
  """Meta-Transfer Learning's ResNet-12 with a linear head; with None for `num_outputs`, without.

  Args:
    num_outputs: of the head, or None for features.
    widths: channels of the four blocks.
    dropout: probability of dropout; theirs is 0.1 in pre-training and 0 afterwards.

  Raises:
    UserError: a setting out of its range; from `init` on, images too small for the blocks.
  """
  resnet12.check(widths, dropout)
  return ResNet12(num_outputs, tuple(widths), dropout)

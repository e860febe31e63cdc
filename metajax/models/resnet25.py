"""The residual network of 25 layers of Meta-Transfer Learning (Sun et al. 2019), as their PyTorch code has it."""

import flax.linen as nn
import jax.numpy as jnp

from metajax.errors import UserError
from metajax.models import convolution, layers

_STAGES = 3
_KAIMING = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # He et al. 2015, of the outputs
_KAIMING_OF_INPUTS = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class ResNet25(nn.Module):
  """A convolution, three stages of residual blocks, each of which halves the image, an average, a linear head or none.

  The average is over all pixels, in the original over 10 x 10: the same 640 features of 80 pixels, and here of images
  of other sizes too.

  Attributes: see `make`; `num_outputs` None for no head.
  """

  num_outputs: int | None
  widths: tuple[int, ...] = (80, 160, 320, 640)
  blocks: int = 4

  @nn.compact
  def __call__(self, x):
    """Maps images (n, h, w, c) to logits (n, num_outputs); without a head to features (n, widths[-1])."""
    layers.check_size(x, halvings=_STAGES)
    kernel = self.param('stem', _KAIMING, (3, 3, x.shape[-1], self.widths[0]))
    # The original draws the bias at random, to no effect: normalisation takes it off.
    bias = self.param('stem_bias', nn.initializers.zeros, (self.widths[0],))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    x = nn.relu(layers.BatchNorm(name='stem_norm')(convolution.conv3x3(x, kernel) + bias))
    for i, width in enumerate(self.widths[1:]):
      for j in range(self.blocks):
        x = ResidualBlock(width, halve=j == 0, name=f'stage{i}_block{j}')(x)
    x = x.mean(axis=(1, 2))
    return x if self.num_outputs is None else nn.Dense(self.num_outputs, kernel_init=_KAIMING_OF_INPUTS, name='head')(x)


class ResidualBlock(nn.Module):
  """Two 3x3 convolutions with batch normalisation, and a shortcut: x itself or, where sizes are halved, of 1x1.

  Attributes:
    width: channels of the result; without `halve` those of x.
    halve: the first convolution and the shortcut have stride 2.
  """

  width: int
  halve: bool

  @nn.compact
  def __call__(self, x):
    """Maps (n, h, w, c) to (n, ceil(h / 2), ceil(w / 2), width), or to its own shape without `halve`."""
    shortcut = x
    if self.halve:
      kernel = self.param('shortcut', _KAIMING, (x.shape[-1], self.width))
      shortcut = jnp.matmul(*nn.dtypes.promote_dtype(x[:, ::2, ::2], kernel))
      shortcut = layers.BatchNorm(name='shortcut_norm')(shortcut)
    for i in range(2):
      convolve = convolution.strided_conv3x3 if self.halve and i == 0 else convolution.conv3x3
      kernel = self.param(f'conv{i}', _KAIMING, (3, 3, x.shape[-1], self.width))
      x = layers.BatchNorm(name=f'norm{i}')(convolve(*nn.dtypes.promote_dtype(x, kernel)))
      x = nn.relu(x if i == 0 else x + shortcut)
    return x


def make(num_outputs, *, widths=(80, 160, 320, 640), blocks=4):
  """ResNet-25 with a linear head; with None for `num_outputs`, without.

  Args:
    num_outputs: of the head, or None for features.
    widths: channels of the first convolution and of the three stages.
    blocks: residual blocks of each stage.

  Raises:
    UserError: a setting out of its range; from `init` on, images too small for the stages.
  """
  if len(widths) != 1 + _STAGES or min(widths) < 1:
    raise UserError(f'widths = {tuple(widths)}: four are needed, each at least 1')
  if blocks < 1:
    raise UserError(f'blocks = {blocks}: at least 1 is needed')
  return ResNet25(num_outputs, tuple(widths), blocks)

"""The residual network of twelve layers of the few-shot literature, as MetaOptNet (Lee et al. 2019) has it."""

import flax.linen as nn
import jax.numpy as jnp

from metajax.errors import UserError
from metajax.models import convolution, layers

_BLOCKS = 4
_KAIMING = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # He et al. 2015, of the outputs


class ResNet12(nn.Module):
  """Four residual blocks, each of which halves the image, then a linear head or none.

  Lee et al. 2019, section 4.1: plain dropout follows the first two blocks, DropBlock the others; both are active if
  `apply` is given a key 'dropout', see `layers`. The last map is flattened: 16,000 features of 84x84 pixels, 2,560 of
  32x32. DropBlock's ramp counts passes of training: prototypical networks make two a meta-update, MAML one.

  Attributes: see `make`; `num_outputs` None for no head.
  """

  num_outputs: int | None
  widths: tuple[int, ...] = (64, 160, 320, 640)
  dropout: float = 0.1
  block_size: int = 2
  ramp: int = 40_000
  pool: bool = False

  @nn.compact
  def __call__(self, x):
    """Maps images (n, h, w, c) to logits (n, num_outputs); without a head to features (n, d)."""
    layers.check_size(x, halvings=_BLOCKS)
    for i, width in enumerate(self.widths):
      x = ResidualBlock(width, name=f'block{i}')(x)
      if self.dropout and i < 2:
        x = nn.Dropout(self.dropout)(x, deterministic=not self.has_rng('dropout'))
      elif self.dropout:
        x = layers.DropBlock(self.dropout, self.block_size, self.ramp, name=f'drop{i}')(x)
    x = x.mean(axis=(1, 2)) if self.pool else x.reshape(x.shape[0], -1)
    if self.num_outputs is None:
      return x
    return nn.Dense(self.num_outputs, kernel_init=nn.initializers.glorot_uniform(), name='head')(x)


class ResidualBlock(nn.Module):
  """Three 3x3 convolutions beside one of 1x1, each with batch normalisation; their sum is pooled.

  Pooling commutes with increasing functions, so it comes before the last LeakyReLU, which then runs on a quarter of the
  pixels: exact. The convolutions have no bias: in front of batch normalisation it would cancel.
  """

  width: int

  @nn.compact
  def __call__(self, x):
    """Maps (n, h, w, c) to (n, h // 2, w // 2, width)."""
    kernel = self.param('shortcut', _KAIMING, (x.shape[-1], self.width))
    shortcut = layers.BatchNorm(name='shortcut_norm')(jnp.matmul(*nn.dtypes.promote_dtype(x, kernel)))
    for i in range(3):
      kernel = self.param(f'conv{i}', _KAIMING, (3, 3, x.shape[-1], self.width))
      x = layers.BatchNorm(name=f'norm{i}')(convolution.conv3x3(*nn.dtypes.promote_dtype(x, kernel)))
      if i < 2:
        x = nn.leaky_relu(x, 0.1)
    return nn.leaky_relu(convolution.max_pool2x2(x + shortcut), 0.1)


def make(num_outputs, *, widths=(64, 160, 320, 640), dropout=0.1, block_size=2, ramp=40_000, pool=False):
  """ResNet-12 with a linear head; with None for `num_outputs`, without.

  Args:
    num_outputs: of the head, or None for features.
    widths: channels of the four blocks.
    dropout: probability of dropout and DropBlock.
    block_size: side of DropBlock's squares in pixels of the map; MetaOptNet has 5 for mini- and tiered-ImageNet, 2 for
      CIFAR.
    ramp: passes over which DropBlock's probability grows from 0 to `dropout`.
    pool: average the last map in place of flattening it.

  Raises:
    UserError: a setting out of its range; from `init` on, images too small for the blocks or for DropBlock.
  """
  check(widths, dropout)
  for name, value in (('block_size', block_size), ('ramp', ramp)):
    if value < 1:
      raise UserError(f'{name} = {value}: at least 1 is needed')
  return ResNet12(num_outputs, tuple(widths), dropout, block_size, ramp, pool)


def check(widths, dropout):
  """Raises UserError for settings out of their range: four widths from 1 on, a probability below 1."""
  if len(widths) != _BLOCKS or min(widths) < 1:
    raise UserError(f'widths = {tuple(widths)}: four are needed, each at least 1')
  if not 0 <= dropout < 1:
    raise UserError(f'dropout = {dropout}: from 0 to below 1 is needed')

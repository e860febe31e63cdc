"""The ResNet-18 of Meta-Transfer Learning (Sun et al. 2019), as their TensorFlow code has it; see also `resnet12_mtl`.

Images are resized otherwise than there: by where pixels have their centres, in TensorFlow 1 their upper left corners,
which moves 84 pixels made 224 by 0.3 of one; and images larger than `size` are smoothed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from metajax.errors import UserError
from metajax.models import convolution, layers, resnet12, resnet12_mtl

_GLOROT = nn.initializers.glorot_uniform()


class ResNet18(nn.Module):
  """A 7x7 convolution, four stages of two residual blocks, an average over what is left, then a linear head or none.

  The convolution, followed by pooling, and each stage halve the image, odd sizes upwards. The average is over all
  pixels, in the original over 7 x 7: the same of images of 224. Dropout follows the first pooling and each block (with
  its pooling), active if `apply` is given a key 'dropout', see `layers`.

  Attributes: see `make`; `num_outputs` None for no head.
  """

  num_outputs: int | None
  widths: tuple[int, ...] = (64, 128, 256, 512)
  size: int = 224
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x):
    """Maps images (n, h, w, c) to logits (n, num_outputs); without a head to features (n, widths[-1])."""
    if self.size:
      x = jax.image.resize(x, (x.shape[0], self.size, self.size, x.shape[-1]), 'bilinear')
    layers.check_size(x, halvings=1 + len(self.widths))
    drop = nn.Dropout(self.dropout, deterministic=not self.has_rng('dropout'))
    kernel = self.param('stem', _GLOROT, (7, 7, x.shape[-1], self.widths[0]))
    bias = self.param('stem_bias', nn.initializers.zeros, (self.widths[0],))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    x = nn.leaky_relu(layers.BatchNorm(epsilon=1e-3, affine=False, name='stem_norm')(x + bias), 0.1)
    x = drop(nn.max_pool(x, (3, 3), (2, 2), 'SAME'))
    for i, width in enumerate(self.widths):
      x = drop(resnet12_mtl.ResidualBlock(width, convolutions=2, name=f'stage{i}_block0')(x))
      x = resnet12_mtl.ResidualBlock(width, convolutions=2, name=f'stage{i}_block1')(x)
      x = drop(_max_pool2x2(x))
    x = x.mean(axis=(1, 2))
    return x if self.num_outputs is None else nn.Dense(self.num_outputs, kernel_init=_GLOROT, name='head')(x)


def _max_pool2x2(x):
  """2x2 max pooling with stride 2 of (n, h, w, c); an odd last row or column is pooled by itself."""
  h, w = x.shape[1:3]
  return convolution.max_pool2x2(jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-jnp.inf))


def make(num_outputs, *, widths=(64, 128, 256, 512), size=224, dropout=0.1):
  """Meta-Transfer Learning's ResNet-18 with a linear head; with None for `num_outputs`, without.

  Args:
    num_outputs: of the head, or None for features.
    widths: channels of the four stages; the 7x7 convolution has those of the first.
    size: side in pixels to which images are resized bilinearly first; 0 to leave them as they are.
    dropout: probability of dropout; theirs is 0.1 in pre-training and 0 afterwards.

  Raises:
    UserError: a setting out of its range; from `init` on, images, or `size`, too small for the stages.
  """
  resnet12.check(widths, dropout)
  if size < 0:
    raise UserError(f'size = {size}: pixels are needed, or 0 for images as they are')
  return ResNet18(num_outputs, tuple(widths), size, dropout)

"""The smallest network with all that learners tell apart: a convolution, normalisation and a head."""

import flax.linen as nn

from metajax.models import layers


class OneBlock(nn.Module):
  num_outputs: int | None

  @nn.compact
  def __call__(self, x):
    kernel = self.param('conv0', nn.initializers.glorot_uniform(), (3, 3, x.shape[-1], 2))
    x = layers.ConvBlock('stride', name='norm0')(x, kernel).mean((1, 2))
    return x if self.num_outputs is None else nn.Dense(self.num_outputs, name='head')(x)


def make(num_outputs):
  return OneBlock(num_outputs)

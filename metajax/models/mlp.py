"""Multi-layer perceptron, for regression and for quick checks."""

import flax.linen as nn


class MLP(nn.Module):
  """ReLU network on flattened inputs; Finn et al. 2017, section 5.1 uses two hidden layers of 40 for the sinusoid."""

  num_outputs: int | None
  hidden: tuple[int, ...] = (40, 40)

  @nn.compact
  def __call__(self, x):
    """Maps (n, ...) to (n, num_outputs), or to the last hidden layer (n, d) if there are no outputs."""
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden):
      x = nn.relu(nn.Dense(width, name=f'layer{i}')(x))
    return x if self.num_outputs is None else nn.Dense(self.num_outputs, name='head')(x)


def make(num_outputs, *, hidden=(40, 40)):
  """A ReLU network with layers of `hidden` units."""
  return MLP(num_outputs, tuple(hidden))

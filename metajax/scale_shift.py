"""Scaling and shifting of convolutions whose weights stay as they are (Sun et al. 2019).

Not the weights W and biases b of a trained network are learned, but a scale of each pair of an input and an output
channel, and a shift of each output channel (equation 6):

  SS(X; W, b; scale, shift) = (W * scale) X + (b + shift)

That is a matter of parameters alone: `apply` returns those with which the network computes just this. A parameter of
four dimensions is a kernel (h, w, c, features), one called 'shortcut' a 1x1 kernel (c, features); the bias is beside
it, with '_bias' after its name. So `models` names them; Flax's own convolutions call the two 'kernel' and 'bias'. In a
network without convolutions nothing is scaled.
"""

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from metajax import networks


def init(params, *, shortcuts=True, norm=False):
  """What is learned of a network, such that `apply` first leaves the network as it is.

  Args:
    params: nested dicts, the network's parameters.
    shortcuts: scale 1x1 convolutions too, as the authors' PyTorch code does and their TensorFlow code does not.
    norm: learn the parameters of normalisation too, as the PyTorch code does.

  Returns:
    {'scale', 'shift'} and, with `norm`, 'norm': parts of `params`, nested like it. Scales are ones (1, 1, c, features),
    for a 1x1 kernel (c, features), shifts zeros (features,).
  """
  params = flatten_dict(params)
  kernels = {path: p for path, p in params.items() if _is_kernel(path, p.shape, shortcuts)}
  learned = {
    'scale': {path: jnp.ones((1,) * (p.ndim - 2) + p.shape[-2:], p.dtype) for path, p in kernels.items()},
    'shift': {path: jnp.zeros_like(params[path]) for path in map(_bias, kernels) if path in params},
  }
  if norm:
    learned['norm'] = {path: p for path, p in params.items() if networks.is_norm(path)}
  return {kind: unflatten_dict(of_kind) for kind, of_kind in learned.items()}


def apply(frozen, learned):
  """The network's parameters with `learned` (see `init`) applied to `frozen`, nested and shaped like `frozen`."""
  frozen, learned = flatten_dict(frozen), {kind: flatten_dict(of_kind) for kind, of_kind in learned.items()}
  scaled = {path: frozen[path] * scale for path, scale in learned['scale'].items()}
  shifted = {path: frozen[path] + shift for path, shift in learned['shift'].items()}
  return unflatten_dict({**frozen, **scaled, **shifted, **learned.get('norm', {})})


def _is_kernel(path, shape, shortcuts):
  one = path[-1] == 'shortcut' or (len(shape) == 4 and shape[:2] == (1, 1))
  return shortcuts if one else len(shape) == 4


def _bias(kernel):
  """The path of the bias that belongs to the kernel of a path."""
  return *kernel[:-1], 'bias' if kernel[-1] == 'kernel' else f'{kernel[-1]}_bias'

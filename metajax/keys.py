"""Random keys from seeds."""

import jax
import numpy as np


def from_seed(seed):
  """`jax.random.key(seed)`, made on the host: that one compiles programs of its own when a run starts."""
  return jax.random.wrap_key_data(np.array(divmod(seed, 2**32), np.uint32), impl='threefry2x32')

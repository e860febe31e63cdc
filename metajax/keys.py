"""Random keys from seeds."""

import jax
import numpy as np


def from_seed(seed):
  """`jax.random.key(seed)`, made on the host: that one compiles programs of its own when a run starts."""
  return from_words(words(seed))


def words(seed):
  """A seed as (2,) uint32, to be sent to the device."""
  return np.array(divmod(seed, 2**32), np.uint32)


def from_words(words):
  """The key of a seed's two words."""
  return jax.random.wrap_key_data(words, impl='threefry2x32')

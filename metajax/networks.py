"""How learners call a network: which statistics normalise, and when dropout is active.

A network (see `models.layers`) decides both by what it is given: here is the one place that gives it.
"""

import jax

from metajax.errors import UserError

BATCH_NORM_MODES = ('transductive', 'support', 'running')


def check_batch_norm(mode):
  """Raises UserError for an unknown batch-norm mode."""
  if mode not in BATCH_NORM_MODES:
    raise UserError(f'batch_norm is one of {", ".join(BATCH_NORM_MODES)}, not {mode!r}')


def is_norm(path):
  """Whether a parameter, by its path in the pytree, belongs to a normalisation layer: one with 'norm' in its name."""
  return any('norm' in jax.tree_util.keystr((key,), simple=True).lower() for key in path)


def by_batch(model, params, model_state, inputs, rng=None):
  """Normalises by the batch's own statistics, with dropout if there is a key; returns outputs and a state with them."""
  return model.apply({'params': params, **model_state}, inputs, mutable=list(model_state), rngs=_rngs(rng))


def by_state(model, params, model_state, inputs, rng=None):
  """Normalises by the statistics in `model_state`, with dropout if there is a key; returns outputs and that state."""
  return model.apply({'params': params, **model_state}, inputs, rngs=_rngs(rng)), model_state


def split(rng):
  """Two keys of one; none of none."""
  return (None, None) if rng is None else jax.random.split(rng)


def updated(old, new, momentum=1.0):
  """The state after a training pass: statistics as a running average, everything else (counters) as it has become.

  Args:
    old: model_state before the pass.
    new: that which the pass returned.
    momentum: how much of the running average stays; 1 leaves it alone.
  """
  state = {**old, **jax.lax.stop_gradient(dict(new))}
  if 'batch_stats' in old:
    state['batch_stats'] = averaged(old['batch_stats'], state['batch_stats'], momentum)
  return state


def averaged(old, new, momentum):
  """Running averages after new statistics, which are taken as constants; with a momentum of 1 those before."""
  if momentum == 1:
    return old
  return jax.tree.map(lambda a, b: momentum * a + (1 - momentum) * jax.lax.stop_gradient(b), old, new)


def _rngs(rng):
  return {} if rng is None else {'dropout': rng}

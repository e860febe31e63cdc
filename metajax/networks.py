"""How learners call a network: which statistics normalise, and when dropout is active.

A network (see `models.layers`) decides both by what it is given: here is the one place that gives it. Statistics are
those of the batch where `batch_stats` may change, dropout has a key where it is active. A network whose `__call__` has
an argument `train` (or `training`, or the opposite `deterministic`) is told so, too.
"""

import inspect

import jax

from metajax.errors import UserError
from metajax.types import Embedding

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
  told = _told(model, rng is not None or 'batch_stats' in model_state)
  return model.apply({'params': params, **model_state}, inputs, mutable=list(model_state), rngs=_rngs(rng), **told)


def by_state(model, params, model_state, inputs, rng=None):
  """Normalises by the statistics in `model_state`, with dropout if there is a key; returns outputs and that state."""
  told = _told(model, rng is not None)
  return model.apply({'params': params, **model_state}, inputs, rngs=_rngs(rng), **told), model_state


def _told(model, train):
  """The argument that tells a network whether it trains, if it has one: {} or {name: bool}."""
  values = {'train': train, 'training': train, 'deterministic': not train}
  known = inspect.signature(type(model).__call__).parameters
  return {name: value for name, value in values.items() if name in known}


def embedding(model, batch_norm, network):
  """The Embedding of a network: its features, normalised as `batch_norm` says.

  Args:
    model: a Flax module, inputs (n, ...) -> features (n, d).
    batch_norm: 'running': by running averages; 'transductive': support and query images by their own statistics each;
      'support': both by those of the support images.
    network: (params, model_state) -> the network's weights.
  """

  def support(params, model_state, inputs):
    normalise = by_state if batch_norm == 'running' else by_batch
    return normalise(model, network(params, model_state), model_state, inputs)

  def query(params, model_state, inputs):
    normalise = by_batch if batch_norm == 'transductive' else by_state
    return normalise(model, network(params, model_state), model_state, inputs)[0]

  return Embedding(support, query)


def without_head(model):
  """A model that returns features; None of one that has no such form."""
  return model.clone(num_outputs=None) if hasattr(model, 'num_outputs') else None


def adopt(params, model_state, network, statistics):
  """Puts a network without its head, and its running statistics, in place of those of a learner (`Algorithm.adopt`).

  Args:
    params: with the network under 'embedding', or with its head under 'network' or as they are.
    model_state: as it is but for the statistics.
    network, statistics: to take their place.
  """
  if 'embedding' in params:
    params = {**params, 'embedding': network}
  elif 'network' in params:
    params = {**params, 'network': {**network, 'head': params['network']['head']}}
  else:
    params = {**network, 'head': params['head']}
  return params, {**model_state, **statistics}


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


def changing(model_state):
  """What of it training or the data may change: all but what is 'frozen'."""
  return {name: x for name, x in model_state.items() if name != 'frozen'}


def averaged(old, new, momentum):
  """Running averages after new statistics, which are taken as constants; with a momentum of 1 those before."""
  if momentum == 1:
    return old
  return jax.tree.map(lambda a, b: momentum * a + (1 - momentum) * jax.lax.stop_gradient(b), old, new)


def _rngs(rng):
  return {} if rng is None else {'dropout': rng}

"""The outer optimiser, from Optax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.errors import UserError


class Plateau(NamedTuple):
  """The state of schedule = 'plateau', which the loop sets by `with_factor`; an optimiser leaves it as it is."""

  factor: Any  # () float32, that of the step size


def _radam(learning_rate, *, weight_decay, mask):
  """RAdam (Liu et al. 2020), whose decay is apart from the gradient, as in torch_optimizer."""
  # Adaptive where rho >= 5: it is 4.996 at the fifth meta-update and 5.994 at the sixth, to two digits in float32.
  return optax.chain(
    optax.scale_by_radam(threshold=5.5),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


_OPTIMIZERS = {'adam': optax.adam, 'adamax': optax.adamax, 'adamw': optax.adamw, 'radam': _radam, 'sgd': optax.sgd}


def make(
  total_steps,
  *,
  name='adam',
  learning_rate=1e-3,
  schedule='constant',
  boundaries=(),
  rates=(),
  final_rate=0.0,
  hold=1,
  plateau_factor=0.1,
  plateau_patience=4,
  momentum=0.0,
  nesterov=False,
  weight_decay=0.0,
  clip=0.0,
  clamp=0.0,
  head_factor=1.0,
  only=(),
):
  """Builds the transformation of meta-gradients.

  Args:
    total_steps: meta-updates over which a schedule runs.
    name: adam, adamax, adamw, radam or sgd. Moments decay by 0.9 and 0.999; radam takes plain momentum, corrected for
      its start, for five meta-updates.
    learning_rate: the first meta-update's step size.
    schedule: 'constant', 'cosine' (to `final_rate` at `total_steps`), 'linear' (likewise), 'steps': after so many
      meta-updates as `boundaries` say, the step sizes that `rates` say; or 'plateau': falls with validation.
    final_rate: the step size that 'cosine' and 'linear' approach.
    hold: meta-updates over which they keep a step size; MAML++ (Antoniou et al. 2019) has the cosine of an epoch's
      first meta-update for all of it.
    plateau_factor, plateau_patience: of 'plateau', see `history.plateau_factor`.
    momentum, nesterov: of sgd.
    weight_decay: of every parameter but learned inner step sizes. Of adam, adamax and sgd it is part of the gradient,
      as in PyTorch; of adamw and radam it is not, as in PyTorch's and torch_optimizer's.
    clip: largest global norm of the meta-gradient; 0 for none.
    clamp: largest size of an entry of the meta-gradient, before `clip`; 0 for none. As in MAML++, entries of learned
      inner step sizes are left alone.
    head_factor: step sizes of the top-level parameter 'head' times this.
    only: names of what the outer loop learns, of parameters or of parts of the network, see `learned`; all if empty.

  Raises:
    UserError: an unknown name or schedule, or settings that do not go together; from `init`, parameters without a head
      where it has a factor, or without a part that is named.
  """
  if name not in _OPTIMIZERS:
    raise UserError(f'name is one of {", ".join(_OPTIMIZERS)}, not {name!r}')
  if not 0 <= final_rate <= learning_rate:
    raise UserError(f'final_rate = {final_rate}: from 0 to learning_rate = {learning_rate} is needed')
  if type(hold) is not int or hold < 1:
    raise UserError(f'hold = {hold}: a whole number from 1 on is needed')
  share = final_rate and final_rate / learning_rate
  schedules = {
    'constant': lambda: learning_rate,
    'cosine': lambda: _held(optax.cosine_decay_schedule(learning_rate, max(total_steps, 1), share), hold),
    'linear': lambda: _held(optax.linear_schedule(learning_rate, final_rate, max(total_steps, 1)), hold),
    'plateau': lambda: learning_rate,
    'steps': lambda: optax.join_schedules([optax.constant_schedule(r) for r in (learning_rate, *rates)], boundaries),
  }
  if schedule not in schedules:
    raise UserError(f'schedule is one of {", ".join(schedules)}, not {schedule!r}')
  numbers = all(type(b) is int for b in boundaries) and all(type(r) in (int, float) and r >= 0 for r in rates)
  if not numbers or len(boundaries) != len(rates) or (0, *boundaries) != tuple(sorted({0, *boundaries})):
    raise UserError(
      f'boundaries = {boundaries}, rates = {rates}: a rate for each boundary is needed, the latter in order'
    )
  if (schedule == 'steps') != bool(boundaries):
    raise UserError(f'boundaries = {boundaries} with schedule = {schedule!r}: those two go together')
  if (momentum or nesterov) and name != 'sgd':
    raise UserError(f'momentum and nesterov are of sgd, not of {name}')
  if nesterov and not momentum:
    raise UserError('nesterov is a kind of momentum: give momentum as well')
  if (final_rate or hold != 1) and schedule not in ('cosine', 'linear'):
    raise UserError(f"final_rate and hold are of schedule = 'cosine' or 'linear', not of {schedule!r}")
  if (plateau_factor, plateau_patience) != (0.1, 4) and schedule != 'plateau':
    raise UserError(f"plateau_factor and plateau_patience are of schedule = 'plateau', not of {schedule!r}")
  if not 0 < plateau_factor < 1 or plateau_patience < 0:
    raise UserError(f'plateau_factor = {plateau_factor}, plateau_patience = {plateau_patience}: out of range')
  if min(clip, clamp, weight_decay) < 0 or not 0 <= momentum < 1:
    found = f'clip = {clip}, clamp = {clamp}, weight_decay = {weight_decay}, momentum = {momentum}'
    raise UserError(f'{found}: out of range')
  if head_factor <= 0:
    raise UserError(f'head_factor = {head_factor}: above 0 is needed')
  apart = {'weight_decay': weight_decay, 'mask': _without_step_sizes}
  own = {'adamw': apart, 'radam': apart, 'sgd': {'momentum': momentum or None, 'nesterov': nesterov}}.get(name, {})
  transforms = [optax.masked(optax.clip(clamp), _without_step_sizes)] if clamp else []
  if clip:
    transforms.append(optax.clip_by_global_norm(clip))
  if weight_decay and 'weight_decay' not in own:
    transforms.append(optax.add_decayed_weights(weight_decay, _without_step_sizes))
  transforms.append(_OPTIMIZERS[name](schedules[schedule](), **own))
  if head_factor != 1:
    transforms.append(optax.masked(optax.scale(head_factor), _head_alone))
  if schedule == 'plateau':
    transforms.append(_times_factor())
  tx = optax.chain(*transforms)
  if not only:
    return tx

  def labels(params):
    return jax.tree.map(lambda of_these: 'learned' if of_these else 'kept', learned(params, only))

  return optax.partition({'learned': tx, 'kept': optax.set_to_zero()}, labels)


def learned(params, only):
  """Which parameters the outer loop learns.

  Args:
    params: nested dicts; of anything else, such as task weights, all is learned.
    only: names that a parameter's path is to have one of, such as 'head' or 'block3'; all are learned if there is none.

  Returns:
    bools, like `params`.

  Raises:
    UserError: no parameter has one of the names.
  """
  if not only or not isinstance(params, dict):
    return jax.tree.map(lambda _: True, params)
  moves = jax.tree.map_with_path(lambda path, _: not set(only).isdisjoint(_names(path)), params)
  names = dict.fromkeys(name for path, _ in jax.tree.leaves_with_path(params) for name in _names(path))
  if missing := [name for name in only if name not in names]:
    raise UserError(f'config.optimizer.only: there is no {" or ".join(missing)} among {", ".join(names)}')
  return moves


def held(params, only):
  """The parameters, of which those that are not `learned` have no derivatives."""
  return jax.tree.map(lambda p, moves: p if moves else jax.lax.stop_gradient(p), params, learned(params, only))


def with_factor(state, factor):
  """A pytree in which the states of optimisers with schedule = 'plateau' have that factor; NumPy there."""

  def of_plateau(x):
    return isinstance(x, Plateau)

  return jax.tree.map(lambda x: Plateau(np.float32(factor)) if of_plateau(x) else x, state, is_leaf=of_plateau)


def _times_factor():
  def init(params):
    del params
    return Plateau(jnp.float32(1))

  def update(updates, state, params=None):
    del params
    return optax.tree.scale(state.factor, updates), state

  return optax.GradientTransformation(init, update)


def _held(schedule, hold):
  """A schedule whose step size changes every `hold` meta-updates only."""
  return lambda count: schedule(count // hold * hold)


def _names(path):
  return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _without_step_sizes(params):
  """False at learned inner step sizes, True at all other parameters."""
  step_sizes = [(jax.tree_util.DictKey(key),) for key in ('inner_lr', 'log_inner_lr')]
  return jax.tree.map_with_path(lambda path, _: path[:1] not in step_sizes, params)


def _head_alone(params):
  """True at the head; task weights, which an outer optimiser may move as well, have none."""
  if isinstance(params, dict) and 'head' not in params:
    raise UserError(f"config.optimizer.head_factor: there is no parameter 'head', only {', '.join(sorted(params))}")
  return jax.tree.map_with_path(lambda path, _: path[:1] == (jax.tree_util.DictKey('head'),), params)

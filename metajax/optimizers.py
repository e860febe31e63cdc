"""The outer optimiser, from Optax."""

import optax

from metajax.errors import UserError

_OPTIMIZERS = {'adam': optax.adam, 'adamw': optax.adamw, 'sgd': optax.sgd}


def make(
  total_steps,
  *,
  name='adam',
  learning_rate=1e-3,
  schedule='constant',
  boundaries=(),
  rates=(),
  momentum=0.0,
  nesterov=False,
  weight_decay=0.0,
  clip=0.0,
):
  """Builds the transformation of meta-gradients.

  Args:
    total_steps: meta-updates over which a schedule runs.
    name: adam, adamw or sgd.
    learning_rate: the first meta-update's step size.
    schedule: 'constant', 'cosine' (to zero at `total_steps`), 'linear' (likewise), or 'steps': after so many
      meta-updates as `boundaries` say, the step sizes that `rates` say.
    momentum, nesterov: of sgd.
    weight_decay: of every parameter. Of adam and sgd it is part of the gradient, as in PyTorch; of adamw it is not.
    clip: largest global norm of the meta-gradient; 0 for none.

  Raises:
    UserError: an unknown name or schedule, or settings that do not go together.
  """
  if name not in _OPTIMIZERS:
    raise UserError(f'name is one of {", ".join(_OPTIMIZERS)}, not {name!r}')
  schedules = {
    'constant': lambda: learning_rate,
    'cosine': lambda: optax.cosine_decay_schedule(learning_rate, total_steps),
    'linear': lambda: optax.linear_schedule(learning_rate, 0.0, total_steps),
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
  if min(clip, weight_decay) < 0 or not 0 <= momentum < 1:
    raise UserError(f'clip = {clip}, weight_decay = {weight_decay}, momentum = {momentum}: out of range')
  own = {
    'adam': {},
    'adamw': {'weight_decay': weight_decay},
    'sgd': {'momentum': momentum or None, 'nesterov': nesterov},
  }
  transforms = [optax.clip_by_global_norm(clip)] if clip else []
  if weight_decay and name != 'adamw':
    transforms.append(optax.add_decayed_weights(weight_decay))
  return optax.chain(*transforms, _OPTIMIZERS[name](schedules[schedule](), **own[name]))

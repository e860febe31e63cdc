"""The outer optimiser, from Optax."""

import optax

from metajax.errors import UserError

_OPTIMIZERS = {'adam': optax.adam, 'adamw': optax.adamw, 'sgd': optax.sgd}


def make(total_steps, *, name='adam', learning_rate=1e-3, schedule='constant', clip=0.0):
  """Builds the transformation of meta-gradients.

  Args:
    total_steps: meta-updates over which a schedule runs.
    name: adam, adamw or sgd.
    learning_rate: the first meta-update's step size.
    schedule: 'constant', 'cosine' (to zero at `total_steps`) or 'linear' (likewise).
    clip: largest global norm of the meta-gradient; 0 for none.

  Raises:
    UserError: an unknown name or schedule.
  """
  if name not in _OPTIMIZERS:
    raise UserError(f'name is one of {", ".join(_OPTIMIZERS)}, not {name!r}')
  schedules = {
    'constant': lambda: learning_rate,
    'cosine': lambda: optax.cosine_decay_schedule(learning_rate, total_steps),
    'linear': lambda: optax.linear_schedule(learning_rate, 0.0, total_steps),
  }
  if schedule not in schedules:
    raise UserError(f'schedule is one of {", ".join(schedules)}, not {schedule!r}')
  if clip < 0:
    raise UserError(f'clip = {clip}: it cannot be negative')
  clipping = [optax.clip_by_global_norm(clip)] if clip else []
  return optax.chain(*clipping, _OPTIMIZERS[name](schedules[schedule]()))

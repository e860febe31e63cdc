"""Task weights by simultaneous perturbation: multi-task modification, MTM (Boiarov, Khabarlak & Yastrebov 2021).

The outer loss is the homoscedastic-uncertainty form of multi-task learning, L_i / w_i^2 + ln w_i^2, summed or averaged
over the tasks i of a meta-batch. The outer optimiser minimises it in the network's weights; SPSA (Spall 1992), which
takes two values of the function whatever the number of weights, minimises it in w. The network is not evaluated again
for that: the losses are those of the meta-update, and only w is perturbed. Weights belong to places in the meta-batch,
not to tasks, which are drawn anew each time.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metajax.errors import UserError
from metajax.types import Array, TaskWeighting

# Where a weight comes to by a step: itself plus it; in units of itself; in its logarithm, so never to zero.
_SPACES = {
  'linear': lambda weights, step: weights + step,
  'relative': lambda weights, step: weights * (1 + step),
  'log': lambda weights, step: weights * jnp.exp(step),
}
_SHOWN = 32  # of more weights than these only quantiles are logged
_NORMS = {'l2': jnp.linalg.norm, 'sum': jnp.sum}


class State(NamedTuple):
  update: Array  # () int32, n of the next update
  weights: Array  # (tasks,), or one for each class


class Rule(NamedTuple):
  """What the settings of a weighting by perturbation stand for."""

  objective: Callable  # (weights (n,), losses (n,)) -> scalar
  gain: Callable  # n -> alpha_n
  radius: Callable  # n -> beta_n
  move: Callable  # (weights, step) -> weights
  normalize: Callable  # (n, weights) -> weights


def make(
  *,
  tasks,
  form='mean',
  gain=('power', 0.25, 1 / 6),
  radius=('power', 15.0, 1 / 24),
  space='linear',
  initial=0.0,
  first=0,
  normalize_every=0,
  norm='l2',
):
  """MTM SPSA: each update draws a sign for every weight and moves it against the difference of two values.

  With the default radius, much larger than the weights, they hardly react to the losses: they shrink together and stay
  near one another. `space='relative'` or `'log'` with a radius such as ('constant', 0.1) has them follow the losses.

  Args:
    tasks: places of a meta-batch.
    form: 'mean' over the tasks, as for MAML, or 'sum', as for prototypical networks.
    gain: alpha_n, how far the weights follow the estimated gradient: ('power', a, g) is a / n^g, ('constant', a), and
      ('step', a, every, factor) multiplies a by the factor at every so-manieth update.
    radius: beta_n, how far they are perturbed, likewise.
    space: what gain and radius count: 'linear' (w + s), 'relative' (w (1 + s), in units of each weight) or 'log'
      (w exp(s), so that no weight ever reaches zero).
    initial: first value of the weights; 0 for 1 / tasks.
    first: n of the first meta-update: 0, at which the weights stay as they are, or 1.
    normalize_every: divide the weights by their norm at every so-manieth update; 0 for never.
    norm: 'l2' or 'sum': the authors' code for prototypical networks had the one after the paper's first version, and
      the other before.

  Raises:
    UserError: an unknown form, sequence, space or norm, or numbers out of range.
  """
  rule = make_rule(form=form, gain=gain, radius=radius, space=space, normalize_every=normalize_every, norm=norm)

  def update(state, losses, classes, rng):
    del classes
    value = functools.partial(rule.objective, losses=losses.mean(axis=1))
    step, pair = perturb(rule, state, value, value, signs(rng, state.weights.shape))
    return finish(rule, state, step, pair)

  return TaskWeighting(init_slots(tasks, initial, first), lambda state, classes: slope(form, state.weights), update)


def init_slots(tasks, initial, first):
  """The `init` of one weight for each place of a meta-batch; arguments as for `make`."""
  if initial < 0 or first not in (0, 1):
    raise UserError(f'initial = {initial}, first = {first}: the one cannot be negative, the other is 0 or 1')
  return lambda rng: State(jnp.int32(first), jnp.full(tasks, initial or 1 / tasks, float))


def make_rule(*, form, gain, radius, space, normalize_every, norm):
  """Reads settings; arguments as for `make`.

  Raises:
    UserError: they are not sound.
  """
  if space not in _SPACES:
    raise UserError(f'space is one of {", ".join(_SPACES)}, not {space!r}')
  radius_at = sequence('radius', radius)
  if space != 'linear' and radius[1] >= 1:
    raise UserError(f"radius = {radius}: with space = {space!r} less than 1 is needed, such as ('constant', 0.1)")
  return Rule(objective(form), sequence('gain', gain), radius_at, _SPACES[space], normalizer(normalize_every, norm))


def objective(form):
  """The multi-task loss of weights (n,) and losses (n,), a 'sum' or a 'mean' over the n.

  Raises:
    UserError: another form.
  """
  if form not in ('mean', 'sum'):
    raise UserError(f'form is mean or sum, not {form!r}')
  total = jnp.mean if form == 'mean' else jnp.sum
  return lambda weights, losses: total(losses / jnp.square(weights) + jnp.log(jnp.square(weights)))


def slope(form, weights):
  """The multi-task loss's derivative in the losses, as coefficients of a mean over tasks: (tasks,)."""
  return (len(weights) if form == 'sum' else 1) / jnp.square(weights)


def sequence(name, spec):
  """The values of the setting `name`, given as `make` lists: n -> value; n = 0 has that of 1.

  Raises:
    UserError: it is none of those.
  """
  values = {
    'power': lambda n, first, decay: first / n**decay,
    'constant': lambda n, first: jnp.full_like(n, first),
    'step': lambda n, first, every, factor: first * factor ** (n // every),
  }
  kind, *numbers = spec or ('',)
  sound = all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
  sound = sound and len(numbers) == {'power': 2, 'constant': 1, 'step': 3}.get(kind) and numbers[0] > 0
  if not sound or (kind == 'power' and numbers[1] < 0) or (kind == 'step' and not (numbers[1] >= 1 and numbers[2] > 0)):
    raise UserError(
      f"{name} = {spec}: ('power', value, decay), ('constant', value) or ('step', value, every, factor) is needed, "
      'with a value and a factor above 0'
    )
  return lambda n: values[kind](jnp.maximum(n, 1).astype(float), *numbers)


def normalizer(every, norm):
  """(n, weights) -> the weights, over their norm if n is a multiple of `every` and not 0.

  Raises:
    UserError: an unknown norm, or a negative number.
  """
  if norm not in _NORMS:
    raise UserError(f'norm is one of {", ".join(_NORMS)}, not {norm!r}')
  if every < 0:
    raise UserError(f'normalize_every = {every}: it cannot be negative')
  if not every:
    return lambda n, weights: weights
  return lambda n, weights: jnp.where((n > 0) & (n % every == 0), weights / _NORMS[norm](weights), weights)


def signs(rng, shape):
  """Independent -1 and 1."""
  return jax.random.rademacher(rng, shape, float)


def perturb(rule, state, plus, minus, signs, weights=None):
  """One step of simultaneous perturbation (Spall 1992, equations 2.1 and 2.2).

  Args:
    rule, state: of the weighting.
    plus, minus: weights -> scalar, for either side: the same function, or one at two times.
    signs: of shape (n,).
    weights: (n,) to perturb, those of the state unless given.

  Returns:
    step: (n,), by how much to move; pair: (2,), the two values.
  """
  weights = state.weights if weights is None else weights
  shift = rule.radius(state.update) * signs
  pair = jnp.stack([plus(rule.move(weights, shift)), minus(rule.move(weights, -shift))])
  return step_from(rule, state, pair, signs), pair


def step_from(rule, state, pair, signs):
  """By how much two values (2,), of weights perturbed by plus and minus `signs` (n,), move them: (n,)."""
  slope = (pair[0] - pair[1]) / (2 * rule.radius(state.update))  # over the signs, which are their own inverses
  return -rule.gain(state.update) * slope * signs


def finish(rule, state, step, pair):
  """The state after an update (after n = 0 nothing has moved), and what is logged of it."""
  n = state.update
  weights = jnp.where(n == 0, state.weights, rule.move(state.weights, step))
  weights = rule.normalize(n, weights)
  if len(weights) <= _SHOWN:
    shown = {'weights': weights}
  else:
    shown = {'weights_quantiles': jnp.quantile(weights, jnp.array([0.0, 0.25, 0.5, 0.75, 1.0]))}
  metrics = {**shown, 'gain': rule.gain(n), 'radius': rule.radius(n), 'pair': pair}
  return state._replace(update=n + 1, weights=weights), metrics

"""Task weightings: the published code's numbers, exact gradients of quadratics, and what each promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import config as config_lib
from metajax.errors import UserError
from metajax.weighting import gradient, sin, spsa, spsa_look_ahead, spsa_per_class, spsa_per_coarse_class, spsa_track

LOSSES = np.array([1.2, 0.8, 1.5, 1.0], np.float32)
BEFORE = np.array([1.6, 1.1, 1.3, 0.9], np.float32)
SIGNS = np.array([1, -1, 1, 1], np.float32)
NO_CLASSES = np.zeros((4, 1), np.int32)
close = functools.partial(np.testing.assert_allclose, rtol=2e-6)


def updated(monkeypatch, weighting, n, losses, signs, *, classes=NO_CLASSES, weights=None, **state):
  """The state and the metrics after the update n of a weighting with losses (tasks,) or (tasks, query)."""
  monkeypatch.setattr(spsa, 'signs', lambda rng, shape: jnp.asarray(signs, jnp.float32).reshape(shape))
  before = weighting.init(jax.random.key(0))._replace(update=jnp.int32(n), **state)
  if weights is not None:
    before = before._replace(weights=jnp.array(weights, jnp.float32))
  return weighting.update(before, jnp.asarray(losses).reshape(len(losses), -1), classes, jax.random.key(1))


# The published code's numbers: losses, weights and signs in, new weights out (float64 there, float32 here).


@pytest.mark.parametrize(
  ('n', 'pair', 'up', 'down'),
  [
    (1, (5.4373875, 5.4042660), 0.2502760124, 0.2497239876),
    (100, (5.0592801, 5.0192727), 0.2501875, 0.2498125181),
  ],
)
def test_spsa_of_a_mean(monkeypatch, n, pair, up, down):
  close(spsa.objective('mean')(np.full(4, 0.25), LOSSES), 15.227411)
  close(spsa.objective('sum')(np.full(4, 0.25), LOSSES), 60.909645)
  state, metrics = updated(monkeypatch, spsa.make(tasks=4), n, LOSSES, SIGNS)
  close(metrics['pair'], pair)
  close(state.weights, [down, up, down, down])
  assert state.update == n + 1


@pytest.mark.parametrize(('n', 'up', 'down'), [(1, 0.2502797809, 0.2497202191), (100, 0.2501906045, 0.2498093955)])
def test_tracking_of_a_mean(monkeypatch, n, up, down):
  known = dict(before=jnp.array(BEFORE), known=jnp.bool(True))
  state, metrics = updated(monkeypatch, spsa_track.make(tasks=4), n, LOSSES, SIGNS, **known)
  if n == 1:
    close(metrics['pair'], [5.4378397, 5.4042660])
  close(state.weights, [down, up, down, down])
  close(state.before, LOSSES)


def test_spsa_and_tracking_of_a_sum(monkeypatch):
  state, metrics = updated(monkeypatch, spsa.make(tasks=4, form='sum', initial=0.5), 1, LOSSES, SIGNS)
  close(metrics['pair'], [21.8125431, 21.5474999])
  close(state.weights, [0.4977913070, 0.5022086930, 0.4977913070, 0.4977913070])
  known = dict(before=jnp.array(BEFORE), known=jnp.bool(True))
  tracking = spsa_track.make(tasks=4, form='sum', initial=0.5, first=1)
  state, metrics = updated(monkeypatch, tracking, 1, LOSSES, SIGNS, **known)
  close(metrics['pair'], [21.8143862, 21.5474999])
  close(state.weights, [0.4977759478, 0.5022240522, 0.4977759478, 0.4977759478])


def test_spsa_of_uneven_weights_and_their_norm(monkeypatch):
  weights = np.array([0.5, 0.4, 0.6, 0.3], np.float32)
  close(spsa.objective('mean')(weights, LOSSES), 4.6073263)
  close(spsa.objective('sum')(weights, LOSSES), 18.4293051)
  state, metrics = updated(monkeypatch, spsa.make(tasks=4), 7, LOSSES, [-1, -1, 1, -1], weights=weights)
  close([metrics['gain'], metrics['radius']], [0.18075501, 13.83180446])
  close(state.weights, [0.4997173524, 0.3997173524, 0.6002826476, 0.2997173524])
  normal = [0.5391638660, 0.4313310928, 0.6469966392, 0.3234983196]
  close(spsa.normalizer(7, 'l2')(jnp.int32(14), weights), normal)
  close(spsa.normalizer(7, 'sum')(jnp.int32(14), weights), weights / 1.8)
  normed, _ = updated(monkeypatch, spsa.make(tasks=4, normalize_every=7), 7, LOSSES, [-1, -1, 1, -1], weights=weights)
  close(normed.weights, state.weights / np.linalg.norm(state.weights))
  for n in (0, 13):
    close(spsa.normalizer(7, 'l2')(jnp.int32(n), weights), weights)


def test_spsa_per_class(monkeypatch):
  """One task of four: the two signs of class 1 cancel; other tasks' queries do not count, other classes stay."""
  weighting = spsa_per_class.make(num_classes=5)
  losses = np.array([[9, 9, 9]] * 3 + [[0.5, 1.5, 1.0]], np.float32)
  classes = np.array([[0, 3, 4]] * 3 + [[1, 1, 2]])
  close(weighting.coefficients(weighting.init(None), classes), np.ones((4, 3)))
  state, metrics = updated(monkeypatch, weighting, 3, losses, [1, -1, 1], classes=classes)
  close([metrics['gain'], metrics['radius']], [0.20817079, 14.32884573])
  close(metrics['pair'], [5.3712112, 5.2780073])
  close(state.weights, [1, 1, 0.9998307406, 1, 1])
  close(weighting.coefficients(state, classes)[3], [1, 1, 0.9998307406**-2])

  same = np.tile(losses[3:], (4, 1)), np.tile(classes[3:], (4, 1))
  everyone = spsa_per_class.make(num_classes=5, update_from='all')
  state, _ = updated(monkeypatch, everyone, 3, same[0], [1, -1, 1] * 4, classes=same[1])
  close(state.weights, [1, 1, 1 - 0.0006770375, 1, 1])


def test_classes_of_a_superclass_share_a_weight(monkeypatch):
  weighting = spsa_per_coarse_class.make(superclass_ids=np.array([2, 0, 1, 0, 2]))
  losses, classes = np.array([[0.5, 1.5, 1.0]], np.float32), np.array([[1, 3, 2]])
  state, _ = updated(monkeypatch, weighting, 3, losses, [1, -1, 1], classes=classes)
  close(state.weights, [1, 1 - 0.0006770375, 1])
  close(weighting.coefficients(state, np.array([[0, 2]])), [[1, (1 - 0.0006770375) ** -2]])


@pytest.mark.parametrize(('form', 'scale'), [('mean', 1), ('sum', 4)])
def test_gradient_of_the_objective(form, scale):
  weighting = gradient.make(tasks=4, tx=optax.sgd(1.0), form=form)
  state, _ = weighting.update(weighting.init(None), LOSSES[:, None], NO_CLASSES, None)
  close(1 - state.weights, scale * np.array([-0.1, 0.1, -0.25, 0]), atol=1e-7)
  close(weighting.coefficients(state, NO_CLASSES), scale / np.square(state.weights))


def test_who_moves_the_weights_of_the_gradient_weightings():
  """The first step of an Adam is its step size, whatever the gradient."""
  moved = {}
  for optimizer, original in itertools.product(('outer', 'adam'), (False, True)):
    weighting = gradient.make(tasks=4, tx=optax.adam(1e-2), optimizer=optimizer, original=original)
    state, _ = weighting.update(weighting.init(None), LOSSES[:, None], NO_CLASSES, None)
    moved[optimizer, original] = float(state.weights[0]) - 1
  assert moved['outer', True] == 0
  close([moved['outer', False], moved['adam', False], moved['adam', True]], [1e-2, 1e-3, 1.1e-2], rtol=1e-3)
  linear = gradient.make(tasks=4, tx=optax.sgd(0.1), linear=True)
  state, _ = linear.update(linear.init(None), LOSSES[:, None], NO_CLASSES, None)
  close(linear.coefficients(state, NO_CLASSES), 1 - 0.1 * LOSSES / 4)


def test_sin_has_a_period_of_four_meta_updates():
  weighting = sin.make(tasks=4)
  state, seen = weighting.init(None), []
  for _ in range(5):
    seen.append(weighting.coefficients(state, NO_CLASSES))
    state, _ = weighting.update(state, LOSSES[:, None], NO_CLASSES, None)
  close(seen[4], seen[0], rtol=1e-5)
  for i in range(4):
    close(sorted(row[i] for row in seen[:4]), [-0.02388, 0.51732, 1.28268, 1.82388], atol=1e-5)
  close(seen[1][0], np.sin(np.pi / 2 + np.pi / 8) + 0.9, rtol=1e-6)


# Gains, and what the weights start from.


def test_sequences():
  n = jnp.arange(1, 8)
  close(spsa.sequence('gain', ('power', 0.25, 1 / 6))(jnp.array([1, 10, 1000])), [0.25, 0.170323, 0.079057], rtol=1e-5)
  close(spsa.sequence('radius', ('power', 15.0, 1 / 24))(jnp.array([10, 3999])), [13.627764, 10.617199])
  close(spsa.sequence('gain', ('step', 1.0, 3, 0.5))(n), [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25])
  close(spsa.sequence('gain', ('constant', 0.3))(n), np.full(7, 0.3))


@pytest.mark.parametrize(
  'spec',
  [
    (),
    ('power',),
    ('power', 0.0, 1.0),
    ('constant', '1'),
    ('step', 1.0, 0, 0.5),
    ('x', 1),
    ('step', 1.0, 3, 0.0),
    ('power', 1.0, -1.0),
  ],
)
def test_what_is_no_sequence_is_refused(spec):
  with pytest.raises(UserError, match=r'gain = .* is needed'):
    spsa.make(tasks=2, gain=spec)


@pytest.mark.parametrize(
  ('make', 'settings', 'text'),
  [
    (spsa.make, dict(tasks=2, form='max'), 'form is mean or sum'),
    (spsa.make, dict(tasks=2, space='exp'), 'space is one of linear, relative, log'),
    (spsa.make, dict(tasks=2, space='relative'), 'less than 1 is needed'),
    (spsa.make, dict(tasks=2, normalize_every=-1), 'normalize_every = -1'),
    (spsa.make, dict(tasks=2, norm='l3'), 'norm is one of l2, sum'),
    (spsa_track.make, dict(tasks=2, restart_every=-1), 'restart_every = -1'),
    (spsa_per_class.make, dict(num_classes=0), 'regression has none'),
    (spsa_per_class.make, dict(num_classes=3, update_from='first'), "'last' or 'all'"),
    (spsa_per_coarse_class.make, dict(superclass_ids=None), 'the data set has none'),
    (gradient.make, dict(tasks=2, tx=None, optimizer='sgd'), 'outer or adam'),
    (gradient.make, dict(tasks=2, tx=None, initial=0.0), 'above 0 is needed'),
  ],
)
def test_settings_that_are_refused(make, settings, text):
  with pytest.raises(UserError, match=text):
    make(**settings)


def test_first_weights_and_the_update_of_number_zero(monkeypatch):
  for tasks in (2, 5):
    close(spsa.make(tasks=tasks).init(None).weights, np.full(tasks, 1 / tasks))
  for weighting in (spsa.make(tasks=4), spsa_track.make(tasks=4)):
    state, _ = updated(monkeypatch, weighting, 0, LOSSES, SIGNS)
    close(state.weights, np.full(4, 0.25))
    assert state.update == 1
  close(state.before, LOSSES)
  assert state.known


def test_tracking_begins_like_spsa_and_forgets_when_told(monkeypatch):
  tracking = spsa_track.make(tasks=4, first=1, restart_every=3)
  plain, _ = updated(monkeypatch, spsa.make(tasks=4, first=1), 1, LOSSES, SIGNS)
  state, known = tracking.init(None), []
  for _ in range(6):
    state, _ = tracking.update(state, LOSSES[:, None], NO_CLASSES, None)
    known.append(bool(state.known))
    if state.update == 2:
      close(state.weights, plain.weights)
  assert known == [True, True, False, True, True, False]


# What simultaneous perturbation is.


@pytest.mark.parametrize('radius', [0.1, 3.0])
def test_over_all_signs_the_estimate_is_the_gradient_of_a_quadratic(radius):
  rng = np.random.default_rng(0)
  matrix, linear, weights = rng.normal(size=(4, 4)), rng.normal(size=4), rng.normal(size=4)
  matrix = matrix @ matrix.T

  def quadratic(w):
    return 0.5 * w @ matrix @ w + linear @ w

  gains = dict(gain=('constant', 1.0), radius=('constant', radius))
  rule = spsa.make_rule(form='mean', space='linear', normalize_every=0, norm='l2', **gains)
  state = spsa.State(jnp.int32(1), jnp.array(weights, jnp.float32))
  steps = [
    spsa.perturb(rule, state, quadratic, quadratic, jnp.array(signs, jnp.float32))[0]
    for signs in itertools.product((-1.0, 1.0), repeat=4)
  ]
  close(-np.mean(steps, axis=0), matrix @ weights + linear, rtol=1e-4)


@pytest.mark.parametrize('space', ['relative', 'log'])
def test_steps_in_units_of_the_weights_follow_the_losses(space):
  """The objective's minimum is at w^2 = L."""
  weighting = spsa.make(tasks=4, gain=('constant', 0.1), radius=('constant', 0.1), space=space, initial=2.0)
  update = jax.jit(weighting.update)
  state = weighting.init(None)
  for key in jax.random.split(jax.random.key(0), 800):
    state, metrics = update(state, 10 * LOSSES[:, None], NO_CLASSES, key)
    assert (metrics['weights'] > 0).all()
  np.testing.assert_allclose(state.weights**2, 10 * LOSSES, rtol=0.1)


def test_a_weight_never_reaches_zero_in_log_space(monkeypatch):
  weighting = spsa.make(tasks=4, gain=('constant', 1.0), radius=('constant', 0.5), space='log', first=1)
  tiny = updated(monkeypatch, weighting, 1, 1e-6 * LOSSES, SIGNS, weights=[1e-3] * 4)[0].weights
  assert (tiny > 0).all()
  linear = spsa.make(tasks=4, gain=('constant', 1.0), radius=('constant', 0.5), first=1)
  assert (updated(monkeypatch, linear, 1, LOSSES, SIGNS, weights=[0.6] * 4)[0].weights < 0).any()


def test_many_weights_are_logged_as_quantiles(monkeypatch):
  weighting = spsa_per_class.make(num_classes=40)
  _, metrics = updated(monkeypatch, weighting, 1, LOSSES, [1], classes=NO_CLASSES)
  assert metrics['weights_quantiles'].shape == (5,) and metrics['weights_quantiles'][2] == 1


def test_every_weighting_can_be_named():
  known = {
    'gradient',
    'sin',
    'spsa',
    'spsa_look_ahead',
    'spsa_per_class',
    'spsa_per_coarse_class',
    'spsa_track',
    'tilted',
  }
  assert set(config_lib.names('weighting')) == {'uniform', *known}
  assert spsa_look_ahead.make(tasks=2).trials is not None

"""MAML++ and Meta-SGD: plain loops over inner steps with plain gradients, the published numbers, what is refused."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import config as config_lib
from metajax import experiment as experiment_lib
from metajax import losses, main, networks, train, workdir
from metajax.algorithms import maml, mamlpp, meta_sgd
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError
from metajax.models import conv4, layers, mlp
from metajax.types import Episode, Examples
from tests.conftest import TINY, records_of

WAY, STEPS = 3, 2
PER_STEP = dict(learned_lr='tensor_step', adapt_norm=False, per_step_norm=True)


class Normed(nn.Module):
  """Small, with a normalisation layer that is not the last thing before the outputs."""

  @nn.compact
  def __call__(self, x):
    x = layers.BatchNorm(name='norm')(nn.Dense(4, name='hidden')(x))
    return nn.Dense(WAY, name='head')(nn.tanh(x).mean(axis=(1, 2)))


LOGITS = jax.jit(Normed().apply)


def draw_episode(seed):
  rng = np.random.default_rng(seed)

  def draw(n):
    inputs = rng.standard_normal((WAY * n, 2, 2, 2), np.float32)
    return Examples(jnp.array(inputs), jnp.repeat(jnp.arange(WAY), n))

  return Episode(draw(2), draw(3), jnp.arange(WAY))


@functools.cache
def learner(**settings):
  """A learner, its params with random rows and step sizes, its state, and an episode."""
  made = maml.make(Normed(), inner_steps=STEPS, inner_lr=0.3, epoch=10, **settings)
  episode = draw_episode(0)
  params, model_state = jax.jit(made.init)(jax.random.key(0), episode.support.inputs)
  leaves, treedef = jax.tree.flatten(params)
  rngs = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.1 * jax.random.normal(r, x.shape) for r, x in zip(rngs, leaves, strict=True)]
  return made, treedef.unflatten(moved), model_state, episode


# The obviously right: one step after the other on the model itself, rows and step sizes picked by hand.


def log_loss(params, examples, statistics=None):
  if statistics is None:
    logits, state = Normed().apply({'params': params}, examples.inputs, mutable=['batch_stats'])
  else:
    logits, state = Normed().apply({'params': params, **statistics}, examples.inputs), statistics
  values = -jax.nn.log_softmax(logits)[jnp.arange(len(examples.targets)), examples.targets]
  return values.mean(), (values, state['batch_stats'])


@functools.partial(jax.jit, static_argnums=(2, 3))
def plain_loop(params, episode, steps, first_order=False, statistics=None):
  """The network after each step as queries see it, and what normalised the support set in it.

  That is given in evaluation, {'batch_stats': rows}, where running averages have a row for each step.
  """
  network, rates, states = params['network'], params['inner_lr'], []
  fast, networks = {name: network[name] for name in ('hidden', 'head')}, []
  for step in range(steps):
    row = min(step, STEPS - 1)
    norm = {'norm': {name: x[row] for name, x in network['norm'].items()}}
    given = statistics and jax.tree.map(lambda x, row=row: x[row], statistics)
    grads, (_, state) = jax.grad(log_loss, has_aux=True)({**fast, **norm}, episode.support, given)
    if first_order:
      grads = jax.lax.stop_gradient(grads)
    fast = {
      layer: {name: x - rates[layer][name][row] * grads[layer][name] for name, x in fast[layer].items()}
      for layer in fast
    }
    networks.append({**fast, **norm})
    states.append(state)
  return networks, states


def assert_close(a, b, **tolerance):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **({'rtol': 1e-4, 'atol': 1e-6} | tolerance)), a, b)


@pytest.mark.parametrize('steps', [1, STEPS, 4])  # in evaluation: fewer than in training, as many, more
def test_every_step_has_its_own_rows_and_step_sizes_and_further_ones_use_the_last(steps):
  _, params, model_state, episode = learner(**PER_STEP)
  evaluation = maml.make(Normed(), inner_steps=steps, **PER_STEP)
  adapted = jax.jit(evaluation.adapt)(params, model_state, episode.support, None)
  expected, _ = plain_loop(params, episode, steps)
  assert_close(adapted.params, expected[-1])
  outputs = jax.jit(evaluation.predict)(params, model_state, adapted, episode.query.inputs)
  assert_close(outputs, LOGITS({'params': expected[-1]}, episode.query.inputs))
  path = jax.jit(evaluation.trajectory)(params, model_state, episode.support, None).params
  assert_close(jax.tree.map(lambda x: x[1:], path), jax.tree.map(lambda *x: jnp.stack(x), *expected))
  inputs, logits = episode.query.inputs, [LOGITS({'params': fast}, episode.query.inputs) for fast in expected]
  along = jax.jit(evaluation.predict_along)(params, model_state, episode.support, inputs, None)
  assert_close(along[1:], jnp.stack(logits))
  before = {**params['network'], 'norm': jax.tree.map(lambda x: x[0], params['network']['norm'])}
  assert_close(jax.tree.map(lambda x: x[0], path), before, rtol=0, atol=0)


def test_a_row_of_zeros_silences_the_step_that_it_belongs_to_alone():
  made, params, model_state, episode = learner(**PER_STEP)
  silent = {
    'scale': params['network']['norm']['scale'].at[0].set(0),
    'bias': params['network']['norm']['bias'].at[0].set(0),
  }
  params = {**params, 'network': {**params['network'], 'norm': silent}}
  path = jax.jit(made.trajectory)(params, model_state, episode.support, None)
  predict = jax.jit(made.predict)
  logits = [predict(params, model_state, jax.tree.map(lambda x, k=k: x[k], path), episode.query.inputs) for k in (1, 2)]
  assert np.ptp(logits[0], axis=0).max() < 1e-6 and np.ptp(logits[1], axis=0).max() > 1e-2


@pytest.mark.parametrize(
  ('multi_step', 'first_order', 'checkpoint'),
  [(False, False, True), (False, True, False), (True, False, True), (True, True, False)],
)
def test_gradients_are_those_of_the_plain_loop(multi_step, first_order, checkpoint):
  epochs = {'multi_step_epochs': 4} if multi_step else {}
  made, params, model_state, episode = learner(**PER_STEP, **epochs, first_order=first_order, checkpoint=checkpoint)
  loss = made.phases[0].loss if multi_step else made.loss
  weights = [1 / 2 - 2 / 8, 1 / 2 + 2 / 8] if multi_step else [0, 1]  # of epoch 2 of 4, with two steps

  def mean_loss(params):
    values, (_, metrics) = loss(params, model_state, episode, None, jnp.int32(29))
    return values.mean(), (values, metrics)

  def expected(params):
    after, _ = plain_loop(params, episode, STEPS, first_order)
    each = [log_loss(network, episode.query)[1][0] for network in after]
    values = sum(weight * values for weight, values in zip(weights, each, strict=True))
    return values.mean(), values

  grads, (values, metrics) = jax.jit(jax.grad(mean_loss, has_aux=True))(params)
  expected_grads, expected_values = jax.jit(jax.grad(expected, has_aux=True))(params)
  assert_close(values, expected_values)
  assert_close(grads, expected_grads)
  # Step sizes learn in first order too, but for that of a bias, which cancels in the normalisation.
  learning = {
    name: {k: np.abs(x).min() > 1e-5 for k, x in grads['inner_lr'][name].items()} for name in ('hidden', 'head')
  }
  assert learning == {'hidden': {'kernel': True, 'bias': False}, 'head': {'kernel': True, 'bias': True}}
  rows = np.abs(grads['network']['norm']['scale']).max(axis=1)
  assert rows[1] > 1e-4 and (rows[0] > 1e-4 or not multi_step) and (rows[0] == 0) == (first_order and not multi_step)
  if multi_step:
    np.testing.assert_allclose(metrics['loss_importance'], weights, rtol=1e-6)
  np.testing.assert_allclose(metrics['inner_lr/head/bias'], params['inner_lr']['head']['bias'], rtol=1e-6)


# Running averages for each step.


@pytest.mark.parametrize('multi_step', [False, True])
def test_running_averages_of_a_step_are_of_its_support_set_and_of_its_queries(multi_step):
  epochs = {'multi_step_epochs': 4} if multi_step else {}
  made, params, model_state, episode = learner(
    **PER_STEP, **epochs, batch_norm='running', per_step_statistics=True, batch_norm_momentum=0.7
  )
  before = jax.tree.map(lambda x: x + np.arange(2, dtype=np.float32)[:, None], model_state)
  loss = made.phases[0].loss if multi_step else made.loss
  _, (after, _) = jax.jit(loss)(params, before, episode, None, jnp.int32(0))
  expected, in_support = plain_loop(params, episode, STEPS)
  for step, network in enumerate(expected):
    row = jax.tree.map(lambda x, step=step: x[step], before['batch_stats'])
    in_query = log_loss(network, episode.query)[1][1]
    for new in (in_support[step], *([in_query] if multi_step or step == 1 else [])):
      row = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * new, row, new)
    assert_close(jax.tree.map(lambda x, step=step: x[step], after), {'batch_stats': row})

  # In evaluation the support set in a step and the queries after it are normalised by its row.
  expected, _ = plain_loop(params, episode, STEPS, statistics=before)
  path, predict = jax.jit(made.trajectory)(params, before, episode.support, None), jax.jit(made.predict)
  for step, row in enumerate([0, 0, 1]):
    adapted = jax.tree.map(lambda x, step=step: x[step], path)
    if step:
      assert_close(adapted.params, expected[step - 1])
    assert_close(adapted.model_state, jax.tree.map(lambda x, row=row: x[row], before), rtol=0)
    outputs = predict(params, before, adapted, episode.query.inputs)
    assert_close(outputs, LOGITS({'params': adapted.params, **adapted.model_state}, episode.query.inputs))


def test_without_running_mode_outputs_do_not_depend_on_statistics():
  made, params, model_state, episode = learner(**PER_STEP)
  other = jax.tree.map(lambda x: x + 3.0, model_state)
  loss = jax.jit(made.loss)
  values = [loss(params, state, episode, None)[0] for state in (model_state, other)]
  np.testing.assert_array_equal(*values)


# What changes with time.


@pytest.mark.parametrize(
  ('epochs', 'epoch', 'expected'),
  [  # the authors' schedule, as their code computes it
    (10, 0, [0.2, 0.2]),
    (10, 1, [0.18, 0.28]),
    (10, 5, [0.1, 0.6]),
    (10, 9, [0.02, 0.92]),
    (10, 10, [0.006, 0.976]),
    (10, 50, [0.006, 0.976]),
    (15, 1, [0.186667, 0.253333]),
    (15, 5, [0.133333, 0.466667]),
    (15, 14, [0.013333, 0.946667]),
  ],
)
def test_importance_is_the_published(epochs, epoch, expected):
  weights = maml.importance(jnp.int32(epoch), 5, epochs)
  np.testing.assert_allclose(weights, [expected[0]] * 4 + [expected[1]], rtol=1e-4)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


class Constant(nn.Module):
  @nn.compact
  def __call__(self, x):
    return jnp.broadcast_to(self.param('w', nn.initializers.constant(1.5), (1,))[None], (x.shape[0], 1))


@pytest.mark.parametrize(
  ('multi_step_epochs', 'starts'), [(1, [0, 10, 20]), (2, [0, 20]), (0, [0, 20]), (3, [0, 20, 30])]
)
def test_phases_have_the_order_and_the_steps_of_their_epochs(multi_step_epochs, starts):
  """One weight: the support loss is (w - 0.3)^2 and the query loss (w - 2)^2."""
  made = maml.make(
    Constant(),
    objective=losses.REGRESSION,
    inner_steps=2,
    inner_lr=0.2,
    first_order_epochs=2,
    multi_step_epochs=multi_step_epochs,
    epoch=10,
  )
  support, query = (
    Examples(jnp.zeros((4, 1)), jnp.full((4, 1), 0.3)),
    Examples(jnp.zeros((5, 1)), jnp.full((5, 1), 2.0)),
  )
  episode = Episode(support, query, jnp.zeros(0, jnp.int32))
  params, model_state = made.init(jax.random.key(0), support.inputs)
  assert [phase.start for phase in made.phases] == starts
  for phase, end in zip(made.phases, [*starts[1:], 40], strict=True):
    gradient = jax.jit(jax.grad(lambda p, step, loss=phase.loss: loss(p, model_state, episode, None, step)[0].mean()))
    for step in (phase.start, end - 1):
      epoch, shrunk = step // 10, 0.3 + 0.6 ** np.arange(1, 3) * 1.2
      slopes = 1 if epoch < 2 else 0.6 ** np.arange(1, 3)
      share = epoch / (2 * multi_step_epochs) if epoch < multi_step_epochs else 0.5
      expected = np.sum(np.array([0.5 - share, 0.5 + share]) * 2 * (shrunk - 2) * slopes)
      np.testing.assert_allclose(gradient(params, jnp.int32(step))['w'], [expected], rtol=1e-5)


def test_training_passes_from_phase_to_phase_and_resumes_between_them_to_the_bit(cache, tmp_path):
  settings = (
    '--mode=train',
    '--config.model.name=tests.one_block',
    '--config.algorithm.name=mamlpp',
    '--config.algorithm.inner_steps=2',
    '--config.algorithm.batch_norm=running',
    '--config.algorithm.per_step_statistics=True',
    '--config.algorithm.epoch=2',
    '--config.algorithm.multi_step_epochs=2',
    '--config.algorithm.first_order_epochs=1',
    '--config.eval.val_episodes=4',
    '--config.eval.inner_steps=2',
  )

  def run(name, steps):
    folder = tmp_path / name
    assert main.main(['', f'--config={TINY}', f'--workdir={folder}', f'--config.total_steps={steps}', *settings]) == 0
    return [record for record in records_of(folder) if 'train/loss' in record]

  run('halves', 3)
  records = run('whole', 6), run('halves', 6)
  assert records[0] == records[1]
  importance = [record['train/loss_importance'] for record in records[0]]
  np.testing.assert_allclose(importance, [[0.5, 0.5]] * 2 + [[0.25, 0.75]] * 2 + [[0, 1]] * 2)
  config = workdir.read_config(tmp_path / 'whole')
  like = train.init_state(experiment_lib.make(config, None), config.seed)
  both = [Checkpoints(tmp_path / name, read_only=True) for name in ('whole', 'halves')]
  whole, halves = (checkpoints.restore(6, like) for checkpoints in both)
  jax.tree.map(np.testing.assert_array_equal, whole, halves)
  chosen = [checkpoints.validated_steps() for checkpoints in both]  # for an ensemble; 3 is validated in any case
  assert chosen[0] == chosen[1] and set(chosen[0]) == {3, 6}
  learned = whole.params['inner_lr']  # in the checkpoint, of what the inner loop moves
  assert np.abs(learned['head']['kernel'] - 0.1).min() > 1e-4 and learned['norm0'] == {'scale': None, 'bias': None}
  assert (
    whole.params['network']['norm0']['scale'].shape == (2, 2) == whole.model_state['batch_stats']['norm0']['var'].shape
  )

  # From there evaluation may take more inner steps.
  folder = tmp_path / 'whole'
  assert main.main(['', f'--workdir={folder}', '--mode=eval', '--config.eval.inner_steps=4']) == 0
  result = json.loads((folder / 'test.json').read_text())
  assert len(result['by_inner_step']['accuracy']) == 5 and result['batch_norm'] == 'running'
  assert json.loads((folder / 'test_episodes.json').read_text())['inner_lr'] == 'learned'


# Meta-SGD, and what a learner has by name.


def test_logarithms_of_step_sizes_are_not_taken_for_step_sizes():
  example = draw_episode(0).support.inputs
  inits = [maml.make(Normed(), learned_lr='tensor', positive_lr=p).init for p in (False, True)]
  params = [jax.eval_shape(init, jax.random.key(0), example)[0] for init in inits]
  assert [set(p) for p in params] == [{'network', 'inner_lr'}, {'network', 'log_inner_lr'}]


def test_meta_sgd_learns_a_step_size_for_every_weight():
  episode = draw_episode(0)
  made = meta_sgd.make(Normed(), inner_steps=1, inner_lr=0.1)
  params, model_state = jax.jit(made.init)(jax.random.key(0), episode.support.inputs)
  shapes = [jax.tree.map(jnp.shape, params[name]) for name in ('network', 'inner_lr')]
  assert shapes[0] == shapes[1]
  grads = jax.jit(jax.grad(lambda p: made.loss(p, model_state, episode, None)[0].mean()))(params)
  gradient = jax.jit(jax.grad(log_loss, has_aux=True))
  support = gradient(params['network'], episode.support)[0]
  fast = jax.tree.map(lambda p, g: p - 0.1 * g, params['network'], support)
  at_query = gradient(fast, episode.query)[0]
  assert_close(grads['inner_lr'], jax.tree.map(lambda a, b: -a * b, support, at_query), atol=1e-7)


@pytest.mark.parametrize('way', [5, 20])
def test_step_sizes_and_rows_of_the_published_network(way):
  """Two rows of four layers of 64, and a step size for each tensor and step (the authors have one step more unused)."""
  params, _ = jax.eval_shape(
    lambda rng: mamlpp.make(conv4.make(way)).init(rng, jnp.zeros((1, 28, 28, 1))), jax.random.key(0)
  )
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  assert count([params['network'][f'norm{i}'] for i in range(4)]) == 2 * 4 * 64 * 5
  convolutions_and_head = {5: 111_749, 20: 112_724}[way] - 4 * 64  # without biases before batch normalisation
  assert count(params['network']) == convolutions_and_head + 2 * 4 * 64 * 5
  assert count(params['inner_lr']) == (4 + 2) * 5


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(first_order=True, first_order_epochs=1), 'choose one'),
    (dict(multi_step_epochs=-1), 'none can be negative'),
    (dict(epoch=0), 'one meta-update at least'),
    (dict(per_step_statistics=True), "'transductive' does not read them"),
    (dict(learned_lr='layer'), "not 'layer'"),
    (dict(learned_lr='tensor', inner_lr_range=('a', 'b')), 'low, high'),
  ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    maml.make(mlp.make(WAY), **settings)


@pytest.mark.parametrize(
  ('model', 'settings', 'message'),
  [
    (mlp.make(WAY), dict(per_step_norm=True, adapt_norm=False), 'no normalisation layers'),
    (Normed(), dict(per_step_norm=True), 'no normalisation layers whose parameters the inner loop leaves alone'),
    (mlp.make(WAY), dict(per_step_statistics=True, batch_norm='running'), 'the model keeps none'),
    (Normed(), dict(inner_params=('norm',), adapt_norm=False), 'would move nothing'),
    (Normed(), dict(inner_steps=0, multi_step_epochs=1), 'inner_steps = 0'),
  ],
)
def test_settings_that_do_not_suit_the_model_are_refused(model, settings, message):
  with pytest.raises(UserError, match=message):
    maml.make(model, **settings).init(jax.random.key(0), draw_episode(0).support.inputs)


def test_another_step_size_for_evaluation_is_refused_where_they_are_learned():
  config = config_lib.load(TINY)
  config = config_lib.override(config, ['--config.algorithm.learned_lr=tensor', '--config.eval.inner_lr=0.5'])
  with pytest.raises(UserError, match='inner_lr: step sizes are learned'):
    experiment_lib.make(config, None)


def test_parameters_of_normalisation_layers_are_known_by_name():
  params = {'norm0': {'scale': 0}, 'block': {'shortcut_norm': {'bias': 0}, 'conv': 0}, 'LayerNorm_0': {'scale': 0}}
  found = jax.tree.map_with_path(lambda path, _: networks.is_norm(path), params)
  assert found == {'norm0': {'scale': True}, 'block': {'shortcut_norm': {'bias': True}, 'conv': False}} | {
    'LayerNorm_0': {'scale': True}
  }

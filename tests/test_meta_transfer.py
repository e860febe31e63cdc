"""Meta-Transfer Learning against its equations with unrolled steps, and what stays as it is to the bit in a run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import experiment as experiment_lib
from metajax import losses, main, networks, train, workdir
from metajax.algorithms import meta_transfer
from metajax.checkpoint import Checkpoints
from metajax.errors import UserError
from metajax.models import convolution, layers
from tests.conftest import SMALL_CONV, TINY, start
from tests.test_maml import draw_episode
from tests.test_protonet import Counting

WAY, SHOT, STEPS = 3, 2, 4
RATE = 0.25  # exact in float32, as step sizes are
EPSILON = 1e-5

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


class Small(nn.Module):
  """A convolution with a bias and a 1x1 convolution, normalisation and a head: all kinds of what may be learned."""

  num_outputs: int | None = None

  @nn.compact
  def __call__(self, x):
    normal = nn.initializers.normal(0.5)
    shortcut = self.param('shortcut', normal, (x.shape[-1], 4), x.dtype)
    y = convolution.conv3x3(x, self.param('conv', normal, (3, 3, x.shape[-1], 4), x.dtype))
    y = layers.BatchNorm(name='norm')(y + self.param('conv_bias', normal, (4,), x.dtype)) + x @ shortcut
    y = nn.softplus(y).mean((1, 2))
    return y if self.num_outputs is None else nn.Dense(self.num_outputs, name='head')(y)


def windows(x):
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return [[padded[:, i : i + x.shape[1], j : j + x.shape[2]] for j in range(3)] for i in range(3)]


def features_of(params, frozen, x, statistics=None):
  """The features of `Small` by equation 6, written out, and the statistics of x."""
  kernel, shift = frozen['conv'] * params['scale']['conv'], params['shift']['conv_bias']
  patches = windows(x)
  y = sum(patches[i][j] @ kernel[i, j] for i in range(3) for j in range(3)) + (frozen['conv_bias'] + shift)
  of_batch = {'mean': y.mean((0, 1, 2)), 'var': y.var((0, 1, 2))}
  by = of_batch if statistics is None else statistics
  norm = params.get('norm', frozen)['norm']
  y = (y - by['mean']) / jnp.sqrt(by['var'] + EPSILON) * norm['scale'] + norm['bias']
  y += x @ (frozen['shortcut'] * params['scale'].get('shortcut', 1.0))
  return jnp.logaddexp(y, 0).mean((1, 2)), of_batch


def cross_entropies(head, features, targets):
  logits = features @ head['kernel'] + head['bias']
  return jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(targets)), targets]


def steps_of_the_head(head, features, targets, steps, rate, *, first_order=False):
  """All heads, from the initial one on; the gradient of the mean cross-entropy by its formula."""
  heads = [head]
  for _ in range(steps):
    rest = jax.nn.softmax(features @ head['kernel'] + head['bias']) - jnp.eye(WAY)[targets]
    gradient = {'kernel': features.T @ rest / len(targets), 'bias': rest.mean(axis=0)}
    if first_order:
      gradient = jax.lax.stop_gradient(gradient)
    head = jax.tree.map(lambda w, g: w - rate * g, head, gradient)
    heads.append(head)
  return heads


def plain_losses(params, frozen, episode, *, first_order=False, given='query'):
  support, of_support = features_of(params, frozen, episode.support.inputs)
  query, of_query = features_of(params, frozen, episode.query.inputs, of_support if given == 'support' else None)
  head = steps_of_the_head(params['head'], support, episode.support.targets, STEPS, RATE, first_order=first_order)[-1]
  return cross_entropies(head, query, episode.query.targets), (of_support, of_query)


def make(model=None, **settings):
  settings = dict(inner_steps=STEPS, inner_lr=RATE) | settings
  return meta_transfer.make(model or Small(7), way=WAY, **settings)


def drawn(tree, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.array(rng.uniform(0.5, 1.5, x.shape)), tree)


def task(seed=0):
  return draw_episode(seed, (5, 6, 2), way=WAY, shot=SHOT)


def begun(learner, moved=True):
  """Initial params and model_state in float64; all that is learned moved away from where it begins, if so wanted."""
  params, state = jax.tree.map(jnp.float64, jax.jit(learner.init)(jax.random.key(0), task().support.inputs))
  state['frozen'] = drawn(state['frozen'], seed=1)
  return drawn(params) if moved else params, state


def of_both(tree):
  """Of the gradient by support and query images the greatest absolute value each."""
  return [float(jnp.abs(x.inputs).max()) for x in tree]


def test_at_first_the_network_is_as_it_was_and_the_head_is_new():
  with jax.enable_x64(True):
    learner, episode = make(learn_norm=True), task()
    params, state = begun(learner, moved=False)
    assert params.keys() == {'head', 'scale', 'shift', 'norm'} and state.keys() == {'frozen', 'batch_stats'}
    assert params['head']['kernel'].shape == (4, WAY) and not params['head']['bias'].any()
    assert np.abs(params['head']['kernel']).max() <= np.sqrt(6 / (4 + WAY))
    assert (params['scale']['conv'] == 1).all() and params['scale']['conv'].shape == (1, 1, 2, 4)
    assert params['scale']['shortcut'].shape == (2, 4) and not params['shift']['conv_bias'].any()
    params, state = {**params, 'norm': {'norm': state['frozen']['norm']}}, dict(state)
    variables = {'params': state['frozen']}

    @jax.jit
    def plain(head):
      support, query = (Small().apply(variables, x.inputs) for x in (episode.support, episode.query))
      head = steps_of_the_head(head, support, episode.support.targets, STEPS, RATE)[-1]
      logits = query @ head['kernel'] + head['bias']
      return cross_entropies(head, query, episode.query.targets), jnp.argmax(logits, axis=1) == episode.query.targets

    values, (after, metrics) = jax.jit(learner.loss)(params, state, episode, None)
    wanted, correct = plain(params['head'])
    close(values, wanted)
    np.testing.assert_array_equal(metrics['accuracy'], correct)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
  ('first_order', 'mode', 'parts'),
  [
    (False, 'transductive', {}),
    (True, 'transductive', dict(shortcuts=False, learn_norm=True)),
    (False, 'support', dict(learn_norm=True)),
    (True, 'running', {}),
  ],
)
def test_loss_and_gradient_are_those_of_unrolled_steps(first_order, mode, parts):
  with jax.enable_x64(True):
    learner, episode = make(first_order=first_order, batch_norm=mode, batch_norm_momentum=0.8, **parts), task()
    params, state = begun(learner)
    assert ('norm' in params) == ('learn_norm' in parts) and ('shortcut' in params['scale']) == (
      'shortcuts' not in parts
    )
    images = episode.support.inputs, episode.query.inputs

    def ours(params, images):
      values, (after, _) = learner.loss(params, state, with_images(episode, images), None)
      return values.mean(), (values, after)

    def plain(params, images):
      options = dict(first_order=first_order, given='support' if mode == 'support' else 'query')
      values, statistics = plain_losses(params, state['frozen'], with_images(episode, images), **options)
      return values.mean(), (values, statistics)

    def constant_head(params, images):
      """The query loss with the adapted head held constant, of which the head's gradient is taken too."""
      support = features_of(params, state['frozen'], images[0])[0]
      heads = steps_of_the_head(params['head'], support, episode.support.targets, STEPS, RATE)
      adapted = jax.lax.stop_gradient(heads[-1])

      def loss(params):
        query, _ = features_of(params, state['frozen'], images[1])
        return cross_entropies(params['head'], query, episode.query.targets).mean()

      return jax.grad(loss)({**params, 'head': adapted})

    @jax.jit
    def both(params, images):
      gradients = [jax.grad(f, (0, 1), has_aux=True)(params, images) for f in (ours, plain)]
      return *gradients, constant_head(params, images)

    ((gradient, of_images), (values, after)), ((wanted, wanted_images), (plainly, statistics)), held = both(
      params, images
    )
  close(values, plainly)
  jax.tree.map(lambda a, b: close(a, b, rtol=1e-7, atol=1e-10), (gradient, of_images), (wanted, wanted_images))
  assert np.abs(of_images[1]).max() > 1e-5
  of_scales = np.abs(gradient['scale']['conv']).max()
  assert of_scales > 1e-4 and np.abs(gradient['shift']['conv_bias']).max() < 1e-12 * max(1, of_scales)
  if first_order:
    assert not np.any(of_images[0])
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-7, atol=1e-10), gradient, held)
  else:
    assert np.abs(of_images[0]).max() > 1e-5
    assert np.abs(gradient['scale']['conv'] - held['scale']['conv']).max() > 1e-2 * of_scales
  np.testing.assert_array_equal(after['frozen']['conv'], state['frozen']['conv'])
  old, (of_support, of_query) = jax.device_get((state['batch_stats']['norm'], statistics))
  for name, found in after['batch_stats']['norm'].items():
    expected = 0.8 * (0.8 * old[name] + 0.2 * of_support[name]) + 0.2 * of_query[name]
    close(found, expected if mode == 'running' else old[name])


def with_images(episode, images):
  return episode._replace(
    support=episode.support._replace(inputs=images[0]), query=episode.query._replace(inputs=images[1])
  )


@pytest.mark.parametrize('mode', networks.BATCH_NORM_MODES)
def test_evaluation_moves_the_head_alone_by_the_statistics_of_its_mode(mode):
  with jax.enable_x64(True):
    learner, episode = make(batch_norm=mode), task()
    params, state = begun(learner)
    state['batch_stats'] = {'norm': {'mean': jnp.arange(4.0), 'var': jnp.arange(1.0, 5.0)}}

    @jax.jit
    def evaluated(params, state):
      adapted = learner.adapt(params, state, episode.support, jax.random.key(0))
      path = learner.trajectory(params, state, episode.support, jax.random.key(0))
      predict = functools.partial(learner.predict, params, state, inputs=episode.query.inputs)
      embedded, given = learner.embedding.support(params, state, episode.support.inputs)
      query = learner.embedding.query(params, given, episode.query.inputs)
      along = learner.predict_along(params, state, episode.support, episode.query.inputs, jax.random.key(0))
      return adapted, path, predict(adapted), jax.vmap(predict)(path), along, (embedded, query)

    adapted, path, outputs, outputs_of_path, along, embedded = evaluated(params, state)
    frozen, known = state['frozen'], state['batch_stats']['norm'] if mode == 'running' else None

    @jax.jit
    def plain(params):
      support, of_support = features_of(params, frozen, episode.support.inputs, known)
      by = {'transductive': None, 'support': of_support, 'running': known}
      query, _ = features_of(params, frozen, episode.query.inputs, by[mode])
      heads = steps_of_the_head(params['head'], support, episode.support.targets, STEPS, RATE)
      return (support, query), heads, [query @ head['kernel'] + head['bias'] for head in heads]

    features, heads, logits = plain(params)
  assert jax.tree.structure(adapted.head) == jax.tree.structure(params['head'])
  assert adapted.statistics.keys() == {'batch_stats'}  # the network is the same for all tasks
  jax.tree.map(close, embedded, features)
  assert len(outputs_of_path) == STEPS + 1 and np.abs(heads[-1]['kernel'] - heads[0]['kernel']).max() > 0.01
  for k, (head, wanted) in enumerate(zip(heads, logits, strict=True)):
    jax.tree.map(lambda a, b, k=k: close(a[k], b), path.head, head)
    close(outputs_of_path[k], wanted)
  close(along, outputs_of_path)
  jax.tree.map(lambda a, b: close(a, b[-1]), (adapted.head, outputs), (path.head, outputs_of_path))


def test_a_step_of_the_tensorflow_code_is_one_with_way_times_its_rate():
  """Its loss is the sum over the support set, divided by shot."""
  rate = 1 / 16
  with jax.enable_x64(True):
    learner, episode = make(inner_steps=1, inner_lr=WAY * rate), task()
    params, state = begun(learner)
    features, _ = jax.jit(features_of)(params, state['frozen'], episode.support.inputs)

    def loss(head):
      return jnp.sum(cross_entropies(head, features, episode.support.targets) / SHOT)

    expected = jax.tree.map(lambda w, g: w - rate * g, params['head'], jax.jit(jax.grad(loss))(params['head']))
    found = jax.jit(learner.adapt)(params, state, episode.support, None).head
  jax.tree.map(close, found, expected)


def test_mirror_images_join_the_support_set_in_evaluation_alone():
  with jax.enable_x64(True):
    learner, plain, episode = make(mirror=True), make(), task()
    params, state = begun(learner)
    inputs = np.asarray(episode.support.inputs)
    mirrored = np.empty_like(inputs)
    for column in range(6):
      mirrored[:, :, column] = inputs[:, :, 5 - column]
    both = episode.support._replace(
      inputs=jnp.concatenate([inputs, mirrored]), targets=jnp.tile(episode.support.targets, 2)
    )

    @jax.jit
    def run():
      wanted = plain.adapt(params, state, both, None).head
      paths = learner.trajectory(params, state, episode.support, None).head
      pairs = [
        (learner.adapt(params, state, episode.support, None).head, wanted),
        (jax.tree.map(lambda x: x[-1], paths), wanted),
        (learner.loss(params, state, episode, None)[0], plain.loss(params, state, episode, None)[0]),
      ]
      return pairs, plain.adapt(params, state, episode.support, None).head, wanted

    pairs, without, wanted = run()
  for found, expected in pairs:
    jax.tree.map(close, found, expected)
  assert np.abs(without['kernel'] - wanted['kernel']).max() > 1e-3


class CountingWithHead(Counting):
  num_outputs: int | None = None


@pytest.mark.parametrize(('mode', 'counted'), [('transductive', 2), ('support', 1)])
def test_dropout_is_for_training_alone_and_in_both_sets(mode, counted):
  """It adds 100; in mode 'support' the query set's pass leaves the state as it is."""
  learner, episode = make(CountingWithHead(), inner_lr=1e-4, batch_norm=mode), draw_episode(0, (4,), way=WAY)
  params, state = learner.init(jax.random.key(0), episode.support.inputs)
  loss = jax.jit(learner.loss)
  values, (dropped, _) = loss(params, state, episode, jax.random.key(1))
  images = episode.support.inputs + 100, episode.query.inputs + 100
  wanted, (plain, _) = loss(params, state, with_images(episode, images), None)
  np.testing.assert_allclose(values, wanted, rtol=1e-3)
  assert dropped['counters']['calls'] == counted and plain['counters']['calls'] == 0
  adapted = jax.jit(learner.adapt)(params, state, episode.support, jax.random.key(1))
  assert adapted.statistics['counters']['calls'] == 0
  assert learner.embedding.support(params, state, episode.support.inputs)[0].max() < 50


# Runs.


def test_a_run_keeps_the_network_to_the_bit_on_one_device_and_where_it_goes_on_on_two(
  pretrained, cache, tmp_path, capsys
):
  """Of three tasks, so that their mean has other bits than each of them."""
  folder = tmp_path / 'run'
  network = Checkpoints(pretrained, read_only=True).best_weights()[0]['embedding']

  def arguments(steps):
    learner = '--config.algorithm.name=meta_transfer', '--config.data.tasks=3', f'--config.init_from={pretrained}'
    return (
      f'--config={TINY}',
      *SMALL_CONV,
      *learner,
      '--mode=train',
      f'--workdir={folder}',
      f'--config.total_steps={steps}',
    )

  def assert_only_the_network_is_as_it_was(step, before):
    state = Checkpoints(folder, read_only=True).restore(step, before)
    jax.tree.map(np.testing.assert_array_equal, state.model_state['frozen'], network)
    for part, leaves in (('scale', 4), ('head', 2)):
      moves = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params[part], before.params[part])
      assert len(jax.tree.leaves(moves)) == leaves and min(jax.tree.leaves(moves)) > 1e-4
    return state

  assert main.main(['metajax', *arguments(steps=2)]) == 0
  assert f'initial weights: the best of {pretrained}, its network\n' in capsys.readouterr().out
  initial = train.init_state(experiment_lib.make(workdir.read_config(folder), None), seed=0)
  halfway = assert_only_the_network_is_as_it_was(2, initial)

  process = start(*arguments(steps=4), METAJAX_CACHE=str(cache), JAX_NUM_CPU_DEVICES='2')
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  assert 'from step 2' in output and '2 cpu device(s)' in output and 'initial weights' not in output
  assert_only_the_network_is_as_it_was(4, halfway)


@pytest.mark.parametrize(
  ('model', 'settings', 'text'),
  [
    (None, dict(batch_norm='batch'), 'batch_norm is one of'),
    (None, dict(objective=losses.REGRESSION), 'regression has none'),
    (None, dict(inner_steps=0), 'inner_steps = 0'),
    (nn.Dense(3), {}, 'a model with num_outputs'),
  ],
)
def test_settings_that_are_refused(model, settings, text):
  with pytest.raises(UserError, match=text):
    make(model, **settings)

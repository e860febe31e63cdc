"""Data sets and networks of a user's own: inputs of any rank and type, and what cannot work is said before training."""

import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import config, main
from metajax import experiment as experiment_lib
from metajax.algorithms import maml
from metajax.errors import UserError
from metajax.types import Episode, Examples
from tests.conftest import TINY

DATA = """
  import numpy as np
  from metajax.data.table import ClassTable

  SHAPES = {'vectors': (6,), 'series': (5, 3), 'images': (8, 6, 2), 'volumes': (4, 4, 4, 1)}

  def load(data_dir, *, kind='vectors', dtype='float32', apart=False):
    x = np.random.default_rng(0).normal(100, 30, (40, *SHAPES[kind])).clip(0, 255).astype(dtype)

    def part(first, classes):
      starts = 5 * np.arange(classes) + (0 if apart else 5 * first)
      images = x[5 * first :].copy() if apart else x
      return ClassTable(images, starts, np.full(classes, 5), np.zeros(classes, np.int8), tuple(map(str, starts)))

    return {'train': part(0, 4), 'test': part(4, 4)}
"""

NETS = """
  import flax.linen as nn

  class Net(nn.Module):
    num_outputs: int | None
    mode: str

    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4)(x.reshape(len(x), -1))
      if self.mode == 'dropout':
        x = nn.Dropout(0.5, deterministic=False)(x)
      if self.mode == 'batch_norm':
        x = nn.BatchNorm(use_running_average=False)(x)
      if self.mode == 'broken':
        x = x + x.colour
      return x if self.num_outputs is None else nn.Dense(1 if self.mode == 'narrow' else self.num_outputs)(x)

  def make(num_outputs, *, mode='plain'):
    return Net(num_outputs, mode)
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
  """A package of the user's own, of a name that no other test has imported."""
  package = tmp_path / f'mine{tmp_path.name.translate({ord("-"): "_"})}'
  package.mkdir()
  (package / '__init__.py').touch()
  for name, text in (('data', DATA), ('nets', NETS)):
    (package / f'{name}.py').write_text(textwrap.dedent(text))
  monkeypatch.syspath_prepend(tmp_path)
  return package


@pytest.fixture
def given(modules):
  """A function that makes command-line arguments with the user's own parts."""

  def make_arguments(*settings):
    names = f'data.name={modules.name}.data', f'model.name={modules.name}.nets'
    few = 'data.way=2', 'data.shot=1', 'data.query_shot=2'
    return [f'--config.{setting}' for setting in (*names, *few, *settings)]

  return make_arguments


def make(arguments):
  return experiment_lib.make(config.override(config.load(TINY), arguments), None)


@pytest.mark.parametrize('apart', [False, True])
@pytest.mark.parametrize('placement', ['device', 'host'])
@pytest.mark.parametrize(
  ('kind', 'dtype'), [('vectors', 'float32'), ('series', 'float64'), ('images', 'uint8'), ('volumes', 'float16')]
)
def test_inputs_of_any_rank(given, kind, dtype, placement, apart):
  """Bytes are divided by 255, floats stay; every split has its own rows, wherever its array lies."""
  made = make(given(f'data.kind={kind}', f'data.dtype={dtype}', f'data.placement={placement}', f'data.apart={apart}'))
  for split in ('train', 'test'):
    data, source = made.splits[split], made.sources[split]
    batch = source.sample(0, 3)
    episodes = jax.device_get(source.decode(made.resident, batch))
    for k in range(3):
      for inputs, target in zip(episodes.query.inputs[k], episodes.query.targets[k], strict=True):
        start = data.starts[episodes.class_ids[k][target]]
        rows = np.asarray(data.images[start : start + 5], np.float32) / (255 if dtype == 'uint8' else 1)
        assert np.isclose(rows, inputs, rtol=1e-6).reshape(5, -1).all(1).any()


def test_vectors_train_and_are_tested(given, tmp_path):
  run = [f'--config={TINY}', f'--workdir={tmp_path / "run"}', '--config.total_steps=1', *given()]
  assert main.main(['metajax', *run]) == 0
  assert (tmp_path / 'run' / 'test.json').exists()


@pytest.mark.parametrize(
  ('settings', 'why'),
  [
    (['data.dtype=uint16'], 'the train split of .* images are uint16; give uint8'),
    (["data.augment=('flip',)"], r'inputs float32 \(6,\) are not images'),
    (['data.normalize=metaoptnet_mini', 'data.kind=images'], r'inputs float32 \(8, 6, 2\) are not images'),
    (['model.name=conv4'], r'conv4 does not take inputs \(6,\): '),
    (['model.mode=dropout'], r'cannot be evaluated: InvalidRngError: .*nets\.py, line \d+\)$'),
    (['model.mode=broken'], r'does not take inputs \(6,\): AttributeError: .*colour \(.*nets\.py, line 16\)$'),
    (['model.mode=narrow'], 'eval.way = 2, but the network was trained with 1 outputs'),
    (
      ['model.mode=batch_norm', 'algorithm.name=protonet', 'algorithm.batch_norm=running'],
      r'cannot be evaluated: Modify',
    ),
  ],
)
def test_what_cannot_work_is_said_before_training(given, settings, why):
  with pytest.raises(UserError, match=f'^config.*{why}'):
    make(given(*settings))


class Told(nn.Module):
  """Dropout and batch norm as Flax users write them."""

  name_of_flag: str
  norm: bool = False

  def body(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.0)(x) if self.norm else x
    return nn.Dense(2, name='head')(nn.Dropout(0.0 if self.norm else 0.5, deterministic=not train)(x))


class Train(Told):
  @nn.compact
  def __call__(self, x, train=False):
    return self.body(x, train)


class Deterministic(Told):
  @nn.compact
  def __call__(self, x, deterministic=True):
    return self.body(x, not deterministic)


@pytest.mark.parametrize('net', [Train, Deterministic])
def test_a_network_is_told_whether_it_trains(net):
  x, y = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32), jnp.array([0, 1] * 3)
  episode, keys = Episode(Examples(x, y), Examples(x, y), jnp.arange(2)), jax.random.split(jax.random.key(0))
  learner = maml.make(net('dropout'), inner_steps=1, inner_lr=0.1)
  params, state = learner.init(keys[0], x[:1])
  trained = [learner.loss(params, state, episode, key)[0] for key in keys]
  assert not np.allclose(*trained)  # dropout draws
  tested = [learner.predict(params, state, learner.adapt(params, state, episode.support, key), x) for key in keys]
  np.testing.assert_array_equal(*tested)

  learner = maml.make(net('norm', norm=True), inner_steps=0, batch_norm='running', batch_norm_momentum=0.0)
  params, state = learner.init(keys[0], x[:1])
  losses, (state, _) = learner.loss(params, state, episode, keys[0])
  kernel = params['head']['kernel']
  [statistics] = state['batch_stats'].values()
  np.testing.assert_allclose(statistics['mean'], x.mean(0), rtol=1e-5)

  def outputs(inputs, mean, var):
    return (inputs - mean) / np.sqrt(var + 1e-5) @ kernel

  expected = optax.softmax_cross_entropy_with_integer_labels(outputs(x, x.mean(0), x.var(0)), y)
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  found = learner.predict(params, state, learner.adapt(params, state, episode.support, None), 3 * x)
  np.testing.assert_allclose(found, outputs(3 * x, statistics['mean'], statistics['var']), rtol=1e-4)

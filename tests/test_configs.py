"""Every config file of `configs/` loads, and takes two steps on tiny data in the data set's own format."""

import json
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from metajax import config as config_lib
from metajax import losses, main, optimizers
from metajax.data import conversion, table
from metajax.datasets import mini_imagenet
from metajax.datasets import omniglot as omniglot_data
from tests.conftest import ROOT

FILES = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))
SMALL = [
  '--config.total_steps=2',
  '--config.data.tasks=2',
  '--config.data.query_shot=1',
  '--config.eval.episodes=2',
  '--config.eval.val_episodes=2',
]


def glyphs(folder):
  del folder
  return ['--config.data.classes=(6,6,6)', '--config.model.width=4', '--config.model.downsample=stride']


def sinusoid(folder):
  del folder
  return []


def omniglot(folder):
  """A converted table, with an image of one brightness for every drawing."""
  classes = {name: range(20) for name in sorted(omniglot_data._characters())}
  table.cache_dir().mkdir(exist_ok=True)
  job = {'fingerprint': '', 'superclasses': {}, 'splits': {}, 'notes': []}
  conversion.convert('omniglot-28', classes, lambda k: np.full((28, 28, 1), 10 * k, np.uint8), (28, 28, 1), job)
  return ['--config.model.width=5']


def mini(folder):
  splits = mini_imagenet._lists()
  rng = np.random.default_rng(0)
  for split, wnids in splits.items():
    wnids = sorted(wnids)[:5]
    data = {
      'image_data': rng.integers(256, size=(5 * 16, 84, 84, 3), dtype=np.uint8),
      'class_dict': {wnid: list(range(16 * k, 16 * k + 16)) for k, wnid in enumerate(wnids)},
    }
    with open(folder / f'mini-imagenet-cache-{split}.pkl', 'wb') as file:
      pickle.dump(data, file, protocol=2)
  return ['--config.model.width=5', '--config.data.size=16']


def images(folder):
  rng = np.random.default_rng(0)
  for k in range(15):
    (folder / 'mine' / f'class {k}').mkdir(parents=True)
    for i in range(6):
      pixels = rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(folder / 'mine' / f'class {k}' / f'{i}.png')
  small = ['--config.model.width=5', '--config.data.size=16', '--config.data.fractions=(0.34, 0.33, 0.33)']
  return ['--config.data.path=mine', *small]


MAML = ('baseline', 'uniform', 'spsa', 'spsa_track')
LARGE, CODES = ('mini_imagenet', 'fc100', 'tiered_imagenet'), ('tensorflow', 'pytorch')
PROTONET = ('pretrain', 'baseline', 'spsa', 'spsa_track')
# Data on which compiling takes less than on the default ones.
STRINGS = {
  'mtm_maml.py': ':data=omniglot,method=spsa_track',
  'mtm_protonet.py': ':data=omniglot,method=pretrain',
  'mamlpp.py': ':way=3,epochs=1,epoch=2',
  'quickdraw.py': ':data=glyphs,way=3,method=meta_sgd',
  'pretrain.py': ':data=omniglot,model=conv4,code=tensorflow',
  'meta_transfer.py': ':data=omniglot,model=conv4,code=pytorch,hard,way=3',
  'joint.py': ':data=omniglot,model=conv4',
}
# The others only train and validate: a test is the same for all configs of an algorithm, and compiling takes long.
TESTED = ('maml_mini.py', 'protonet_omniglot.py', 'sinusoid.py')
DATA = {'glyphs': glyphs, 'omniglot': omniglot, 'mini_imagenet': mini, 'folder': images, 'sinusoid': sinusoid}


# `.ci/run` runs the quick start whole.
@pytest.mark.parametrize('name', [name for name in FILES if name != 'quickstart.py'])
def test_config_takes_two_steps(name, tmp_path, monkeypatch):
  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'cache'))
  path = f'configs/{name}{STRINGS.get(name, "")}'
  config = config_lib.load(f'{ROOT}/{path}')
  extra = DATA[config.data.name](tmp_path)
  if 'inner_steps' in config.algorithm:
    extra.append('--config.eval.inner_steps=2')
    if config.algorithm.inner_steps > 2:
      extra.append('--config.algorithm.inner_steps=2')
  if config.data.group > 1:
    extra.append('--config.data.group=2')
  monkeypatch.chdir(ROOT)
  arguments = [f'--config={path}', f'--workdir={tmp_path / "run"}', f'--data_dir={tmp_path}', *SMALL, *extra]
  if name not in TESTED:
    arguments.append('--mode=train')
  assert main.main(['metajax', *arguments]) == 0
  records = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert records[-1]['step'] == 2 and np.isfinite(records[-1]['val/loss'])
  if name in TESTED:
    result = json.loads((tmp_path / 'run' / 'test.json').read_text())
    assert ('dataset_notes' in result) == (config.data.name == 'mini_imagenet')  # of which there is a part only


@pytest.mark.parametrize(
  'string',
  [
    # Every recipe of the MTM authors' code, and what is trained before it.
    *(
      f'mtm_maml.py:data={data},way=2,shot=1,method={m}' for data in ('mini_imagenet', 'tiered_imagenet') for m in MAML
    ),
    *(f'mtm_maml.py:data=fc100,way=5,shot=5,method={m}' for m in ('baseline', 'spsa_coarse')),
    *(f'mtm_maml.py:data=cifar_fs,way=5,shot=1,method={m}' for m in ('baseline', 'inner_first_order', 'backprop')),
    *(f'mtm_protonet.py:data=mini_imagenet,model=resnet12,tasks=2,method={m}' for m in PROTONET),
    *(f'mtm_protonet.py:data=cifar_fs,way=2,method={m}' for m in ('pretrain', 'backprop')),
    # Every ablation of MAML++, and the twelve cells of Quick, Draw!.
    *(
      f'mamlpp.py:way=5,method={m}'
      for m in ('maml', 'multi_step', 'order', 'per_step_norm', 'lslr', 'cosine', 'meta_sgd')
    ),
    *(f'mamlpp.py:data=mini_imagenet,way=5,shot={shot}' for shot in (1, 5)),
    *(f'quickdraw.py:way={w},shot={s},drawings={d}' for w in (5, 10) for s in (1, 5, 10) for d in (20, 100)),
    *(f'mtm_protonet.py:data=fc100,shot=10,method={m}' for m in ('pretrain', 'inner_first_order')),
    'mtm_protonet.py:data=tiered_imagenet,way=2,shot=5,method=spsa',
    # Every cell of Meta-Transfer Learning's tables.
    *(f'pretrain.py:data={data},code={code}' for data in LARGE for code in CODES),
    *(f'meta_transfer.py:data={data},code={code},shot={s}' for data in LARGE for code in CODES for s in (1, 5)),
    *(f'meta_transfer.py:data=fc100,code={code},shot=10,hard' for code in CODES),
    *(
      f'meta_transfer.py:learn={learn},code={code}' for learn in ('ss_last', 'ft', 'ft_last', 'head') for code in CODES
    ),
  ],
)
def test_recipes_are_complete_configs(string):
  config = config_lib.load(f'{ROOT}/configs/{string}')
  way, shot = (int(re.search(rf'{k}=(\d+)', string + ',way=5,shot=1')[1]) for k in ('way', 'shot'))
  assert (config.data.way, config.data.shot) == (way, shot)
  assert config_lib.from_json(config_lib.to_json(config)) == config
  config_lib.call(optimizers.make, config, 'optimizer', config.total_steps)
  config_lib.build(
    config, 'weighting', tasks=config.data.tasks, tx=None, num_classes=8, superclass_ids=np.zeros(8, np.int32)
  )


@pytest.mark.parametrize('way', [5, 10])
@pytest.mark.parametrize('shot', [1, 5, 10])
@pytest.mark.parametrize(
  ('drawings', 'tasks', 'inner_lr', 'learning_rate', 'tested'),
  [(100, 25, 0.01, 1e-3, 2500), (20, 10, 0.005, 5e-4, 1000)],
)
def test_the_twelve_cells_of_quick_draw_are_the_published(way, shot, drawings, tasks, inner_lr, learning_rate, tested):
  config = config_lib.load(f'{ROOT}/configs/quickdraw.py:way={way},shot={shot},drawings={drawings}')
  data, algorithm = config.data, config.algorithm
  assert (data.way, data.shot, data.query_shot, data.tasks) == (way, shot, shot, tasks)
  assert (data.split, data.split_seed, data.per_class, data.train_per_class) == ('ffl', 123, 100, drawings)
  assert (algorithm.inner_steps, algorithm.inner_lr, algorithm.first_order) == (5, inner_lr, False)
  assert (config.optimizer.learning_rate, config.total_steps, config.model.width) == (learning_rate, 5000, 20)
  assert config.eval.episodes == tested


@pytest.mark.parametrize(
  ('data', 'shot', 'images', 'tasks', 'updates'),
  [
    *(('mini_imagenet', 5, 10, 2, 800), ('mini_imagenet', 1, 10, 6, 266)),
    *(('tiered_imagenet', 5, 40, 1, 1600), ('tiered_imagenet', 1, 40, 2, 800)),
    *(('cifar_fs', 5, 10, 6, 266), ('cifar_fs', 1, 20, 2, 800), ('fc100', 5, 10, 6, 266), ('fc100', 1, 5, 1, 1600)),
  ],
)
def test_the_eight_cells_of_joint_training_are_the_published(data, shot, images, tasks, updates):
  config = config_lib.load(f'{ROOT}/configs/joint.py:data={data},shot={shot}')
  assert (config.data.tasks, config.data.way, config.data.shot + config.data.query_shot) == (tasks, 5, images)
  assert (config.eval.way, config.eval.shot, config.eval.query_shot, config.eval.episodes) == (5, shot, 30, 2000)
  assert (config.eval_every, config.eval.val_episodes, config.stop_patience) == (updates, 400, 15)
  assert config.algorithm.normalize == (data != 'fc100') and config.algorithm.head_c == 3
  assert config.model.block_size == (5 if data.endswith('imagenet') else 2)
  assert config.optimizer.name == 'radam' and config.optimizer.schedule == 'plateau' and config.eval.last
  assert config_lib.from_json(config_lib.to_json(config)) == config


def test_step_sizes_of_meta_transfer_are_the_published():
  phases = {code: config_lib.load(f'{ROOT}/configs/meta_transfer.py:code={code}').optimizer for code in CODES}
  tensorflow, pytorch = phases.values()
  assert (tensorflow.learning_rate, *tensorflow.rates) == (1e-3, 5e-4, 2.5e-4, 1.25e-4, 1e-4)
  assert tensorflow.boundaries == (1000, 2000, 3000, 4000)
  assert pytorch.boundaries == tuple(range(1000, 10_000, 1000)) and pytorch.learning_rate * pytorch.head_factor == 1e-3
  np.testing.assert_allclose(pytorch.rates, 1e-4 * 0.5 ** np.arange(1, 10))
  first = config_lib.load(f'{ROOT}/configs/pretrain.py:code=pytorch')
  assert first.total_steps == 110 * 300 and first.optimizer.boundaries == (9000, 18_000, 27_000)
  assert first.optimizer.rates == (0.02, 0.004, 0.0008)
  other = config_lib.load(f'{ROOT}/configs/pretrain.py:code=tensorflow')
  assert (other.total_steps, other.optimizer.boundaries, other.optimizer.rates) == (10_000, (5000,), (5e-4,))


@pytest.mark.parametrize(
  ('learn', 'learner', 'only', 'inner'),
  [
    ('ss', 'meta_transfer', (), None),
    ('ss_last', 'meta_transfer', ('conv3', 'head'), None),
    ('head', 'meta_transfer', ('head',), None),
    ('ft_last', 'maml', ('conv3', 'norm3', 'head'), ('conv3', 'norm3', 'head')),
    ('ft', 'maml', (), ()),
  ],
)
def test_what_the_ablation_of_meta_transfer_learns(learn, learner, only, inner):
  """The outer loop learns just this of a network whose names are looked up, and by MAML the inner loop moves it."""
  config = config_lib.load(f'{ROOT}/configs/meta_transfer.py:learn={learn},model=conv4,data=omniglot')
  assert (config.algorithm.name, config.optimizer.only) == (learner, only)
  assert config.algorithm.get('inner_params') == inner
  model = config_lib.build(config, 'model', 5)
  algorithm = config_lib.build(config, 'algorithm', model, way=5, objective=losses.CLASSIFICATION)
  params, _ = jax.eval_shape(algorithm.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
  moving = flatten_dict(optimizers.learned(params, config.optimizer.only))
  assert {path for path, moves in moving.items() if not moves} == {
    path for path in moving if only and not {*path} & {*only}
  }


@pytest.mark.parametrize('model', ['resnet12', 'resnet12_mtl', 'resnet18_mtl'])
def test_networks_of_meta_transfer_have_dropout_in_pre_training_alone(model):
  phases = [config_lib.load(f'{ROOT}/configs/{name}.py:model={model}') for name in ('pretrain', 'meta_transfer')]
  assert [(config.model.name, config.model.dropout) for config in phases] == [(model, 0.1), (model, 0.0)]


def test_prototypical_networks_step_sizes_by_epoch():
  """Those of the specification, (last epoch, step size) by 1-based epoch; an epoch of four tasks has 250 updates."""

  def rates(method, original=False):
    string = f'mtm_protonet.py:method={method}' + ',original_schedule' * original
    config = config_lib.load(f'{ROOT}/configs/{string}').optimizer
    epoch = 1000 if method == 'baseline' else 250
    return [config.learning_rate, *config.rates], [b / epoch for b in config.boundaries]

  assert rates('baseline') == ([0.1, 0.006, 0.0012, 0.00024], [20, 40, 50])
  assert rates('baseline', original=True) == ([0.1, 0.006, 0.0012, 0.00024], [21, 41, 51])
  values, ends = rates('spsa_track')
  np.testing.assert_allclose(values, [0.0006, 0.00012, 0.000024])
  assert ends == [20, 30]
  values, ends = rates('spsa', original=True)
  np.testing.assert_allclose(values, [0.1, 0.0006, 0.00012, 0.000024])
  assert ends == [1, 21, 31]
  assert rates('backprop') == ([0.006, 0.0012, 0.00024], [20, 30])


@pytest.mark.parametrize('name', FILES)
def test_config_says_how_to_run_it(name):
  text = Path(ROOT / 'configs' / name).read_text()
  assert text.startswith('r"""') and f'metajax train --config={Path(name).stem}' in text.replace('\\\n     ', '')


@pytest.mark.parametrize(
  'name', [*(n for n in config_lib.names('data') if n not in ('tfds', 'sinusoid')), 'tfds:flowers']
)
def test_any_config_takes_any_data_set(name):
  config = config_lib.override(config_lib.load(str(ROOT / 'configs/maml_mini.py')), [f'--config.data.name={name}'])
  assert (config.data.name, config.data.way, config.data.shot, config.data.tasks) == (name, 5, 1, 4)
  assert config_lib.from_json(config_lib.to_json(config)) == config

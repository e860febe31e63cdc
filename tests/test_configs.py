"""Every config file of `configs/` loads, and takes two steps on tiny data in the data set's own format."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metajax import config as config_lib
from metajax import main
from metajax.data import conversion, table
from metajax.datasets import mini_imagenet
from metajax.datasets import omniglot as omniglot_data
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures('quick_compilation')
FILES = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))
SMALL = [
  '--config.total_steps=2',
  '--config.data.tasks=2',
  '--config.eval.episodes=2',
  '--config.eval.val_episodes=2',
  '--config.eval.inner_steps=2',
]


def glyphs(folder):
  del folder
  return []


def omniglot(folder):
  """A converted table, with an image of one brightness for every drawing."""
  classes = {name: range(20) for name in sorted(omniglot_data._characters())}
  table.cache_dir().mkdir(exist_ok=True)
  job = {'fingerprint': '', 'superclasses': {}, 'splits': {}, 'notes': []}
  conversion.convert('omniglot-28', classes, lambda k: np.full((28, 28, 1), 10 * k, np.uint8), (28, 28, 1), job)
  return ['--config.model.width=4']


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
  return ['--config.model.width=4']


def images(folder):
  rng = np.random.default_rng(0)
  for k in range(15):
    (folder / 'mine' / f'class {k}').mkdir(parents=True)
    for i in range(6):
      pixels = rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(folder / 'mine' / f'class {k}' / f'{i}.png')
  small = ['--config.model.width=4', '--config.data.size=20', '--config.data.fractions=(0.34, 0.33, 0.33)']
  return ['--config.data.path=mine', *small]


DATA = {'glyphs': glyphs, 'omniglot': omniglot, 'mini_imagenet': mini, 'folder': images, 'sinusoid': glyphs}


@pytest.mark.parametrize('name', FILES)
def test_config_takes_two_steps(name, tmp_path, monkeypatch):
  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'cache'))
  path = f'configs/{name}'
  config = config_lib.load(str(ROOT / path))
  extra = DATA[config.data.name](tmp_path)
  monkeypatch.chdir(ROOT)
  arguments = [f'--config={path}', f'--workdir={tmp_path / "run"}', f'--data_dir={tmp_path}', *SMALL, *extra]
  assert main.main(['metajax', *arguments]) == 0
  result = json.loads((tmp_path / 'run' / 'test.json').read_text())
  assert ('dataset_notes' in result) == (config.data.name == 'mini_imagenet')  # of which there is a part only


@pytest.mark.parametrize('name', FILES)
def test_config_says_how_to_run_it(name):
  text = Path(ROOT / 'configs' / name).read_text()
  assert text.startswith('r"""') and f'python -m metajax.main --config=configs/{name}' in text


@pytest.mark.parametrize(
  'name', [*(n for n in config_lib.names('data') if n not in ('tfds', 'sinusoid')), 'tfds:flowers']
)
def test_any_config_takes_any_data_set(name):
  config = config_lib.override(config_lib.load(str(ROOT / 'configs/maml_mini.py')), [f'--config.data.name={name}'])
  assert (config.data.name, config.data.way, config.data.shot, config.data.tasks) == (name, 5, 1, 4)
  assert config_lib.from_json(config_lib.to_json(config)) == config

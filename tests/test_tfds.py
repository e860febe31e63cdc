"""Data sets from what TFDS has prepared: its own copies of the field's data sets, and any other."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from metajax import config as config_lib
from metajax.datasets import (
  cifar100,
  cifar_fs,
  cub,
  fc100,
  mini_imagenet,
  omniglot,
  quickdraw,
  tiered_imagenet,
)
from metajax.datasets import tfds as any_tfds
from metajax.errors import UserError
from tests.conftest import TINY, prepare
from tests.test_prepared import build, features_of, png, stamped, stroke

pytestmark = pytest.mark.usefixtures('tables')


def flowers(data, names=('rose', 'tulip', 'daisy', 'iris', 'lily'), per_class=4, **options):
  """A data set that only TFDS knows, its classes mixed and over two splits; images are noise from (class, number)."""
  features = tfds.features.FeaturesDict(
    {'image': tfds.features.Image(shape=(8, 8, 3)), 'label': tfds.features.ClassLabel(names=names)}
  )
  examples = [
    {'image': png(stamped((8, 8, 3), 20 * label + n)), 'label': label}
    for n in range(per_class)
    for label in range(len(names))
  ]
  build(data / 'tensorflow_datasets', 'flowers', features, {'train': examples[::2], 'test': examples[1::2]}, **options)
  return names


def seeds(table, name):
  """The seeds in the corners of a class's images."""
  c = table.names.index(name)
  return sorted(int(image[0, 0, 0]) for image in table.images[table.starts[c] : table.starts[c] + table.counts[c]])


def test_any_data_set_with_classes_dealt_by_fractions(data):
  names = flowers(data)
  tables = any_tfds.load('flowers', str(data), size=8, fractions=(0.6, 0.2, 0.2), split_seed=3)
  order = np.random.default_rng(3).permutation(5)
  expected = [sorted(sorted(names)[k] for k in part) for part in np.split(order, [3, 4])]
  assert [list(t.names) for t in tables.values()] == expected and list(tables) == ['train', 'val', 'test']
  for t in tables.values():
    for name in t.names:
      label = names.index(name)
      assert seeds(t, name) == [20 * label + n for n in range(4)]
  row = tables['train'].images[tables['train'].starts[0]]
  np.testing.assert_array_equal(row, stamped((8, 8, 3), row[0, 0, 0]))


def test_once_converted_tfds_is_not_needed(data, tmp_path):
  flowers(data)
  any_tfds.load('flowers', str(data), size=8)
  again = any_tfds.load('flowers', str(tmp_path / 'nowhere'), size=8, split_seed=1)
  assert sum(len(t.names) for t in again.values()) == 5


def test_another_preparation_is_another_table(data, tmp_path):
  names = flowers(data)
  any_tfds.load('flowers', str(data), size=8)
  flowers(data, names[:3], per_class=5, version='4.0.0')
  again = any_tfds.load('flowers', str(data), size=8)
  assert sorted(name for t in again.values() for name in t.names) == sorted(names[:3])
  assert all((t.counts == 5).all() for t in again.values())
  settings = [('x/grey', False), ('x', True), ('x-grey', False), ('a/b:1.0.0', False), ('a/b-1.0.0', False)]
  assert len({any_tfds.dataset(builder, '', grey).name for builder, grey in settings}) == 5


def test_any_data_set_with_splits_of_a_file(data):
  flowers(data)
  (data / 'my.json').write_text(json.dumps({'train': ['tulip', 'rose'], 'test': ['iris']}))
  tables = any_tfds.load('flowers', str(data), size=8, splits='my.json')
  assert {split: t.names for split, t in tables.items()} == {'train': ('tulip', 'rose'), 'test': ('iris',)}


@pytest.mark.parametrize(
  ('content', 'complaint'),
  [
    ('{"train": ["rose"', 'my.json is no JSON file of split -> class names'),
    ('["rose"]', 'my.json is no JSON file of split -> class names'),
    ('{"training": ["rose"]}', "has a split 'training': they are train, val and test"),
    ('{"train": ["rosé"]}', "lists class 'rosé', which the data set has not; it has daisy, iris"),
    ('{"train": "rose"}', 'each split is a list of names'),
    ('{"train": [["rose"]]}', 'each split is a list of names'),
    ('[' * 100_000, 'no JSON file'),
    ('{"train": ["rose"], "test": ["rose"]}', "lists class 'rose' twice"),
  ],
)
def test_mistakes_in_the_file_of_splits(data, content, complaint):
  flowers(data)
  (data / 'my.json').write_text(content)
  with pytest.raises(UserError, match=complaint):
    any_tfds.load('flowers', str(data), size=8, splits='my.json')


def test_from_the_command_lines(data, capsys):
  flowers(data, names=tuple('abcdefghij'))
  assert prepare(['tfds:flowers', '--size=8', f'--data_dir={data}']) == 0
  assert '40 images of 8 x 8 x 3' in capsys.readouterr().out
  assert prepare(['tfds:flowers', '--check', f'--data_dir={data}']) == 0
  arguments = ['--config.data.name=tfds:flowers', '--config.data.size=8', '--config.data.fractions=(0.4, 0.3, 0.3)']
  config = config_lib.from_json(config_lib.to_json(config_lib.override(config_lib.load(TINY), arguments)))
  tables = config_lib.build(config, 'data', str(data))
  assert [len(t.names) for t in tables.values()] == [4, 3, 3]


def test_omniglot(data):
  """Both of TFDS's large splits; the small ones, which repeat part of them, do not count."""
  numbers = omniglot._characters()
  alphabets = sorted({name.split('/')[0] for name in numbers})

  def examples(*names):
    return [
      {
        'image': png(stroke(numbers[name], drawer)),
        'label': numbers[name] - 1,
        'alphabet': alphabets.index(name.split('/')[0]),
        'alphabet_char_id': int(name[-2:]) - 1,
      }
      for name in names
      for drawer in range(3)
    ]

  features = features_of('omniglot', alphabet=alphabets, label=[str(k) for k in range(1623)])
  greek, angelic = 'Greek/character02', 'Angelic/character11'
  splits = {'train': examples(greek), 'test': examples(angelic), 'small1': examples(greek)}
  build(data / 'tensorflow_datasets', 'omniglot', features, splits)
  tables = omniglot.load(str(data), size=105, split='lake', rotations=())
  assert (tables['train'].names, tables['test'].names) == ((greek,), (angelic,))
  for t, name in ((tables['train'], greek), (tables['test'], angelic)):
    assert t.counts.tolist() == [3] and t.superclasses == (name.split('/')[0],)
    rows = {t.images[t.starts[0] + k].tobytes() for k in range(3)}
    assert rows == {np.uint8(255 * ~stroke(numbers[name], drawer)).tobytes() for drawer in range(3)}


def build_imagenet(data, counts):
  """ImageNet with some images of some classes, numbered with gaps; the rank is in the first two pixels."""
  features, examples = features_of('imagenet2012'), []
  for wnid, count in counts.items():
    for rank in range(count):
      pixels = np.array([[[rank >> 8, rank & 255, 0]]], np.uint8)
      examples.append({'image': png(pixels), 'label': wnid, 'file_name': f'{wnid}_{3 * rank + 5}.JPEG'})
  validation = [{'image': png(pixels), 'label': wnid, 'file_name': 'ILSVRC2012_val_00000001.JPEG'}]
  order = np.random.default_rng(0).permutation(len(examples))
  splits = {'train': [examples[k] for k in order], 'validation': validation}
  build(data / 'tensorflow_datasets', 'imagenet2012', features, splits)


def test_mini_imagenet_from_imagenet(data):
  build_imagenet(data, {'n01532829': 1300, 'n01440764': 2})
  train = mini_imagenet.load(str(data), size=1)['train']
  assert train.names == ('n01532829',) and train.counts.tolist() == [600]
  ranks = train.images[:, 0, 0, 0].astype(int) * 256 + train.images[:, 0, 0, 1] + 1
  assert ranks[:12].tolist() == [5, 6, 7, 10, 14, 15, 16, 17, 18, 19, 20, 21]


def test_tiered_imagenet_from_imagenet(data):
  build_imagenet(data, {'n01532829': 5, 'n01440764': 2, 'n01530575': 3})
  train = tiered_imagenet.load(str(data), size=1)['train']
  assert train.names == ('n01530575', 'n01532829') and train.counts.tolist() == [3, 5]
  assert train.superclasses == ('passerine', 'passerine')


def test_cub(data):
  names = [c for split in cub._lists()['closer_look'].values() for c in split]
  features = features_of('caltech_birds2011', label=[str(k) for k in range(200)])
  kept = {name: features[name] for name in ('image', 'image/filename', 'label')}
  examples = [
    {
      'image': png(stamped((8, 8, 3), k)),
      'image/filename': f'{name}/{name[4:]}_{k:04d}_1.jpg',
      'label': int(name[:3]) - 1,
    }
    for k, name in enumerate((names[0], names[0], names[-1]))
  ]
  splits = {'train': examples[:1], 'test': examples[1:]}
  build(data / 'tensorflow_datasets', 'caltech_birds2011', tfds.features.FeaturesDict(kept), splits)
  tables = cub.load(str(data), size=8, crop=0.0)
  assert tables['train'].names == (names[0],) and tables['test'].names == (names[-1],)
  assert seeds(tables['train'], names[0]) == [0, 1] and seeds(tables['test'], names[-1]) == [2]


def build_cifar(data):
  features = features_of('cifar100', label=cifar100.names(), coarse_label=list(cifar100.lists()['superclasses']))

  def examples(*labels):
    return [
      {'id': f'{k}', 'image': png(stamped((32, 32, 3), label)), 'label': label, 'coarse_label': 0}
      for k, label in enumerate(labels)
    ]

  build(data / 'tensorflow_datasets', 'cifar100', features, {'train': examples(0, 4, 0), 'test': examples(4, 94)})


def test_cifar(data):
  """Both halves: without the test half a class has 500 images."""
  build_cifar(data)
  names = cifar100.names()
  for module, first in ((cifar_fs, 'cifar_fs'), (fc100, 'fc100')):
    tables = module.load(str(data))
    found = {name: seeds(t, name) for t in tables.values() for name in t.names}
    assert found == {names[0]: [0, 0], names[4]: [4, 4], names[94]: [94]}, first
    for split, t in tables.items():
      assert t.superclasses == tuple(
        s for c in t.names for s, of in cifar100.lists()['superclasses'].items() if c in of
      )
      listed = cifar100.lists()[first][split]
      assert all((s if module is fc100 else c) in listed for c, s in zip(t.names, t.superclasses, strict=True))


@pytest.mark.parametrize('per_class', [0, 2])
def test_quickdraw(data, caplog, per_class):
  features = features_of('quickdraw_bitmap')
  features = tfds.features.FeaturesDict(
    {'image': features['image'], 'label': tfds.features.ClassLabel(names=['bear', 'ant', 'angel'])}
  )
  labels = [0, 1, 0, 0, 2, 1, 0, 2, 2]
  examples = [{'image': png(stamped((28, 28), k)), 'label': label} for k, label in enumerate(labels)]
  build(data / 'tensorflow_datasets', 'quickdraw_bitmap', features, {'train': examples})
  tables = quickdraw.load(str(data), per_class=per_class)
  counts = dict(zip(('bear', 'ant', 'angel'), ([2] * 3 if per_class else [4, 2, 3]), strict=True))
  assert {name: len(seeds(t, name)) for t in tables.values() for name in t.names} == counts
  for t in tables.values():
    for name in t.names:
      assert {labels[k] for k in seeds(t, name)} == {('bear', 'ant', 'angel').index(name)}
  assert ('not those that the seed draws' in caplog.text) == bool(per_class)


def test_damage_in_the_files_is_named(data):
  flowers(data)
  [path] = (data / 'tensorflow_datasets/flowers/3.0.0').glob('*test*array_record*')
  path.unlink()
  with pytest.raises(UserError, match=r'TFDS flowers in .* cannot be read .*missing.*prepare it again'):
    any_tfds.load('flowers', str(data))


def test_what_is_not_there_is_said_to_need_preparing(data):
  with pytest.raises(UserError, match='TFDS has no data set flowers'):
    any_tfds.load('flowers', str(data))

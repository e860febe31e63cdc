import concurrent.futures
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, UnidentifiedImageError

from metajax.data import prepared
from metajax.datasets import omniglot
from metajax.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
  """No data set of the person who runs the tests is found."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  file.seek(0)
  return file


def build(
  data_dir, name, features, splits, supervised_keys=None, version='3.0.0', file_format='array_record', shards=None
):
  """Has TFDS prepare a data set; returns its folder. `splits` is split -> list of examples."""

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=supervised_keys)

    def _split_generators(self, dl_manager):
      return {split: enumerate(examples) for split, examples in splits.items()}

    def _generate_examples(self):
      raise NotImplementedError

  Builder.name = name
  tfds.disable_progress_bar()
  builder = Builder(data_dir=data_dir, file_format=file_format)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
  return Path(builder.data_dir)


def features_of(builder, **names):
  """The features of one of TFDS's own data sets, with the class names that it sets when it is prepared."""
  features = tfds.builder(builder).info.features
  for feature, values in names.items():
    features[feature].names = values
  return features


def noise(shape, seed):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def seed_of(record):
  """Images below are noise from a seed that is written in their upper left corner."""
  pixels = np.asarray(record.item.open())
  return int(pixels.reshape(-1)[0])


def stamped(shape, seed):
  pixels = noise(shape, seed)
  pixels.reshape(-1)[0] = seed
  return pixels


# ---- the data sets

CHARACTERS = [709, 1, 1100]  # numbers in the original files; the last one is of the evaluation half


def stroke(number, drawer):
  """A 1-bit image as in Omniglot."""
  return noise((105, 105), 100 * number + drawer) > 127


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def omniglot_folder(data_dir):
  names = {number: name.split('/character') for name, number in omniglot._characters().items()}
  alphabets = sorted({alphabet for alphabet, _ in names.values()})
  labels = [f'{names[n][0]}_{int(names[n][1]) - 1}' for n in range(1, 1624)]

  def examples(number, drawers):
    alphabet, character = names[number]
    return [
      {
        'image': png(stroke(number, drawer)),
        'alphabet': alphabet,
        'alphabet_char_id': int(character) - 1,
        'label': number - 1,
      }
      for drawer in range(1, drawers + 1)
    ]

  a, b, c = CHARACTERS
  splits = {'train': examples(a, 20) + examples(b, 20), 'test': examples(c, 20), 'small1': examples(a, 3)}
  features = features_of('omniglot', alphabet=alphabets, label=labels)
  return build(data_dir / 'tensorflow_datasets', 'omniglot', features, splits, ('image', 'label'))


@pytest.fixture(scope='module')
def cifar_folder(data_dir):
  superclasses = json.loads((ROOT / 'metajax/datasets/splits/cifar100.json').read_text())['superclasses']
  fine = sorted(c for members in superclasses.values() for c in members)
  coarse = {c: name for name, members in superclasses.items() for c in members}
  splits = {
    split: [
      {
        'id': f'{split}_{k:05d}',
        'image': png(stamped((32, 32, 3), k)),
        'label': fine[k % 100],
        'coarse_label': coarse[fine[k % 100]],
      }
      for k in numbers
    ]
    for split, numbers in {'train': range(200), 'test': range(200, 240)}.items()
  }
  features = features_of('cifar100', label=fine, coarse_label=list(superclasses))
  return build(data_dir / 'tensorflow_datasets', 'cifar100', features, splits, ('image', 'label'))


def dots(tmp_path, splits=None, **options):
  """A small data set of the images' own: pixels of 5 x 7 in a tensor, under other names than usual."""
  features = tfds.features.FeaturesDict(
    {
      'picture': tfds.features.Tensor(shape=(5, 7, 3), dtype=np.uint8),
      'kind': tfds.features.ClassLabel(names=['few', 'many']),
      'weight': np.float32,
    }
  )
  examples = [{'picture': stamped((5, 7, 3), k), 'kind': k % 2, 'weight': k / 4} for k in range(10)]
  return build(tmp_path, 'dots', features, splits or {'train': examples}, **options)


# ---- finding


def test_find_takes_the_newest_version_of_the_first_place(tmp_path, monkeypatch):
  places = {
    'inner': tmp_path / 'data/tensorflow_datasets',
    'outer': tmp_path / 'data',
    'set': tmp_path / 'set',
    'home': tmp_path / 'home/tensorflow_datasets',
  }
  monkeypatch.setenv('TFDS_DATA_DIR', str(places['set']))
  found = []
  for place in reversed(places.values()):
    for version in ('1.9.0', '1.10.0', 'incomplete.ABCDEF_2.0.0', 'notes'):
      (place / 'omniglot' / version).mkdir(parents=True)
    found.append(prepared.find('omniglot', str(tmp_path / 'data')))
  assert found == [place / 'omniglot/1.10.0' for place in reversed(places.values())]
  assert prepared.find('omniglot:1.9.0', str(tmp_path / 'data')) == places['inner'] / 'omniglot/1.9.0'
  (places['set'] / 'omniglot/3.0.0').mkdir()
  assert prepared.find('omniglot:3.0.0', str(tmp_path / 'data')) == places['set'] / 'omniglot/3.0.0'
  assert prepared.find('omniglot:7.0.0', str(tmp_path / 'data')) is None
  assert prepared.find('cifar100', str(tmp_path / 'data')) is None


def test_find_with_configs(tmp_path):
  for config in ('8x8', '16x16'):
    (tmp_path / 'imagenet_resized' / config / '0.1.0').mkdir(parents=True)
  folder = tmp_path / 'imagenet_resized/8x8/0.1.0'
  assert prepared.find('imagenet_resized/8x8', str(tmp_path)) == folder
  assert prepared.find('imagenet_resized/8x8:0.1.0', str(tmp_path)) == folder
  assert prepared.find('imagenet_resized/32x32', str(tmp_path)) is None
  with pytest.raises(UserError, match=r'configs \(16x16, 8x8\): .* imagenet_resized/16x16'):
    prepared.find('imagenet_resized', str(tmp_path))


@pytest.mark.parametrize('name', ['', '../omniglot', 'omniglot:new', 'a/b/c', '/omniglot'])
def test_malformed_name_is_refused(name, tmp_path):
  with pytest.raises(UserError, match='is not the name of a TFDS data set'):
    prepared.find(name, str(tmp_path))


def test_tensorflow_is_never_imported_nor_tfds_in_vain(omniglot_folder, tmp_path):
  (tmp_path / 'tensorflow').mkdir()
  (tmp_path / 'tensorflow/__init__.py').write_text('raise RuntimeError("TensorFlow was imported")')
  program = f"""if True:
    import sys
    from metajax.data import prepared
    assert prepared.find('omniglot', {str(tmp_path)!r}) is None
    assert 'tensorflow_datasets' not in sys.modules
    records = list(prepared.read('omniglot', {str(omniglot_folder)!r}, ['alphabet']))
    assert len(records) == 63 and records[0].item.open().size == (105, 105)
    assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules
  """
  path = os.pathsep.join([str(tmp_path), str(ROOT)])
  subprocess.run([sys.executable, '-c', program], check=True, env={**os.environ, 'PYTHONPATH': path})


# ---- reading


def test_omniglot(data_dir, omniglot_folder):
  folder = prepared.find('omniglot', str(data_dir))
  assert folder == omniglot_folder
  records = list(prepared.read('omniglot', folder, ['alphabet', 'alphabet_char_id']))
  assert [r.split for r in records] == ['train'] * 40 + ['test'] * 20 + ['small1'] * 3
  numbers = omniglot._characters()
  pictures = {}
  for record in records:
    assert list(record.extra) == ['alphabet', 'alphabet_char_id']
    character = f'{record.extra["alphabet"]}/character{record.extra["alphabet_char_id"] + 1:02d}'
    assert record.label == f'{record.extra["alphabet"]}_{record.extra["alphabet_char_id"]}'
    image = record.item.open()
    assert image.mode == '1'  # as in the original files, though the feature says three channels
    pictures.setdefault((record.split, numbers[character]), set()).add(np.asarray(image.convert('L')).tobytes())
  a, b, c = CHARACTERS
  expected = {('train', a): 20, ('train', b): 20, ('test', c): 20, ('small1', a): 3}
  assert pictures == {
    (split, number): {(stroke(number, drawer) * np.uint8(255)).tobytes() for drawer in range(1, count + 1)}
    for (split, number), count in expected.items()
  }
  assert str(records[41].item) == f'example 1 of split test of TFDS omniglot in {folder}'


def test_cifar100(data_dir, cifar_folder):
  folder = prepared.find('cifar100:3.0.0', str(data_dir))
  records = list(prepared.read('cifar100', folder, ['coarse_label', 'id']))
  assert [r.split for r in records] == ['train'] * 200 + ['test'] * 40
  seeds = [int(r.extra['id'].split('_')[1]) for r in records]
  assert sorted(seeds) == list(range(240)) and seeds != sorted(seeds)  # TFDS shuffles
  for record, seed in zip(records, seeds, strict=True):
    np.testing.assert_array_equal(np.asarray(record.item.open()), stamped((32, 32, 3), seed))
  labels = {int(r.extra['id'].split('_')[1]): (r.label, r.extra['coarse_label']) for r in records}
  assert labels[0] == labels[100] == labels[200] == ('apple', 'fruit_and_vegetables')
  assert labels[99] == ('worm', 'non-insect_invertebrates')
  assert next(prepared.read('cifar100', folder)).extra == {}


def test_quickdraw(tmp_path):
  features = features_of('quickdraw_bitmap')
  names = features['label'].names
  assert names.index('baseball bat') < names.index('baseball')  # TFDS's own order: only names say what a label means
  examples = [{'image': png(stamped((28, 28), k)), 'label': k} for k in range(40)]
  folder = build(tmp_path, 'quickdraw_bitmap', features, {'train': examples}, ('image', 'label'))
  for record in prepared.read('quickdraw_bitmap', folder):
    image = record.item.open()
    assert image.mode == 'L' and image.size == (28, 28)
    assert record.label == names[seed_of(record)]
    np.testing.assert_array_equal(np.asarray(image), stamped((28, 28), seed_of(record)))


def test_pixels_in_a_tensor_and_other_names(tmp_path):
  records = list(prepared.read('dots', dots(tmp_path), ['weight']))
  assert len(records) == 10
  for record in records:
    seed = seed_of(record)
    assert record.label == ('few', 'many')[seed % 2] and record.extra == {'weight': seed / 4}
    assert type(record.extra['weight']) is float
    np.testing.assert_array_equal(np.asarray(record.item.open()), stamped((5, 7, 3), seed))


def test_grey_pixels_in_a_tensor(tmp_path):
  features = tfds.features.FeaturesDict(
    {'image': tfds.features.Tensor(shape=(4, 6, 1), dtype=np.uint8), 'label': tfds.features.ClassLabel(num_classes=3)}
  )
  folder = build(tmp_path, 'grey', features, {'train': [{'image': stamped((4, 6, 1), 7), 'label': 2}]})
  (record,) = prepared.read('grey', folder)
  assert record.label == '2'  # for want of names
  image = record.item.open()
  assert image.mode == 'L'
  np.testing.assert_array_equal(np.asarray(image), stamped((4, 6, 1), 7)[..., 0])


def test_the_usual_names_come_before_supervised_keys_and_those_before_nothing(tmp_path):
  """As in caltech_birds2011, which has a mask besides the image."""
  features = {
    'first': tfds.features.ClassLabel(names=['one']),
    'second': tfds.features.ClassLabel(names=['two']),
    'mask': tfds.features.Image(shape=(None, None, 1)),
    'image': tfds.features.Image(),
    'image/filename': tfds.features.Text(),
  }

  def birds(place, **options):
    example = {
      'first': 'one',
      'second': 'two',
      'mask': png(stamped((8, 9), 1)),
      'image': png(stamped((8, 9, 3), 2)),
      'image/filename': '001.Albatross/x.jpg',
    }
    return build(tmp_path / place, 'birds', tfds.features.FeaturesDict(features), {'train': [example]}, **options)

  with pytest.raises(UserError, match=r'should have one label feature, but has 2 \(first, second\)'):
    prepared.read('birds', birds('a'))
  (record,) = prepared.read('birds', birds('b', supervised_keys=('mask', 'second')), ['image/filename'])
  assert seed_of(record) == 2 and record.label == 'two' and record.extra == {'image/filename': '001.Albatross/x.jpg'}


def test_examples_without_label_are_left_out(tmp_path):
  examples = [{'picture': stamped((5, 7, 3), k), 'kind': -1 if k == 3 else 0, 'weight': 0} for k in range(5)]
  records = list(prepared.read('dots', dots(tmp_path, {'train': examples})))
  assert sorted(seed_of(record) for record in records) == [0, 1, 2, 4]


def test_several_threads_may_open_items(cifar_folder):
  items = [record.item for record in prepared.read('cifar100', cifar_folder)]
  expected = [np.asarray(item.open()).tobytes() for item in items]
  fresh = [record.item for record in prepared.read('cifar100', cifar_folder)] * 8
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    opened = list(pool.map(lambda item: np.asarray(item.open()).tobytes(), fresh))
  assert opened == expected * 8


def test_more_files_than_may_be_open(tmp_path):
  examples = [{'picture': stamped((5, 7, 3), k), 'kind': 0, 'weight': 0} for k in range(60)]
  folder = dots(tmp_path, {'train': examples}, shards=60)
  assert len(list(folder.glob('dots-train*'))) == 60
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  highest_open = os.open(os.devnull, os.O_RDONLY)
  os.close(highest_open)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest_open + 30, hard))
    assert sorted(map(seed_of, prepared.read('dots', folder))) == list(range(60))
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

  program = f"""if True:
    import resource
    from metajax.data import prepared
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    prepared.read('dots', {str(folder)!r})
  """
  run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
  assert 'dots/3.0.0 has 60 files, which stay open together, but this process may open only 100' in run.stderr


# ---- what can be wrong


@pytest.fixture
def copy(omniglot_folder, tmp_path):
  return Path(shutil.copytree(omniglot_folder, tmp_path / 'omniglot/3.0.0'))


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json', 'omniglot-test.array_record-00000-of-00001'])
def test_missing_file_is_noticed_at_once(copy, name):
  (copy / name).unlink()
  with pytest.raises(UserError, match=r'TFDS omniglot in .*3.0.0 cannot be read .* prepare it again') as error:
    prepared.read('omniglot', copy)
  assert '\n' not in str(error.value)


def test_broken_description_is_named(copy):
  (copy / 'features.json').write_text('{')
  with pytest.raises(UserError, match=r'3.0.0 cannot be read'):
    prepared.read('omniglot', copy)


def test_truncated_file_is_named(copy):
  path = copy / 'omniglot-test.array_record-00000-of-00001'
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(UserError, match=r'example 0 of split test of TFDS omniglot in .* cannot be read'):
    list(prepared.read('omniglot', copy))


def test_damage_behind_the_labels_is_named(copy):
  """An image that goes bad between the two passes."""
  records = [record for record in prepared.read('omniglot', copy) if record.split == 'test']
  os.truncate(copy / 'omniglot-test.array_record-00000-of-00001', 0)
  with pytest.raises(UserError, match=r'example 5 of split test of TFDS omniglot in .* cannot be read') as error:
    records[5].item.open()
  assert '\n' not in str(error.value)


def test_what_is_no_image_is_left_to_pillow(tmp_path):
  features = tfds.features.FeaturesDict(
    {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(num_classes=2)}
  )
  folder = build(tmp_path, 'odd', features, {'train': [{'image': io.BytesIO(b'not a PNG'), 'label': 0}]})
  (record,) = prepared.read('odd', folder)
  with pytest.raises(UnidentifiedImageError):
    record.item.open()


def test_postscript_is_not_run(tmp_path):
  features = tfds.features.FeaturesDict(
    {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(num_classes=2)}
  )
  eps = io.BytesIO(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n')
  (record,) = prepared.read('odd', build(tmp_path, 'odd', features, {'train': [{'image': eps, 'label': 0}]}))
  with pytest.raises(UnidentifiedImageError):
    record.item.open()


NESTED = json.dumps({'x': {'type': 'strange_code.Feature', 'content': {}}})


@pytest.mark.parametrize(
  'feature',
  [
    {'pythonClassName': 'strange_code.Feature', 'jsonFeature': {'json': '{}'}},
    {'python_class_name': 'strange_code.Feature', 'jsonFeature': {'json': '{}'}},
    {
      'pythonClassName': 'tensorflow_datasets.core.features.features_dict.FeaturesDict',
      'jsonFeature': {'json': NESTED},
    },
  ],
)
def test_code_of_strangers_is_not_run(copy, feature, tmp_path, monkeypatch):
  (tmp_path / 'strange_code.py').write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
  monkeypatch.syspath_prepend(str(tmp_path))
  description = json.loads((copy / 'features.json').read_text())
  description['featuresDict']['features']['extra'] = feature
  (copy / 'features.json').write_text(json.dumps(description))
  with pytest.raises(UserError, match=r'3.0.0 is not read: it asks for code, strange_code.Feature, which is not of'):
    prepared.read('omniglot', copy)
  assert not (tmp_path / 'was run').exists()


def test_texts_and_labels_that_cannot_be_are_named(tmp_path):
  features = tfds.features.FeaturesDict(
    {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(num_classes=2), 'text': tfds.features.Text()}
  )
  example = {'image': png(stamped((4, 4), 1)), 'label': 1, 'text': b'\xff'}
  folder = build(tmp_path, 'texts', features, {'train': [example]})
  with pytest.raises(UserError, match=r'example 0 of split train of TFDS texts in .* cannot be read \(.*utf-8'):
    list(prepared.read('texts', folder, ['text']))
  (folder / 'label.labels.txt').write_text('only\n')
  description = (folder / 'features.json').read_text()
  (folder / 'features.json').write_text(description.replace('"numClasses": "2"', '"numClasses": "1"'))
  with pytest.raises(UserError, match=r'example 0 of split train of TFDS texts in .* cannot be read'):
    list(prepared.read('texts', folder))


def test_unknown_feature_is_named(cifar_folder):
  with pytest.raises(UserError, match=r'has no feature alphabet; it has coarse_label, id, image, label'):
    prepared.read('cifar100', cifar_folder, ['id', 'alphabet'])


def test_what_is_not_for_image_classification_is_refused(tmp_path):
  label = tfds.features.ClassLabel(num_classes=2)
  text = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'label': label})
  folder = build(tmp_path, 'imdb', text, {'train': [{'text': 'good', 'label': 1}]})
  with pytest.raises(UserError, match=r'should have one image feature, but has none among label, text'):
    prepared.read('imdb', folder)
  depth = tfds.features.FeaturesDict({'image': tfds.features.Tensor(shape=(4, 4, 2), dtype=np.uint8), 'label': label})
  folder = build(tmp_path, 'depth', depth, {'train': [{'image': np.zeros((4, 4, 2), np.uint8), 'label': 1}]})
  with pytest.raises(UserError, match=r'should have one image feature'):
    prepared.read('depth', folder)


def to_tfrecord(folder):
  """Rewrites a data set's ArrayRecord files in TFDS's usual format (with zeros for checksums)."""
  sources = tfds.builder_from_directory(folder).as_data_source(
    deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  for split, source in sources.items():
    (path,) = folder.glob(f'*-{split}.array_record*')
    content = b''.join(struct.pack('<Q', len(raw)) + bytes(4) + raw + bytes(4) for raw in source)
    path.with_name(path.name.replace('array_record', 'tfrecord')).write_bytes(content)
    path.unlink()


def test_tfrecord(omniglot_folder, copy):
  to_tfrecord(copy)

  def content(folder):
    records = prepared.read('omniglot', folder, ['alphabet'])
    return [(r.split, r.label, r.extra, r.item.open().tobytes()) for r in records]

  assert content(copy) == content(omniglot_folder)


@pytest.mark.parametrize(('cut', 'reason'), [(1, 'train.* is cut short'), (None, 'split train has 0 of 40 examples')])
def test_truncated_tfrecord_is_named(copy, cut, reason):
  to_tfrecord(copy)
  (path,) = copy.glob('*train*')
  os.truncate(path, path.stat().st_size - cut if cut else 0)
  with pytest.raises(UserError, match=rf'TFDS omniglot in .* cannot be read \(.*{reason}'):
    prepared.read('omniglot', copy)


def test_preparing_without_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setattr(prepared, '_has_tensorflow', lambda: False)
  with pytest.raises(
    UserError, match=r'needs TensorFlow: install tensorflow, or copy the folder omniglot .*array_record'
  ):
    prepared.prepare('omniglot', str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_preparing_what_tfds_does_not_know(tmp_path):
  with pytest.raises(UserError, match='TFDS has no data set omniglott'):
    prepared.prepare('omniglott', str(tmp_path))


# ---- with TensorFlow, where there is one


def test_tfrecord_written_by_tensorflow(tmp_path):
  pytest.importorskip('tensorflow', reason='TensorFlow is not installed')
  folders = {}
  for file_format in ('array_record', 'tfrecord'):
    examples = [{'image': png(stamped((28, 28), k)), 'label': k} for k in range(40)]
    features = features_of('quickdraw_bitmap')
    place = tmp_path / file_format
    folders[file_format] = build(place, 'quickdraw_bitmap', features, {'train': examples}, file_format=file_format)
  assert list(folders['tfrecord'].glob('*tfrecord*'))
  read = {key: list(prepared.read('quickdraw_bitmap', folder)) for key, folder in folders.items()}
  assert len(read['tfrecord']) == 40
  assert [r.label for r in read['tfrecord']] == [r.label for r in read['array_record']]
  assert [seed_of(r) for r in read['tfrecord']] == [seed_of(r) for r in read['array_record']]

  other = dots(tmp_path, file_format='tfrecord')
  records = list(prepared.read('dots', other, ['weight']))
  assert {type(r.extra['weight']) for r in records} == {float}
  assert sorted((seed_of(r), r.label, r.extra['weight']) for r in records) == [
    (k, ('few', 'many')[k % 2], k / 4) for k in range(10)
  ]
  (path,) = other.glob('*tfrecord*')
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(UserError, match=r'TFDS dots in .* cannot be read .*cut short'):
    prepared.read('dots', other)


def test_preparing_with_tensorflow(tmp_path):
  pytest.importorskip('tensorflow', reason='TensorFlow is not installed')

  class MetajaxStamps(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      names = {'image': tfds.features.Image(shape=(6, 6, 3)), 'label': tfds.features.ClassLabel(num_classes=3)}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(names))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for k in range(3):
        yield k, {'image': stamped((6, 6, 3), k), 'label': k}

  prepared.prepare('metajax_stamps', str(tmp_path))
  folder = prepared.find('metajax_stamps', str(tmp_path))
  assert folder == tmp_path / 'tensorflow_datasets/metajax_stamps/1.0.0' and list(folder.glob('*array_record*'))
  assert sorted((r.label, seed_of(r)) for r in prepared.read('metajax_stamps', folder)) == [
    ('0', 0),
    ('1', 1),
    ('2', 2),
  ]

  with pytest.raises(UserError, match=r'TFDS cannot prepare imagenet2012 in .*: Manual directory') as error:
    prepared.prepare('imagenet2012', str(tmp_path))
  assert '\n' not in str(error.value)

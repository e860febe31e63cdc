"""CIFAR-FS and FC100 in every format that they come in."""

import io
import logging
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from metajax.data import download, source
from metajax.datasets import cifar100, cifar_fs, fc100
from metajax.errors import UserError

MODULES = {'cifar_fs': cifar_fs, 'fc100': fc100}
SPLITS = {
  'cifar_fs': {'train': ('apple', 'bear'), 'val': ('beaver', 'camel'), 'test': ('baby', 'worm')},
  'fc100': {'train': ('apple',), 'val': ('bear', 'camel', 'worm'), 'test': ('baby', 'beaver')},
}
COARSE = {
  'apple': 'fruit_and_vegetables',
  'baby': 'people',
  'bear': 'large_carnivores',
  'beaver': 'aquatic_mammals',
  'camel': 'large_omnivores_and_herbivores',
  'worm': 'non-insect_invertebrates',
}
FINE = {'apple': 0, 'baby': 2, 'bear': 3, 'beaver': 4, 'camel': 15, 'worm': 99}  # CIFAR-100's labels
PREFIX = {'cifar_fs': 'CIFAR_FS', 'fc100': 'FC100'}


pytestmark = pytest.mark.usefixtures('tables')


def picture(name, k):
  """The k-th image of a class: noise that no other has, and a red patch that is broader than high."""
  pixels = np.random.default_rng([FINE[name], k]).integers(0, 256, (32, 32, 3), np.uint8)
  pixels[:4, :8] = 255, 0, 0
  return pixels


def as_record(pixels):
  """As CIFAR's page has it: 1024 red bytes row by row, then the green, then the blue."""
  return b''.join(pixels[:, :, channel].tobytes() for channel in range(3))


def rows(text):
  """(class, number of its image)."""
  return [(word[:-1], int(word[-1])) for word in text.split()]


HALVES = {  # in CIFAR's files classes are mixed
  'train': rows('worm0 apple0 bear0 apple1 camel0 baby0 beaver0 beaver1 worm1 baby1 camel1 bear1'),
  'test': rows('camel2 baby2 apple2 worm2 beaver2 bear2'),
}


def half(members):
  return {
    'data': np.stack([np.frombuffer(as_record(picture(*member)), np.uint8) for member in members]),
    'fine_labels': [FINE[name] for name, _ in members],
    'coarse_labels': [0] * len(members),
    'filenames': [f'{name}_s_{k:06d}.png' for name, k in members],
  }


LEGEND = {'fine_label_names': cifar100.names(), 'coarse_label_names': sorted(cifar100.lists()['superclasses'])}


def with_bytes(content):
  """Keys and strings as bytes."""
  if isinstance(content, dict):
    return {key.encode(): with_bytes(value) for key, value in content.items()}
  return [v.encode() if isinstance(v, str) else v for v in content] if isinstance(content, list) else content


def as_python_2(content):
  """A pickle as Python 2 wrote it, of dicts, lists, strings, numbers below 128 and arrays of bytes."""

  def emit(value):
    if isinstance(value, dict):
      return b'}(' + b''.join(emit(key) + emit(v) for key, v in value.items()) + b'u'
    if isinstance(value, list):
      return b'](' + b''.join(map(emit, value)) + b'e'
    if isinstance(value, str):
      return b'U' + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
      return b'K' + bytes([value])
    shape = b''.join(b'J' + n.to_bytes(4, 'little') for n in value.shape)
    dtype = b'cnumpy\ndtype\n' + emit('u1') + b'K\x00K\x01\x87R(K\x03' + emit('|') + b'NNNK\x00K\x00K\x00tb'
    text = b'T' + value.nbytes.to_bytes(4, 'little') + value.tobytes()
    start = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R'
    return start + b'(K\x01(' + shape + b't' + dtype + b'\x89' + text + b'tb'

  return b'\x80\x02' + emit(content) + b'.'


def save(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def python_version(place, form=as_python_2):
  for name, content in (*((name, half(members)) for name, members in HALVES.items()), ('meta', LEGEND)):
    save(place / 'cifar-100-python' / name, form(content))


def binary_version(place):
  for name, members in HALVES.items():
    content = b''.join(bytes([0, FINE[c]]) + as_record(picture(c, k)) for c, k in members)
    save(place / 'cifar-100-binary' / f'{name}.bin', content)
  save(place / 'cifar-100-binary/fine_label_names.txt', '\n'.join([*cifar100.names(), '']).encode())
  save(place / 'cifar-100-binary/coarse_label_names.txt', '\n'.join(cifar100.lists()['superclasses']).encode())


def torchmeta(place):
  place.mkdir(parents=True, exist_ok=True)
  with h5py.File(place / 'data.hdf5', 'w') as file:
    for name, coarse in COARSE.items():
      file.create_group(coarse).create_dataset(name, data=np.stack([picture(name, k) for k in range(3)]))


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


def folders(place, layout='{name}/{k}.png', splits=SPLITS['cifar_fs']):
  for split, names in splits.items():
    for name in names:
      for k in range(3):
        save(place / layout.format(split=split, name=name, k=k), png(picture(name, k)))


def pack(folder, path):
  """All that is in a folder, as an archive."""
  files = [f for f in folder.rglob('*') if f.is_file()]
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w') as archive:
      for file in files:
        archive.write(file, file.relative_to(folder))
  else:
    with tarfile.open(path, 'w:gz' if path.suffix == '.gz' else 'w') as archive:
      for file in files:
        archive.add(file, file.relative_to(folder))


def packed(make, name, place=''):
  def write(data):
    make(data.parent / 'source')
    (data / place).mkdir(exist_ok=True)
    pack(data.parent / 'source', data / place / name)

  return write


WHOLE = {  # of which both data sets can be made
  'python 2 folder': python_version,
  'python 2 folder itself': lambda data: python_version(data) or (data / 'cifar-100-python').rename(data / 'cifar100'),
  'bytes as keys': lambda data: python_version(data, lambda content: pickle.dumps(with_bytes(content), protocol=2)),
  'protocol 5': lambda data: python_version(data / 'cifar100', lambda content: pickle.dumps(content, protocol=5)),
  'python archive': packed(python_version, 'cifar-100-python.tar.gz'),
  'binary folder': binary_version,
  'binary archive': packed(binary_version, 'cifar-100-binary.tar.gz', 'cifar100'),
  'torchmeta': lambda data: torchmeta(data / 'cifar100'),
  'r2d2 folder': lambda data: folders(data, 'cifar100/data/{name}/{k}.png'),
  'r2d2 archive': packed(lambda place: folders(place, 'cifar100/data/{name}/{k}.png'), 'cifar100.zip'),
}


@pytest.mark.parametrize('name', MODULES)
@pytest.mark.parametrize('form', WHOLE)
def test_files_of_cifar_100(data, name, form):
  WHOLE[form](data)
  check(name, MODULES[name].load(str(data)))


def check(name, tables):
  assert {split: t.names for split, t in tables.items()} == SPLITS[name]
  for t in tables.values():
    assert t.images.shape == (18, 32, 32, 3) and t.images.dtype == np.uint8
    assert t.superclasses == tuple(COARSE[c] for c in t.names)
    np.testing.assert_array_equal(t.counts, 3)
    for start, c in zip(t.starts, t.names, strict=True):
      assert t.images[start][3, 7].tolist() == [255, 0, 0]
      np.testing.assert_array_equal(t.images[start : start + 3], [picture(c, k) for k in range(3)])


def pickles(place, name, pattern, form=pickle.dumps):
  for split, names in SPLITS[name].items():
    content = {
      'data': np.stack([picture(c, k) for k in range(3) for c in names]),
      'labels': [FINE[c] for _ in range(3) for c in names],
    }
    save(place / pattern.format(split=split), form(content))


def archive_per_split(data):
  (data / 'FC100').mkdir()
  for split, names in SPLITS['fc100'].items():
    folders(data.parent / split, '{split}/{name}/{k}.png', {split: names})
    pack(data.parent / split, data / 'FC100' / f'{split}.tar')


def tadam(place):
  for split, names in SPLITS['fc100'].items():
    pixels = np.stack([picture(c, k) for k in range(3) for c in names])
    labels = np.array([FINE[c] for _ in range(3) for c in names], np.int32)
    place.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(place / f'few-shot-{split}.npz', features=pixels, targets=labels)


DIVIDED = [
  ('cifar_fs', lambda data: pickles(data, 'cifar_fs', 'CIFAR_FS_{split}.pickle', as_python_2)),
  ('cifar_fs', lambda data: pickles(data, 'cifar_fs', 'CIFAR-FS/{split}.pickle')),
  ('cifar_fs', packed(lambda place: pickles(place, 'cifar_fs', 'x/CIFAR_FS_{split}.pickle'), 'CIFAR-FS.zip')),
  ('cifar_fs', lambda data: folders(data, 'cifarfs/processed/{split}/{name}/{k}.png')),
  ('cifar_fs', lambda data: folders(data, '{split}/{name}/{k}.png')),
  ('fc100', lambda data: pickles(data, 'fc100', 'fc100/FC100_{split}.pickle', as_python_2)),
  ('fc100', lambda data: pickles(data, 'fc100', 'FC100/{split}.pickle')),
  ('fc100', packed(lambda place: pickles(place, 'fc100', 'FC100_{split}.pickle'), 'FC100.zip', 'FC100')),
  ('fc100', lambda data: tadam(data / 'fc100')),
  ('fc100', archive_per_split),
]


@pytest.mark.parametrize(('name', 'make'), DIVIDED)
def test_files_of_a_division(data, name, make):
  make(data)
  check(name, MODULES[name].load(str(data)))


def test_class_that_is_called_as_a_split_is(data):
  save(data / 'cifar100/data/train/a.png', png(picture('apple', 0)))
  save(data / 'cifar100/data/wolf/a.png', png(picture('bear', 0)))
  tables = cifar_fs.load(str(data))
  assert tables['train'].names == ('train', 'wolf')
  np.testing.assert_array_equal(tables['train'].images, [picture('apple', 0), picture('bear', 0)])


def write_meaningless(data, name, counts):
  """Pickles in which only the splits mean anything; the image of label 7 * c has the value c."""
  for split, count in counts.items():
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 32, 32, 3)).copy()
    content = {'data': images, 'labels': [7 * c for c in range(count)]}
    save(data / f'{PREFIX[name]}_{split}.pickle', pickle.dumps(content))


@pytest.mark.parametrize(
  ('name', 'counts'), [('cifar_fs', dict(train=64, val=16, test=20)), ('fc100', dict(train=60, val=20, test=20))]
)
def test_labels_that_mean_nothing(data, name, counts):
  write_meaningless(data, name, counts)
  tables = MODULES[name].load(str(data))
  assert {split: len(t.names) for split, t in tables.items()} == counts
  for split, t in tables.items():
    assert t.superclasses == ()
    for c, start in zip(t.names, t.starts, strict=True):
      assert c.startswith(f'{split}/') and 7 * int(t.images[start, 0, 0, 0]) == int(c.removeprefix(f'{split}/'))


@pytest.mark.parametrize(
  ('name', 'counts', 'groups'), [('cifar_fs', [64, 16, 20], None), ('fc100', [60, 20, 20], [12, 4, 4])]
)
def test_divisions_are_those_published(data, name, counts, groups):
  for c in cifar100.names():
    save(data / f'cifar100/data/{c}/a.png', png(np.zeros((32, 32, 3), np.uint8)))
  tables = MODULES[name].load(str(data), size=2)
  assert list(tables) == ['train', 'val', 'test']
  assert [len(t.names) for t in tables.values()] == counts
  assert sorted(c for t in tables.values() for c in t.names) == cifar100.names()
  if groups:
    assert [len(set(t.superclasses)) for t in tables.values()] == groups


def test_part_is_said_to_be_one(data, caplog):
  torchmeta(data)
  fc100.load(str(data))
  assert 'FC100 is not as published: 94 of 100 classes are missing: aquarium_fish' in caplog.text
  assert 'class apple has 3 images, not 600' in caplog.text


def test_other_sizes_are_resized(data):
  torchmeta(data)
  image = fc100.load(str(data), size=84, resample='bicubic')['train'].images[0]
  truth = Image.fromarray(picture('apple', 0)).resize((84, 84), Image.BICUBIC)
  np.testing.assert_array_equal(image, np.asarray(truth))


def test_download(data, monkeypatch, caplog):
  asked = []

  def fetch(remote, folder):
    asked.append(remote)
    assert folder == str(data / 'cifar100')
    os.makedirs(folder)
    python_version(data.parent / 'source')
    pack(data.parent / 'source', Path(folder, remote.name))

  caplog.set_level(logging.INFO)
  monkeypatch.setattr(download, 'fetch', fetch)
  check('cifar_fs', cifar_fs.load(str(data)))
  check('fc100', fc100.load(str(data)))  # from the same file
  (remote,) = asked
  assert remote.urls[0] == 'https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz'
  assert (len(remote.sha256), remote.size) == (64, 169001437)
  assert f'downloading 1 files of CIFAR-FS to {data}/cifar100 (0.17 GB)' in caplog.text


@pytest.mark.parametrize('form', ['pickle', 'records'])
def test_images_stay_on_disk(data, form):
  """20 000 images take 61 MB; what is read of them, no more than the items and labels."""
  if form == 'pickle':
    python_version(data, pickle.dumps)
    content = {'data': np.zeros((20_000, 3072), np.uint8), 'fine_labels': [5] * 20_000}
    save(data / 'cifar-100-python/train', pickle.dumps(content))
  else:
    binary_version(data)
    os.truncate(data / 'cifar-100-binary/train.bin', 20_000 * 3074)
  tracemalloc.start()
  contents = source.read(cifar_fs.dataset(), source.locate(cifar_fs.dataset(), str(data)), None)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert sum(map(len, contents.classes.values())) == 20_000 + 6
  assert peak < 12e6


def change(folder, name='train', **entries):
  """The Python version, with other entries in a file."""
  python_version(folder, pickle.dumps)
  path = folder / 'cifar-100-python' / name
  save(path, pickle.dumps(pickle.loads(path.read_bytes()) | entries))


def cut(path, keep=0.5):
  os.truncate(path, int(path.stat().st_size * keep))


def write_hdf5(data, **datasets):
  with h5py.File(data / 'data.hdf5', 'w') as file:
    for path, images in datasets.items():
      file.create_dataset(path.replace('__', '/'), data=images)


def write_pickle(folder, **content):
  save(folder / 'CIFAR_FS_train.pickle', pickle.dumps(content))


def image(*shape):
  return np.zeros(shape, np.uint8)


def missing(name, make, folder):
  def write(data):
    make(data)
    (data / folder / name).unlink()

  return write


MISTAKES = {
  'float pixels': (lambda d: change(d, data=np.zeros((12, 3072))), r'train has data float64 \(12, 3072\), not rows'),
  'grey pixels': (lambda d: change(d, data=image(12, 1024)), r'train has data uint8 \(12, 1024\), not rows of 3072'),
  'lists for pixels': (lambda d: change(d, data=[[1, 2]] * 12), r'train has data int64 \(12, 2\), not rows of 3072'),
  'no pixels': (lambda d: change(d, data=None), 'train is not in the format of its name'),
  'few labels': (lambda d: change(d, fine_labels=[1, 2]), r'train has 12 images, but labels int64 \(2,\): replace'),
  'odd labels': (lambda d: change(d, fine_labels=[0.5] * 12), r'train has 12 images, but labels float64 \(12,\)'),
  'strange label': (lambda d: change(d, fine_labels=[100] * 12), 'train has label 100, and CIFAR-100'),
  'other names': (lambda d: change(d, 'meta', fine_label_names=['cat']), "meta has not the names of CIFAR-100's"),
  'no meta': (missing('meta', python_version, 'cifar-100-python'), 'cifar-100-python has no meta, the names of its'),
  'no names': (missing('fine_label_names.txt', binary_version, 'cifar-100-binary'), 'has no fine_label_names.txt, the'),
  'cut pickle': (lambda d: python_version(d) or cut(d / 'cifar-100-python/test'), 'test is damaged or not a pickle'),
  'cut records': (lambda d: binary_version(d) or cut(d / 'cifar-100-binary/test.bin', 0.7), 'test.bin is cut short'),
  'empty records': (lambda d: binary_version(d) or cut(d / 'cifar-100-binary/test.bin', 0), 'test.bin is cut short'),
  'cut archive': (
    lambda d: packed(python_version, 'cifar-100-python.tar.gz')(d) or cut(d / 'cifar-100-python.tar.gz'),
    'cifar-100-python.tar.gz is damaged',
  ),
  'cut HDF5': (lambda d: torchmeta(d) or cut(d / 'data.hdf5'), 'data.hdf5 is damaged or not HDF5'),
  'strange class': (lambda d: write_hdf5(d, fish__newt=image(1, 32, 32, 3)), 'class newt, which is not in CIFAR-FS'),
  'class twice': (
    lambda d: write_hdf5(d, fish__ray=image(1, 32, 32, 3), trees__ray=image(1, 32, 32, 3)),
    'class ray is in two of .*data.hdf5: replace one',
  ),
  'another HDF5': (lambda d: write_hdf5(d, datasets__ray=image(1, 32, 32, 3)), 'data.hdf5 has no images of CIFAR-FS'),
  'float HDF5': (
    lambda d: write_hdf5(d, fish__ray=np.zeros((1, 32, 32, 3), np.float32)),
    r'image 0 of fish/ray in .*data.hdf5 does not decode',
  ),
  'two splits': (
    lambda d: folders(d, '{split}/{name}/{k}.png') or save(d / 'test/apple/a.png', png(picture('apple', 0))),
    'class apple is in .*data/test/apple and in .*data/train/apple: remove it from one',
  ),
  'another division': (
    lambda d: write_meaningless(d, 'fc100', dict(train=60)) or (d / 'FC100_train.pickle').rename(d / 'train.pickle'),
    'train.pickle and its like are not of CIFAR-FS: .* train has 60 of them, not 64; replace them',
  ),
  'another division by name': (
    lambda d: pickles(d, 'fc100', '{split}.pickle'),
    'train.pickle and its like are not of CIFAR-FS: .* train has 1 of them, not 64',
  ),
  'no labels': (lambda d: write_pickle(d, data=image(2, 32, 32, 3)), 'CIFAR_FS_train.pickle is not in the format'),
  'label too many': (
    lambda d: write_pickle(d, data=image(2, 32, 32, 3), labels=[0, 1, 1]),
    r'CIFAR_FS_train.pickle has 2 images, but labels int64 \(3,\)',
  ),
  'large images': (
    lambda d: write_pickle(d, data=image(2, 84, 84, 3), labels=[0, 1]),
    r'CIFAR_FS_train.pickle has images \(84, 84, 3\), not \(32, 32, 3\): it is not of CIFAR-FS',
  ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_named(data, mistake):
  make, complaint = MISTAKES[mistake]
  make(data)
  with pytest.raises(UserError, match=complaint) as error:
    cifar_fs.load(str(data))
  assert '\n' not in str(error.value)


def test_mini_imagenets_files_of_the_same_name_are_not_fc100s(data):
  np.savez(data / 'few-shot-train.npz', features=image(2, 84, 84, 3), targets=np.array([0, 1]))
  with pytest.raises(UserError, match=r'few-shot-train.npz has images \(84, 84, 3\), not \(32, 32, 3\)'):
    fc100.load(str(data))

import gzip
import io
import os
import pickle
import shutil
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from metajax.data import conversion
from metajax.datasets import mini_imagenet
from metajax.errors import UserError

pytestmark = pytest.mark.usefixtures('tables')
WNIDS = {split: list(classes) for split, classes in mini_imagenet._lists().items()}
TRAIN, VAL, TEST = WNIDS['train'][:2], WNIDS['val'][:1], WNIDS['test'][:1]
VINYALS = 'n01614925'  # in the other data set of this name only


def picture(wnid, k):
  """The k-th image of a class, unlike any other."""
  return np.random.default_rng([int(wnid[1:]), k]).integers(0, 256, (84, 84, 3), np.uint8)


def cache_of(wnids, per_class=3):
  images = np.stack([picture(wnid, k) for wnid in wnids for k in range(per_class)])
  return {
    'image_data': images,
    'class_dict': {wnid: list(range(c * per_class, (c + 1) * per_class)) for c, wnid in enumerate(wnids)},
  }


def as_bytes(content):
  members = {wnid.encode(): rows for wnid, rows in content['class_dict'].items()}
  return {b'image_data': content['image_data'], b'class_dict': members}


def as_python_2(content):
  """Pickles as Python 2 with NumPy 1 did: strings are bytes, read as Latin-1."""
  images = content['image_data'].tobytes()

  def short(text):
    return b'U' + bytes([len(text)]) + text

  def number(value):
    return b'J' + int(value).to_bytes(4, 'little')

  shape = b'(' + b''.join(number(n) for n in content['image_data'].shape) + b't'
  dtype = b'cnumpy\ndtype\n' + short(b'u1') + b'K\x00K\x01\x87R(K\x03' + short(b'|') + b'NNNK\x00K\x00K\x00tb'
  members = b''.join(
    short(wnid.encode()) + b'](' + b''.join(number(row) for row in rows) + b'e'
    for wnid, rows in content['class_dict'].items()
  )
  return (
    b'\x80\x02}('
    + short(b'image_data')
    + b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01'
    + (shape + dtype + b'\x89T' + len(images).to_bytes(4, 'little') + images + b'tb')
    + short(b'class_dict')
    + (b'}(' + members + b'u')
    + b'u.'
  )


def check(tables, per_class=3):
  """The classes TRAIN, VAL and TEST with their pictures."""
  assert {split: t.names for split, t in tables.items()} == {'train': (*TRAIN,), 'val': (*VAL,), 'test': (*TEST,)}
  for t in tables.values():
    assert t.images.shape == (4 * per_class, 84, 84, 3)
    np.testing.assert_array_equal(t.counts, per_class)
    for start, wnid in zip(t.starts, t.names, strict=True):
      for k in range(per_class):
        np.testing.assert_array_equal(t.images[start + k], picture(wnid, k))


def test_lists_are_ravi_and_larochelles():
  assert {split: len(wnids) for split, wnids in WNIDS.items()} == {'train': 64, 'val': 16, 'test': 20}
  assert len({wnid for wnids in WNIDS.values() for wnid in wnids}) == 100
  for total, bitmap in mini_imagenet._classes().values():
    ranks = mini_imagenet._ranks(bitmap)
    assert len(ranks) == 600 and ranks[0] >= 1 and ranks[-1] <= total <= 1300
  # the first rows of train.csv: n0153282900000005.jpg, n0153282900000006.jpg, ...
  first = mini_imagenet._ranks(mini_imagenet._classes()['n01532829'][1])
  assert first[:12].tolist() == [5, 6, 7, 10, 14, 15, 16, 17, 18, 19, 20, 21]


@pytest.mark.parametrize('form', [pickle.dumps, lambda c: pickle.dumps(as_bytes(c), protocol=2), as_python_2])
@pytest.mark.parametrize(('place', 'val'), [('', 'val'), ('mini-imagenet', 'validation')])
def test_pickles(data, form, place, val):
  (data / place).mkdir(exist_ok=True)
  for split, wnids in (('train', TRAIN), (val, VAL), ('test', TEST)):
    (data / place / f'mini-imagenet-cache-{split}.pkl').write_bytes(form(cache_of(wnids)))
  check(mini_imagenet.load(str(data)))


def write_archive(path):
  with tarfile.open(path, 'w:gz') as archive:
    for split, wnids in (('test', TEST), ('train', TRAIN), ('val', VAL)):
      content = as_python_2(cache_of(wnids))
      member = tarfile.TarInfo(f'./mini-imagenet-cache-{split}.pkl')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def test_archive(data):
  write_archive(data / 'mini-imagenet.tar.gz')
  check(mini_imagenet.load(str(data)))
  assert os.listdir(data) == ['mini-imagenet.tar.gz']


def save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, 'png')  # exact, and Pillow looks at the content rather than at the name


LAYOUTS = {
  'mini_imagenet/{split}/{wnid}/{k}.jpg',
  '{split}/{wnid}/{wnid}{k:08d}.jpg',
  'miniimagenet/{wnid}/{wnid}_{k}.JPEG',
  'images/{wnid}/{k}.png',
  'mini_imagenet/{wnid}{k:08d}.jpg',
  'images/{wnid}{k:08d}.jpg',
}


@pytest.mark.parametrize('layout', sorted(LAYOUTS))
def test_images(data, layout):
  for split, wnids in (('train', TRAIN), ('val', VAL), ('test', TEST)):
    for wnid in wnids:
      for k in range(3):
        save(data / layout.format(split=split, wnid=wnid, k=k), picture(wnid, k))
  check(mini_imagenet.load(str(data)))


def stacks(wnids):
  return np.concatenate([cache_of([wnid])['image_data'] for wnid in wnids])


def write_hdf5(data):
  """Torchmeta."""
  (data / 'miniimagenet').mkdir()
  for split, wnids in (('train', TRAIN), ('val', VAL), ('test', TEST)):
    with h5py.File(data / f'miniimagenet/{split}_data.hdf5', 'w') as file:
      for wnid in wnids:
        file[f'datasets/{wnid}'] = stacks([wnid])


def write_npz(data):
  """TADAM: rows in any order, a class by its place among the sorted ones of its split."""
  for split, wnids in (('train', TRAIN), ('val', VAL), ('test', TEST)):
    order = np.random.default_rng(1).permutation(3 * len(wnids))
    targets = np.repeat([sorted(WNIDS[split]).index(wnid) for wnid in wnids], 3)
    order = order[np.argsort(order % 3, kind='stable')]  # of a class in the order above, for `check`
    np.savez(data / f'few-shot-{split}.npz', features=stacks(wnids)[order], targets=targets[order])


def write_category_splits(data, names=True):
  """Gidaris and Komodakis, where the names of the classes are there too."""
  for name, first, wnids in (('train_phase_train', 0, TRAIN), ('val', 64, VAL), ('test', 80, TEST)):
    content = {'data': stacks(wnids), 'labels': np.repeat(first + 3 * np.arange(len(wnids)), 3).tolist()}
    if names:
      content['catname2label'] = {wnid: first + 3 * k for k, wnid in enumerate(wnids)}
    path = data / f'miniImageNet_category_split_{name}.pickle'
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_tree(base):
  for split, wnids in (('train', TRAIN), ('val', VAL), ('test', TEST)):
    for wnid in wnids:
      for k in range(3):
        save(base / split / wnid / f'{wnid}{k:08d}.jpg', picture(wnid, k))


def write_tars(data):
  """Meta-Transfer Learning."""
  write_tree(data / 'x')
  for split in ('train', 'val', 'test'):
    with tarfile.open(data / f'{split}.tar', 'w') as archive:
      archive.add(data / 'x' / split, split)
  shutil.rmtree(data / 'x')


def write_bz2(data):
  """MAML++."""
  write_tree(data / 'x')
  with tarfile.open(data / 'mini_imagenet_full_size.tar.bz2', 'w:bz2') as archive:
    archive.add(data / 'x', 'mini_imagenet_full_size')
  shutil.rmtree(data / 'x')


def write_zip(data):
  """R2-D2."""
  with zipfile.ZipFile(data / 'miniimagenet.zip', 'w') as archive:
    for wnid in (*TRAIN, *VAL, *TEST):
      for k in range(3):
        file = io.BytesIO()
        Image.fromarray(picture(wnid, k)).save(file, 'png')
        archive.writestr(f'miniimagenet/data/{wnid}/{wnid}{k:08d}.jpg', file.getvalue())
    archive.writestr('miniimagenet/splits/ravi-larochelle/train.txt', '\n'.join(TRAIN))


WRITERS = [write_hdf5, write_npz, write_category_splits, write_tars, write_bz2, write_zip]


@pytest.mark.parametrize('write', WRITERS)
def test_other_containers(data, write):
  write(data)
  check(mini_imagenet.load(str(data)))


def test_classes_without_names(data):
  write_category_splits(data, names=False)
  tables = mini_imagenet.load(str(data))
  assert {split: t.names for split, t in tables.items()} == {
    'train': ('train/0', 'train/3'),
    'val': ('val/64',),
    'test': ('test/80',),
  }
  np.testing.assert_array_equal(tables['test'].images[tables['test'].starts[0]], picture(TEST[0], 0))


def test_images_of_another_size_are_squashed(data):
  pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
  save(data / f'train/{TRAIN[0]}/a.jpg', pixels)
  tables = mini_imagenet.load(str(data), size=32)
  truth = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.BILINEAR))
  np.testing.assert_array_equal(tables['train'].images[0], truth)
  assert list(tables) == ['train']


def write_ilsvrc(place, wnid, total):
  """A class folder with numbers that have gaps and whose order is not that of their digits."""
  numbers = np.sort(np.random.default_rng(0).choice(20_000, total, replace=False))
  for rank, number in enumerate(numbers, start=1):
    save(place / f'{wnid}_{number}.JPEG', np.array([[[rank >> 8, rank & 255, 0]]], np.uint8))


def test_whole_ilsvrc_class_is_reduced_to_the_list(data):
  write_ilsvrc(data / 'n01532829', 'n01532829', 1300)
  train = mini_imagenet.load(str(data), size=1)['train']
  np.testing.assert_array_equal(train.counts, [600])
  ranks = train.images[:, 0, 0, 0].astype(int) * 256 + train.images[:, 0, 0, 1]
  assert ranks[:12].tolist() == [5, 6, 7, 10, 14, 15, 16, 17, 18, 19, 20, 21]
  assert len(set(ranks)) == 600 and ranks.max() <= 1300


def test_ilsvrc_class_with_gaps_is_refused(data):
  write_ilsvrc(data / 'n01532829', 'n01532829', 700)
  with pytest.raises(UserError, match=r"n01532829_\d+.JPEG is one of 700 of ILSVRC's 1300"):
    mini_imagenet.load(str(data), size=1)


def write_whole(data, per_class=600):
  """All classes, in images of one pixel."""
  for split, wnids in WNIDS.items():
    images = np.arange(len(wnids) * per_class * 3, dtype=np.uint32).astype(np.uint8).reshape(-1, 1, 1, 3)
    members = {wnid: range(c * per_class, (c + 1) * per_class) for c, wnid in enumerate(wnids)}
    content = {'image_data': images, 'class_dict': {wnid: list(rows) for wnid, rows in members.items()}}
    (data / f'mini-imagenet-cache-{split}.pkl').write_bytes(pickle.dumps(content))


def test_whole_data_set_needs_its_source_once(data, caplog):
  write_whole(data)
  tables = mini_imagenet.load(str(data), size=1)
  assert {split: t.names for split, t in tables.items()} == {s: tuple(w) for s, w in WNIDS.items()}
  assert tables['train'].images.shape == (60_000, 1, 1, 3)
  mini_imagenet.load('nowhere', size=1)
  assert 'not as published' not in caplog.text


def test_part_is_said_to_be_one_and_never_passes_for_the_whole(data, caplog, monkeypatch):
  path = data / 'mini-imagenet-cache-train.pkl'
  path.write_bytes(pickle.dumps(cache_of(TRAIN, per_class=2)))
  assert list(mini_imagenet.load(str(data), size=2)) == ['train']
  assert 'mini-ImageNet is not as published: 98 of 100 classes are missing' in caplog.text
  assert f'class {TRAIN[0]} has 2 images, not 600' in caplog.text

  caplog.clear()
  with monkeypatch.context() as patch:  # the same part again comes from its table
    patch.setattr(conversion, 'convert', None)
    mini_imagenet.load(str(data), size=2)
    mini_imagenet.load('nowhere', size=2)
  assert caplog.text.count('98 of 100 classes are missing') == 2

  path.write_bytes(pickle.dumps(cache_of(TRAIN, per_class=3)))
  np.testing.assert_array_equal(mini_imagenet.load(str(data), size=2)['train'].counts, [3, 3])


def write_cache(data, content):
  (data / 'mini-imagenet-cache-test.pkl').write_bytes(pickle.dumps(content))


def write_cut_archive(data, keep=0.5, junk=b''):
  path = data / 'mini-imagenet.tar.gz'
  write_archive(path)
  os.truncate(path, int(path.stat().st_size * keep))


def write_twice(data):
  save(data / f'train/{TEST[0]}/a.jpg', picture(TEST[0], 0))
  save(data / f'test/{TEST[0]}/a.jpg', picture(TEST[0], 1))


def write_targets(data, *targets):
  for split in WNIDS:
    np.savez(data / f'few-shot-{split}.npz', features=stacks(TEST), targets=np.array(targets))


def write_tar_of_nothing(data):
  (data / 'mini-imagenet.tar.gz').write_bytes(gzip.compress(bytes(10240)))


@pytest.mark.parametrize(
  ('make', 'complaint'),
  [
    (lambda data: None, 'no network; .*metajax.data --list'),
    (
      lambda data: write_cache(data, cache_of([*TEST, VINYALS])),
      f'data has class {VINYALS}, which is not in mini-ImageNet',
    ),
    (
      lambda data: save(data / f'train/{VINYALS}/a.jpg', picture(VINYALS, 0)),
      f'data has class {VINYALS}, which is not in mini-ImageNet',
    ),
    (
      lambda data: save(data / f'images/{VINYALS}00000001.jpg', picture(VINYALS, 0)),
      f'data has class {VINYALS}, which is not in mini-ImageNet',
    ),
    (write_twice, f'class {TEST[0]} is in .*data/test/{TEST[0]} and in .*data/train/{TEST[0]}'),
    (lambda data: write_cache(data, [1, 2]), 'cache-test.pkl is not in the format of its name'),
    (
      lambda data: write_cache(data, {'image_data': [1], 'class_dict': {}}),
      'cache-test.pkl is not in the format of its name',
    ),
    (lambda data: write_cache(data, cache_of(TEST) | {'class_dict': {TEST[0]: [0, 3]}}), 'beyond its 3 images'),
    (lambda data: write_cache(data, cache_of(TEST) | {'class_dict': {}}), 'no images of mini-ImageNet'),
    (lambda data: write_cache(data, cache_of(TEST) | {'class_dict': 5}), 'cache-test.pkl is not in the format'),
    (lambda data: write_cache(data, cache_of(TEST) | {'class_dict': {TEST[0]: ['a']}}), 'is not in the format'),
    (lambda data: write_cache(data, cache_of(TEST) | {'class_dict': {TEST[0]: 3}}), 'is not in the format'),
    (lambda data: write_cache(data, cache_of(TEST) | {'class_dict': {TEST[0]: [0], 7: [1]}}), 'a name that is no text'),
    (lambda data: write_cache(data, np.zeros(3)), 'cache-test.pkl is not in the format of its name'),
    (
      lambda data: write_targets(data, 'a', 'b', 'c'),
      'few-shot-train.npz has labels other than 0 to 63, mini-ImageNet',
    ),
    (lambda data: write_targets(data, -1, 0, 0), 'few-shot-train.npz has labels other than 0 to 63'),
    (lambda data: write_targets(data, 0, 0, 64), 'few-shot-train.npz has labels other than 0 to 63'),  # of FC100
    (lambda data: (data / 'mini-imagenet-cache-val.pkl').write_bytes(b'\x80\x02}'), 'cache-val.pkl is damaged'),
    (write_cut_archive, r'mini-imagenet.tar.gz is damaged'),
    (write_tar_of_nothing, r'mini-imagenet.tar.gz holds nothing'),
    (lambda data: (data / 'mini-imagenet.tar.gz').write_text('<html>'), r'mini-imagenet.tar.gz is damaged'),
  ],
)
def test_mistakes_are_named(data, make, complaint):
  make(data)
  with pytest.raises(UserError, match=complaint) as error:
    mini_imagenet.load(str(data))
  assert '\n' not in str(error.value)


def test_ilsvrc_as_a_whole_may_have_other_classes(data):
  for wnid in [*mini_imagenet._classes(), VINYALS]:
    save(data / f'{wnid}/a.jpg', picture(wnid, 0)[:1, :1])
  tables = mini_imagenet.load(str(data), size=1)
  assert {split: t.names for split, t in tables.items()} == {s: tuple(w) for s, w in WNIDS.items()}

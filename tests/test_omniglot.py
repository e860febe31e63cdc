import io
import os
import pathlib
import pickle
import shutil
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from metajax.data import download, table
from metajax.datasets import omniglot
from metajax.errors import UserError

pytestmark = pytest.mark.usefixtures('tables')
REAL = pathlib.Path(
  os.environ.get('METAJAX_TEST_OMNIGLOT') or pathlib.Path(__file__).parents[1] / '../shared/data/omniglot'
)
SIZES = {
  'vinyals': {'train': 1028, 'val': 172, 'test': 423},
  'lake': {'train': 964, 'test': 659},
  'meta_dataset': {'train': 883, 'val': 81, 'test': 659},
  'maml++': {'train': 1150, 'val': 50, 'test': 423},
  'random': {'train': 1100, 'val': 100, 'test': 423},
}
HALVES = {'images_background': ('Alphabet_of_the_Magi', 'Hebrew'), 'images_evaluation': ('Ge_ez', 'Keble')}


def png(number, odd):
  """A 1-bit image, white paper 1 and black ink 0, in which `number` is written as 12 bars: a class's own picture."""
  pixels = np.ones((105, 105), bool)
  for k in range(12):
    pixels[8 * k : 8 * k + 5, : 20 + 60 * (number >> k & 1) + odd] = False
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  """Both archives of the real structure, with two alphabets of each."""
  folder = tmp_path_factory.mktemp('omniglot')
  for half, alphabets in HALVES.items():
    with zipfile.ZipFile(folder / f'{half}.zip', 'w') as archive:
      for name, number in omniglot._characters().items():
        if name.split('/')[0] in alphabets:
          pictures = png(number, False), png(number, True)
          for drawer in range(1, 21):
            archive.writestr(f'{half}/{name}/{number:04d}_{drawer:02d}.png', pictures[drawer % 2])
  return folder


def there(kind):
  """Split -> characters, of those in the archives."""
  alphabets = sum(HALVES.values(), ())
  return {s: [c for c in names if c.split('/')[0] in alphabets] for s, names in omniglot._SPLITS[kind](0).items()}


def truth(content, size):
  """What torchmeta makes of an image, by the book: 255 for ink, then Resize."""
  image = Image.open(io.BytesIO(content)).convert('L').point(lambda value: 255 - value)
  return np.asarray(image.resize((size, size), Image.BILINEAR))


def members(tables, split):
  return {name.rsplit('/rot', 1)[0] for name in tables[split].names}


def test_splits_are_those_published():
  everything = {*omniglot._characters()}
  assert len(everything) == 1623
  of_kind = {kind: splits(0) for kind, splits in omniglot._SPLITS.items()}
  assert {kind: {split: len(c) for split, c in splits.items()} for kind, splits in of_kind.items()} == SIZES
  vinyals, lake = of_kind['vinyals'], of_kind['lake']
  for splits in of_kind.values():
    listed = [c for of_split in splits.values() for c in of_split]
    assert len(listed) == 1623 and set(listed) == everything
    assert all(c == sorted(c) for c in splits.values())
  numbers = omniglot._characters()
  assert sorted(numbers.values()) == list(range(1, 1624))
  assert numbers['Alphabet_of_the_Magi/character01'] == 709 and numbers['Angelic/character01'] == 965
  assert {numbers[c] for c in lake['train']} == set(range(1, 965))
  # the one alphabet that Vinyals' split divides
  assert [sum(c.startswith('Gurmukhi/') for c in vinyals[s]) for s in ('train', 'val', 'test')] == [41, 0, 4]


def test_archives_become_tables(archives, tmp_path):
  tables = omniglot.load(str(archives))
  train, val, test = tables['train'], tables['val'], tables['test']
  vinyals = there('vinyals')
  assert [len(t.names) for t in (train, val, test)] == [4 * len(vinyals[s]) for s in ('train', 'val', 'test')]
  assert train.images is val.images is test.images
  assert train.images.shape == (20 * sum(map(len, vinyals.values())), 28, 28, 1) and train.images.dtype == np.uint8
  assert all((t.counts == 20).all() for t in (train, val, test))
  numbers = omniglot._characters()
  for t in (train, val, test):
    for c in (0, 7, 15):
      for k in (0, 1, 19):
        expected = truth(png(numbers[t.names[c]], bool((k + 1) % 2)), 28)
        np.testing.assert_array_equal(t.images[t.starts[c] + k, :, :, 0], expected)
  assert np.median(train.images) == 0  # paper

  for turn in range(4):
    c = turn * len(vinyals['train']) + 5
    assert train.turns[c] == turn and train.starts[c] == train.starts[5]
    assert train.names[c] == train.names[5] + ('', '/rot090', '/rot180', '/rot270')[turn]
  assert not omniglot.load(str(archives), rotations=('train', 'val'))['test'].turns.any()
  assert {s: members(tables, s) for s in tables} == {s: set(names) for s, names in vinyals.items()}

  # from the converted table: no archive is needed any more, and options of the split still apply
  again = omniglot.load(str(tmp_path / 'nowhere'), split='lake', rotations=())
  assert {split: list(t.names) for split, t in again.items()} == there('lake')
  np.testing.assert_array_equal(again['test'].images[::500], train.images[::500])


def pack_again(source, target, keep=lambda name: True, rename=lambda name: name, extra=()):
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
    for name in filter(keep, old.namelist()):
      new.writestr(rename(name), old.read(name))
    for name in extra:
      new.writestr(name, extra[name] if isinstance(extra, dict) else b'')


def test_archives_are_downloaded_and_one_packed_again_will_do(archives, tmp_path, monkeypatch):
  asked = []

  def fetch(remote, folder):
    asked.append((remote.urls[0], remote.sha256[:8], remote.size))
    extra = ['__MACOSX/images_background/Greek/character01/._0394_01.png', 'images_background/.DS_Store']
    os.makedirs(folder, exist_ok=True)
    pack_again(archives / remote.name, os.path.join(folder, remote.name), extra=extra)

  monkeypatch.setattr(download, 'fetch', fetch)
  tables = omniglot.load(str(tmp_path / 'data'), size=20, rotations=('test',))
  official = 'https://github.com/brendenlake/omniglot/raw/master/python/images_'
  assert asked == [
    (f'{official}background.zip', 'ad41ab67', 9464212),
    (f'{official}evaluation.zip', '1f61a8f3', 6462886),
  ]
  vinyals = there('vinyals')
  assert [len(tables[s].names) for s in ('train', 'val', 'test')] == [
    len(vinyals['train']),
    len(vinyals['val']),
    4 * len(vinyals['test']),
  ]
  for t in tables.values():
    expected = truth(png(omniglot._characters()[t.names[7]], True), 20)
    np.testing.assert_array_equal(t.images[t.starts[7], :, :, 0], expected)


# A part of Omniglot in every form: two characters of each half, three drawings of each.
PART = {709: 'Alphabet_of_the_Magi/character01', 718: 'Alphabet_of_the_Magi/character10', 965: 'Angelic/character01'}


def write_images(folder, layout, form=lambda content: content):
  for number, name in PART.items():
    for drawer in (1, 2, 3):
      half = 'images_background' if number < 965 else 'images_evaluation'
      path = folder / layout.format(half=half, name=name) / f'{number:04d}_{drawer:02d}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(form(png(number, drawer == 3)))


def resized(content):
  """As MAML's script: on disk at 28 pixels already, of 8 bits."""
  file = io.BytesIO()
  Image.open(io.BytesIO(content)).convert('L').resize((28, 28), Image.BILINEAR).save(file, 'png')
  return file.getvalue()


def write_tar(folder):
  write_images(folder / 'x', 'images_all/{name}')
  with tarfile.open(folder / 'omniglot.tar.gz', 'w:gz') as archive:
    archive.add(folder / 'x/images_all', 'images_all')
  shutil.rmtree(folder / 'x')


def write_hdf5(folder):
  (folder / 'omniglot').mkdir()
  with h5py.File(folder / 'omniglot/data.hdf5', 'w') as file:
    for number, name in PART.items():
      pixels = [~np.asarray(Image.open(io.BytesIO(png(number, odd))).convert('L')) for odd in (False, False, True)]
      file[f'{"images_background" if number < 965 else "images_evaluation"}/{name}'] = np.stack(pixels)


def write_caches(folder):
  """What Ren et al.'s code keeps, of Lake's split as of that of Vinyals; pickled as by Python 2, keys are bytes."""
  for split, numbers in (('train', (709, 718)), ('test', (965,))):
    content = {
      b'images': np.stack([truth(png(n, odd), 28)[..., None] for n in numbers for odd in (False, False, True)]),
      b'labels': np.repeat(np.arange(len(numbers), dtype=np.int32), 3),
      b'label_str': [PART[n].replace('/', '_').encode() for n in numbers],
    }
    (folder / f'{split}_lake.pkl').write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
  'write',
  [
    lambda folder: write_images(folder, '{half}/{name}'),
    lambda folder: write_images(folder, 'omniglot_dataset/{half}/{name}'),  # MAML++
    lambda folder: write_images(folder, 'omniglot/data/{name}'),  # prototypical networks, R2-D2
    lambda folder: write_images(folder, 'omniglot_resized/{name}', resized),  # MAML
    write_tar,  # Ren et al.
    write_hdf5,  # torchmeta
    write_caches,  # Ren et al.
  ],
)
def test_every_format(tmp_path, write, caplog):
  (tmp_path / 'data').mkdir()
  write(tmp_path / 'data')
  tables = omniglot.load(str(tmp_path / 'data'), split='lake', rotations=())
  assert tables['train'].names == (PART[709], PART[718]) and tables['test'].names == (PART[965],)
  assert tables['train'].superclasses == ('Alphabet_of_the_Magi',) * 2
  for table_, number in ((tables['train'], 709), (tables['test'], 965)):
    for k in range(3):
      row = table_.images[table_.starts[0] + k, :, :, 0]
      np.testing.assert_array_equal(row, truth(png(number, k == 2), 28))
  assert '1620 of 1623 classes are missing' in caplog.text


def test_other_folders_beside_the_alphabets_are_not_searched(tmp_path, monkeypatch):
  write_images(tmp_path, '{name}')
  (tmp_path / 'photographs/2019').mkdir(parents=True)
  searched, scan = [], os.scandir
  monkeypatch.setattr(os, 'scandir', lambda folder: searched.append(str(folder)) or scan(folder))
  assert omniglot.load(str(tmp_path), split='lake', size=3, rotations=())['test'].names == (PART[965],)
  assert str(tmp_path / 'Angelic') in searched and str(tmp_path / 'photographs') not in searched


def copy(archives, tmp_path, **change):
  """Both archives, with that of the evaluation half changed."""
  shutil.copy(archives / 'images_background.zip', tmp_path)
  path = tmp_path / 'images_evaluation.zip'
  pack_again(archives / path.name, path, **change)
  return path


@pytest.mark.parametrize(
  ('change', 'complaint'),
  [
    (dict(keep=lambda name: 'Keble/character03' not in name), r'1530 of 1623 classes are missing'),
    (dict(keep=lambda name: '1111_07' not in name), r'class Ge_ez/character23 has 19 images, not 20'),
  ],
)
def test_what_is_missing_is_named(archives, tmp_path, change, complaint, caplog):
  copy(archives, tmp_path, **change)
  omniglot.load(str(tmp_path), size=3)
  assert f'Omniglot is not as published: {complaint}' in caplog.text


def test_characters_that_are_not_in_omniglot_are_refused(archives, tmp_path):
  copy(archives, tmp_path, extra={'images_evaluation/Klingon/character01/1624_01.png': png(1624, False)})
  with pytest.raises(UserError, match=f'{tmp_path} has class Klingon/character01, which is not in Omniglot'):
    omniglot.load(str(tmp_path))


def test_cut_archive_is_named(archives, tmp_path):
  path = copy(archives, tmp_path)
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(UserError, match=r'images_evaluation.zip is damaged'):
    omniglot.load(str(tmp_path))


def test_flipped_bits_are_named(archives, tmp_path):
  path = copy(archives, tmp_path)
  with zipfile.ZipFile(path) as archive:
    offset = archive.getinfo(archive.namelist()[500]).header_offset
  with open(path, 'r+b') as file:
    file.seek(offset + 120)
    file.write(b'\xff\x00\xff\x00')
  with pytest.raises(UserError, match=r'images_evaluation.zip is damaged .*CRC.*png'):
    omniglot.load(str(tmp_path))
  assert not [name for name in os.listdir(table.cache_dir()) if 'lock' not in name]


@pytest.mark.parametrize(
  ('options', 'complaint'), [(dict(split='ravi'), 'vinyals, lake'), (dict(rotations=('trian',)), 'trian')]
)
def test_unknown_options_are_named(options, complaint):
  with pytest.raises(UserError, match=complaint):
    omniglot.load('nowhere', **options)


@pytest.mark.skipif(not REAL.is_dir(), reason='no Omniglot archives: set METAJAX_TEST_OMNIGLOT to their folder')
def test_real_omniglot():
  for kind, sizes in SIZES.items():
    tables = omniglot.load(str(REAL), split=kind, rotations=())
    assert {split: len(t.names) for split, t in tables.items()} == sizes
    assert all((t.counts == 20).all() and t.names == tuple(omniglot._SPLITS[kind](0)[s]) for s, t in tables.items())
  tables = omniglot.load(str(REAL))
  train = tables['train']
  assert [len(tables[s].names) for s in ('train', 'val', 'test')] == [4112, 688, 1692]
  assert train.images.shape == (32460, 28, 28, 1)
  assert 0.07 < train.images[:].mean() / 255 < 0.09  # the share of ink
  with zipfile.ZipFile(REAL / 'images_background.zip') as archive:
    expected = truth(archive.read('images_background/Alphabet_of_the_Magi/character03/0711_15.png'), 28)
  row = train.starts[train.names.index('Alphabet_of_the_Magi/character03')] + 14
  np.testing.assert_array_equal(train.images[row, :, :, 0], expected)


def test_a_cache_with_labels_that_have_no_name(tmp_path):
  content = {'images': np.zeros((3, 28, 28, 1), np.uint8), 'labels': np.arange(3), 'label_str': ['Greek/character01']}
  (tmp_path / 'train_vinyals.pkl').write_bytes(pickle.dumps(content))
  with pytest.raises(UserError, match=r'train_vinyals.pkl has images .* or labels without a name: replace it'):
    omniglot.load(str(tmp_path))

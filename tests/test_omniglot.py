import io
import os
import pathlib
import shutil
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from metajax.data import download, table
from metajax.datasets import omniglot
from metajax.errors import UserError

REAL = pathlib.Path(
  os.environ.get('METAJAX_TEST_OMNIGLOT') or pathlib.Path(__file__).parents[1] / '../shared/data/omniglot'
)
HALVES = {'images_background': range(1, 965), 'images_evaluation': range(965, 1624)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('METAJAX_CACHE', str(tmp_path / 'cache'))


def png(number, odd):
  """A 1-bit image, white paper 1 and black ink 0, in which `number` is written as 12 bars: a class's own picture."""
  pixels = np.ones((105, 105), bool)
  for k in range(12):
    pixels[8 * k : 8 * k + 5, : 20 + 60 * (number >> k & 1) + odd] = False
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


def names(numbers):
  """Character number -> `Alphabet/characterNN`."""
  by_number = {number: name for name, number in omniglot._characters().items()}
  return {number: by_number[number] for number in numbers}


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  """Both archives of the real structure."""
  folder = tmp_path_factory.mktemp('omniglot')
  for half, numbers in HALVES.items():
    with zipfile.ZipFile(folder / f'{half}.zip', 'w') as archive:
      for number, name in names(numbers).items():
        pictures = png(number, False), png(number, True)
        for drawer in range(1, 21):
          archive.writestr(f'{half}/{name}/{number:04d}_{drawer:02d}.png', pictures[drawer % 2])
  return folder


def truth(content, size):
  """What torchmeta makes of an image, by the book: 255 for ink, then Resize."""
  image = Image.open(io.BytesIO(content)).convert('L').point(lambda value: 255 - value)
  return np.asarray(image.resize((size, size), Image.BILINEAR))


def members(tables, split):
  return {name.rsplit('/rot', 1)[0] for name in tables[split].names}


def test_splits_are_those_published():
  vinyals, lake = omniglot._splits()['vinyals'], omniglot._splits()['lake']
  assert {split: len(c) for split, c in vinyals.items()} == {'train': 1028, 'val': 172, 'test': 423}
  assert {split: len(c) for split, c in lake.items()} == {'train': 964, 'test': 659}
  everything = {*omniglot._characters()}
  assert len(everything) == 1623
  for splits in (vinyals, lake):
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
  assert [len(t.names) for t in (train, val, test)] == [4 * 1028, 4 * 172, 4 * 423]
  assert train.images is val.images is test.images
  assert train.images.shape == (32460, 28, 28, 1) and train.images.dtype == np.uint8
  assert all((t.counts == 20).all() for t in (train, val, test))
  numbers = omniglot._characters()
  for t in (train, val, test):
    for c in (0, 100, 171):
      for k in (0, 1, 19):
        expected = truth(png(numbers[t.names[c]], bool((k + 1) % 2)), 28)
        np.testing.assert_array_equal(t.images[t.starts[c] + k, :, :, 0], expected)
  assert np.median(train.images) == 0  # paper

  for turn in range(4):
    c = turn * 1028 + 5
    assert train.turns[c] == turn and train.starts[c] == train.starts[5]
    assert train.names[c] == train.names[5] + ('', '/rot090', '/rot180', '/rot270')[turn]
  assert not omniglot.load(str(archives), rotations=('train', 'val'))['test'].turns.any()
  assert sum(len(members(tables, s)) for s in tables) == 1623
  assert len(set().union(*(members(tables, s) for s in tables))) == 1623

  # from the converted table: no archive is needed any more, and options of the split still apply
  start = time.monotonic()
  again = omniglot.load(str(tmp_path / 'nowhere'), split='lake', rotations=())
  assert time.monotonic() - start < 0.3
  assert {split: len(t.names) for split, t in again.items()} == {'train': 964, 'test': 659}
  np.testing.assert_array_equal(again['test'].images[::500], train.images[::500])


def pack_again(source, target, keep=lambda name: True, rename=lambda name: name, extra=()):
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
    for name in filter(keep, old.namelist()):
      new.writestr(rename(name), old.read(name))
    for name in extra:
      new.writestr(name, b'')


def test_folder_and_download_mix_and_an_archive_packed_again_will_do(archives, tmp_path, monkeypatch):
  with zipfile.ZipFile(archives / 'images_evaluation.zip') as archive:
    archive.extractall(tmp_path / 'data/omniglot')
  asked = []

  def fetch(remote, folder):
    path = folder / remote.name
    asked.append((remote.urls[0], remote.sha256[:8], remote.size))
    extra = ['__MACOSX/images_background/Greek/character01/._0394_01.png', 'images_background/.DS_Store']
    pack_again(archives / path.name, path, rename=lambda name: name.replace('images_background/', ''), extra=extra)
    return path

  monkeypatch.setattr(download, 'fetch', fetch)
  tables = omniglot.load(str(tmp_path / 'data'), size=20, rotations=('test',))
  official = 'https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip'
  assert asked == [(official, 'ad41ab67', 9464212)]
  assert [len(tables[s].names) for s in ('train', 'val', 'test')] == [1028, 172, 4 * 423]
  for t in tables.values():
    expected = truth(png(omniglot._characters()[t.names[7]], True), 20)
    np.testing.assert_array_equal(t.images[t.starts[7], :, :, 0], expected)


def copy(archives, tmp_path, **change):
  """Both archives, with that of the evaluation half changed."""
  shutil.copy(archives / 'images_background.zip', tmp_path)
  path = tmp_path / 'images_evaluation.zip'
  pack_again(archives / path.name, path, **change)
  return path


@pytest.mark.parametrize(
  ('change', 'complaint'),
  [
    (dict(keep=lambda name: 'Keble/character03' not in name), r'13160 images of 658 .*Keble/character03/\d+_01.png'),
    (dict(keep=lambda name: '1111_07' not in name), r'13179 images of 659 .*1111_07.png is missing'),
    (dict(rename=lambda name: name.replace('1111_07', '1112_07')), r'13180 images .*1111_07.png is missing'),
    (dict(extra=['images_evaluation/Klingon/character01/1624_01.png']), r'13181 images of 660 .*others'),
  ],
)
def test_archive_that_is_not_omniglot_is_refused(archives, tmp_path, change, complaint):
  path = copy(archives, tmp_path, **change)
  with pytest.raises(UserError, match=complaint) as error:
    omniglot.load(str(tmp_path))
  assert str(path) in str(error.value)


def test_cut_archive_is_named(archives, tmp_path):
  path = copy(archives, tmp_path)
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(UserError, match=r'images_evaluation.zip cannot be read'):
    omniglot.load(str(tmp_path))


def test_flipped_bits_are_named(archives, tmp_path):
  path = copy(archives, tmp_path)
  with zipfile.ZipFile(path) as archive:
    offset = archive.getinfo(archive.namelist()[5000]).header_offset
  with open(path, 'r+b') as file:
    file.seek(offset + 120)
    file.write(b'\xff\x00\xff\x00')
  with pytest.raises(UserError, match=r'images_evaluation.zip is damaged at .*png .*CRC'):
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
  tables = omniglot.load(str(REAL))
  train = tables['train']
  assert [len(tables[s].names) for s in ('train', 'val', 'test')] == [4112, 688, 1692]
  assert train.images.shape == (32460, 28, 28, 1)
  assert 0.07 < train.images[:].mean() / 255 < 0.09  # the share of ink
  with zipfile.ZipFile(REAL / 'images_background.zip') as archive:
    expected = truth(archive.read('images_background/Alphabet_of_the_Magi/character03/0711_15.png'), 28)
  row = train.starts[train.names.index('Alphabet_of_the_Magi/character03')] + 14
  np.testing.assert_array_equal(train.images[row, :, :, 0], expected)

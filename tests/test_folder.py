import os

import numpy as np
import pytest
from PIL import Image

from metajax.data import images
from metajax.datasets import folder
from metajax.errors import UserError

pytestmark = pytest.mark.usefixtures('tables')


@pytest.fixture
def root(tmp_path):
  (tmp_path / 'images').mkdir()
  return tmp_path / 'images'


def save(path, value=0, mode='RGB', size=(6, 4), **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = value if isinstance(value, Image.Image) else Image.new(mode, size, value)
  image.save(path, **options)


def make_classes(root, count, images=2):
  for c in range(count):
    for k in range(images):
      save(root / f'class{c:02d}/{k}.png', (c, k, 0))


def first_image(tables, split='train'):
  return tables[split].images[tables[split].starts[0]]


def test_splits_from_folders(root):
  save(root / 'train/cat/b.png', (1, 2, 3))
  save(root / 'train/cat/a.png', (4, 5, 6))
  save(root / 'train/ant/a.bmp', (7, 8, 9))
  save(root / 'valid/dog/a.jpeg', (200, 200, 200))
  tables = folder.load(str(root.parent), path='images', size=3)
  assert {split: t.names for split, t in tables.items()} == {'train': ('ant', 'cat'), 'val': ('dog',)}
  train = tables['train']
  np.testing.assert_array_equal(train.counts, [1, 2])
  rows = train.images[train.starts[1] : train.starts[1] + 2]
  np.testing.assert_array_equal(rows[:, 0, 0], [[4, 5, 6], [1, 2, 3]])
  assert train.images.shape == (4, 3, 3, 3)


def test_classes_are_divided_by_seed(root):
  make_classes(root, 25)
  tables = folder.load(str(root), size=2)
  assert {split: len(t.names) for split, t in tables.items()} == {'train': 16, 'val': 4, 'test': 5}
  order = np.random.default_rng(0).permutation(25)
  assert tables['train'].names == tuple(f'class{c:02d}' for c in sorted(order[:16]))
  assert tables['test'].names == tuple(f'class{c:02d}' for c in sorted(order[20:]))
  for t in tables.values():  # names and images go together
    for start, name in zip(t.starts, t.names, strict=True):
      assert t.images[start, 0, 0, 0] == int(name[5:])
  again = folder.load(str(root), size=2)
  assert all(again[s].names == tables[s].names for s in tables)
  assert folder.load(str(root), size=2, split_seed=1)['train'].names != tables['train'].names


@pytest.mark.parametrize(
  ('classes', 'fractions', 'counts'),
  [
    (3, (0.64, 0.16, 0.2), {'train': 1, 'val': 1, 'test': 1}),
    (4, (0.64, 0.16, 0.2), {'train': 2, 'val': 1, 'test': 1}),
    (10, (0.5, 0, 0.5), {'train': 5, 'test': 5}),
    (2, (0, 0, 1), {'test': 2}),
  ],
)
def test_every_split_asked_for_has_a_class(root, classes, fractions, counts):
  make_classes(root, classes, images=1)
  tables = folder.load(str(root), size=1, fractions=fractions)
  assert {split: len(t.names) for split, t in tables.items()} == counts


def oriented(path):
  pixels = np.zeros((4, 4, 3), np.uint8)
  pixels[:, :2] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # to be shown turned clockwise
  save(path, Image.fromarray(pixels), exif=exif)
  return np.rot90(pixels, -1)


def test_exif_orientation(root):
  expected = oriented(root / 'train/c/a.png')
  np.testing.assert_array_equal(first_image(folder.load(str(root), size=4)), expected)


def grey_16_bit(path):
  save(path, Image.fromarray(np.full((4, 4), 40_000, np.uint16)))


def transparent_palette(path):
  image = Image.new('P', (4, 4), 0)
  image.putpalette([10, 20, 30, 40, 50, 60])
  save(path, image, transparency=0)


KINDS = {  # file -> what a pixel becomes
  'rgba.png': (lambda path: save(path, (255, 0, 0, 0), 'RGBA'), (255, 255, 255)),
  'half.png': (lambda path: save(path, (255, 0, 0, 127), 'RGBA'), (255, 128, 128)),
  'la.png': (lambda path: save(path, (0, 0), 'LA'), (255, 255, 255)),
  'palette.gif': (lambda path: save(path, Image.new('RGB', (4, 4), (9, 99, 9)).quantize(2)), (9, 99, 9)),
  'palette.png': (transparent_palette, (255, 255, 255)),
  'cmyk.tiff': (lambda path: save(path, (0, 255, 255, 0), 'CMYK'), (255, 0, 0)),
  'deep.png': (grey_16_bit, (156, 156, 156)),
  'bits.png': (lambda path: save(path, 1, '1'), (255, 255, 255)),
  'grey.webp': (lambda path: save(path, 77, 'L', lossless=True), (77, 77, 77)),
}


@pytest.mark.parametrize('name', KINDS)
def test_every_kind_of_pixel(root, name):
  write, colour = KINDS[name]
  write(root / 'train/c' / name)
  assert tuple(first_image(folder.load(str(root), size=2))[0, 0]) == colour
  grey = first_image(folder.load(str(root), size=2, grey=True))
  assert grey.shape == (2, 2, 1)
  assert grey[0, 0, 0] == np.asarray(Image.new('RGB', (1, 1), colour).convert('L'))[0, 0]


def test_any_shape_is_squashed(root):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
  save(root / 'train/c/a.png', Image.fromarray(pixels))
  truth = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.BILINEAR))
  np.testing.assert_array_equal(first_image(folder.load(str(root), size=16)), truth)


def test_other_files_are_passed_over(root):
  make_classes(root, 3)
  (root / '.git').mkdir()
  (root / 'README.md').write_text('text')
  (root / 'class00/.hidden.png').write_text('not an image')
  (root / 'class00/notes.txt').write_text('text')
  (root / 'class00/deeper.png').mkdir()
  tables = folder.load(str(root), size=1)
  assert sum(t.counts.sum() for t in tables.values()) == 6


def test_converted_once_per_state_of_the_folder(root, monkeypatch):
  make_classes(root, 3)
  decoded = []
  pixels = images.pixels
  monkeypatch.setattr(images, 'pixels', lambda item, *args: decoded.append(item) or pixels(item, *args))
  folder.load(str(root), size=1)
  folder.load(str(root), size=1, split_seed=3)
  assert len(decoded) == 6
  os.utime(root / 'class00/0.png', ns=(1, 1))
  folder.load(str(root), size=1)
  assert len(decoded) == 12
  save(root / 'class00/2.png', 1)
  assert folder.load(str(root), size=1)['train'].images.shape[0] == 7


@pytest.mark.parametrize(
  ('make', 'options', 'complaint'),
  [
    (lambda root: None, dict(path='missing'), 'no folder of images .*missing'),
    (lambda root: None, {}, 'no images in class folders'),
    (lambda root: save(root / 'a.png'), {}, 'no images in class folders'),
    (lambda root: (make_classes(root, 3), (root / 'empty').mkdir()), {}, 'class folder empty .*no images'),
    (lambda root: make_classes(root, 2), {}, '2 classes, too few'),
    (lambda root: make_classes(root, 3), dict(fractions=(0.5, 0.5, 0.5)), 'fractions'),
    (lambda root: make_classes(root, 3), dict(fractions=(0.5, 0.5)), 'fractions'),
    (lambda root: make_classes(root, 3), dict(size=0), 'size = 0'),
    (lambda root: (save(root / 'train/cat/a.png'), save(root / 'test/cat/b.png')), {}, 'class cat is in'),
    (lambda root: (make_classes(root, 3), (root / 'class01/x.jpg').write_text('no')), {}, 'class01/x.jpg does not dec'),
    (lambda root: save(root / 'train/c/a.tiff', 0.5, 'F'), {}, 'a.tiff does not decode .*floating-point'),
  ],
)
def test_mistakes_are_named(root, make, options, complaint):
  make(root)
  with pytest.raises(UserError, match=complaint) as error:
    folder.load(str(root), **options)
  assert '\n' not in str(error.value)

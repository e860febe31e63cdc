import functools
import logging
import os
import re
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from metajax.data import images, source, table
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


@pytest.mark.parametrize(
  'names', [('Train', 'Valid', 'Test'), ('train', 'dev', 'testing'), ('TRAINING', 'validation', 'test')]
)
def test_splits_are_known_by_their_usual_names(root, names):
  for name in names:
    save(root / name / f'of {name}/0.png')
  tables = folder.load(str(root), size=1)
  expected = {split: (f'of {name}',) for split, name in zip(('train', 'val', 'test'), names, strict=True)}
  assert {split: t.names for split, t in tables.items()} == expected


def test_what_lies_beside_splits_is_named(root, caplog):
  caplog.set_level(logging.INFO)
  for place in ('train/a', 'test/b', 'unlabeled/c'):
    save(root / place / '0.png')
  save(root / 'train/sheet.png')
  (root / '__MACOSX/train/a').mkdir(parents=True)
  tables = folder.load(str(root), size=1)
  assert {split: t.names for split, t in tables.items()} == {'train': ('a',), 'test': ('b',)}
  assert 'folders beside test, train are passed over: unlabeled' in caplog.text and 'MACOSX' not in caplog.text
  assert '1 images beside class folders are passed over' in caplog.text


def test_a_test_split_may_be_all_there_is(root):
  save(root / 'test/a/0.png')
  assert {split: t.names for split, t in folder.load(str(root), size=1).items()} == {'test': ('a',)}


@pytest.mark.parametrize('others', [('bus', 'car'), ('test', 'car')])
def test_a_class_may_be_called_train(root, others):
  for name in ('train', *others):
    save(root / name / '0.png')
  tables = folder.load(str(root), size=1)
  assert sorted(name for t in tables.values() for name in t.names) == sorted(('train', *others))


def test_splits_may_name_their_classes_alike(root):
  for k, place in enumerate(('train/0', 'train/1', 'Valid/0', 'test/0')):
    save(root / place / '0.png', (k, 0, 0))
  with pytest.raises(UserError, match=r'class 0 is at Valid/0 and at test/0 and at train/0 .*names_by_split=True'):
    folder.load(str(root), size=1)
  tables = folder.load(str(root), size=1, names_by_split=True)
  assert {split: t.names for split, t in tables.items()} == {
    'train': ('train/0', 'train/1'),
    'val': ('val/0',),
    'test': ('test/0',),
  }
  reds = {split: t.images[t.starts, 0, 0, 0].tolist() for split, t in tables.items()}
  assert reds == {'train': [0, 1], 'val': [2], 'test': [3]}


def test_the_home_folder(root, tables):
  for k in range(3):
    save(tables.parent / f'home/photos/{k}/0.png')  # HOME is there
  assert folder.load('elsewhere', path='~/photos', size=1)['test'].counts.tolist() == [1]


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


def save_deep(path, *values, dtype=np.uint16):
  save(path, Image.fromarray(np.array(values, dtype).reshape(1, -1)))


RANGES = [  # values, their type, white -> what they become
  ((0, 255, 256, 40_000, 65_535), np.uint16, 0, [0, 0, 1, 156, 255]),
  ((0, 15, 16, 2000, 3000), np.uint16, 0, [0, 0, 1, 125, 187]),  # 12 bits
  ((0, 1, 100, 254), np.uint16, 0, [0, 1, 100, 254]),
  ((0, 1, 100), np.int32, 0, [0, 1, 100]),
  ((0, 1 << 16, (1 << 20) - 1), np.int32, 0, [0, 16, 255]),
  ((0, 500, 1000, 3000), np.uint16, 1000, [0, 128, 255, 255]),
  ((0, 1), np.uint16, 1, [0, 255]),
  ((-1, 0, 0.25, 1, 2), np.float32, 1, [0, 0, 64, 255, 255]),
]


@pytest.mark.parametrize(('values', 'dtype', 'white', 'expected'), RANGES)
def test_the_range_of_deep_images(root, values, dtype, white, expected):
  save_deep(root / 'train/c/a.tiff', *values, dtype=dtype)
  table = folder.load(str(root), size=len(values), grey=True, white=white)
  assert first_image(table)[0, :, 0].tolist() == expected


def test_deep_images_have_one_range(root, caplog):
  caplog.set_level(logging.INFO)
  save_deep(root / 'train/c/a.png', 0, 100)
  save_deep(root / 'train/c/b.png', 0, 1000)
  save(root / 'train/c/c.png', (77, 77, 77))
  (root / 'train/c/d.png').write_text('no image')
  with source.skipping_bad():
    train = folder.load(str(root), size=2, grey=True)['train']
  assert train.images[:, 0, 1, 0].tolist() == [25, 250, 77]
  assert '16-bit images reach up to 1000: 1023 becomes 255' in caplog.text


@pytest.mark.parametrize(
  ('ground', 'colour'), [('white', (255, 128, 128)), ('black', (127, 0, 0)), ('#0f0', (127, 128, 0))]
)
def test_the_ground_of_transparent_images(root, ground, colour):
  save(root / 'train/c/a.png', (255, 0, 0, 127), 'RGBA')
  assert tuple(first_image(folder.load(str(root), size=2, ground=ground))[0, 0]) == colour


def icon(path):
  """A white drawing on transparent ground."""
  pixels = np.full((4, 4, 4), 255, np.uint8)
  pixels[..., 3] = np.arange(16).reshape(4, 4) * 17
  save(path, Image.fromarray(pixels))


def fine_line(path):
  pixels = np.zeros((200, 200), np.uint8)
  pixels[100] = 255
  save(path, Image.fromarray(pixels))


def with_outlier(path):
  for k in range(2):
    save_deep(path.with_name(f'other{k}.png'), 0, 65_535)
  save_deep(path, 0, 4095)


def deep_colour(path):
  """PNG (ISO 15948) with 16 bits for each of red, green and blue, which hold 12 bits."""
  header = (6).to_bytes(4), (1).to_bytes(4)  # width and height
  content = zlib.compress(b'\0' + (np.arange(18) * 200).astype('>u2').tobytes())
  with open(path, 'wb') as file:
    file.write(b'\x89PNG\r\n\x1a\n')
    PngImagePlugin.putchunk(file, b'IHDR', *header, b'\x10\x02\0\0\0')
    PngImagePlugin.putchunk(file, b'IDAT', content)
    PngImagePlugin.putchunk(file, b'IEND')


FAINT = [  # file, settings -> what is said
  (lambda path: save(path, (9, 99, 9)), {}, '1 images have one colour: c/x.png'),
  (lambda path: save(path, Image.linear_gradient('L').point(lambda v: v // 16)), {}, 'levels: c/x.png; stretch'),
  (icon, {}, '1 images can hardly be told from the ground behind them: c/x.png; set ground'),
  (with_outlier, {}, '1 images span fewer than 16 of 256 levels: c/x.png; set white'),
  (lambda path: save_deep(path, 0, 255), dict(white=65_535), '1 images span fewer .*: c/x.png; set white'),
  (lambda path: save_deep(path, 7, 7), {}, '1 images have one colour: c/x.png'),
  (fine_line, {}, '1 images span fewer than 16 of 256 levels once they are resized: c/x.png; choose a larger size'),
  (deep_colour, {}, '1 images have 16-bit colours, .*: c/x.png; convert them to 8 bits'),
]


@pytest.mark.parametrize(('write', 'settings', 'text'), FAINT)
def test_images_that_show_next_to_nothing_are_named(root, write, settings, text, caplog):
  for k in range(8):  # each half black and half white
    save(root / f'c/{k}.png', Image.fromarray(np.uint8([[0, 255]])))
  write(root / 'c/x.png')
  load = functools.partial(folder.load, str(root), size=4, fractions=(1, 0, 0), **settings)
  [note] = load()['train'].notes
  assert re.search(text, note)
  caplog.clear()
  load()
  assert caplog.messages == [f'{root}: {note}']  # again, but not as if it were a published data set


def test_images_that_show_something_are_not_named(root):
  for write, name in ((icon, 'icon.png'), (fine_line, 'line.png')):
    write(root / 'c' / name)
  save(root / 'c/low.png', Image.fromarray(np.uint8([[100, 116]])))
  assert folder.load(str(root), size=100, ground='black', fractions=(1, 0, 0))['train'].notes == ()


def test_what_is_passed_over_is_counted(root):
  make_classes(root, 3)
  for name in ('a.HEIC', 'b.heif', 'plain', 'c.cr2', 'd.cr2', 'e.svg'):
    (root / 'class00' / name).write_bytes(b'\0')
  for name in ('.DS_Store', 'Thumbs.db', 'labels.txt', 'boxes.xml'):
    (root / 'class01' / name).write_bytes(b'\0')
  save(root / 'class02/more/0.png')
  notes = folder.load(str(root), size=1)['train'].notes
  stems = [
    '2 HEIC files .* pillow-heif',
    '1 files without an ext',
    r'2 .cr2, 1 .svg: .* PNG',
    '1 images in .*nested=True',
  ]
  assert len(notes) == 5 and all(map(re.search, stems, notes)), notes  # the fifth is on single colours
  for name in ('a.HEIC', 'b.heif', 'plain', 'c.cr2', 'd.cr2', 'e.svg'):
    (root / 'class00' / name).unlink()
  assert len(folder.load(str(root), size=1)['train'].notes) == 2


@pytest.mark.parametrize(
  ('make', 'complaint'),
  [
    (lambda root: (root / 'c/x.heic').write_text(''), 'no images in class folders.*; 1 HEIC files'),
    (lambda root: save(root / 'c/more/x.png'), 'no images in class folders.*; 1 images in folders below .*nested=True'),
    (lambda root: (save(root / 'd/x.png'), (root / 'c/x').write_text('')), 'folder c in .*; 1 files without'),
  ],
)
def test_a_class_without_images_says_what_it_has(root, make, complaint):
  (root / 'c').mkdir()
  make(root)
  with pytest.raises(UserError, match=complaint):
    folder.load(str(root))


def test_nested_folders(root):
  for k in range(3):
    save(root / f'c{k}/0.png', (k, 0, 0))
    save(root / f'c{k}/day/night/1.png', (k, 1, 0))
  (root / 'c0/day/back').symlink_to('..')
  assert folder.load(str(root), size=1)['test'].counts.tolist() == [1]
  tables = folder.load(str(root), size=1, nested=True)
  for t in tables.values():
    rows = t.images[t.starts[0] : t.starts[0] + t.counts[0], 0, 0]
    np.testing.assert_array_equal(rows, [[int(t.names[0][1]), k, 0] for k in range(2)])


def test_heic_is_read_where_pillow_heif_is_installed(root, monkeypatch):
  """The package is played by one that calls PNG files HEIC."""

  def register():
    Image.register_open('HEIF', PngImagePlugin.PngImageFile)
    Image.register_extensions('HEIF', ['.heic'])

  for name in ('ID', 'OPEN', 'EXTENSION'):
    monkeypatch.setattr(Image, name, type(getattr(Image, name))(getattr(Image, name)))
  monkeypatch.setitem(sys.modules, 'pillow_heif', types.SimpleNamespace(register_heif_opener=register))
  save(root / 'train/c/x.HEIC', (1, 2, 3), format='PNG')
  try:
    images.formats.cache_clear()
    images._extensions.cache_clear()
    assert first_image(folder.load(str(root), size=1))[0, 0].tolist() == [1, 2, 3]
  finally:
    images.formats.cache_clear()
    images._extensions.cache_clear()


@pytest.mark.parametrize(('pillow', 'complaint'), [(8, 'more than 1 million; set max_pixels=4'), (1, 'Set max_pixels')])
def test_large_images_take_a_setting(root, monkeypatch, pillow, complaint):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', pillow << 20)
  save(root / 'train/c/x.png', 200, 'L', size=(2000, 2000))
  with pytest.raises(UserError, match=f'c/x.png does not decode .*{complaint}'):
    folder.load(str(root), size=1, max_pixels=1)
  assert first_image(folder.load(str(root), size=1, max_pixels=4))[0, 0, 0] == 200


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
    (lambda root: (save(root / 'train/cat/a.png'), save(root / 'test/cat/b.png')), {}, 'class cat is at'),
    (lambda root: (make_classes(root, 3), (root / 'class01/x.jpg').write_text('no')), {}, 'class01/x.jpg does not dec'),
    (lambda root: save(root / 'train/c/a.tiff', 0.5, 'F'), {}, 'a.tiff does not decode .*floating-point.*white'),
    (lambda root: make_classes(root, 3), dict(white=-1), 'white = -1'),
    (lambda root: make_classes(root, 3), dict(max_pixels=0), 'max_pixels = 0'),
    (lambda root: make_classes(root, 3), dict(ground='grass'), "ground = 'grass'"),
  ],
)
def test_mistakes_are_named(root, make, options, complaint):
  make(root)
  with pytest.raises(UserError, match=complaint) as error:
    folder.load(str(root), **options)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('place', 'why'), [('b', 'class folder b in '), ('', 'the folder of images ')])
def test_folders_that_may_not_be_read(tmp_path, tables, place, why, monkeypatch):
  """As another user: root may read everything, so the refusal is played."""
  for name in 'abc':
    (tmp_path / 'mine' / name).mkdir(parents=True)
    Image.new('RGB', (4, 4)).save(tmp_path / 'mine' / name / '0.png')
  scandir = os.scandir

  def refuse(folder):
    if os.path.normpath(folder) == os.path.normpath(tmp_path / 'mine' / place):
      raise PermissionError(13, 'Permission denied', str(folder))
    return scandir(folder)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(UserError, match=rf'{why}.*\(Permission denied\): make it readable'):
    folder.load(str(tmp_path), path='mine', size=4)


def test_a_table_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, tables, monkeypatch):
  for name in 'abc':
    (tmp_path / 'mine' / name).mkdir(parents=True)
    Image.new('RGB', (4, 4)).save(tmp_path / 'mine' / name / '0.png')
  folder.load(str(tmp_path), path='mine', size=4)

  def refuse(place):
    raise PermissionError(13, 'Permission denied', str(place))

  monkeypatch.setattr(table, 'open_folder', refuse)
  with pytest.raises(UserError, match=r'cannot be read \(Permission denied\): make it readable, or set METAJAX_CACHE'):
    folder.load(str(tmp_path), path='mine', size=4)

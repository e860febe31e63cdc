import os

import numpy as np
import pytest
from PIL import Image

from metajax.data import images
from metajax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)


@pytest.fixture
def file(tmp_path):
  Image.fromarray(PIXELS).save(tmp_path / 'x.png')
  return images.File(str(tmp_path / 'x.png'))


def test_an_image_is_squashed_bilinearly(file):
  truth = Image.fromarray(PIXELS).resize((10, 10), Image.BILINEAR)
  np.testing.assert_array_equal(images.pixels(file, images.Rendering(10)), np.asarray(truth))
  grey = Image.fromarray(PIXELS).convert('L').resize((10, 10), Image.BILINEAR)
  np.testing.assert_array_equal(images.pixels(file, images.Rendering(10, 'L')), np.asarray(grey)[:, :, None])


@pytest.mark.parametrize('resample', ['nearest', 'lanczos', 'box'])
def test_the_filter_is_the_one_asked_for(file, resample):
  truth = Image.fromarray(PIXELS).resize((7, 7), Image.Resampling[resample.upper()])
  np.testing.assert_array_equal(images.pixels(file, images.Rendering(7, 'RGB', resample)), np.asarray(truth))


def test_the_middle_is_cropped_as_torchvision_does(file):
  """Resize(9) makes 20 x 30 (width x height) 9 x 13, and CenterCrop(6) starts at round(3 / 2), round(7 / 2)."""
  truth = np.asarray(Image.fromarray(PIXELS).resize((9, 13), Image.BILINEAR))[4:10, 2:8]
  np.testing.assert_array_equal(images.pixels(file, images.Rendering(6, crop=6 / 9)), truth)


def test_rows_and_files_in_arrays(file, tmp_path):
  rendering = images.Rendering(20)
  rows = np.stack([PIXELS[:20], PIXELS[10:]])
  np.testing.assert_array_equal(images.pixels(images.Row(rows, 1, 'x.npy'), rendering), PIXELS[10:])
  np.testing.assert_array_equal(
    images.pixels(images.Row(rows[..., :1], 0, 'x.npy'), rendering), PIXELS[:20, :, [0, 0, 0]]
  )
  content = np.frombuffer((tmp_path / 'x.png').read_bytes(), np.uint8)
  expected = images.pixels(file, rendering)
  for form in (content, content[:, None], content.tobytes()):
    np.testing.assert_array_equal(images.pixels(images.Encoded([form], 0, 'x.pkl'), rendering), expected)
  with pytest.raises(UserError, match=r'image 0 of x.pkl does not decode'):
    images.pixels(images.Encoded([content[:40]], 0, 'x.pkl'), rendering)


def test_what_does_not_decode_is_named(file):
  os.truncate(file.path, 700)
  with pytest.raises(UserError, match=r'x.png does not decode .*replace or remove'):
    images.pixels(file, images.Rendering(10))
  with open(file.path, 'w') as text:
    text.write('text')
  with pytest.raises(UserError, match=r'x.png does not decode \(not an image\)'):
    images.pixels(file, images.Rendering(10))


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path):
  Image.new('1', (9000, 9000)).save(tmp_path / 'bomb.png')
  assert (tmp_path / 'bomb.png').stat().st_size < 20_000
  with pytest.raises(UserError, match=r'bomb.png does not decode \(it has 9000 x 9000 pixels, more than 64 million'):
    images.pixels(images.File(str(tmp_path / 'bomb.png')), images.Rendering(10))


def test_postscript_is_not_run(tmp_path):
  Image.fromarray(PIXELS).save(tmp_path / 'x.eps')
  (tmp_path / 'x.eps').rename(tmp_path / 'y.png')
  with pytest.raises(UserError, match='not an image'):
    images.pixels(images.File(str(tmp_path / 'y.png')), images.Rendering(10))
  Image.fromarray(PIXELS).save(tmp_path / 'x.eps')
  assert images.list_images(tmp_path) == [str(tmp_path / 'y.png')]


@pytest.mark.parametrize(
  ('rendering', 'complaint'),
  [
    (images.Rendering(0), 'size = 0'),
    (images.Rendering(5, resample='cubic'), "resample is one of nearest, .*bicubic.*not 'cubic'"),
    (images.Rendering(5, crop=1.5), 'crop = 1.5'),
    (images.Rendering(5, crop=0.01), 'crop = 0.01: a part of the shorter side from 0.1 to 1, or 0'),
  ],
)
def test_renderings_that_cannot_be_are_refused(rendering, complaint):
  with pytest.raises(UserError, match=complaint):
    rendering.check()


def test_settings_that_differ_have_tables_of_their_own():
  crops = [0.0, 0.8746, 0.8754, 0.875, 2 / 3, 0.6667, 1.0]
  assert len({str(images.Rendering(84, crop=crop)) for crop in crops}) == len(crops)
  assert str(images.Rendering(84, crop=1)) == str(images.Rendering(84, crop=np.float64(1))) == '84-crop1.0'


@pytest.mark.parametrize('shape', [(1, 60_000), (60_000, 1)])
def test_an_image_that_would_grow_beyond_memory_is_refused(shape):
  line = images.Row(np.zeros((1, *shape, 3), np.uint8), 0, 'x.npy')
  with pytest.raises(UserError, match=r'does not decode \(it is .* resized by the shorter side has .*, more than 64'):
    images.pixels(line, images.Rendering(84, crop=2 / 3))
  assert images.pixels(line, images.Rendering(84)).shape == (84, 84, 3)


def test_16_bits_lose_the_lower_8():
  values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
  np.testing.assert_array_equal(np.asarray(images.flatten(Image.fromarray(values))), values >> 8)


@pytest.mark.parametrize('bits', range(8, 16))
def test_fewer_bits_lose_what_is_beyond_8(bits):
  values = np.arange(1 << bits, dtype=np.uint16).reshape(16, -1)
  found = images.flatten(Image.fromarray(values), white=(1 << bits) - 1)
  np.testing.assert_array_equal(np.asarray(found), values >> (bits - 8))


def test_what_systems_leave_behind_is_passed_over(tmp_path):
  for name in ('__MACOSX', '@eaDir', '.git', 'a'):
    (tmp_path / name).mkdir()
  for name in ('Thumbs.db', 'desktop.ini', '.x.png', 'x.png'):
    (tmp_path / name).write_text('')
  assert images.list_folders(tmp_path) == ['a'] and images.list_files(tmp_path) == [str(tmp_path / 'x.png')]


def test_what_cannot_be_looked_at_is_passed_over(tmp_path, monkeypatch):
  for name in ('seen', 'locked'):
    (tmp_path / name).mkdir()
    Image.fromarray(PIXELS).save(tmp_path / name / 'x.png')
  for name in ('loop', 'seen/loop.png'):
    (tmp_path / name).symlink_to(os.path.basename(name))
  assert images.list_folders(tmp_path) == ['locked', 'seen'] and images.list_folders(tmp_path / 'loop') == []
  assert images.list_images(tmp_path / 'seen') == [str(tmp_path / 'seen/x.png')]

  scan = os.scandir

  def refuse(folder):
    if os.path.basename(folder) == 'locked':
      raise PermissionError(13, 'Permission denied')
    return scan(folder)

  monkeypatch.setattr(os, 'scandir', refuse)
  assert images.list_images(tmp_path / 'locked') == images.list_folders(tmp_path / 'locked') == []

"""`python -m metajax.data`: what it prints, what it finds wrong, how it ends."""

import logging
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.conftest import prepare as main

pytestmark = pytest.mark.usefixtures('tables')


@pytest.fixture
def run(data, capsys):
  """Runs a command on `data`: (exit status, what it printed, errors)."""

  def run(*arguments):
    status = main([*arguments, f'--data_dir={data}'])
    return status, *capsys.readouterr()

  yield run
  logging.basicConfig(force=True)  # no longer to what `capsys` closes now


def picture(*seed):
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8))


def make_folder(root, classes=6, images=4):
  for k in range(classes):
    folder = root / ('train', 'val', 'test')[k % 3] / f'class{k}'
    folder.mkdir(parents=True)
    for n in range(images):
      picture(k, n).save(folder / f'{n}.png')


def test_prepares_and_tells(run, tmp_path):
  make_folder(tmp_path / 'data/mine')
  status, out, _ = run('folder', '--path=mine', '--size=5', '--grey=true')
  assert status == 0
  assert 'folder: 24 images of 5 x 5 x 1, 0.0 MB' in out
  assert re.search(r'train +2 classes of 4 images each\n +val +2 classes .*\n +test +2 classes of', out)
  assert re.search(r'source class/image or split/class/image\n +table', out)
  [sheet] = re.findall(r'sheet +(.*)', out)
  with Image.open(sheet) as image:
    assert image.width > 500
    assert len(image.convert('RGB').getcolors(1 << 20)) > 30
  [folder, digest] = re.findall(r'table +(.*), SHA-256 (\w{64})', out)[0]
  assert os.path.dirname(sheet) == folder
  assert run('folder', '--path=mine', '--size=5', '--grey=true')[1].count(digest) == 1  # the same table


def test_superclasses_are_counted(run):
  status, out, _ = run('glyphs')
  assert status == 0 and 'embedded' in out and 'SHA' not in out
  assert run('sinusoid')[1] == 'sinusoid is made of functions: there is nothing to prepare\n'


def test_list_says_what_to_put_where(run, tmp_path):
  status, out, _ = run('--list')
  assert status == 0
  place = tmp_path / 'data/mini_imagenet'
  assert re.search(
    rf'mini_imagenet: missing\..*\n  into {place}:\n    mini-imagenet-cache-{{train,val,test}}.pkl\n', out
  )
  assert f'  into {tmp_path / "data/tensorflow_datasets"}:\n    TFDS imagenet2012\n' in out
  assert '    images_{background,evaluation}.zip\n' in out
  assert 'omniglot: missing. It is downloaded when it is first used, 16 MB from github.com, raw.githubus' in out
  place.mkdir()
  (place / 'mini-imagenet.tar.gz').write_text('')
  out = run('mini_imagenet', '--list')[1]
  assert out == f'mini_imagenet: found, mini-imagenet.tar.gz in {place}\n'


def test_list_says_what_is_ready(run, tmp_path):
  for k in range(3):
    folder = tmp_path / f'data/omniglot/data/Angelic/character{k + 1:02d}'
    folder.mkdir(parents=True)
    picture(k).save(folder / '0.png')
  assert run('omniglot', '--size=3')[0] == 0
  shutil.rmtree(tmp_path / 'data/omniglot')
  assert run('omniglot', '--list')[1] == f'omniglot: ready, {tmp_path / "cache/omniglot-3"}, 0.0 MB\n'


@pytest.mark.parametrize(
  ('arguments', 'complaint'),
  [
    (['omniglott'], "there is no 'omniglott'; did you mean 'omniglot'"),
    (['omniglot', '--sise=3'], "omniglot has no setting 'sise'; known: data_dir, size, split"),
    (['omniglot', '--size=three'], '--size takes a value such as 28'),
    (['omniglot', '--split=ravi'], "no split 'ravi'"),
    (['omniglot', '--force'], "do not know what to do with '--force'"),
    (['omniglot'], 'cannot download images_background.zip .*no network.*--list'),
    (['omniglot', '--check'], 'omniglot is not in .*--list'),
    (['tfds:no_such_set'], 'no data set no_such_set'),
    (['tfds'], 'what follows tfds is missing, as in tfds:BUILDER'),
    (['folder'], r'data holds no images in class folders: .*; set path'),
    (['omniglot', '--size=16.9'], '--size takes a value such as 28, not .16.9'),
    (['omniglot', '--size=1e400'], '--size takes a value such as 28'),
    (['omniglot', '--split=maml++', '--split_seed=-1'], 'split_seed = -1'),
  ],
)
def test_mistakes_end_in_one_line(run, arguments, complaint):
  status, _, err = run(*arguments)
  assert status == 2 and re.search(complaint, err) and err.startswith('metajax: ') and err.count('\n') == 1


def test_settings_of_a_data_set_of_the_users_own(run, tmp_path, monkeypatch):
  """One of any type is read as in a config, and one without a default has to be given."""
  (tmp_path / 'own_data').mkdir()
  (tmp_path / 'own_data' / 'any_type.py').write_text(
    'from metajax.errors import UserError\n'
    'def load(data_dir, kind, *, given=None):\n  raise UserError(f"{kind!r} and {given!r}")\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  for arguments, line in (
    (['--given=1'], 'command line: --kind=VALUE is missing'),
    (['--kind=a'], "'a' and None"),
    (['--kind=3', '--given=(1, 2.5)'], '3 and (1, 2.5)'),
    (['--kind=a', '--given=/b'], "'a' and '/b'"),
  ):
    assert run('own_data.any_type', *arguments)[2] == f'metajax: {line}\n'


def test_images_that_do_not_decode_stop_it_or_are_listed(run, tmp_path):
  make_folder(tmp_path / 'data')
  for name in ('train/class0/1.png', 'test/class5/3.png'):
    (tmp_path / 'data' / name).write_text('no image')
  status, _, err = run('folder', '--size=5')
  assert status == 2 and 'train/class0/1.png does not decode (not an image): replace or remove it; ' in err
  assert '--check` lists all such images, --skip_bad leaves them out' in err
  status, out, err = run('folder', '--size=5', '--skip_bad')
  assert status == 0 and '22 images of' in out and '3 to 4 images each' in out
  for name in ('train/class0/1.png', 'test/class5/3.png'):
    assert f'{name} does not decode' in err + out
  assert '--skip_bad' not in out and 'published' not in out


@pytest.mark.parametrize(
  ('setting', 'complaint'),
  [
    ("--fractions=('a','b','c')", 'fractions .* are not three parts of 1'),
    ('--fractions=(1e400,0,0)', 'fractions .* are not three parts of 1'),
    ('--split_seed=-1', 'split_seed = -1'),
  ],
)
def test_settings_out_of_range_end_in_one_line(run, tmp_path, setting, complaint):
  make_folder(tmp_path / 'data/mine')
  for split in ('train', 'val', 'test'):  # classes alone
    for folder in (tmp_path / f'data/mine/{split}').iterdir():
      folder.rename(tmp_path / f'data/mine/{folder.name}')
    (tmp_path / f'data/mine/{split}').rmdir()
  status, _, err = run('folder', '--path=mine', setting)
  assert status == 2 and re.search(complaint, err)


def truncate(folder):
  os.truncate(folder / 'images.npy', 100)


DEFECTS = [
  (truncate, 'damaged'),
  (lambda folder: (folder / 'images.npy').unlink(), 'damaged'),
  (lambda folder: (folder / 'manifest.json').write_text('{'), 'damaged'),
  (lambda folder: (folder / 'manifest.json').write_text('{"format": 1}'), 'of an older format'),
]


@pytest.mark.parametrize(('spoil', 'word'), DEFECTS)
def test_a_table_that_is_not_whole(run, tmp_path, spoil, word):
  make_folder(tmp_path / 'data/omniglot/data')
  for k, name in enumerate(('train', 'val', 'test')):
    (tmp_path / 'data/omniglot/data' / name).rename(tmp_path / 'data/omniglot/data' / ('Greek', 'Latin', 'Tibetan')[k])
  for folder in (tmp_path / 'data/omniglot/data').glob('*/*'):
    folder.rename(folder.with_name(f'character{int(folder.name[-1]) + 1:02d}'))
  assert run('omniglot', '--size=3')[0] == 0
  (tmp_path / 'cache/.omniglot-3.old/left').mkdir(parents=True)  # by a process that was killed at the end
  spoil(tmp_path / 'cache/omniglot-3')
  assert 'ready' not in run('omniglot', '--list')[1]
  assert re.search(f'omniglot-3 is {word}.*is made again', run('omniglot', '--check')[1])
  status, out, _ = run('omniglot', '--size=3')
  assert status == 0 and 'will be made anew' in out and '24 images of 3 x 3 x 1' in out
  assert [name for name in os.listdir(tmp_path / 'cache') if 'old' in name] == []


def test_check_leaves_nothing(run, tmp_path):
  make_folder(tmp_path / 'data')
  assert run('folder', '--check')[0] == 0
  assert os.listdir(tmp_path / 'cache') == ['.check.lock']


def test_the_files_of_a_folder_decide_not_the_cache(run, tmp_path):
  """What cannot be read or is not there is told of the files."""
  (tmp_path / 'data/omniglot/images_background.zip').mkdir(parents=True)
  status, _, err = run('omniglot')
  assert status == 2 and 'images_background.zip is a folder, where the archive of Omniglot should be: remove it' in err
  assert run('omniglot', '--data_dir=~/no_such_folder', '--list')[1].find('~') == -1


@pytest.mark.parametrize('name', ['$x_{$', '%', 'a' * 60])
def test_a_sheet_has_room_for_any_name(run, tmp_path, name):
  make_folder(tmp_path / 'data')
  (tmp_path / 'data/train/class0').rename(tmp_path / 'data/train' / name)
  status, out, _ = run('folder', '--size=5')
  assert status == 0 and 'sheet.png' in out


def plant_odd_count(root):
  (root / 'val/class1/0.png').unlink()
  return [r'class class1 has 3 images, most classes have 4']


def plant_class_in_two_splits(root):
  (root / 'test/class0').mkdir()
  picture(99).save(root / 'test/class0/0.png')
  return [
    r'class class0 is at test/class0 and at train/class0 .*names_by_split',
    r'class class0 has 1 images, most classes have 4',
  ]


def plant_image_in_two_splits(root):
  with Image.open(root / 'train/class3/2.png') as image:
    image.save(root / 'test/class2/2.bmp')  # the same pixels in another file
  (root / 'test/class2/0.png').unlink()
  return [r'the same image is in test \(class class2\) and in train \(class class3\): .*2.bmp and .*class3/2.png']


def plant_image_in_two_classes(root):
  shutil.copy(root / 'train/class3/2.png', root / 'train/class0/2.png')
  return [r'the same image is in classes class0 and class3: .*class0/2.png and .*class3/2.png']


def plant_no_image(root):
  (root / 'train/class3/2.png').write_bytes(b'')
  return [r'class3/2.png does not decode']


def plant_white_icon(root):
  Image.new('LA', (9, 9), (255, 0)).save(root / 'train/class3/2.png')
  with Image.open(root / 'train/class3/2.png') as image:
    image.putpixel((4, 4), (255, 255))
    image.save(root / 'train/class3/2.png')
  return [r'1 images can hardly be told from the ground behind them: train/class3/2.png; set ground']


def plant_one_colour(root):
  Image.new('1', (9, 9)).save(root / 'train/class3/2.png')
  return [r'1 images have one colour: train/class3/2.png']


def plant_unread(root):
  (root / 'train/class3/2.png').rename(root / 'train/class3/2.heic')
  return [r'class class3 has 3 images, most', r'1 HEIC files are passed over: pip install pillow-heif']


FAULTS = [
  plant_odd_count,
  plant_class_in_two_splits,
  plant_image_in_two_splits,
  plant_image_in_two_classes,
  plant_no_image,
  plant_white_icon,
  plant_one_colour,
  plant_unread,
]


@pytest.mark.parametrize('plant', FAULTS)
def test_check_finds_each_fault(run, tmp_path, plant):
  make_folder(tmp_path / 'data')
  assert run('folder', '--check')[:2][1].endswith('folder: no faults\n')
  expected = plant(tmp_path / 'data')
  status, out, _ = run('folder', '--check')
  assert status == 1 and out.endswith(f'folder: {len(expected)} faults\n'), out
  for fault in expected:
    assert re.search(fault, out), out


def test_check_finds_all_faults_at_once(run, tmp_path):
  make_folder(tmp_path / 'data', classes=15)
  expected = [
    fault for plant in FAULTS[:5] if plant is not plant_image_in_two_classes for fault in plant(tmp_path / 'data')
  ]
  status, out, _ = run('folder', '--check')
  assert status == 1
  for fault in expected[:3]:
    assert re.search(fault, out), out


def test_an_image_twice_in_a_class_is_a_note(run, tmp_path):
  make_folder(tmp_path / 'data')
  shutil.copy(tmp_path / 'data/train/class3/2.png', tmp_path / 'data/train/class3/1.png')
  status, out, _ = run('folder', '--check')
  assert status == 0 and re.search(r'note: the same image is twice in class class3: .*1.png and .*2.png', out)


def test_what_the_files_tell_is_not_told_of_their_table_again(run, tmp_path):
  make_folder(tmp_path / 'data')
  plant_one_colour(tmp_path / 'data')
  assert '1 images have one colour' in run('folder')[1]
  assert run('folder', '--check')[1].endswith('folder: 1 faults\n')


def test_settings_of_a_folder_are_those_of_its_check_too(run, tmp_path):
  make_folder(tmp_path / 'data')
  plant_white_icon(tmp_path / 'data')
  assert run('folder', '--check', '--ground=black')[0] == 0


def test_check_finds_a_table_that_changed(run, tmp_path):
  make_folder(tmp_path / 'data')
  [folder] = re.findall(r'table +(.*), SHA', run('folder')[1])
  with open(f'{folder}/images.npy', 'r+b') as file:
    file.seek(5000)
    file.write(b'\x80\x7f')
  status, out, _ = run('folder', '--check')
  assert status == 1 and re.search(r'images.npy has changed since it was made .*remove', out)


def test_check_finds_each_fault_in_the_real_omniglot(run, tmp_path, omniglot_dir):
  for half in ('images_background', 'images_evaluation'):
    with zipfile.ZipFile(omniglot_dir / f'{half}.zip') as archive:
      archive.extractall(tmp_path / 'data')
  background, evaluation = tmp_path / 'data/images_background', tmp_path / 'data/images_evaluation'
  (background / 'Greek/character01/0394_07.png').unlink()
  shutil.copy(background / 'Greek/character02/0395_07.png', evaluation / 'Keble/character01/1245_07.png')
  shutil.copytree(background / 'Latin/character01', evaluation / 'Latin/character01')
  status, out, _ = run('omniglot', '--check', '--split=lake')
  assert status == 1
  assert 'class Greek/character01 has 19 images, not 20' in out
  assert re.search(r'class Latin/character01 is in .*background/Latin/character01 and in .*evaluation/Latin', out)
  pair = r'train \(class Greek/character02\) and in test \(class Keble/character01\): .*0395_07.png and .*1245_07'
  assert re.search(f'same image is in {pair}', out)
  assert len(re.findall('the same image is in', out)) == 1 + 20
  assert len(re.findall('note: ', out)) == 1  # the one dot of Braille that the original has twice

import io
import os
import tarfile

import h5py
import numpy as np
import pytest
from PIL import Image

from metajax.data import prepared, source
from metajax.datasets import cub
from metajax.errors import UserError

CLASSES = {'train': ['001.Black_footed_Albatross', '003.Sooty_Albatross'], 'val': ['002.Laysan_Albatross'],
           'test': ['004.Groove_billed_Ani']}  # fmt: skip
PER_CLASS = 2
WIDE = (200, 150)


pytestmark = pytest.mark.usefixtures('tables')


def photograph(c, k):
  """The k-th image of a class as a JPEG file; they differ in shape, and the first of all is grey."""
  shape = (WIDE if k else WIDE[::-1]) + (3,) * (c[:3] != '001' or k != 0)
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng([int(c[:3]), k]).integers(0, 256, shape, np.uint8)).save(file, 'jpeg')
  return file.getvalue()


def resized_and_cropped(c, k):
  """As torchvision's Resize(126) and CenterCrop(84)."""
  image = Image.open(io.BytesIO(photograph(c, k))).convert('RGB')
  size = (168, 126) if image.width > image.height else (126, 168)
  left, top = (size[0] - 84) // 2, (size[1] - 84) // 2
  return np.asarray(image.resize(size, Image.BILINEAR).crop((left, top, left + 84, top + 84)))


def write_folders(folder):
  for classes in CLASSES.values():
    for c in classes:
      (folder / c).mkdir(parents=True)
      for k in range(PER_CLASS):
        (folder / c / f'{c[4:]}_000{k}_{k}.jpg').write_bytes(photograph(c, k))


def check(tables):
  assert {split: list(t.names) for split, t in tables.items()} == CLASSES
  for t in tables.values():
    assert t.images.shape == (4 * PER_CLASS, 84, 84, 3) and t.superclasses == ()
    np.testing.assert_array_equal(t.counts, PER_CLASS)
    for start, c in zip(t.starts, t.names, strict=True):
      for k in range(PER_CLASS):
        np.testing.assert_array_equal(t.images[start + k], resized_and_cropped(c, k))


def test_splits_are_those_published():
  sizes = {kind: [len(classes) for classes in splits.values()] for kind, splits in cub._lists().items()}
  assert sizes == {'closer_look': [100, 50, 50], 'meta_dataset': [140, 30, 30]}
  for splits in cub._lists().values():
    assert sorted(c for classes in splits.values() for c in classes) == sorted(cub.dataset().counts)


@pytest.mark.parametrize('place', ['CUB_200_2011/images', 'cub/CUB_200_2011/images', 'cub/images', 'CUB', ''])
def test_folders(data, place, caplog):
  write_folders(data / place)
  check(cub.load(str(data)))
  assert '196 of 200 classes are missing' in caplog.text and 'it has 8 of 11788 images' in caplog.text


def test_archive(data, tmp_path):
  write_folders(tmp_path / 'CUB_200_2011/images')
  (tmp_path / 'CUB_200_2011/images.txt').write_text('1 whatever.jpg\n')
  (tmp_path / 'attributes.txt').write_text('1 has_bill_shape::curved\n')
  with tarfile.open(data / 'CUB_200_2011.tgz', 'w:gz') as archive:
    for name in ('attributes.txt', 'CUB_200_2011'):
      archive.add(tmp_path / name, f'./{name}')
  check(cub.load(str(data)))
  assert os.listdir(data) == ['CUB_200_2011.tgz']


def write_hdf5(folder, classes=CLASSES):
  folder.mkdir(exist_ok=True)
  for split, names in classes.items():
    with h5py.File(folder / f'{split}_data.hdf5', 'w') as file:
      group = file.create_group('datasets')
      for c in names:
        rows = group.create_dataset(c, (PER_CLASS,), dtype=h5py.special_dtype(vlen=np.uint8))
        for k in range(PER_CLASS):
          rows[k] = np.frombuffer(photograph(c, k), np.uint8)


def test_torchmeta(data):
  write_hdf5(data / 'cub')
  check(cub.load(str(data)))


def test_other_split_and_size_share_what_they_can(data, monkeypatch):
  write_folders(data / 'cub/images')
  cub.load(str(data), size=8, crop=0.0)
  monkeypatch.setattr(source, 'locate', lambda *arguments: None)  # from the table, without its source
  tables = cub.load(str(data), size=8, crop=0.0, split='meta_dataset')
  assert {split: len(t.names) for split, t in tables.items()} == {'train': 4}  # unlike above
  whole = Image.open(io.BytesIO(photograph('001.Black_footed_Albatross', 1))).resize((8, 8), Image.BILINEAR)
  np.testing.assert_array_equal(tables['train'].images[1], np.asarray(whole))


def test_whole_data_set_is_not_complained_about():
  each = [list(range(59))] * 188 + [list(range(58))] * 12
  contents = source.Contents(dict(zip(cub.dataset().counts, each, strict=True)))
  assert source.deviations(cub.dataset(), contents) == []


def write_no_image(data):
  write_folders(data / 'cub/images')
  (data / 'cub/images/002.Laysan_Albatross/Laysan_Albatross_0000_0.jpg').write_bytes(b'<html>')


def write_no_image_in_hdf5(data):
  write_hdf5(data / 'cub')
  with h5py.File(data / 'cub/val_data.hdf5', 'r+') as file:
    file['datasets/002.Laysan_Albatross'][1] = np.arange(9, dtype=np.uint8)


def write_cut_hdf5(data):
  write_hdf5(data / 'cub')
  os.truncate(data / 'cub/test_data.hdf5', 1000)


@pytest.mark.parametrize(
  ('make', 'complaint'),
  [
    (write_no_image, r'Laysan_Albatross_0000_0.jpg does not decode'),
    (write_no_image_in_hdf5, r'image 1 of datasets/002.Laysan_Albatross in .*val_data.hdf5 does not decode'),
    (write_cut_hdf5, r'test_data.hdf5 is damaged or not HDF5'),
    (lambda data: write_hdf5(data, CLASSES | {'test': CLASSES['val']}), r'class 002.Laysan_Albatross is in two of'),
    (lambda data: write_hdf5(data, CLASSES | {'test': ['201.Dodo']}), r'class 201.Dodo, which is not in CUB-200-2011'),
    (lambda data: (data / 'CUB_200_2011.tgz').write_bytes(b'<html>'), r'CUB_200_2011.tgz is damaged or no archive'),
  ],
)
def test_mistakes_are_named(data, make, complaint):
  make(data)
  with pytest.raises(UserError, match=complaint) as error:
    cub.load(str(data))
  assert '\n' not in str(error.value)


def test_tfds_file_names_without_a_class_are_passed_over(monkeypatch, tmp_path):
  names = ['001.Black_footed_Albatross/Black_footed_Albatross_0001_796111.jpg', 'notes.jpg']
  records = [prepared.Record('train', str(k), {'image/filename': name}, k) for k, name in enumerate(names)]
  monkeypatch.setattr(prepared, 'read', lambda *arguments: records)
  contents = cub.dataset().prepared[0].read(tmp_path, tmp_path)
  assert contents.classes == {'001.Black_footed_Albatross': [0]}


def test_unknown_split():
  with pytest.raises(UserError, match="no split 'ravi'; choose one of closer_look, meta_dataset"):
    cub.load('nowhere', split='ravi')

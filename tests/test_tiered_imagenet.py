import io
import os
import pickle
import tarfile

import h5py
import numpy as np
import pytest
from PIL import Image

from metajax.data import source
from metajax.datasets import tiered_imagenet
from metajax.errors import UserError

SPLITS = {
  split: [c for group in groups.values() for c in group['classes']]
  for split, groups in tiered_imagenet._lists().items()
}
CLASSES = {'train': SPLITS['train'][3:5], 'val': SPLITS['val'][:1], 'test': SPLITS['test'][:1]}
PER_CLASS = 3
STRANGE = 'n01614925'  # of ILSVRC, but not of tiered-ImageNet


pytestmark = pytest.mark.usefixtures('tables')


def words(wnid):
  return tiered_imagenet._classes()[wnid][1]


def picture(wnid, k):
  """The k-th image of a class, unlike any other."""
  return np.random.default_rng([int(wnid[1:]), k]).integers(0, 256, (84, 84, 3), np.uint8)


def encoded(pixels, form='png'):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, form)
  return np.frombuffer(file.getvalue(), np.uint8)


def rows(split):
  """What a file of a split holds, in an order that is not that of the classes: (wnid, number of the image)."""
  return [(wnid, k) for k in range(PER_CLASS) for wnid in reversed(CLASSES[split])]


def labels(split):
  """As Ren et al. publish them, with numbers of classes in no order."""
  order = sorted(CLASSES[split], key=words)
  return {
    'label_specific': np.array([order.index(wnid) for wnid, _ in rows(split)], np.int32),
    'label_general': np.zeros(len(rows(split)), np.int32),
    'label_specific_str': [words(wnid) for wnid in order],
    'label_general_str': ['whatever'],
  }


def as_bytes(content):
  """As Python 3 reads what Python 2 wrote, and a dict where there was a list."""
  content = {key.encode(): value for key, value in content.items()}
  content[b'label_specific_str'] = {k: name.encode() for k, name in enumerate(content[b'label_specific_str'])}
  return content


def write_names(folder, prefix='', class_names='class_names.txt', synsets='synsets.txt'):
  """The names of all classes of ILSVRC, as it were, in parallel lists."""
  wnids = sorted(tiered_imagenet._classes(), reverse=True)
  (folder / f'{prefix}{class_names}').write_text(''.join(words(wnid) + '\n' for wnid in wnids))
  (folder / f'{prefix}{synsets}').write_text(''.join(wnid + '\n' for wnid in wnids))


def write_pickles(folder, prefix='', form=lambda content: content, protocol=None):
  folder.mkdir(parents=True, exist_ok=True)
  for split in CLASSES:
    files = [encoded(picture(*row)) for row in rows(split)]
    files[1] = files[1][:, None]  # OpenCV gives one or two axes
    (folder / f'{prefix}{split}_images_png.pkl').write_bytes(pickle.dumps(files, protocol))
    (folder / f'{prefix}{split}_labels.pkl').write_bytes(pickle.dumps(form(labels(split)), protocol))
  write_names(folder, prefix)


def check(tables):
  """The classes with their pictures, whatever they are called."""
  assert {split: t.names for split, t in tables.items()} == {split: tuple(c) for split, c in CLASSES.items()}
  check_pictures(tables)
  for split, t in tables.items():
    superclasses = {c: group['name'] for group in tiered_imagenet._lists()[split].values() for c in group['classes']}
    assert all(superclasses[c].startswith(name) for c, name in zip(t.names, t.superclasses, strict=True))


def check_pictures(tables):
  for split, t in tables.items():
    assert t.images.shape == (4 * PER_CLASS, 84, 84, 3)
    np.testing.assert_array_equal(t.counts, PER_CLASS)
    for start, wnid in zip(t.starts, CLASSES[split], strict=True):
      for k in range(PER_CLASS):
        np.testing.assert_array_equal(t.images[start + k], picture(wnid, k))


def test_figures_are_those_published():
  dataset = tiered_imagenet.dataset()
  assert {split: len(classes) for split, classes in SPLITS.items()} == {'train': 351, 'val': 97, 'test': 160}
  images = {split: sum(dataset.counts[c] for c in classes) for split, classes in SPLITS.items()}
  assert images == {'train': 448_695, 'val': 124_261, 'test': 206_209}
  superclasses = {split: {dataset.superclasses[c] for c in classes} for split, classes in SPLITS.items()}
  assert {split: len(names) for split, names in superclasses.items()} == {'train': 20, 'val': 6, 'test': 8}
  assert len(set().union(*superclasses.values())) == 34 and 'passerine' in superclasses['train']
  assert len({words(c) for c in dataset.counts}) == len({words(c).split(',')[0] for c in dataset.counts}) == 608


@pytest.mark.parametrize('prefix', ['', 'tiered-imagenet-'])
@pytest.mark.parametrize('form', [lambda content: content, as_bytes])
@pytest.mark.parametrize('protocol', [2, 5])
def test_pickles_of_encoded_images(data, prefix, form, protocol):
  write_pickles(data / 'tiered-imagenet', prefix, form, protocol)
  check(tiered_imagenet.load(str(data)))


def test_archive_of_pickles(data, tmp_path, caplog):
  write_pickles(tmp_path / 'tiered-imagenet')
  with tarfile.open(data / 'tiered-imagenet.tar', 'w') as archive:
    archive.add(tmp_path / 'tiered-imagenet', 'tiered-imagenet')
  check(tiered_imagenet.load(str(data)))
  assert os.listdir(data) == ['tiered-imagenet.tar']
  assert '604 of 608 classes are missing' in caplog.text and 'has 3 images, not 1300' in caplog.text


def test_red_is_red(data):
  """A PNG file has its colours in an order of its own, whoever encoded it."""
  write_pickles(data)
  red = np.zeros((84, 84, 3), np.uint8)
  red[..., 0] = 255
  files = [encoded(red)] * len(rows('test'))
  (data / 'test_images_png.pkl').write_bytes(pickle.dumps(files))
  np.testing.assert_array_equal(tiered_imagenet.load(str(data), size=1)['test'].images[-1], [[[255, 0, 0]]])


@pytest.mark.parametrize('name', [words, lambda wnid: words(wnid).split(',')[0]])
def test_torchmeta(data, name):
  (data / 'tieredimagenet').mkdir()
  for split, wnids in CLASSES.items():
    with h5py.File(data / f'tieredimagenet/{split}_data.hdf5', 'w') as file:
      group = file.create_group('datasets')
      for wnid in wnids:
        rows = group.create_dataset(name(wnid), (PER_CLASS,), dtype=h5py.special_dtype(vlen=np.uint8))
        rows.attrs['label_general'], rows.attrs['label_specific'] = 'whatever', name(wnid)
        for k in range(PER_CLASS):
          rows[k] = encoded(picture(wnid, k))
  check(tiered_imagenet.load(str(data)))


def write_arrays(folder, split, blue_first, content):
  folder.mkdir(exist_ok=True)
  images = np.stack([picture(*row) for row in rows(split)])
  np.savez(folder / f'{split}_images.npz', images=images[..., ::-1] if blue_first else images)
  (folder / f'{split}_labels.pkl').write_bytes(pickle.dumps(content))


def test_metaoptnet_has_numbers_alone(data, caplog):
  first = {'train': 0, 'val': 351, 'test': 448}  # sparse numbers, one range for each split
  for split, wnids in CLASSES.items():
    numbers = [first[split] + wnids.index(wnid) for wnid, _ in rows(split)]
    write_arrays(data / 'tiered_imagenet', split, True, {'labels': numbers})
  tables = tiered_imagenet.load(str(data))
  assert {s: t.names for s, t in tables.items()} == {
    'train': ('train/0', 'train/1'), 'val': ('val/351',), 'test': ('test/448',)
  }  # fmt: skip
  assert 'it has 12 of 779165 images' in caplog.text and tables['train'].superclasses == ()
  order = [*CLASSES['test'], *CLASSES['train'], *CLASSES['val']]  # of the names
  expected = np.stack([picture(wnid, k) for wnid in order for k in range(PER_CLASS)])
  np.testing.assert_array_equal(tables['val'].images, expected)


def test_arrays_that_opencv_decoded_beside_labels_with_names(data):
  for split in CLASSES:
    write_arrays(data / 'tiered-imagenet', split, True, labels(split))
  write_names(data / 'tiered-imagenet')
  check(tiered_imagenet.load(str(data)))


def test_arrays_that_pillow_decoded(data):
  for split, spelled in (('train', 'train'), ('val', 'validation'), ('test', 'test')):
    np.save(data / f'{spelled}_images.npy', np.stack([picture(*row) for row in rows(split)]))
    (data / f'{split}_labels.pkl').write_bytes(pickle.dumps(labels(split)))
  write_names(data)
  check(tiered_imagenet.load(str(data)))


def test_images_file_decides_what_the_labels_are(data):
  """Ren et al.'s code leaves its decoded arrays beside the files they are made of."""
  write_pickles(data)
  (data / 'train_images.npz').write_bytes(b'being written')
  check(tiered_imagenet.load(str(data)))


def save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encoded(pixels))  # exact, and Pillow looks at the content rather than at the name


@pytest.mark.parametrize(
  'layout', ['tiered_imagenet/{split}/{wnid}/{wnid}{k:08d}.jpg', '{split}/{wnid}/{k}.jpg', '{wnid}/{wnid}_{k}.JPEG']
)
def test_folders(data, layout):
  for split, wnids in CLASSES.items():
    for wnid in wnids:
      for k in range(PER_CLASS):
        save(data / layout.format(split=split, wnid=wnid, k=k), picture(wnid, k))
  check(tiered_imagenet.load(str(data)))


def test_archive_of_folders(data, tmp_path):
  for split, wnids in CLASSES.items():
    for wnid in wnids:
      for k in range(PER_CLASS):
        save(tmp_path / f'all/{split}/{wnid}/{wnid}{k:08d}.jpg', picture(wnid, k))
  with tarfile.open(data / 'tiered_imagenet.tar', 'w') as archive:
    archive.add(tmp_path / 'all', 'tiered_imagenet')
  check(tiered_imagenet.load(str(data)))


def test_ilsvrc_as_a_whole_may_have_other_classes(data, caplog):
  pixel = np.zeros((1, 1, 3), np.uint8)
  for wnid in [*tiered_imagenet.dataset().counts, STRANGE]:
    save(data / f'{wnid}/{wnid}_1.JPEG', pixel)
  tables = tiered_imagenet.load(str(data), size=1)
  assert {split: list(t.names) for split, t in tables.items()} == SPLITS
  assert 'missing' not in caplog.text and 'has 1 images, not' in caplog.text


def damage(name, change):
  """Writes the pickles, one of them changed."""

  def make(data):
    write_pickles(data)
    content = pickle.loads((data / name).read_bytes())
    (data / name).write_bytes(pickle.dumps(change(content)))

  return make


def cut(name):
  def make(data):
    write_pickles(data)
    os.truncate(data / name, (data / name).stat().st_size // 2)

  return make


def without(*names):
  def make(data):
    write_pickles(data)
    for name in names:
      (data / name).unlink()

  return make


def write_damaged_hdf5(data):
  for split in CLASSES:
    (data / f'{split}_data.hdf5').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))


def write_strange_hdf5(data):
  for split in CLASSES:
    with h5py.File(data / f'{split}_data.hdf5', 'w') as file:
      files = file.create_dataset(f'datasets/house cat of {split}', (1,), dtype=h5py.special_dtype(vlen=np.uint8))
      files[0] = encoded(picture(STRANGE, 0))


def write_no_zip(data):
  write_arrays(data, 'test', True, {'labels': [0] * 3})
  (data / 'test_images.npz').write_text('<html>')


def write_shifted_synsets(data):
  """One line more at the front moves all classes."""
  write_pickles(data)
  path = data / 'synsets.txt'
  path.write_text(f'{CLASSES["test"][0]}\n{path.read_text()}')


def write_swapped_synsets(data):
  write_pickles(data)
  path, swap = data / 'synsets.txt', {CLASSES['train'][0]: CLASSES['test'][0], CLASSES['test'][0]: CLASSES['train'][0]}
  path.write_text(''.join(swap.get(wnid, wnid) + '\n' for wnid in path.read_text().split()))


def write_garbled_npy(data):
  header = b"{'descr': '|u1', 'shape': (1, '''"  # with a quote that does not end
  (data / 'test_images.npy').write_bytes(b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header)


def write_cut_npy(data):
  np.save(data / 'test_images.npy', np.zeros((3, 84, 84, 3), np.uint8))
  os.truncate(data / 'test_images.npy', 1000)


@pytest.mark.parametrize(
  ('make', 'complaint'),
  [
    (damage('val_labels.pkl', lambda c: c | {'label_specific': [0]}), r'val_images_png.pkl has 3 images, but labels'),
    (damage('val_labels.pkl', lambda c: c | {'label_specific': [0, 7, 0]}), r'val_labels.pkl has images of class 7'),
    (damage('val_labels.pkl', lambda c: c | {'label_specific_str': ['cat']}), r"'cat', which is not in .*names.txt"),
    (damage('val_labels.pkl', lambda c: c | {'label_specific_str': 5}), r'val_labels.pkl is not in the format'),
    (damage('val_labels.pkl', lambda c: c | {'label_specific_str': [b'\xff']}), r'has class .*, which is not in'),
    (damage('val_labels.pkl', lambda c: c | {'label_specific': [0, 'a', None]}), r'label_specific object, not int'),
    (damage('val_labels.pkl', lambda c: np.zeros(3)), r'val_labels.pkl is not in the format of its name'),
    (damage('val_labels.pkl', lambda c: [1]), r'val_labels.pkl is not in the format of its name'),
    (damage('val_images_png.pkl', lambda c: {}), r'val_images_png.pkl holds no list of PNG files'),
    (damage('val_images_png.pkl', lambda c: [*c[:2], c[2][:99]]), r'image 2 of .*val_images_png.pkl does not decode'),
    (damage('val_images_png.pkl', lambda c: [*c[:2], 0]), r'image 2 of .*val_images_png.pkl does not decode'),
    (damage('test_labels.pkl', lambda c: labels('val')), r'class n\d+ is in two of .*val_images'),
    (cut('train_images_png.pkl'), r'train_images_png.pkl is damaged or not a pickle'),
    (cut('train_labels.pkl'), r'train_labels.pkl is damaged or not a pickle'),
    (write_shifted_synsets, r'class_names.txt has 608 lines and .*synsets.txt 609'),
    (write_swapped_synsets, rf'synsets.txt has {CLASSES["test"][0]} for .*, which is {CLASSES["train"][0]}'),
    (without('synsets.txt'), r'synsets.txt is missing'),
    (without('test_labels.pkl'), r'test_labels.pkl is missing'),
    (write_damaged_hdf5, r'train_data.hdf5 is damaged or not HDF5'),
    (write_strange_hdf5, r'class house cat of test, which is not in tiered-ImageNet'),
    (write_no_zip, r'test_images.npz is damaged or no archive'),
    (write_cut_npy, r'test_images.npy is damaged'),
    (write_garbled_npy, r'test_images.npy is damaged'),
    (lambda data: save(data / f'train/{STRANGE}/a.jpg', picture(STRANGE, 0)), f'class {STRANGE}, which is not in'),
    (lambda data: (data / 'tiered-imagenet.tar').write_text('<html>'), r'tiered-imagenet.tar is damaged'),
  ],
)  # fmt: skip
def test_mistakes_are_named(data, make, complaint):
  make(data)
  with pytest.raises(UserError, match=complaint) as error:
    tiered_imagenet.load(str(data))
  assert '\n' not in str(error.value)


def test_what_is_not_there_is_downloaded(data, tmp_path, monkeypatch):
  """The archive arrives where it is looked for."""

  def fetch(remote, folder):
    write_pickles(tmp_path / 'tiered-imagenet')
    os.makedirs(folder)
    with tarfile.open(os.path.join(folder, remote.name), 'w') as archive:
      archive.add(tmp_path / 'tiered-imagenet', 'tiered-imagenet')

  monkeypatch.setattr(source.download, 'fetch', fetch)
  check(tiered_imagenet.load(str(data)))

"""The class splits in metajax/datasets/splits: the figures published, and facts that a wrong copy would not have."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from metajax.datasets import omniglot

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT.parent / 'shared' / 'reference' / 'splits'
SPLITS = ('train', 'val', 'test')


def stored(name):
  return json.loads((ROOT / 'metajax' / 'datasets' / 'splits' / f'{name}.json').read_text())


def reference(name):
  path = REFERENCE / f'{name}.json'
  if not path.exists():
    pytest.skip(f'no reference lists in {REFERENCE}')
  return json.loads(path.read_text())


def everything(splits):
  """All classes of the splits, none of which may come twice."""
  assert tuple(splits) == SPLITS
  classes = list(itertools.chain.from_iterable(splits.values()))
  assert len(set(classes)) == len(classes)
  return set(classes)


def sizes(splits):
  return [len(splits[split]) for split in SPLITS]


def in_order(splits):
  return {split: sorted(classes) for split, classes in splits.items()}


def tiered():
  """split -> wnid -> [images in ILSVRC, words]."""
  return {
    split: {wnid: row for group in groups.values() for wnid, row in group['classes'].items()}
    for split, groups in stored('tiered_imagenet').items()
  }


def fine_classes(superclasses):
  members = stored('cifar100')['superclasses']
  return sorted(c for name in superclasses for c in members[name])


def test_cifar100_has_20_superclasses_of_5():
  superclasses = stored('cifar100')['superclasses']
  assert len(superclasses) == 20 and list(superclasses) == sorted(superclasses)  # the order of CIFAR-100's numbers
  assert all(len(members) == 5 for members in superclasses.values())
  fine = fine_classes(superclasses)
  assert len(set(fine)) == 100 and fine[:2] + fine[-2:] == ['apple', 'aquarium_fish', 'woman', 'worm']
  assert superclasses['people'] == ['baby', 'boy', 'girl', 'man', 'woman']


def test_cifar_fs():
  splits = stored('cifar100')['cifar_fs']
  assert sizes(splits) == [64, 16, 20]
  assert everything(splits) == set(fine_classes(stored('cifar100')['superclasses']))


def test_fc100_splits_superclasses():
  splits, superclasses = stored('cifar100')['fc100'], stored('cifar100')['superclasses']
  assert sizes(splits) == [12, 4, 4]
  assert everything(splits) == set(superclasses)
  assert [len(fine_classes(splits[split])) for split in SPLITS] == [60, 20, 20]
  # Oreshkin et al. 2018 give CIFAR-100's numbers of the superclasses
  numbers = {split: {list(superclasses).index(name) for name in names} for split, names in splits.items()}
  train = {1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19}
  assert numbers == {'train': train, 'val': {8, 11, 13, 16}, 'test': {0, 7, 12, 14}}


def test_tiered_imagenet():
  groups, classes = stored('tiered_imagenet'), tiered()
  assert sizes(groups) == [20, 6, 8] and len(everything(groups)) == 34
  assert sizes(classes) == [351, 97, 160] and len(everything(classes)) == 608
  assert sum(len(g['classes']) for split in SPLITS for g in groups[split].values()) == 608
  assert [sum(count for count, _ in classes[split].values()) for split in SPLITS] == [448695, 124261, 206209]
  counts, words = zip(*itertools.chain.from_iterable(c.values() for c in classes.values()), strict=True)
  assert min(counts) == 732 and max(counts) == 1300
  assert len(set(words)) == 608  # the published pickles name classes by their words
  assert {len(g['classes']) for split in SPLITS for g in groups[split].values()} <= {*range(10, 31)}
  assert groups['train']['n01524359']['name'] == 'passerine, passeriform bird'
  assert classes['test']['n01440764'] == [1300, 'tench, Tinca tinca']


def test_tiered_imagenet_against_mini_imagenet():
  """What makes a network trained on one unfit to be tested on the other."""
  mini, other = stored('mini_imagenet'), tiered()
  shared = {(a, b): len(mini[a].keys() & other[b].keys()) for a in SPLITS for b in SPLITS}
  assert sum(shared.values()) == 58
  assert [shared['train', split] for split in ('val', 'test')] == [6, 13] and shared['test', 'train'] == 5
  # both count the images of a class in ILSVRC
  everywhere = {wnid: row[0] for split in SPLITS for wnid, row in other[split].items()}
  assert all(everywhere.get(wnid, row[0]) == row[0] for split in SPLITS for wnid, row in mini[split].items())


def test_cub():
  splits = stored('cub')
  assert {name: sizes(of_name) for name, of_name in splits.items()} == {
    'closer_look': [100, 50, 50],
    'meta_dataset': [140, 30, 30],
  }
  classes = everything(splits['closer_look'])
  assert everything(splits['meta_dataset']) == classes
  assert sorted(int(name[:3]) for name in classes) == list(range(1, 201))
  assert {'001.Black_footed_Albatross', '200.Common_Yellowthroat'} < classes
  # Closer Look deals classes out by number: odd ones, those 2 more than a multiple of 4, and multiples of 4
  assert [{int(name[:3]) % 4 for name in splits['closer_look'][split]} for split in SPLITS] == [{1, 3}, {2}, {0}]


def test_quickdraw():
  content = stored('quickdraw')
  classes = content['classes']
  assert len(classes) == 345 and list(classes) == sorted(classes)
  drawings = {name: count for name, (count, _) in classes.items()}
  assert sum(drawings.values()) == 50426266
  assert min(drawings, key=drawings.get) == 'panda' and drawings['panda'] == 113613
  assert max(drawings, key=drawings.get) == 'snowman' and drawings['snowman'] == 340029
  assert all(len(bytes.fromhex(sha256)) == 32 for _, sha256 in classes.values())
  assert sizes(content['meta_dataset']) == [241, 52, 52]
  assert everything(content['meta_dataset']) == set(classes)


def test_quickdraw_files_as_tfds_knows_them():
  path = Path(tfds.__file__).parent / 'datasets' / 'quickdraw_bitmap' / 'checksums.tsv'
  files = {}
  for line in path.read_text().splitlines():
    url, size, sha256, _ = line.split('\t')
    files[url.rpartition('/')[2].removesuffix('.npy')] = [(int(size) - 80) / 784, sha256]  # 80 bytes of NumPy's header
  assert files == stored('quickdraw')['classes']


def test_omniglot_meta_dataset():
  content = stored('omniglot')
  alphabets, lake, splits = content['alphabets'], content['lake'], content['meta_dataset']
  characters = {name: count for name, (_, count) in alphabets.items()}
  assert everything(splits) == set(alphabets)
  assert [sum(characters[name] for name in splits[split]) for split in SPLITS] == [883, 81, 659]
  assert splits['test'] == lake['test']
  assert splits['val'] == sorted(sorted(lake['train'], key=characters.get)[:5])


def test_cifar_lists_are_the_reference():
  content, cifar_fs, fc100 = stored('cifar100'), reference('cifar_fs'), reference('fc100')
  assert fine_classes(content['superclasses']) == cifar_fs['fine_label_names']
  assert list(content['superclasses']) == cifar_fs['coarse_label_names']
  assert content['superclasses'] == {name: sorted(c) for name, c in fc100['superclass_members'].items()}
  assert content['cifar_fs'] == cifar_fs['classes']
  assert content['fc100'] == fc100['superclasses']
  assert {s: fine_classes(names) for s, names in content['fc100'].items()} == fc100['classes']


def test_tiered_imagenet_is_the_reference():
  expected, groups = reference('tiered_imagenet'), stored('tiered_imagenet')
  listed = {s: {group: sorted(content['classes']) for group, content in of_s.items()} for s, of_s in groups.items()}
  assert listed == {s: in_order(of_s) for s, of_s in expected['superclasses'].items()}
  assert {g: content['name'] for s in SPLITS for g, content in groups[s].items()} == expected['superclass_names']
  rows = {wnid: row for of_split in tiered().values() for wnid, row in of_split.items()}
  assert {wnid: words for wnid, (_, words) in rows.items()} == expected['names']
  assert {wnid: count for wnid, (count, _) in rows.items()} == expected['images_per_class']


def test_cub_is_the_reference():
  expected = reference('cub')
  assert stored('cub') == {name: expected[name] for name in ('closer_look', 'meta_dataset')}


def test_quickdraw_is_the_reference():
  content, expected = stored('quickdraw'), reference('quickdraw')
  assert list(content['classes']) == expected['class_names_sorted']
  assert {name: row[0] for name, row in content['classes'].items()} == expected['images_per_class']
  assert content['meta_dataset'] == expected['meta_dataset']


def test_rule_of_fast_forward_labs_quickdraw_split():
  """Sorted FILE names, so that 'baseball bat.npy' comes before 'baseball.npy', shuffled and cut at 60 and 80 %."""
  files = sorted(f'{name}.npy' for name in stored('quickdraw')['classes'])
  np.random.RandomState(123).shuffle(files)
  names = [file.removesuffix('.npy') for file in files]
  assert names[:5] == ['nose', 'necklace', 'pickup truck', 'washing machine', 'baseball']
  splits = {'train': names[:207], 'val': names[207:276], 'test': names[276:]}
  assert splits == reference('quickdraw')['seed123_60_20_20']


def test_omniglot_lists_are_the_reference():
  expected = reference('omniglot_vinyals')
  splits = {kind: of_kind(0) for kind, of_kind in omniglot._SPLITS.items()}
  assert omniglot._characters() == expected['file_prefix']
  assert splits['vinyals'] == in_order(expected['vinyals'])
  assert list(splits['lake'].values()) == [sorted(expected['lake'][half]) for half in ('background', 'evaluation')]
  assert stored('omniglot')['meta_dataset'] == in_order(expected['meta_dataset_alphabets'])


def test_rule_of_maml_plus_plus_omniglot_split():
  """Characters sorted by name, shuffled by a seed that is itself drawn, and cut at two fractions."""
  numbers = omniglot._characters()
  seed = np.random.RandomState(0).randint(1, 999999)
  assert seed == 985773
  order = np.arange(1623, dtype=np.int32)
  np.random.RandomState(seed).shuffle(order)
  first, second = int(0.70918052988 * 1623), int(0.73998767713 * 1623)
  shuffled = [numbers[sorted(numbers)[k]] for k in order]
  splits = {'train': shuffled[:first], 'val': shuffled[first:second], 'test': shuffled[second:]}
  assert sizes(splits) == [1150, 50, 423]
  ours = {split: [numbers[c] for c in names] for split, names in omniglot._SPLITS['maml++'](0).items()}
  assert in_order(ours) == in_order(splits) == in_order(reference('omniglot_vinyals')['mamlpp_val_seed_0'])

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from metajax import compare, config, main, processes, report, workdir
from metajax import experiment as experiment_lib
from metajax.data import identity, table
from metajax.data.table import ClassTable
from metajax.errors import UserError
from tests.conftest import TINY

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 4, 4, 1), np.uint8)
FOLDER = ('--config.data.name=folder', '--config.data.size=8', '--config.data.way=2', '--config.data.query_shot=1')
QUICK = (
  '--config.model.name=mlp',
  '--config.total_steps=2',
  '--config.eval.episodes=4',
  '--config.eval.val_episodes=2',
)


def a_table(names, first=0, images=IMAGES, n=3):
  starts = n * (first + np.arange(len(names)))
  return ClassTable(images, starts, np.full(len(names), n), np.zeros(len(names), np.int8), tuple(names))


def names(splits):
  return {split: data.names for split, data in splits.items()}


def test_identity_is_of_bytes_shape_and_type():
  assert len({table.digest(x) for x in (IMAGES, IMAGES + 1, IMAGES[:, :, :2], IMAGES.astype(np.float32))}) == 4
  assert table.digest(IMAGES) == table.digest(IMAGES.copy(order='F')) == table.digest(list(IMAGES))
  [[name, images, digest], _] = identity.describe({'train': a_table('ab')})['train']
  assert (name, images, digest) == ('a', 3, table.digest(IMAGES[:3]))
  turned = a_table('ab')._replace(turns=np.int8([0, 1]))
  assert identity.describe({'train': turned})['train'][0] == [name, images, digest]
  assert identity.describe({'train': turned})['train'][1][2] == f'{table.digest(IMAGES[3:6])} turned 90'
  assert identity.describe({'train': object()}) == {} and identity.fingerprint(None) is None
  a, b, c = ([[name, 3, digest] for name in order] for order in ('ab', 'ba', 'ab'))
  assert identity.fingerprint(a) == identity.fingerprint(c) != identity.fingerprint(b)


def test_a_run_keeps_its_division_when_classes_come_later():
  kept = identity.describe({'train': a_table('abcd'), 'test': a_table('ef', 4)})
  now = {'train': a_table('abe'), 'val': a_table('d', 3), 'test': a_table('cfgh', 4)}
  moved = a_table('xxxxxxxx')  # as the classes of all splits lie: a, b, c, ...
  now = {
    'train': now['train']._replace(starts=moved.starts[[0, 1, 4]]),
    'val': now['val'],
    'test': now['test']._replace(starts=moved.starts[[2, 5, 6, 7]]),
  }
  splits, notes = identity.settle(now, kept, ('train', 'test'))
  assert identity.describe(splits) == kept and names(splits) == {'train': tuple('abcd'), 'test': tuple('ef')}
  assert notes == ['classes that this run began without are left out: g, h']


def test_a_split_that_the_run_did_not_have_is_taken_where_it_is_needed():
  now = {'train': a_table('ab'), 'val': a_table('c', 2), 'test': a_table('d', 3)}
  kept = identity.describe({'train': now['train']})
  assert names(identity.settle(now, kept, ('test',))[0]) == {'train': ('a', 'b'), 'test': ('d',)}
  assert identity.settle(now, {}, ('test',)) == (now, [])


@pytest.mark.parametrize(
  ('test', 'why'),
  [
    (a_table('ab', 4), 'class b has other images'),
    (a_table('ax', 4), 'class b is missing'),
    (a_table('ab', 4)._replace(counts=np.array([3, 2])), 'class b has 2 images, not 3'),
  ],
)
def test_what_has_changed_is_named(test, why):
  train = a_table('cd')
  kept = identity.describe({'train': train, 'test': a_table('ab', 4)})
  images = IMAGES.copy()
  images[16] += 1
  now = {'train': train._replace(images=images), 'test': test._replace(images=images)}
  with pytest.raises(UserError, match=f'the test split has changed since this run began: {why}; restore'):
    identity.settle(now, kept, ('train', 'test'))
  splits, notes = identity.settle(now, kept, ('train',))
  assert notes[0] == f'the test split has changed since this run began: {why}' and splits['test'] is now['test']


def test_classes_seen_in_training():
  kept = {
    'splits': {'train': [['a', 3, '1']], 'test': [['a', 3, '2'], ['b', 3, '1'], ['c', 3, '3'], ['d', 3, '4']]},
    'seen': [['c', 9, '5'], ['x', 3, '4']],
  }
  assert identity.seen_in_training(kept) == ['b', 'c', 'd'] and identity.seen_in_training(None) == []


def test_splits_whose_images_lie_apart_are_joined():
  train, test = a_table('ab'), a_table('c', 0, IMAGES[6:].copy())
  shared = table.share({'train': train, 'test': test, 'other': None})
  assert shared['train'].images is shared['test'].images and shared['other'] is None
  before, after = (identity.describe(splits) for splits in ({'train': train, 'test': test}, shared))
  assert before == after
  assert table.share({'train': train, 'test': a_table('c', 2)})['train'] is train
  with pytest.raises(UserError, match=r'uint8 \(4, 4, 1\) and uint8 \(5, 4, 1\)'):
    table.share({'train': train, 'test': a_table('c', 0, np.zeros((3, 5, 4, 1), np.uint8))})


@pytest.mark.parametrize(
  ('change', 'why'),
  [
    ({'images': IMAGES.astype(np.uint16)}, 'images are uint16; give uint8'),
    ({'starts': np.arange(3)}, 'starts has 3 entries, but there are 2 classes'),
    ({'superclasses': ('x',)}, 'superclasses has 1 entries'),
    ({'counts': np.array([3, 99])}, 'reach beyond its 24 images'),
    ({'turns': np.int8([0, 1]), 'images': np.zeros((24, 7), np.uint8)}, 'only square images'),
  ],
)
def test_tables_that_are_none(change, why):
  with pytest.raises(UserError, match=f'mine: .*{why}'):
    table.check(a_table('ab')._replace(**change), 'mine')


@pytest.fixture
def photos(tmp_path, tables):
  """A folder of twelve classes of three images."""
  for k in range(12):
    for n in range(3):
      place = tmp_path / 'photos' / f'c{k:02d}' / f'{n}.png'
      place.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.random.default_rng((k, n)).integers(0, 256, (8, 8, 3), np.uint8)).save(place)
  return tmp_path / 'photos'


def run(folder, *arguments):
  return main.main(['metajax', f'--config={TINY}', *FOLDER, *QUICK, f'--workdir={folder}', *arguments])


def test_a_number_belongs_to_its_images(photos, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report, 'figures', lambda: None)
  a, here = tmp_path / 'a', f'--config.data.path={photos}'
  assert run(a, here) == 0
  data, result = (json.loads((a / name).read_text()) for name in ('data.json', 'test.json'))
  test_classes = [name for name, _, _ in data['splits']['test']]
  assert (
    result['test_data'] == identity.fingerprint(data['splits']['test']) and 'classes_seen_in_training' not in result
  )
  capsys.readouterr()

  # A class that comes later would move others from split to split.
  shutil.copytree(photos / test_classes[0], photos / 'b00')
  for mode in ('eval', 'train_and_eval'):
    assert run(a, here, f'--mode={mode}') == 0
    assert 'left out: b00' in capsys.readouterr().out
    assert json.loads((a / 'test.json').read_text())['accuracy'] == result['accuracy']

  # A moved folder is the same data, also as a copy with other times.
  moved = f'--config.data.path={tmp_path / "moved"}'
  shutil.copytree(photos, tmp_path / 'moved', copy_function=shutil.copyfile)
  assert run(a, moved, '--mode=eval') == 0
  assert json.loads((a / 'test.json').read_text())['accuracy'] == result['accuracy']

  # A new run has the new division; it is not compared with the old one by mistake, and knows what it has seen.
  b = tmp_path / 'b'
  assert run(b, here, f'--config.init_from={a}') == 0
  seen = json.loads((b / 'test.json').read_text())['classes_seen_in_training']
  now = json.loads((b / 'data.json').read_text())
  trained = {name for name, _, _ in data['splits']['train']}
  assert set(seen) >= trained & {name for name, _, _ in now['splits']['test']} != set()
  assert f'{len(seen)} of 3 test classes, {", ".join(seen)}' in capsys.readouterr().out
  assert compare.main(['compare', str(a), str(b)]) == 2
  assert f'test classes or their images are not the same in {a}, {b}' in capsys.readouterr().err
  assert compare.main(['compare', str(a), str(b), '--mixed']) == 0
  assert 'unpaired' in capsys.readouterr().out

  # An image that was removed or replaced.
  (tmp_path / 'moved' / test_classes[0] / '0.png').unlink()
  assert run(a, moved, '--mode=eval') == 2
  assert f'class {test_classes[0]} has 2 images, not 3' in capsys.readouterr().err
  with pytest.raises(UserError, match=f'class {test_classes[0]} has 2 images'):
    kept, given = workdir.read_data(a)['splits'], workdir.read_config(a)
    experiment_lib.make(config.override(given, [moved]), '', kept=kept)


def test_a_folder_of_test_classes_alone_serves_evaluation(photos, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report, 'figures', lambda: None)
  a, split = tmp_path / 'a', tmp_path / 'split'
  shutil.copytree(photos, split / 'train')
  shutil.copytree(photos, split / 'test')
  for k in range(12):
    shutil.rmtree(split / ('test' if k < 8 else 'train') / f'c{k:02d}')
  assert run(a, f'--config.data.path={split}') == 0
  result = json.loads((a / 'test.json').read_text())
  shutil.rmtree(split / 'train')
  assert run(a, f'--config.data.path={split}', '--mode=eval') == 0
  assert json.loads((a / 'test.json').read_text())['accuracy'] == result['accuracy']
  assert 'the train split has changed' in capsys.readouterr().out


def test_processes_with_other_images_are_told(photos, monkeypatch):
  given = config.override(config.load(TINY), [*FOLDER, f'--config.data.path={photos}'])
  monkeypatch.setattr(processes, 'from_first', lambda function: {'train': []})
  with pytest.raises(UserError, match='other classes or images here than on process 0'):
    experiment_lib.make(given, '')


def test_damaged_data_json_is_one_line(photos, tmp_path, capsys):
  a = tmp_path / 'a'
  assert run(a, f'--config.data.path={photos}', '--mode=train') == 0
  for text in ('', '[]', '{"splits": 3}'):
    (a / 'data.json').write_text(text)
    assert run(a, f'--config.data.path={photos}') == 2
    assert 'data.json is damaged' in capsys.readouterr().err


def test_every_protocol_keeps_its_results(photos, tmp_path, capsys):
  a, here = tmp_path / 'a', f'--config.data.path={photos}'
  assert run(a, here) == 0
  first = json.loads((a / 'test.json').read_text())
  assert run(a, here, '--mode=eval', '--config.eval.shot=2', '--config.eval.head=prototype') == 0
  assert run(a, here, '--mode=eval', '--config.eval.shot=2', '--config.eval.head=prototype') == 0
  tests = sorted((a / 'tests').iterdir())
  assert [path.name.rsplit('_', 1)[0] for path in tests] == [
    '2-way_1-shot_4-episodes_step-2', '2-way_2-shot_4-episodes_prototype_step-2'
  ]  # fmt: skip
  results = [json.loads((path / 'test.json').read_text()) for path in tests]
  assert results[0] == first and results[1] == json.loads((a / 'test.json').read_text())
  assert (tests[0] / 'inner_steps.png').exists()
  # The figures of the workdir are those of its last test, which has no inner loop.
  assert {path.name for path in (a / 'figures').iterdir()} == {'learning_curves.png', 'episode.png'}
  shutil.copytree(a, tmp_path / 'b')
  capsys.readouterr()
  assert compare.main(['compare', str(a), str(tmp_path / 'b')]) == 0  # by the configs: one shot
  assert 'evaluating' not in capsys.readouterr().out

import ml_collections
import pytest

from metajax import config as config_lib
from metajax.errors import UserError
from tests.conftest import TINY


def test_config_string_is_read_by_the_types_of_its_defaults():
  arg = config_lib.parse_arg('way=20,debug,lr=0.5', way=5, shot=1, debug=False, lr=1.0)
  assert arg.to_dict() == {'way': 20, 'shot': 1, 'debug': True, 'lr': 0.5}
  assert config_lib.parse_arg(None, way=5).way == 5


@pytest.mark.parametrize(
  'arg, message', [('wya=20', "no key 'wya'; did you mean 'way'"), ('way', 'way=5'), ('way=x', 'way=5')]
)
def test_config_string_errors(arg, message):
  with pytest.raises(UserError, match=message):
    config_lib.parse_arg(arg, way=5)


def test_complete_fills_in_defaults_of_signatures_and_locks():
  config = config_lib.load(TINY)
  assert config.algorithm.first_order is False and config.algorithm.batch_norm == 'transductive'
  assert config.optimizer.name == 'adam' and config.weighting.name == 'uniform' and config.seed == 0
  assert config.data.placement == 'auto' and config.model.downsample == 'stride'
  with pytest.raises(AttributeError):
    config.no_such_setting = 1


def test_complete_is_idempotent_and_survives_json():
  config = config_lib.load(TINY)
  assert config_lib.differences(config, config_lib.complete(config)) == []
  again = config_lib.from_json(config_lib.to_json(config))
  assert config_lib.differences(config, again) == []
  assert again.data.classes == (12, 6, 6)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(stepz=1), "config.stepz: there is no such setting; did you mean 'total_steps'|config.stepz"),
    (dict(algorithm=dict(name='maml', inner_stepz=1)), "maml has no such setting; did you mean 'inner_steps'"),
    (dict(algorithm=dict(name='mamal')), "there is no 'mamal'; did you mean 'maml'"),
    (dict(model=dict(width=3)), 'config.model.name is missing'),
    (dict(data=dict(name='glyphs', way=5, query_shot=1, tasks=1)), 'config.data.shot is missing'),
    (dict(data=dict(name='metajax.data.episodes')), r'has no load\(\)'),
    (dict(model=3), 'group of settings'),
  ],
)
def test_complete_names_what_is_wrong(change, message):
  with pytest.raises(UserError, match=message):
    config_lib.complete({**config_lib.load(TINY).to_dict(), **change})


def test_override_converts_to_the_type_of_the_setting():
  config = config_lib.override(
    config_lib.load(TINY),
    [
      '--config.seed=3',
      '--config.algorithm.inner_lr=1',
      '--config.algorithm.first_order=True',
      '--config.eval.inner_steps=7',
      '--config.data.classes=(9, 8, 7)',
      '--config.optimizer.schedule=cosine',
      "--config.data.augment=('flip', 'crop')",
      "--config.eval.augment=('flip')",
    ],
  )
  assert (config.seed, config.algorithm.inner_lr, config.algorithm.first_order) == (3, 1.0, True)
  assert (config.eval.inner_steps, config.data.classes, config.optimizer.schedule) == (7, (9, 8, 7), 'cosine')
  assert (config.data.augment, config.eval.augment) == (('flip', 'crop'), ('flip',))
  assert isinstance(config.algorithm.inner_lr, float)


def test_override_of_a_name_takes_the_settings_that_the_new_one_knows():
  config = config_lib.override(
    config_lib.load(TINY), ['--config.algorithm.name=reptile', '--config.algorithm.inner_batch=4']
  )
  assert config.algorithm.name == 'reptile' and config.algorithm.inner_batch == 4
  assert config.algorithm.inner_lr == 0.1 and 'first_order' not in config.algorithm
  config = config_lib.override(config_lib.load(TINY), ['--config.model.name=mlp'])
  assert config.model.to_dict() == {'name': 'mlp', 'hidden': (40, 40)}


def test_override_of_a_name_takes_its_own_defaults():
  config = config_lib.override(config_lib.load(TINY), ['--config.algorithm.name=anil'])
  assert config.algorithm.inner_params == ('head',) and config.algorithm.inner_lr == 0.1


def test_values_of_a_file_have_the_type_of_their_default():
  settings = config_lib.load(TINY).to_dict()
  settings['algorithm'] = {'name': 'maml', 'inner_lr': 1}
  config = config_lib.override(config_lib.complete(settings), ['--config.algorithm.inner_lr=0.5', '--config.chunk=4'])
  assert config.algorithm.inner_lr == 0.5 and config.chunk == '4'
  settings['algorithm'] = {'name': 'maml', 'inner_steps': '1'}
  with pytest.raises(UserError, match=r"config.algorithm.inner_steps = '1': int is needed"):
    config_lib.complete(settings)


@pytest.mark.parametrize(
  'argument, message',
  [
    ('--config.algorithm.inner_stepz=2', "config.algorithm has no setting 'inner_stepz'; did you mean 'inner_steps'"),
    ('--config.algorithn.inner_steps=2', "did you mean 'algorithm'"),
    ('--config.seed=abc', 'seed'),
    ('--config.algorithm.name=nothing', "there is no 'nothing'"),
    ('--config.algorithm=maml', 'config.algorithm'),
    ('--config.model.name=../x', 'not the name of a module'),
    ('--config.seed', 'seed'),
  ],
)
def test_override_names_what_is_wrong(argument, message):
  with pytest.raises(UserError, match=message):
    config_lib.override(config_lib.load(TINY), [argument])


def test_own_algorithm_by_its_module_name(tmp_path, monkeypatch):
  (tmp_path / 'my_algorithm.py').write_text('def make(model, *, temperature=2.0):\n  return temperature\n')
  (tmp_path / 'my.py').write_text('')
  monkeypatch.syspath_prepend(tmp_path)
  package = tmp_path / 'own'
  package.mkdir()
  (package / '__init__.py').write_text('')
  (package / 'learner.py').write_text('def make(model, *, temperature=2.0):\n  return temperature\n')
  config = config_lib.complete({**config_lib.load(TINY).to_dict(), 'algorithm': {'name': 'own.learner'}})
  assert config.algorithm.temperature == 2.0
  assert config_lib.build(config, 'algorithm', None) == 2.0


def test_differences_are_dotted_names():
  config = config_lib.load(TINY)
  other = config_lib.override(config, ['--config.seed=1', '--config.model.width=5'])
  assert config_lib.differences(config, other) == ['model.width', 'seed']


def test_load_errors(tmp_path):
  for name, text, message in [
    ('none.py', None, 'there is no file'),
    ('empty.py', '', 'no function get_config'),
    ('plain.py', 'def get_config():\n  return {}\n', 'total_steps'),
    ('config.txt', '', 'not a Python file'),
    ('syntax.py', 'def get_config(:', 'cannot be read: invalid syntax'),
    ('missing.py', 'import no_such_module', "No module named 'no_such_module'"),
    ('list.py', 'def get_config():\n  return [1]\n', 'a ConfigDict is needed'),
  ]:
    if text is not None:
      (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
      config_lib.load(str(tmp_path / name))
  with pytest.raises(UserError, match='takes no config string'):
    config_lib.load(f'{tmp_path / "plain.py"}:way=5')
  assert isinstance(config_lib.load(TINY), ml_collections.ConfigDict)


def test_another_algorithm_takes_the_old_one_s_inner_loop_out_of_evaluation():
  config = config_lib.load(TINY)
  assert config.eval.inner_steps == 2
  assert config_lib.override(config, ['--config.algorithm.name=protonet']).eval.inner_steps is None
  assert config_lib.override(config, ['--config.algorithm.name=anil']).eval.inner_steps == 2


@pytest.mark.parametrize(
  ('settings', 'c'),
  [
    (['--config.eval.head=logistic_regression'], 3),
    (['--config.eval.head=ridge'], 1),
    (['--config.eval.head=ridge', '--config.eval.head_c=2'], 2),
    (['--config.algorithm.head=ridge', '--config.eval.head=ridge'], 3),
  ],
)
def test_a_head_has_the_c_of_the_algorithm_s_own_one(settings, c):
  own = ['--config.algorithm.name=classifier', '--config.algorithm.head_c=3']
  config = config_lib.override(config_lib.load(TINY), [*own, *settings])
  assert config_lib.head_c(config) == c

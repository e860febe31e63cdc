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


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A function that makes a module of the user's own, under a name that no other test has imported, and returns it."""
  package = tmp_path / f'own{tmp_path.name.replace("-", "_")}'
  package.mkdir()
  (package / '__init__.py').touch()
  monkeypatch.syspath_prepend(tmp_path)

  def write(signature, returned='locals()'):
    (package / 'part.py').write_text(f'import numpy as np\ndef {signature}:\n  return {returned}\n')
    return f'{package.name}.part'

  return write


def test_own_algorithm_by_its_module_name(own):
  name = own('make(model, *, temperature=2.0)')
  config = config_lib.complete({**config_lib.load(TINY).to_dict(), 'algorithm': {'name': name}})
  assert config.algorithm.temperature == 2.0
  assert config_lib.build(config, 'algorithm', 'net') == {'model': 'net', 'temperature': 2.0}


OWN = {'widths': (8, (4, 2)), 'inner_steps': 1, 'rate': None, 'flag': False}


@pytest.mark.parametrize(
  'arguments',
  [
    'model, way, objective, widths=[8, [4, 2]], inner_steps=1, rate=None, flag=False',
    'model, *, way, objective, widths=(8, (4, 2)), inner_steps=1, rate=None, flag=False',
    'model=None, way=5, objective=len, widths=[8, (4, 2)], *, inner_steps=1, rate=None, flag=False',
  ],
)
def test_arguments_are_settings_wherever_they_stand(own, arguments):
  """But for those that training supplies; lists are tuples, and None is empty until it is given."""
  name = own(f'make({arguments})')
  supplied = {'way': 3, 'objective': 'loss', 'num_classes': 12}
  config = config_lib.override(config_lib.load(TINY), [f'--config.algorithm.name={name}'])
  assert config.algorithm.to_dict() == {'name': name, **OWN}
  assert config_lib.build(config, 'algorithm', 'net', **supplied) == {
    **{'model': 'net', 'way': 3, 'objective': 'loss'},
    **OWN,
  }
  given = [f'--config.algorithm.{each}' for each in ('inner_steps=4', 'rate=0.5', 'widths=(1, (2, 3))')]
  config = config_lib.from_json(config_lib.to_json(config_lib.override(config, given)))
  made = config_lib.build(config, 'algorithm', 'net', **supplied)
  assert (made['inner_steps'], made['rate'], made['widths']) == (4, 0.5, (1, (2, 3)))


@pytest.mark.parametrize(
  ('text', 'value'),
  [('3', 3), ('0.5', 0.5), ('True', True), ('tanh', 'tanh'), ('(1, 2)', (1, 2)), ('/a/b', '/a/b'), ('None', None)],
)
def test_a_setting_of_any_type(own, text, value):
  config = config_lib.override(config_lib.load(TINY), [f'--config.model.name={own("make(num_outputs, given=None)")}'])
  for before in (None, 1, 'x'):  # a value of another type may take its place
    config = config_lib.override(config, [f'--config.model.given={before}'])
    config = config_lib.override(config_lib.from_json(config_lib.to_json(config)), [f'--config.model.given={text}'])
    assert config.model.given == value and type(config.model.given) is type(value)
  assert config_lib.build(config, 'model', 5) == {'num_outputs': 5, 'given': value}
  with pytest.raises(UserError, match=r'config.model.given = \{.*a bool, int, float, str, None or a tuple'):
    config_lib.override(config, ['--config.model.given={"a": 1}'])


@pytest.mark.parametrize(
  ('group', 'signature', 'message'),
  [
    (
      'algorithm',
      'make(model, sizes={"a": 1})',
      r'\.make\(\): a config cannot hold the default of sizes: make it a bool',
    ),
    ('algorithm', 'make(model, *, loss=len)', 'the default of loss: make it .* or leave it out'),
    ('model', 'make(num_outputs, *, scale=np.ones(3))', 'the default of scale'),
    ('model', 'make(num_outputs, *, scale=np.float32(3))', 'the default of scale'),
    ('weighting', 'make(rules=(len, max))', 'the default of rules'),
    ('data', 'load(data_dir, **settings)', r'\.load\(\) takes \*\*settings, .*: name each'),
    ('model', 'make(num_outputs, width=3, /)', 'width cannot be given by keyword: remove the /'),
    ('model', 'make(num_outputs, name="net")', 'config.model.name has another meaning: call the argument'),
    ('algorithm', 'make(model, temperature)', 'config.algorithm.temperature is missing'),
  ],
)
def test_what_can_be_no_setting_is_refused(own, group, signature, message):
  with pytest.raises(UserError, match=message) as error:
    config_lib.override(config_lib.load(TINY), [f'--config.{group}.name={own(signature)}'])
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('group', 'signature', 'settings'),
  [
    ('data', 'load(data_dir, num_classes=10)', {'num_classes': 10}),
    ('model', 'make(num_outputs=None, objective="sine")', {'objective': 'sine'}),
    ('algorithm', 'make(model, way=5, num_classes=2, tasks=4)', {'tasks': 4}),
    ('weighting', 'make(scale=2.0, tasks=4, way=5)', {'scale': 2.0, 'way': 5}),
  ],
)
def test_only_what_training_supplies_to_a_part_is_no_setting(own, group, signature, settings):
  assert config_lib.keywords(config_lib.find(group, own(signature)), group) == settings


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


@pytest.mark.parametrize(
  ('arguments', 'line'),
  [
    (['seed=1', 'algorithm.name=maml'], None),
    (
      ['algorithm.name=anil'],
      "config: kept algorithm.inner_lr=0.1, algorithm.inner_steps=1; new by default algorithm.inner_params=('head',)",
    ),
    (
      ['algorithm.name=protonet', 'algorithm.batch_norm=support'],
      'config: dropped algorithm.inner_lr=0.1, algorithm.inner_steps=1, eval.inner_steps=2',
    ),
    (
      ['model.name=mlp', 'algorithm.name=reptile', 'algorithm.inner_lr=0.5'],
      "config: kept algorithm.inner_steps=1; dropped model.downsample='stride', model.width=4",
    ),
  ],
)
def test_override_says_what_became_of_the_settings_of_a_name_that_goes(arguments, line):
  lines = []
  config = config_lib.load(TINY)
  changed = config_lib.override(config, [f'--config.{each}' for each in arguments], note=lines.append)
  assert lines == ([line] if line else [])
  assert config_lib.differences(changed, config_lib.override(config, [f'--config.{each}' for each in arguments])) == []

"""Configs: reading a file, filling in defaults, building what the settings name, comparing two of them."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import operator
import os
import pkgutil
import re
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_dict import FieldReference, placeholder

from metajax import optimizers
from metajax.errors import UserError, first_line

REQUIRED = inspect.Parameter.empty

# Defaults of the settings that no module's signature holds. One of a type is empty until it is given, and of any type
# if that is `object`; an empty setting of `eval` is as in training.
TOP_LEVEL = dict(
  seed=0,  # of initial weights and training episodes
  total_steps=REQUIRED,  # meta-updates; with 0 what a run begins with is evaluated
  log_every=100,
  eval_every=1000,
  checkpoint_every=1000,
  chunk='auto',  # tasks that one `vmap` takes at once; the rest by a scan
  stop_patience=0,  # regular validations without a better score than before, after which training ends; 0: never
  profile='',  # meta-updates to trace, such as '10:20'
  init_from='',  # workdir of a trained run, whose best weights are the initial ones
)
_DATA = dict(
  way=int,  # none in regression
  shot=REQUIRED,
  query_shot=REQUIRED,
  tasks=REQUIRED,  # in a meta-batch
  group=1,  # episodes that make up one task of the meta-batch
  batch=0,  # images of all training classes that make up one task, in place of an episode; 0 for episodes
  hard_updates=0,  # meta-updates on hard tasks, after each `random_updates` on random ones: see `data.hard_tasks`
  random_updates=10,
  placement='auto',  # of the image table: 'device', 'host', or by its size
  augment=(),  # what is done to the images of the train split, in this order: see `metajax.data.augment`
  normalize='none',  # a name in `augment.NORMALIZE`, for every split
)
_EVAL = dict(
  episodes=600,  # of the test split
  val_episodes=300,
  seed=0,  # of the validation and test episodes: leave it, so that all runs face the same ones
  inner_steps=int,
  inner_lr=float,
  way=int,
  shot=int,
  query_shot=int,
  augment=(),  # of validation and test: none unless asked for, whatever training has
  head='',  # fitted to the features of the support images in place of the learner's own way, see `metajax.heads`
  head_c=float,  # its c, if it has one: by default the algorithm's where it has that head, else 1
  head_normalize=True,  # whether it sees features of length 1
  last=False,  # the last checkpoint as well as the best by validation: numbers of its own
  ensemble=0,  # of so many of the best checkpoints by validation, the mean of their outputs: a number of its own
)
OF_INNER_LOOP = ('inner_steps', 'inner_lr')  # settings of `eval` that only some algorithms have
_PACKAGES = {  # where a group's `name` is looked for, and what builds it there
  'data': ('metajax.datasets', 'load'),
  'model': ('metajax.models', 'make'),
  'algorithm': ('metajax.algorithms', 'make'),
  'weighting': ('metajax.weighting', 'make'),
}
# Arguments that are no settings: how many training supplies by position, and which ones to whatever names them.
_SUPPLIED = {
  'data': (1, ()),
  'model': (1, ()),
  'algorithm': (1, ('objective', 'way', 'num_classes')),
  'weighting': (0, ('tasks', 'tx', 'num_classes', 'superclass_ids')),
  'optimizer': (1, ()),
}
_GROUPS = (*_PACKAGES, 'optimizer', 'eval')


def parse_arg(arg, **defaults):
  """Reads a config string such as 'way=20,shot=1,debug'.

  Args:
    arg: what stood after the colon, or None.
    **defaults: the known keys and their defaults. A value is read as its default's type; a bool's '=True' may be
      left out.

  Returns:
    a ConfigDict of the keys of `defaults`.

  Raises:
    UserError: an unknown key or an unreadable value.
  """
  result = ml_collections.ConfigDict(defaults)
  for item in filter(None, (arg or '').split(',')):
    key, _, text = item.partition('=')
    if key not in defaults:
      raise UserError(f'--config: the config string has no key {key!r}{_known(key, defaults)}')
    kind = type(defaults[key])
    try:
      result[key] = _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
      raise UserError(f'--config: {key} takes a value such as {key}={defaults[key]}, not {item!r}') from None
  return result


_BOOLS = {'': True, 'true': True, '1': True, 'false': False, '0': False}


def load(spec):
  """Runs `get_config` of NAME, FILE, NAME:ARGS or FILE:ARGS and fills in the defaults."""
  path, arg = split_spec(spec)
  path = find_file(path)
  module_spec = importlib.util.spec_from_file_location('metajax_config', path)
  if module_spec is None:
    raise UserError(f'--config: {path} is not a Python file')
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except (SyntaxError, ImportError) as error:
    raise UserError(f'--config: {path} cannot be read: {first_line(error)}') from error
  if not hasattr(module, 'get_config'):
    raise UserError(f'--config: {path} has no function get_config')
  if not inspect.signature(module.get_config).parameters:
    if arg:
      raise UserError(f'--config: {path} takes no config string, but {arg!r} was given')
    return complete(module.get_config())
  return complete(module.get_config(arg or None))


def split_spec(spec):
  """Splits NAME[:ARGS] or FILE[:ARGS] into the name or file, and the config string, '' without one."""
  drive, rest = spec[:2], spec[2:]
  if not re.fullmatch(r'[A-Za-z]:', drive) or rest[:1] not in ('/', '\\'):  # not as in C:\configs\mine.py
    drive, rest = '', spec
  path, _, arg = rest.partition(':')
  return drive + path, arg


def find_file(name):
  """The file of a config: the shipped one of that name, else `name` itself if it is a file.

  Raises:
    UserError: it is neither.
  """
  if name in (known := shipped()):
    return str(known[name])
  if Path(name).is_file():
    return name
  if (stem := Path(name).stem) in known:
    raise UserError(f'--config: there is no file {name}; the shipped config is --config={stem}')
  raise UserError(f'--config: there is no file {name}, and no shipped config of that name{_known(name, known)}')


def shipped():
  """The configs that come with metajax: {name: path}, by name."""
  package = Path(__file__).parent
  folders = package / 'configs', package.parent / 'configs'  # installed, and in a checkout
  folder = next((folder for folder in folders if folder.is_dir()), folders[0])
  return {path.stem: path for path in sorted(folder.glob('[!_.]*.py'))}


def complete(config):
  """The config (a ConfigDict or nested dicts) with every default filled in, and locked: all that a run depends on.

  Raises:
    UserError: a setting that is missing, or that nothing knows.
  """
  if not isinstance(config, (dict, ml_collections.ConfigDict)):
    raise UserError(f'config: a ConfigDict is needed, not {config!r}')
  config = _plain(config)
  config.setdefault('weighting', {'name': 'uniform'})
  _fill('config', config, TOP_LEVEL, groups=_GROUPS)
  config['init_from'] = os.path.expanduser(config['init_from'])
  for group in _GROUPS:
    settings = config.setdefault(group, {})
    if not isinstance(settings, dict):
      raise UserError(f'config.{group} is a group of settings, not {settings!r}')
    if group in _PACKAGES and not settings.get('name'):
      raise UserError(f'config.{group}.name is missing: it is one of {", ".join(names(group))}')
    _fill(f'config.{group}', settings, _defaults(group, settings.get('name')), name=settings.get('name'))
  return ml_collections.ConfigDict(config, type_safe=True).lock()


def override(config, arguments, note=None):
  """Applies command-line arguments `--config.KEY=VALUE` to a complete config.

  A group's `name` comes first. Settings that differ from the old one's defaults stay if the new one has them; the
  others take the new one's defaults.

  Args:
    config: complete.
    arguments: of the command line.
    note: if names change, called with one line that says what became of the old ones' settings.

  Returns:
    the config, complete.

  Raises:
    UserError: a setting that nothing knows, or a value that it cannot take.
  """
  config = _plain(config)
  before, given = _flat(config), []  # settings, and which of them differ from the defaults of a name that goes
  for argument in arguments:
    if match := re.fullmatch(r'--?config\.(\w+)\.name=(.+)', argument):
      group, name = match.groups()
      if group in _PACKAGES and name != config[group]['name']:
        old, known = _defaults(group, config[group]['name']), _defaults(group, name)
        differing = {k: v for k, v in config[group].items() if k in old and v is not None and v != old[k]}
        given += [f'{group}.{k}' for k in differing]
        config[group] = {'name': name, **{k: v for k, v in differing.items() if k in known}}
        if group == 'algorithm':  # what evaluation had for the old one goes with it
          given += [f'eval.{k}' for k in OF_INNER_LOOP if k not in known and config['eval'][k] is not None]
          config['eval'].update({key: None for key in OF_INNER_LOOP if key not in known})
  config = complete(config)
  for argument in arguments:
    _check_key(config, key_of(argument))
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=['', *arguments])
    values(['', *arguments])
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(f'command line: {first_line(error)}') from error
  config, chosen = complete(values.config), {key_of(argument) for argument in arguments}
  if note and (line := _changes({k: v for k, v in before.items() if k not in chosen}, _flat(_plain(config)), given)):
    note(line)
  return config


def _changes(before, after, given):
  """A line on what became of the settings `before` when names changed; '' if all of them stay by default."""
  given = [key for key in before if key in given]
  kept = [key for key in given if after.get(key) == before[key]]
  changed = [key for key in before.keys() & after.keys() - given if before[key] not in (None, after[key])]
  parts = {
    'kept': (kept, before),
    'dropped': ([key for key in given if key not in kept], before),
    'new by default': (sorted(changed), after),
  }
  shown = [f'{what} {", ".join(f"{key}={of[key]!r}" for key in keys)}' for what, (keys, of) in parts.items() if keys]
  return f'config: {"; ".join(shown)}' if shown else ''


def overrides(argv):
  """The arguments of a command line that `override` takes: --config.KEY=VALUE, and --noconfig.KEY."""
  return [argument for argument in argv if _OVERRIDE.match(argument)]


def key_of(argument):
  """The dotted KEY of such an argument."""
  return _OVERRIDE.sub('', argument.partition('=')[0])


_OVERRIDE = re.compile(r'^--?(no)?config\.')


def call(function, config, group, *supplied, **more):
  """Calls `function` with those settings of a group that are keyword arguments of it."""
  known = keywords(function, group)
  settings = {k: v for k, v in _plain(config[group]).items() if k in known and k not in more}
  try:
    return function(*supplied, **settings, **more)
  except UserError as error:
    raise error if group == 'data' else UserError(f'config.{group}: {error}') from error


def build(config, group, *supplied, **more):
  """Calls the `make` (or a data set's `load`) that `config.GROUP.name` names, with what it names of `_SUPPLIED`."""
  function = find(group, config[group].name)
  asked = inspect.signature(function).parameters
  more = {name: value for name, value in more.items() if name not in _SUPPLIED[group][1] or name in asked}
  return call(function, config, group, *supplied, **more)


def get(config, name):
  """The setting of a dotted name."""
  return functools.reduce(operator.getitem, name.split('.'), config)


def head_c(config):
  """The c of the head that `config.eval` names: by default the algorithm's, where it has that head, else 1."""
  if config.eval.head_c is not None:
    return config.eval.head_c
  return config.algorithm.get('head_c', 1.0) if config.eval.head == config.algorithm.get('head') else 1.0


def differences(a, b):
  """The dotted names of the settings in which two complete configs differ."""
  a, b = _flat(_plain(a)), _flat(_plain(b))
  return sorted(key for key in a.keys() | b.keys() if a.get(key, REQUIRED) != b.get(key, REQUIRED))


def to_json(config):
  """The config as text; `from_json` reads it back."""
  return json.dumps(_plain(config), indent=2) + '\n'


def from_json(text):
  return complete(json.loads(text))


def _plain(config):
  """As nested dicts; sequences as tuples, as they come back from a file."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return {k: _plain(v) if isinstance(v, dict) else _tuples(v) for k, v in config.items()}


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _flat(settings, prefix=''):
  flat = {}
  for key, value in settings.items():
    flat.update(_flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value})
  return flat


def _fill(where, settings, defaults, *, groups=(), name=None):
  for key in settings:
    if key not in defaults and key not in groups and key != 'name':
      of = f'{name} has' if name else 'there is'
      raise UserError(f'{where}.{key}: {of} no such setting{_known(key, [*defaults, *groups])}')
  for key, value in defaults.items():
    if value is REQUIRED and settings.get(key) is None:
      raise UserError(f'{where}.{key} is missing')
    if settings.get(key) is None:  # an empty setting read from a file loses its type: give it back
      settings[key] = placeholder(value) if isinstance(value, type) else value
    elif value is not REQUIRED:
      settings[key] = _convert(f'{where}.{key}', settings[key], value if isinstance(value, type) else type(value))


def _convert(where, value, kind):
  """A setting as the type of its default; an int may stand for a float, or for a number in a text ('auto' or 4)."""
  if kind is object:
    if not _is_simple(value):
      raise UserError(f'{where} = {value!r}: {_SIMPLE} is needed')
    return FieldReference(value, object)  # a value of another type may take its place
  if type(value) is int and kind in (float, str):
    return kind(value)
  if type(value) is not kind:
    raise UserError(f'{where} = {value!r}: {kind.__name__} is needed')
  return value


def _defaults(group, name):
  if group == 'eval':
    return dict(_EVAL)
  if group == 'optimizer':
    return keywords(optimizers.make, group)
  settings = keywords(find(group, name), group)
  return {**settings, **_DATA} if group == 'data' else settings


def keywords(function, group):
  """The settings of a function that builds a part: its arguments but for those that training supplies.

  Args:
    function: a `make`, or a data set's `load`.
    group: the part, such as 'algorithm'.

  Returns:
    {name: default}; lists are tuples, and for None stands `object`: empty until it is given, of any type.

  Raises:
    UserError: an argument that can be no setting.
  """
  by_position, by_name = _SUPPLIED[group]
  made_by = getattr(function, 'func', function)  # of a partial
  where = f'{made_by.__module__}.{getattr(made_by, "__qualname__", type(made_by).__name__)}()'
  settings = {}
  for argument in list(inspect.signature(function).parameters.values())[by_position:]:
    name, default = argument.name, _tuples(argument.default)
    if argument.kind is argument.VAR_KEYWORD:
      raise UserError(f'{where} takes **{name}, whose settings are unknown: name each as an argument')
    if argument.kind is argument.POSITIONAL_ONLY:
      raise UserError(f'{where}: {name} cannot be given by keyword: remove the / after it')
    if argument.kind is argument.VAR_POSITIONAL or name in by_name:
      continue
    if name == 'name' and group != 'optimizer':
      raise UserError(f'{where}: config.{group}.name has another meaning: call the argument something else')
    if default is not REQUIRED and not _is_simple(default):
      raise UserError(f'{where}: a config cannot hold the default of {name}: make it {_SIMPLE}, or leave it out')
    settings[name] = object if default is None else default
  return settings


_SIMPLE = 'a bool, int, float, str, None or a tuple of these'


def _is_simple(value):
  """Whether a config can hold it, and its file."""
  return all(map(_is_simple, value)) if type(value) is tuple else type(value) in (bool, int, float, str, type(None))


def find(group, name):
  """What builds the module of that name; after a colon stands its first argument, as in 'tfds:omniglot'."""
  package, entry = _PACKAGES[group]
  name, colon, argument = name.partition(':')
  if not re.fullmatch(r'\w+(\.\w+)*', name):
    raise UserError(f'config.{group}.name: {name!r} is not the name of a module')
  path = name if '.' in name else f'{package}.{name}'
  try:
    module = importlib.import_module(path)
  except ModuleNotFoundError as error:
    if error.name != path:
      raise
    raise UserError(f'config.{group}.name: there is no {name!r}{_known(name, names(group))}') from None
  if not _is_entry(group, module):
    raise UserError(f'config.{group}.name: {path} has no {entry}()')
  function = getattr(module, entry)
  first = next(iter(inspect.signature(function).parameters), None)
  if bool(colon) != (group == 'data' and first != 'data_dir'):
    form = f'{name} takes no argument' if colon else f'what follows {name} is missing, as in {name}:{first.upper()}'
    raise UserError(f'config.{group}.name: {form}')
  return functools.partial(function, argument) if colon else function


def _is_entry(group, module):
  function = getattr(module, _PACKAGES[group][1], None)
  return function is not None and (group != 'data' or 'data_dir' in inspect.signature(function).parameters)


def names(group):
  """Names that a group's `name` may have, besides dotted ones."""
  package = importlib.import_module(_PACKAGES[group][0])
  modules = [name for _, name, _ in pkgutil.iter_modules(package.__path__)]
  return [name for name in modules if _is_entry(group, importlib.import_module(f'{package.__name__}.{name}'))]


def _check_key(config, path):
  where = 'config'
  for key in path.split('.'):
    if not isinstance(config, ml_collections.ConfigDict) or key not in config:
      known = list(config) if isinstance(config, ml_collections.ConfigDict) else []
      raise UserError(f'command line: {where} has no setting {key!r}{_known(key, known)}')
    config, where = config[key], f'{where}.{key}'


def _known(key, known):
  close = difflib.get_close_matches(key, known, n=1)
  return f'; did you mean {close[0]!r}?' if close else f'; known: {", ".join(sorted(known))}' if known else ''

"""The folder of one run: one process at a time, one config and one data set for good."""

import contextlib
import json
import os
import platform
from pathlib import Path

from metajax import config as config_lib
from metajax import system
from metajax.errors import UserError, first_line
from metajax.files import write_atomically

# What may differ when a run goes on: it changes no result, or (chunk) only the order of a sum.
_FREE = ('log_every', 'chunk', 'profile', 'data.placement')
# What evaluation may choose anew, besides the settings of `eval`.
_OF_EPISODES = ('way', 'shot', 'query_shot')


@contextlib.contextmanager
def locked(workdir, name='.lock'):
  """Creates the folder and holds its lock; the operating system lets go of it however the process ends.

  Args:
    workdir: the folder.
    name: of the file that is the lock: a run has one, and a sweep that starts the run another.

  Raises:
    UserError: another process holds it, or the folder cannot be written.
  """
  path = Path(workdir) / name
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('a+')
  except OSError as error:
    raise UserError(f'--workdir: cannot write to {workdir} ({error.strerror}): choose another') from None
  with file:
    try:
      held = system.try_lock(file)
    except OSError as error:
      raise UserError(f'--workdir: {workdir} cannot be locked ({error.strerror}): choose a local folder') from None
    if not held:
      file.seek(0)
      holder = file.read().strip() or 'another process'
      raise UserError(f'--workdir: {workdir} is in use by {holder}: wait for it, or choose another workdir')
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}')
    file.flush()
    yield


def settle_config(workdir, config, mode):
  """Compares a config with the one that the workdir was made with.

  Args:
    workdir: may be new.
    config: complete.
    mode: 'train', 'eval' or 'train_and_eval'.

  Returns:
    the config to go on with. In evaluation way, shot and query_shot that differ from training become settings of
    `eval`.

  Raises:
    UserError: a setting differs that would change the result, or there is nothing to evaluate.
  """
  if mode != 'eval' and not (Path(workdir) / 'config.json').exists():
    if any((Path(workdir) / 'checkpoints').glob('[0-9]*')):
      raise UserError(f'--workdir: {workdir} has checkpoints but no config.json to tell whose: choose another workdir')
    return config
  kept = read_config(workdir)
  differing = set(config_lib.differences(kept, config)).difference(_FREE)
  if (Path(workdir) / 'data.json').exists():  # which tells whether they are the same images at another place
    differing.discard('data.path')
  if mode == 'eval':
    differing = {key for key in differing if not key.startswith('eval.')}.difference(f'data.{k}' for k in _OF_EPISODES)
  elif kept.optimizer.schedule in ('constant', 'plateau', 'steps'):
    differing.discard('total_steps')
  if differing:
    way_on = ''
    if differing == {'total_steps'}:  # a schedule that ends there cannot be made longer
      way_on = f', with --config.init_from={workdir} to begin with its best weights'
    raise UserError(
      f'--workdir: {workdir} was made with another config: {", ".join(sorted(differing))} '
      f'{"differs" if len(differing) == 1 else "differ"} from its config.json: choose another workdir{way_on}'
    )
  if mode != 'eval':
    return config
  settings = config.to_dict()
  for key in _OF_EPISODES:
    if config.data[key] != kept.data[key]:
      if settings['eval'][key] is not None:
        raise UserError(f'config.data.{key} differs from training, but config.eval.{key} decides: change that one')
      settings['eval'][key] = config.data[key]
    settings['data'][key] = kept.data[key]
  return config_lib.complete(settings)


def read_config(workdir):
  """The config that a workdir was made with.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  path = Path(workdir) / 'config.json'
  try:
    return config_lib.from_json(path.read_text())
  except FileNotFoundError:
    raise UserError(f'--workdir: {workdir} holds no run (no config.json): train first, or name another') from None
  except ValueError as error:
    raise UserError(f'{path} is damaged ({first_line(error)}): restore it, or choose another --workdir') from None


def keep_config(workdir, config):
  """Writes `config.json`: from now on the workdir belongs to this config."""
  write_atomically(Path(workdir) / 'config.json', config_lib.to_json(config))


def read_data(workdir):
  """What `keep_data` has written; None if there is nothing.

  Raises:
    UserError: it cannot be read.
  """
  path = Path(workdir) / 'data.json'
  try:
    kept = json.loads(path.read_text())
    return {'splits': dict(kept['splits']), 'seen': list(kept['seen'])}
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged ({first_line(error)}): restore or remove it') from None


def keep_data(workdir, splits, init_from=''):
  """Writes `data.json`, which data the run belongs to, unless it is there.

  Args:
    workdir: of the run.
    splits: their identity, see `data.identity.describe`.
    init_from: workdir of the run whose weights this one begins with, if any: 'seen' are the classes that it, and the
      runs before it, were trained on.
  """
  path, before = Path(workdir) / 'data.json', read_data(init_from) if init_from else None
  if not path.exists():
    seen = [*before['splits'].get('train', []), *before['seen']] if before else []
    write_atomically(path, json.dumps({'splits': splits, 'seen': seen}) + '\n')


def forget_test(workdir):
  """Removes the test results of a shorter run, so that there are some when this one is done and not before."""
  for name in ('test.json', 'test_episodes.json'):
    (Path(workdir) / name).unlink(missing_ok=True)

"""Prepares data sets ahead of training, and shows what is available.

metajax data NAME [--data_dir=DIR] [--SETTING=VALUE ...] [--skip_bad]   find or download it, and convert it
metajax data NAME [--data_dir=DIR] [--SETTING=VALUE ...] --check        look for what is wrong with it
metajax data --list [--data_dir=DIR]                                    what is there, and what to put where

  NAME         as in --config.data.name: omniglot, mini_imagenet, folder, tfds:cifar100, ...
  --data_dir   where its files lie or go; $METAJAX_DATA, else ~/metajax_data
  --SETTING    of the data set, as in --config.data.SETTING: --size=84, --split=lake, --path=FOLDER, ...
  --skip_bad   leave out images that do not decode, and list them, instead of stopping at the first

example: metajax data folder --path=photos --size=84
"""

import ast
import contextlib
import functools
import glob
import inspect
import json
import sys
import urllib.parse
from pathlib import Path

from metajax import cli, system
from metajax import config as config_lib
from metajax.data import check, source, table
from metajax.errors import UserError, optional


@cli.command
def main(argv):
  """Runs a command line; returns the exit status: 1 if --check found something, 2 for what a user can mend."""
  cli.log_plainly()
  name, flags, settings = _parse(argv[1:])
  data_dir = cli.data_folder(settings.pop('data_dir', None))
  if 'help' in flags or not (name or 'list' in flags):
    print(__doc__.rstrip())
  elif 'list' in flags:
    for each in [name] if name else config_lib.names('data'):
      _list(each, data_dir)
  elif 'check' in flags:
    return _check(name, data_dir, settings)
  else:
    with source.skipping_bad() if 'skip_bad' in flags else contextlib.nullcontext():
      _prepare(name, data_dir, settings)
  return 0


def _parse(arguments):
  """Divides a command line into NAME, flags without a value, and settings as text."""
  name, flags, settings = '', set(), {}
  for argument in arguments:
    key, equals, value = argument.lstrip('-').partition('=')
    if not argument.startswith('-') and not name:
      name = argument
    elif argument.startswith('-') and equals:
      settings[key] = value
    elif argument in ('-h', '--help', '--list', '--check', '--skip_bad'):
      flags.add('help' if key == 'h' else key)
    else:
      raise UserError(f'command line: do not know what to do with {argument!r}; settings are --SETTING=VALUE')
  return name, flags, settings


def _load(name, data_dir, settings):
  """The data set's tables by split."""
  return config_lib.find('data', name)(data_dir, **_settings(name, settings))


_UNREADABLE = (TypeError, ValueError, SyntaxError, MemoryError, RecursionError)


def _settings(name, settings):
  """Settings read as the types of their defaults."""
  defaults, result = config_lib.keywords(config_lib.find('data', name), 'data'), {}
  if missing := [key for key, default in defaults.items() if default is config_lib.REQUIRED and key not in settings]:
    raise UserError(f'command line: --{missing[0]}=VALUE is missing')
  for key, text in settings.items():
    if key not in defaults:
      raise UserError(f'command line: {name} has no setting {key!r}; known: {", ".join(["data_dir", *defaults])}')
    kind = type(defaults[key])
    if kind is type:  # of any type
      result[key] = text
      with contextlib.suppress(*_UNREADABLE):
        result[key] = ast.literal_eval(text)
      continue
    try:
      value = text if kind is str else ast.literal_eval(text.capitalize() if kind is bool else text)
      result[key] = float(value) if kind is float and type(value) is int else value
      if type(result[key]) is not kind:
        raise ValueError
    except _UNREADABLE:
      raise UserError(f'command line: --{key} takes a value such as {defaults[key]!r}, not {text!r}') from None
  return result


def _dataset(name, data_dir, settings):
  """The data set's source.Dataset; None if it is embedded."""
  load = config_lib.find('data', name)
  load, first = (load.func, load.args) if isinstance(load, functools.partial) else (load, ())
  describe = getattr(sys.modules[load.__module__], 'dataset', None)
  if describe is None:
    return None
  known = inspect.signature(describe).parameters
  settings = {'data_dir': data_dir, **_settings(name, settings)}
  return describe(*first, **{key: value for key, value in settings.items() if key in known})


def _prepare(name, data_dir, settings):
  """Makes the table, and prints what it holds."""
  splits = _load(name, data_dir, settings)
  if not all(isinstance(split, table.ClassTable) for split in splits.values()):
    return print(f'{name} is made of functions: there is nothing to prepare')
  images = next(iter(splits.values())).images
  print(f'{name}: {len(images)} images of {" x ".join(map(str, images.shape[1:]))}, {images.nbytes / 1e6:.1f} MB')
  for split, t in splits.items():
    least, most = t.counts.min(), t.counts.max()
    each = f'{least} images each' if least == most else f'{least} to {most} images each'
    kinds = len(set(t.superclasses))
    print(f'  {split:6} {len(t.names)} classes of {each}' + (f', {kinds} superclasses' if kinds else ''))
  if not hasattr(images, 'filename'):
    return print('  embedded')
  folder = Path(images.filename).parent
  manifest = json.loads((folder / 'manifest.json').read_text())
  print(f'  source {manifest["source"]}')
  for file in manifest['files']:
    print(f'    {file["path"]}, {file["bytes"]} bytes, SHA-256 {file["sha256"]}')
  print(f'  table  {folder}, SHA-256 {manifest["sha256"]}')
  with optional('contact sheet'):  # a table is of use without
    figures = system.package('metajax.figures', 'drawing')
    figures.contact_sheet(folder / 'sheet.png', name, splits)
    print(f'  sheet  {folder / "sheet.png"}')


def _check(name, data_dir, settings):
  """Prints what is wrong with the files and the table; the exit status."""
  dataset = _dataset(name, data_dir, settings)
  if dataset is None:
    print(f'{name} is embedded: there is nothing to check')
    return 0
  found = source.locate(dataset, data_dir)
  tables = _tables(dataset)
  if not found and not tables:
    raise UserError(f'{name} is not in {data_dir}: `metajax data --list` says what to put where')
  faults, notes = [], []
  if found:
    print(f'checking {found.what} in {found.folder}')
    faults, notes = check.check_source(dataset, found)
  for folder in tables:
    print(f'checking the table {folder}')
    faults += check.check_table(folder, faults + notes)
  for sentence in [*(f'note: {note}' for note in notes), *faults]:
    print(f'  {sentence}')
  print(f'{name}: {len(faults)} faults' if faults else f'{name}: no faults')
  return 1 if faults else 0


def _list(name, data_dir):
  """Prints whether a data set is there, or what to put where."""
  if name == 'folder':
    return print('folder: yours, --path=FOLDER with class/image or split/class/image')
  if name == 'tfds':
    return print('tfds: what TFDS has prepared, as tfds:BUILDER')
  dataset = _dataset(name, data_dir, {})
  if dataset is None:
    return print(f'{name}: embedded')
  tables = [folder for folder in _tables(dataset) if not table.defect_of(folder)]
  found = source.locate(dataset, data_dir)
  for folder in tables:
    size = f'{(folder / "images.npy").stat().st_size / 1e6:.1f} MB'
    print(f'{name}: ready, {folder}, {size}')
  if found:
    print(f'{name}: found, {found.what} in {found.folder}')
  if not tables and not found:
    size = sum(remote.size or 0 for remote in dataset.downloads) / 1e6
    hosts = sorted({urllib.parse.urlsplit(url).netloc for remote in dataset.downloads for url in remote.urls})
    size = f'{size:.0f} MB ' if size else ''
    print(
      f'{name}: missing. It is downloaded when it is first used, {size}from {", ".join(hosts)}; or put one of these'
    )
    for folder, files in source.wanted(dataset, data_dir).items():
      print(f'  into {folder}:', *files, sep='\n    ')
    if dataset.terms:
      print(f'  {dataset.terms}')


def _tables(dataset):
  """Folders of its converted tables, whole or not."""
  return sorted(path for path in table.cache_dir().glob(f'{glob.escape(dataset.name)}-[0-9]*') if path.is_dir())


if __name__ == '__main__':
  sys.exit(main())

"""Looks for what is wrong with a data set's files: every image is decoded, and compared with all others."""

import collections
import hashlib
import itertools
import json
import shutil

from metajax.data import conversion, images, source, table
from metajax.errors import UserError

_MOST = 0.5  # where more of the classes than this have the same number of images, the others should have it too


def check_source(dataset, found):
  """Everything that is wrong with a data set's files.

  Args:
    dataset: source.Dataset.
    found: source.Found, where they are.

  Returns:
    (faults, notes), lists of sentences. Notes are of what published data sets have as well: an image that is twice in
    a class, and in those alone, images of one colour.
  """
  cache = table.cache_dir()
  with conversion.writes(cache):
    cache.mkdir(parents=True, exist_ok=True)
  scratch = cache / '.check.unpacked'
  with table.locked(cache / '.check.lock'):
    shutil.rmtree(scratch, ignore_errors=True)
    try:
      contents = source.read(dataset, found, scratch)
      splits = contents.splits or dataset.splits(sorted(contents.classes))
      counts = {c: len(items) for c, items in contents.classes.items()}
      deviations = source.deviations(dataset, contents, len(counts)) if dataset.counts else odd_counts(counts)
      faults, notes, faint = _compare(contents, {c: split for split, names in splits.items() for c in names})
      faults = [*contents.faults, *deviations, *faults]
      # What is published has few levels for all who use it.
      (notes if dataset.counts else faults).extend([*contents.notes, *contents.explain(faint)])
    except UserError as error:
      faults, notes = [str(error)], []
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
  return [[source.outside(text, found, scratch) for text in texts] for texts in (faults, notes)]


def check_table(folder, known=()):
  """What is wrong with a converted table: a list of sentences, without what is known of its source."""
  if defect := table.defect_of(folder):
    return [f'{folder} {defect}; it is made again when it is next used']
  manifest = json.loads((folder / 'manifest.json').read_text())
  if table.describe_file(folder / 'images.npy')['sha256'] != manifest['sha256']:
    return [f'{folder / "images.npy"} has changed since it was made (SHA-256): remove {folder} to have it made again']
  notes = [note for note in manifest['notes'] if note not in known]
  return [f'the table {folder.name} was made with this deviation: {note}' for note in notes]


def odd_counts(counts):
  """Classes with another number of images than most have: sentences.

  Args:
    counts: class name -> images.
  """
  [(usual, classes)] = collections.Counter(counts.values()).most_common(1)
  if classes <= _MOST * len(counts):  # sizes vary, as they do in nature
    return []
  return [f'class {c} has {n} images, most classes have {usual}' for c, n in counts.items() if n != usual]


def _compare(contents, split_of):
  """Images that do not decode or are there twice, as faults and notes; and items of images of few levels."""
  items = [(c, item) for c, of_class in contents.classes.items() for item in of_class]

  def digest(entry):
    try:
      image = images.open_item(entry[1])
      faint = images.is_faint(images.to_rgb(entry[1], image, contents.transform))
    except UserError as error:
      return str(error)
    return hashlib.blake2b(f'{image.mode}{image.size}'.encode() + image.tobytes(), digest_size=16).digest(), faint

  faults, notes, first, faint_items = [], [], {}, []
  results = itertools.chain.from_iterable(conversion.on_cores(digest, items, 'checking'))
  for index, result in enumerate(results):
    if isinstance(result, str):
      faults.append(result)
      continue
    digest_of_image, faint = result
    faint_items += [items[index][1]] * faint
    if (other := first.setdefault(digest_of_image, index)) != index:
      same_class = items[other][0] == items[index][0]
      (notes if same_class else faults).append(_twice(items[other], items[index], split_of))
  return faults, notes, faint_items


def _twice(first, second, split_of):
  places = [split_of.get(c) for c, _ in (first, second)]
  if first[0] == second[0]:
    where = f'twice in class {first[0]}'
  elif None in places or places[0] == places[1]:
    where = f'in classes {first[0]} and {second[0]}'
  else:
    where = f'in {places[0]} (class {first[0]}) and in {places[1]} (class {second[0]})'
  return f'the same image is {where}: {first[1]} and {second[1]}'

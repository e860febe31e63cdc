"""Which data a run's number belongs to: the classes of each split, and a digest of each class's images.

A run keeps this in `data.json`. Whatever resumes, evaluates or compares it must find the same classes with the same
images; where they lie, in which format and since when does not matter.
"""

import hashlib
import json

import numpy as np

from metajax.data.table import ClassTable, digest
from metajax.errors import UserError

_NAMED = 5  # at most so many classes in a message


def describe(splits):
  """The identity of a data set.

  Args:
    splits: {split: ClassTable}; other data, such as functions, has no identity and is passed over.

  Returns:
    {split: [[class name, number of images, digest], ...]} in the order of the labels; types that JSON can hold.
  """
  return {split: _describe(data) for split, data in splits.items() if isinstance(data, ClassTable)}


def _describe(data):
  ends = data.starts + data.counts
  digests = data.digests or [digest(data.images[a:b]) for a, b in zip(data.starts, ends, strict=True)]
  return [
    [name, int(count), text + f' turned {90 * int(turns)}' * bool(turns)]
    for name, count, text, turns in zip(data.names, data.counts, digests, data.turns, strict=True)
  ]


def fingerprint(classes):
  """16 hexadecimal digits for the classes of a split, their order and their images; None without classes."""
  return hashlib.blake2b(json.dumps(classes).encode(), digest_size=8).hexdigest() if classes else None


def settle(splits, kept, needed):
  """Divides a data set into the splits that a run had, and compares its images with those that the run had.

  Classes that came later are left out: they would move others from one split to another.

  Args:
    splits: {split: ClassTable or other data}, as loaded now.
    kept: the run's `describe`; {} for a new run, or where nothing was kept.
    needed: splits that must be as they were. One that the run did not have is taken as it is.

  Returns:
    the splits; sentences on what has changed but is not needed.

  Raises:
    UserError: a needed split lacks a class, or a class has other images.
  """
  found = describe(splits)
  if not kept or kept == found:
    return splits, []
  shared = len({id(splits[split].images) for split in found}) == 1  # else a class cannot move to another split
  places = {split: {entry[0]: (split, k) for k, entry in enumerate(classes)} for split, classes in found.items()}
  anywhere = {name: at for classes in places.values() for name, at in classes.items()} if shared else {}
  result, notes = {split: data for split, data in splits.items() if split not in found or split in needed}, []
  for split, classes in kept.items():
    taken = [places.get(split, {}).get(name, anywhere.get(name)) for name, _, _ in classes]
    now = [found[at[0]][at[1]] if at else None for at in taken]
    if changes := [_change(*pair) for pair in zip(classes, now, strict=True) if pair[0] != pair[1]]:
      text = f'the {split} split has changed since this run began: {some(changes)}'
      if split in needed:
        raise UserError(f'config.data: {text}; restore the images, or choose another --workdir')
      notes.append(text)
      result |= {split: splits[split]} if split in splits else {}
    else:
      result[split] = _take([(splits[source], k) for source, k in taken])
  known = {name for classes in kept.values() for name, _, _ in classes}
  if later := [name for classes in places.values() for name in classes if name not in known]:
    notes.append(f'classes that this run began without are left out: {some(later)}')
  return result, notes


def _change(was, now):
  name, images, _ = was
  if now is None:
    return f'class {name} is missing'
  return f'class {name} has {now[1]} images, not {images}' if now[1] != images else f'class {name} has other images'


def _take(members):
  """A ClassTable of some classes, each (ClassTable, number of the class in it); the tables share their images."""
  first = members[0][0]

  def column(field):
    values = [getattr(data, field)[k] for data, k in members if len(getattr(data, field))]
    return (
      np.array(values, getattr(first, field).dtype) if isinstance(getattr(first, field), np.ndarray) else tuple(values)
    )

  fields = 'starts', 'counts', 'turns', 'names', 'superclasses', 'digests'
  return first._replace(**{field: column(field) for field in fields})


def seen_in_training(kept):
  """Names of the test classes that a run, or a run before it that its initial weights came from, was trained on.

  A run knows its own training classes by their images. Earlier runs may have had the images at another size: their
  classes are known by name, too.

  Args:
    kept: what `workdir.read_data` returns; None for nothing.
  """
  if not kept:
    return []
  digests = {text for _, _, text in (*kept['splits'].get('train', ()), *kept['seen'])}
  names = {name for name, _, _ in kept['seen']}
  return [name for name, _, text in kept['splits'].get('test', ()) if name in names or text in digests]


def some(texts):
  """Texts for a message, the first few of many."""
  return ', '.join(texts[:_NAMED]) + f' and {len(texts) - _NAMED} more' * (len(texts) > _NAMED)

"""FC100 (Oreshkin et al. 2018): CIFAR-100's classes divided by superclass, 60 / 20 / 20."""

import functools

from metajax.data import containers, images, source
from metajax.datasets import cifar100


def load(data_dir, *, size=32, resample='bilinear'):
  """Loads FC100.

  A part of the data set serves too, with a warning of what is missing. Where files name their classes, or have
  CIFAR-100's labels, a class belongs to the split that Oreshkin et al. put it in. Of files whose labels mean nothing,
  the splits are taken, and classes are called `<split>/<label>`.

  Args:
    data_dir: str; `metajax data --list` says what may lie there. Need not exist: CIFAR-100 is downloaded
      to it.
    size: side in pixels; images have 32.
    resample: Pillow's filter for images of another size.

  Returns:
    split -> ClassTable with images (60000, size, size, 3), and 12, 4 and 4 of CIFAR-100's superclasses; a split
    without any class is absent.

  Raises:
    UserError: nothing is found and the download failed, or it is damaged or has classes of another data set.
  """
  return source.load(dataset(), data_dir, images.Rendering(size, 'RGB', resample))


@functools.cache
def dataset():
  """What there is to know about FC100."""
  return cifar100.dataset(
    'fc100',
    'FC100',
    _splits(),
    places=('fc100', 'FC100'),
    files=(
      ('FC100_{split}.pickle', containers.load_pickle),
      ('{split}.pickle', containers.load_pickle),
      ('few-shot-{split}.npz', containers.load_npz),
    ),
    archives=(('FC100.zip',), ('fc100.zip',), ('train.tar', 'val.tar', 'test.tar')),
  )


@functools.cache
def _splits():
  members = cifar100.lists()['superclasses']
  return {
    split: sorted(name for superclass in superclasses for name in members[superclass])
    for split, superclasses in cifar100.lists()['fc100'].items()
  }

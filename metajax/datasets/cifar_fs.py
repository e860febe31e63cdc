"""CIFAR-FS (Bertinetto et al. 2019): CIFAR-100's classes divided at random, 64 / 16 / 20."""

import functools

from metajax.data import containers, images, source
from metajax.datasets import cifar100


def load(data_dir, *, size=32, resample='bilinear'):
  """Loads CIFAR-FS.

  A part of the data set serves too, with a warning of what is missing. Where files name their classes, or have
  CIFAR-100's labels, a class belongs to the split that Bertinetto et al. put it in. Of files whose labels mean
  nothing, the splits are taken, and classes are called `<split>/<label>`.

  Args:
    data_dir: str; `metajax data --list` says what may lie there. Need not exist: CIFAR-100 is downloaded
      to it.
    size: side in pixels; images have 32.
    resample: Pillow's filter for images of another size.

  Returns:
    split -> ClassTable with images (60000, size, size, 3), and CIFAR-100's 20 superclasses, which the splits share;
    a split without any class is absent.

  Raises:
    UserError: nothing is found and the download failed, or it is damaged or has classes of another data set.
  """
  return source.load(dataset(), data_dir, images.Rendering(size, 'RGB', resample))


@functools.cache
def dataset():
  """What there is to know about CIFAR-FS."""
  return cifar100.dataset(
    'cifar_fs',
    'CIFAR-FS',
    cifar100.lists()['cifar_fs'],
    places=('cifar_fs', 'cifar-fs', 'cifarfs', 'CIFAR-FS', 'CIFAR_FS'),
    files=(
      ('CIFAR_FS_{split}.pickle', containers.load_pickle),
      ('{split}.pickle', containers.load_pickle),
    ),
    archives=(('CIFAR-FS.zip',), ('CIFAR_FS.zip',)),
  )

"""CUB-200-2011 (Wah et al. 2011): 11788 photographs of 200 species of birds, for research and education only."""

import functools
import re

from metajax.data import containers, images, source
from metajax.data.download import Remote, google_drive
from metajax.errors import UserError

_CLASS = re.compile(r'\d{3}\.\w+')


def load(data_dir, *, size=84, split='closer_look', resample='bilinear', crop=2 / 3):
  """Loads CUB-200-2011.

  A part of the data set serves too, with a warning of what is missing; how many images there are of each class is not
  checked, but how many in all.

  Args:
    data_dir: str; `metajax data --list` says what may lie there. Need not exist: 1.2 GB are downloaded.
    size: side in pixels.
    split: of the classes,
      'closer_look': 100 / 50 / 50 (Chen et al. 2019),
      'meta_dataset': 140 / 30 / 30 (Triantafillou et al. 2020).
    resample: Pillow's filter.
    crop: part of the shorter side of which the central square is taken; 0 squashes the whole image. With two thirds
      and 84 pixels the image is resized to 126 by its shorter side and cropped, as by torchmeta.

  Returns:
    split -> ClassTable with images (11788, size, size, 3).

  Raises:
    UserError: an option is unknown; what is there is damaged or another data set; the download failed.
  """
  if split not in _lists():
    raise UserError(f'cub has no split {split!r}; choose one of {", ".join(_lists())}')
  rendering = images.Rendering(size, 'RGB', resample, crop)
  return source.load(dataset(split), data_dir, rendering)


@functools.cache
def dataset(split='closer_look'):
  """What there is to know about CUB-200-2011."""
  return source.Dataset(
    name='cub',
    title='CUB-200-2011',
    places=('cub', 'CUB_200_2011', 'CUB', ''),
    formats=(
      containers.class_folders(
        lambda name: name if _CLASS.fullmatch(name) else None, inside=('', 'images', 'CUB_200_2011/images')
      ),
      containers.hdf5([f'{split}_data.hdf5' for split in ('train', 'val', 'test')]),
    ),
    archives=(('CUB_200_2011.tgz',),),
    prepared=(
      containers.tfds(
        'caltech_birds2011', lambda r: next(iter(_CLASS.findall(r.extra['image/filename'])), None), ['image/filename']
      ),
    ),
    downloads=(
      Remote(
        'CUB_200_2011.tgz',
        urls=(
          'https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1',
          *google_drive('1hbzc_P1FuxMkcabkgn9ZKinBwW683j45'),
        ),
        sha256='0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081',
        size=1150585339,
      ),
    ),
    splits=lambda names: _lists()[split],
    counts=dict.fromkeys(sorted(c for classes in _lists()['closer_look'].values() for c in classes)),
    total=11788,
    terms='its photographs are for non-commercial research and education only',
  )


def _lists():
  """kind of split -> split -> class names."""
  return source.stored('cub')

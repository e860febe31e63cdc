"""Times augmentation: making the images of a meta-batch on the device, a meta-update with them, and Pillow on the host.

python -m benchmarks.augment [--json=FILE] [--shape=mini] [--rounds=15] [...]

All take turns, once a round. `decode` makes a meta-batch of float32 images from a uint8 table, normalised, as the
compiled step does but into memory. `meta-update` is the whole train step, its images made in it. `Pillow` does the same
as torchvision's transforms do, image by image in one thread, from NumPy bytes to a normalised NumPy batch.
"""

import argparse
import random
import time

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from benchmarks import workload
from metajax import evaluate, parallel
from metajax.data import augment, episodes
from metajax.data.table import ClassTable

STANDARD = ('crop', 'jitter', 'flip')  # of MetaOptNet and what followed it
RESIZED = ('resized_crop', 'jitter', 'flip')
SEQUENCES = (
  *((), ('flip',), ('crop',), ('rotate',), ('resized_crop',), ('jitter',)),
  *(STANDARD, (*STANDARD, 'rotate'), RESIZED),
)
STEPS = ((), STANDARD)  # timed in a meta-update
_CLASSES, _IMAGES = 64, 60  # of the table


def make_source(work, names):
  """Episodes of random images, normalised as in MetaOptNet where they are RGB."""
  size = _CLASSES * _IMAGES
  images = np.random.default_rng(0).integers(0, 256, (size, *work.image), np.uint8)
  starts, counts = np.arange(0, size, _IMAGES), np.full(_CLASSES, _IMAGES)
  table = ClassTable(images, starts, counts, np.zeros(_CLASSES, np.int8), ('',) * _CLASSES)
  settings = dict(way=work.way, shot=work.shot, query_shot=work.query_shot, seed=0)
  return episodes.make_source(table, 'train', **settings, augment=names, normalize=_constants(work), placement='device')


def decoding(work, source):
  """A function that makes the images of one meta-batch, as over devices and chunks as a step does."""
  chunk = parallel.chunk_size('auto', work.tasks, evaluate.elements(source))
  _, batch = parallel.lay_out(source.sample(0, work.tasks), work.tasks, chunk)
  resident = parallel.replicate(source.resident)

  def decode(resident, batch):
    episode = jax.lax.map(lambda chunk: source.decode(resident, chunk), batch)
    return episode.support.inputs, episode.query.inputs

  compiled = jax.pmap(decode, in_axes=(None, 0)).lower(resident, batch).compile()
  return lambda: jax.block_until_ready(compiled(resident, batch))


def host_batch(images, names, constants):
  """What torchvision's transforms do on the host: (n, h, w, c) uint8 to float32, one image after the other."""
  mean, std = (np.float32(values) for values in augment.NORMALIZE[constants])
  return np.stack([(np.asarray(_transform(image, names), np.float32) / 255 - mean) / std for image in images])


def _transform(pixels, names):
  image = Image.fromarray(pixels)
  w, h = image.size
  for name in names:
    if name == 'crop':
      pad = min(8, w // 8)
      x, y = random.randint(0, 2 * pad), random.randint(0, 2 * pad)
      image = ImageOps.expand(image, pad).crop((x, y, x + w, y + h))
    elif name == 'resized_crop':
      area, aspect = random.uniform(0.08, 1) * w * h, random.uniform(3 / 4, 4 / 3)
      width, height = min(w, round((area * aspect) ** 0.5)), min(h, round((area / aspect) ** 0.5))
      x, y = random.randint(0, w - width), random.randint(0, h - height)
      image = image.crop((x, y, x + width, y + height)).resize((w, h), Image.Resampling.BILINEAR)
    elif name == 'flip' and random.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif name == 'rotate':
      image = image.rotate(90 * random.randrange(4))
    elif name == 'jitter':
      enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
      for enhancer in random.sample(enhancers, 3):
        image = enhancer(image).enhance(random.uniform(0.6, 1.4))
  return image


def measure(work, sequences, steps, rounds):
  """Times everything in turns.

  Args:
    work: Workload of RGB images.
    sequences: augmentations for `decode` and `Pillow`.
    steps: those for the meta-update.
    rounds: timed turns of each.

  Returns:
    rows, dictionaries.
  """
  turns = {}
  host = make_source(work, ()).resident[: work.tasks * work.way * (work.shot + work.query_shot)]
  for names in sequences:
    turns['decode', names] = decoding(work, make_source(work, names))
    turns['Pillow', names] = lambda names=names: host_batch(host, names, _constants(work))
  for names in steps:
    turns['meta-update', names] = workload.TrainStep(work, make_source(work, names))
  seconds = {key: [] for key in turns}
  for number in range(rounds + 1):
    for key, turn in turns.items():
      start = time.perf_counter()
      turn()
      if number:
        seconds[key].append(time.perf_counter() - start)
  return [
    {'shape': work.name, 'what': what, 'augment': names, **workload.spread(seconds[what, names])}
    for what, names in turns
  ]


def _constants(work):
  return 'metaoptnet_mini' if work.image[2] == 3 else 'none'


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  workload.add_options(parser)
  parser.set_defaults(shape='mini')
  parser.add_argument('--rounds', type=int, default=15, help='timed turns of each')
  options = parser.parse_args(argv)
  works = workload.from_options(options)
  rows = []
  for work in works:
    for row in measure(work, SEQUENCES, STEPS, options.rounds):
      rows.append(row)
      low, high = row['step_ms_quartiles']
      names = ', '.join(row['augment']) or 'none'
      print(
        f'{row["shape"]}  {row["what"]:11}  {names:27}  {row["step_ms"]:7.1f} ms ({low:.1f} - {high:.1f})', flush=True
      )
  workload.write_json(options.json, works=works, rows=rows)


if __name__ == '__main__':
  main()

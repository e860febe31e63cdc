"""How fast files become a table, and in how much memory.

python -m benchmarks.conversion [--json=FILE] [--images=N]

Makes N images as tiered-ImageNet comes, smooth with some noise as photographs are: PNG files in Ren et al.'s pickles,
JPEG files of 84 pixels in class folders, and larger JPEG files that take shrinking. Converts each to 84 pixels in a
process of its own, on all cores.

- `memory`: the most that the process had, less what it had before. Pages of a mapped pickle are among it, which the
  system takes back when it wants them.
"""

import argparse
import concurrent.futures
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from metajax.datasets import tiered_imagenet

_CLASSES = 8
_CASES = {'PNG, 84 x 84, in a pickle': ('png', 84), 'JPEG, 84 x 84': ('jpeg', 84), 'JPEG, 500 x 375': ('jpeg', 500)}
_WHOLE = 779_165  # images of tiered-ImageNet


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--json', type=Path)
  parser.add_argument('--images', type=int, default=10_000)
  arguments = parser.parse_args()
  results = []
  print('files                      images/s  tiered-ImageNet   memory')
  for name, (kind, width) in _CASES.items():
    with tempfile.TemporaryDirectory() as folder:
      (make_pickles if kind == 'png' else make_folders)(Path(folder), arguments.images, width)
      with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        seconds, memory = pool.submit(convert, folder).result()
    speed = arguments.images / seconds
    results.append({'files': name, 'images_per_second': speed, 'memory_bytes': memory})
    print(f'{name:25}  {speed:8.0f}  {_WHOLE / speed / 60:11.1f} min  {memory / 1e6:4.0f} MB', flush=True)
  if arguments.json:
    arguments.json.write_text(json.dumps(results, indent=2))


def convert(folder):
  """Seconds and bytes that conversion takes."""
  os.environ['METAJAX_CACHE'] = str(Path(folder) / 'cache')
  logging.disable()  # what such a small part lacks
  before, start = peak(), time.perf_counter()
  tiered_imagenet.load(folder)
  return time.perf_counter() - start, peak() - before


def peak():
  """The most memory that this process had, in bytes; getrusage would count what its parent had."""
  [line] = re.findall(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())
  return 1024 * int(line)


def make_pickles(folder, images, width):
  names = {wnid: words for wnid, (_, words) in list(tiered_imagenet._classes().items())[:_CLASSES]}
  files = [np.frombuffer(encoded(k, (width, width), 'png'), np.uint8)[:, None] for k in range(images)]
  labels = {'label_specific': np.arange(images) * _CLASSES // images, 'label_specific_str': list(names.values())}
  (folder / 'train_images_png.pkl').write_bytes(pickle.dumps(files, protocol=4))
  (folder / 'train_labels.pkl').write_bytes(pickle.dumps(labels))
  (folder / 'class_names.txt').write_text('\n'.join(names.values()))
  (folder / 'synsets.txt').write_text('\n'.join(names))


def make_folders(folder, images, width):
  wnids = list(tiered_imagenet._classes())[:_CLASSES]
  height = width if width == 84 else 3 * width // 4
  for wnid in wnids:
    (folder / 'train' / wnid).mkdir(parents=True)
  for k in range(images):
    (folder / 'train' / wnids[k % _CLASSES] / f'{k}.jpg').write_bytes(encoded(k, (width, height), 'jpeg'))


def encoded(seed, size, kind):
  rng = np.random.default_rng(seed)
  smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
  pixels = np.asarray(smooth).astype(int)
  file = io.BytesIO()
  Image.fromarray((pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)).save(file, kind)
  return file.getvalue()


if __name__ == '__main__':
  main()

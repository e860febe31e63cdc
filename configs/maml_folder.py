r"""MAML, Conv4-32, on your own images: a folder of class/image, or of split/class/image.

    metajax train --config=maml_folder:way=5,shot=1 --config.data.path=FOLDER

FOLDER is looked up in --data_dir unless it is absolute. Images are resized once, to `data.size` pixels.
"""

import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1, size=84, grey=False)
  config = ml_collections.ConfigDict()
  config.total_steps = 20_000
  config.checkpoint_every = 500
  config.data = dict(
    name='folder', path='', size=arg.size, grey=arg.grey, tasks=4, way=arg.way, shot=arg.shot, query_shot=5
  )
  config.model = dict(name='conv4', width=32, downsample='pool')
  config.algorithm = dict(name='maml', inner_steps=5, inner_lr=0.01, batch_norm='transductive')
  config.optimizer = dict(learning_rate=1e-3, schedule='cosine', clip=10.0)
  config.eval = dict(inner_steps=10)
  return config

r"""MAML, Conv4-32, mini-ImageNet (Finn et al. 2017, Table 1: 5-way 1-shot 48.70 +- 1.84 %, 5-shot 63.11 +- 0.92 %).

    metajax train --config=maml_mini:way=5,shot=1 --data_dir=DIR

DIR holds mini-imagenet-cache-{train,val,test}.pkl, or folders of images: README, "Data". 5 inner steps in training and
10 at test, 15 queries a class, 4 tasks (1-shot) or 2 (5-shot) a meta-update, as in the paper's code. Nobody has run it
here: the images are not ours to ship.
"""

import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1)
  config = ml_collections.ConfigDict()
  config.total_steps = 60_000
  config.checkpoint_every = 500
  config.data = dict(name='mini_imagenet', tasks=4 if arg.shot == 1 else 2, way=arg.way, shot=arg.shot, query_shot=15)
  config.model = dict(name='conv4', width=32, downsample='pool')
  config.algorithm = dict(name='maml', inner_steps=5, inner_lr=0.01, batch_norm='transductive')
  config.optimizer = dict(learning_rate=1e-3, schedule='constant', clip=10.0)
  config.eval = dict(inner_steps=10)
  return config

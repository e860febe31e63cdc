r"""Prototypical networks, Conv4-64, Omniglot.

Snell et al. 2017, Table 1: 5-way 98.8 % (1-shot), 99.7 % (5-shot); 20-way 96.0 and 98.9 %.

    metajax train --config=protonet_omniglot:way=20,shot=1
    metajax eval --workdir=runs/protonet_omniglot-way=20,shot=1 --config.eval.way=5

Trained as in the paper on 60-way episodes with 5 queries a class, sums of squared differences as distances; the step
size is halved after 2, 3, 4 and 5 sixths of the run. The split of Vinyals et al. 2016, rotations by 90 degrees as new
classes in every split.
"""

import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1, train_way=60, steps=6000)
  config = ml_collections.ConfigDict()
  config.total_steps = arg.steps
  config.eval_every = max(arg.steps // 12, 1)
  config.checkpoint_every = 100
  config.data = dict(
    name='omniglot',
    split='vinyals',
    rotations=('train', 'val', 'test'),
    tasks=1,
    way=arg.train_way,
    shot=arg.shot,
    query_shot=5,
  )
  config.model = dict(name='conv4', width=64, downsample='pool')
  config.algorithm = dict(name='protonet', scale=0.0, learn_scale=False, batch_norm='running')
  config.optimizer = dict(
    learning_rate=1e-3,
    schedule='steps',
    boundaries=tuple(arg.steps * k // 6 for k in range(2, 6)),
    rates=tuple(1e-3 / 2**k for k in range(1, 5)),
  )
  config.eval = dict(way=arg.way)
  return config

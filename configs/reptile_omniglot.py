r"""Reptile, Conv4-64, Omniglot (Nichol et al. 2018, Table 2: 5-way 1-shot 97.68 +- 0.04 %, transductive).

    metajax train --config=reptile_omniglot:way=5,shot=1

Inner Adam 1e-3 on batches of 10, 5 steps in training and 50 at test, meta-batch 5, epsilon from 1 to 0, as in the
paper's appendix A. There a task trains on 10 images a class: here 10 of support and query together.
"""

import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1, steps=100_000)
  config = ml_collections.ConfigDict()
  config.total_steps = arg.steps
  config.eval_every = max(arg.steps // 20, 1)
  config.checkpoint_every = 500
  config.data = dict(
    name='omniglot',
    split='vinyals',
    rotations=('train', 'val', 'test'),
    tasks=5,
    way=arg.way,
    shot=arg.shot,
    query_shot=10 - arg.shot,
  )
  config.model = dict(name='conv4', width=64, downsample='stride')
  config.algorithm = dict(name='reptile', inner_steps=5, inner_lr=1e-3, inner_batch=10, batch_norm='transductive')
  config.optimizer = dict(name='sgd', learning_rate=1.0, schedule='linear')
  config.eval = dict(inner_steps=50, query_shot=1)
  return config

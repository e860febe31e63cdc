r"""MAML, strided Conv4-64, Omniglot.

Finn et al. 2017, Table 1: 5-way 98.7 +- 0.4 % (1-shot), 99.9 +- 0.1 % (5-shot); 20-way 95.8 +- 0.3, 98.9 +- 0.2 %.

    metajax train --config=maml_omniglot:way=5,shot=1
    metajax train --config=maml_omniglot:way=20,shot=1

Inner steps, step sizes and tasks as in appendix A.1 of the paper; as many queries as shots, as in its code. A fifth of
its 60,000 meta-updates, with a cosine schedule from a step size twice as large. Classes: the split of Vinyals et al.
2016, rotations by 90 degrees as new classes in every split.
"""

import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1, steps=12_000)
  twenty = arg.way > 5
  config = ml_collections.ConfigDict()
  config.total_steps = arg.steps
  config.eval_every = max(arg.steps // 12, 1)
  config.checkpoint_every = 100
  config.data = dict(
    name='omniglot',
    split='vinyals',
    rotations=('train', 'val', 'test'),
    tasks=16 if twenty else 32,
    way=arg.way,
    shot=arg.shot,
    query_shot=arg.shot,
  )
  config.model = dict(name='conv4', width=64, downsample='stride')
  config.algorithm = dict(
    name='maml',
    inner_steps=5 if twenty else 1,
    inner_lr=0.1 if twenty else 0.4,
    batch_norm='transductive',
  )
  config.optimizer = dict(learning_rate=2e-3, schedule='cosine')
  config.eval = dict(inner_steps=5 if twenty else 3)
  return config

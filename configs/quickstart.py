r"""MAML in about a minute on a laptop: 5-way 1-shot on the embedded `glyphs`, nothing to download.

metajax train --config=quickstart
"""

import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1)
  config = ml_collections.ConfigDict()
  config.total_steps = 800
  config.log_every = 20
  config.eval_every = 200
  config.checkpoint_every = 50
  config.data = dict(name='glyphs', tasks=16, way=arg.way, shot=arg.shot, query_shot=5)
  config.model = dict(name='conv4', width=32, downsample='stride')
  config.algorithm = dict(name='maml', inner_steps=1, inner_lr=0.4, batch_norm='transductive')
  config.optimizer = dict(learning_rate=2e-3, schedule='cosine')
  config.eval = dict(inner_steps=3)
  return config

"""The smallest run that goes through everything: a config file for the tests."""

import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=3, shot=1)
  config = ml_collections.ConfigDict()
  config.total_steps = 6
  config.log_every = 1
  config.eval_every = 3
  config.checkpoint_every = 2
  config.data = dict(
    name='glyphs', classes=(12, 6, 6), images_per_class=6, tasks=2, way=arg.way, shot=arg.shot, query_shot=2
  )
  config.model = dict(name='conv4', width=4, downsample='stride')
  config.algorithm = dict(name='maml', inner_steps=1, inner_lr=0.1)
  config.eval = dict(episodes=20, val_episodes=10, inner_steps=2)
  return config

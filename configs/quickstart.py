import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1)
  config = ml_collections.ConfigDict()
  config.total_steps = 300
  config.eval_every = 100
  config.log_every = 20
  config.data = dict(name='glyphs', tasks=16, way=arg.way, shot=arg.shot, query_shot=5)
  config.model = dict(name='conv4', width=32, downsample='stride')
  config.algorithm = dict(name='maml', inner_steps=1, inner_lr=0.4)
  config.optimizer = dict(schedule='cosine', learning_rate=2e-3)
  config.eval = dict(inner_steps=3)
  return config

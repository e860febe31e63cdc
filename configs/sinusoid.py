import ml_collections

from metajax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, shot=10)
  config = ml_collections.ConfigDict()
  config.total_steps = 300
  config.eval_every = 100
  config.log_every = 20
  config.data = dict(name='sinusoid', tasks=25, shot=arg.shot, query_shot=10)
  config.model = dict(name='mlp')
  config.algorithm = dict(name='maml', inner_steps=1, inner_lr=0.01)
  config.eval = dict(inner_steps=10)
  return config

r"""Sinusoid regression (Finn et al. 2017, section 5.1): MAML, and the two networks that the paper compares it with.

    metajax train --config=sinusoid:shot=10
    metajax train --config=sinusoid:shot=10,method=joint
    metajax train --config=sinusoid:shot=10,method=oracle

`joint` is trained on all tasks together (MAML of no inner steps) and fine-tuned on the support points of a test task,
with --config.eval.inner_lr as its step size; `oracle` is told amplitude and phase.
"""

import ml_collections

from metajax.config import parse_arg
from metajax.errors import UserError


def get_config(arg=None):
  arg = parse_arg(arg, shot=10, method='maml')
  if arg.method not in ('maml', 'joint', 'oracle'):
    raise UserError(f'--config: method is maml, joint or oracle, not {arg.method!r}')
  config = ml_collections.ConfigDict()
  config.total_steps = 50_000
  config.log_every = 500
  config.eval_every = 5000
  config.checkpoint_every = 5000
  config.data = dict(name='sinusoid', tasks=25, shot=arg.shot, query_shot=10, oracle=arg.method == 'oracle')
  config.model = dict(name='mlp', hidden=(40, 40))
  config.algorithm = dict(name='maml', inner_steps=1 if arg.method == 'maml' else 0, inner_lr=0.01)
  config.optimizer = dict(learning_rate=1e-3, schedule='cosine')
  config.eval = dict(query_shot=100, inner_steps=0 if arg.method == 'oracle' else 10)
  return config

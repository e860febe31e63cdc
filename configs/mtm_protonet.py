r"""Prototypical networks with weighted tasks: multi-task modification, MTM (Boiarov et al. 2021), its ProtoNet half.

Here a task of a meta-batch is the mean over 8 episodes. Twenty epochs without weighting, then forty with it:

    metajax train --config=mtm_protonet:data=mini_imagenet,model=resnet12,method=pretrain \
      --workdir=runs/mini
    metajax train \
      --config=mtm_protonet:data=mini_imagenet,model=resnet12,method=spsa_track,tasks=2 \
      --config.init_from=runs/mini --workdir=runs/mini_spsa_track

`launch/mtm.sh configs/mtm_protonet.py data=cifar_fs,way=2` does all methods. The authors' recipes are the one above;
data=cifar_fs,way=2,method=backprop; data=fc100,shot=10,method=inner_first_order; and
data=tiered_imagenet,way=2,shot=5,method=spsa. The paper's tables were not to be had.

`method=baseline` goes through all sixty epochs without weighting. `original_schedule` changes the step size an epoch
late, as the authors' code did, with the first weighted epoch at 0.1; the schedule before it, and Lee et al.'s, is the
default. Their pre-training and weighting are one run, which keeps the optimiser's momentum; here they are two.
Methods as in mtm_maml.py. As in the authors' code their outer steps differ: the step size is the same, but for SPSA a
tenth, while their gradients are the mean's times 16 or more with SPSA, 4 with backprop and inner_first_order (sums over
four tasks), and 1 with uniform and look_ahead. Images are augmented and normalised as by Lee et al. (2019); Omniglot is
left as it is.
"""

import ml_collections

from metajax.config import parse_arg
from metajax.errors import UserError

METHODS = ('baseline', 'pretrain', 'uniform', 'spsa', 'spsa_track', 'backprop', 'inner_first_order', 'look_ahead')
EPOCH = 1000  # meta-updates without weighting; with it each is of several tasks
RATES = (0.1, 0.006, 0.0012, 0.00024)  # from epoch 1, 21, 41 and 51 on


def get_config(arg=None):
  arg = parse_arg(
    arg,
    data='mini_imagenet',
    way=5,
    shot=1,
    train_way=0,  # 0: as in evaluation
    train_shot=0,
    model='conv4',
    width=32,  # of conv4: 32 in the authors' code, 64 in their text
    tasks=4,
    method='baseline',
    original_schedule=False,
  )
  if arg.method not in METHODS:
    raise UserError(f'--config: method is one of {", ".join(METHODS)}, not {arg.method!r}')
  if arg.model not in ('conv4', 'resnet12') or arg.tasks < 1:
    raise UserError(f'--config: model is conv4 or resnet12, not {arg.model!r}; tasks at least 1, not {arg.tasks}')
  weighted = arg.method not in ('baseline', 'pretrain')
  tasks = arg.tasks if weighted else 1
  epoch, late = EPOCH // tasks, int(arg.original_schedule)
  config = ml_collections.ConfigDict()
  config.total_steps = {'baseline': 60, 'pretrain': 20}.get(arg.method, 40) * epoch
  config.eval_every = epoch
  config.checkpoint_every = 100
  way, shot = arg.train_way or arg.way, arg.train_shot or arg.shot
  config.data = dict(name=arg.data, tasks=tasks, group=8, way=way, shot=shot, query_shot=6)
  if arg.data != 'omniglot':
    constants = 'metaoptnet_cifar' if arg.data in ('cifar_fs', 'fc100') else 'metaoptnet_mini'
    config.data.update(augment=('crop', 'jitter', 'flip'), normalize=constants)
  if arg.model == 'resnet12':
    config.model = dict(name='resnet12', ramp=2 * 40_000 // 6)  # theirs counts six passes a meta-update, ours two
  else:
    config.model = dict(name='conv4', width=arg.width)
  config.algorithm = dict(name='protonet', batch_norm='running')
  config.weighting = _weighting(arg.method, tasks, epoch)
  config.optimizer = dict(
    name='sgd', momentum=0.9, nesterov=True, weight_decay=5e-4, **_schedule(arg.method, epoch, late)
  )
  config.eval = dict(way=arg.way, shot=arg.shot, query_shot=15, episodes=1000, val_episodes=2000)
  return config


def _weighting(method, tasks, epoch):
  spsa = dict(form='sum', initial=tasks**-0.5, first=1, normalize_every=epoch)
  return {
    'spsa': dict(name='spsa', **spsa),
    'spsa_track': dict(name='spsa_track', restart_every=epoch, **spsa),
    'backprop': dict(name='gradient', optimizer='outer', form='sum'),
    'inner_first_order': dict(name='gradient', optimizer='adam', form='sum'),
    'look_ahead': dict(name='spsa_look_ahead'),
  }.get(method, dict(name='uniform'))


def _schedule(method, epoch, late):
  """Step sizes: those of SPSA are a tenth, since its weights make the gradient that much larger."""
  if method == 'pretrain':
    return dict(learning_rate=RATES[0])
  if method == 'baseline':
    rates, ends = RATES, [e + late for e in (20, 40, 50)]
  else:
    rates = [rate / 10 if method in ('spsa', 'spsa_track') else rate for rate in RATES[1:]]
    rates, ends = ([RATES[0], *rates], (1, 21, 31)) if late else (rates, (20, 30))
  return dict(
    learning_rate=rates[0], schedule='steps', boundaries=tuple(e * epoch for e in ends), rates=tuple(rates[1:])
  )

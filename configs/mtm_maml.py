r"""MAML with weighted tasks: multi-task modification, MTM (Boiarov, Khabarlak & Yastrebov 2021), its MAML half.

A baseline, then an MTM run from its best weights for 4,000 meta-updates, as in the recipes of the authors' code:

    metajax train --config=mtm_maml:data=mini_imagenet,way=2,shot=1 --workdir=runs/mini
    metajax train --config=mtm_maml:data=mini_imagenet,way=2,shot=1,method=spsa_track \
      --config.init_from=runs/mini --workdir=runs/mini_spsa_track

`launch/mtm.sh mtm_maml data=cifar_fs,way=5,shot=1` does all methods. The authors' recipes are
mini_imagenet,way=2,shot=1,method=spsa_track; tiered_imagenet,way=2,shot=1,method=spsa;
fc100,way=5,shot=5,method=spsa_coarse; cifar_fs,way=5,shot=1,method=inner_first_order and method=backprop. The paper's
tables were not to be had; the authors' log has baselines of CIFAR-FS at 75.0 % (2-way 1-shot), 87.4 (2-way 5-shot),
54.9 (5-way 1-shot), 70.1 (5-way 5-shot), FC100 35.1, 47.2 and 51.3 (5-way 1-, 5- and 10-shot), mini-ImageNet 47.12 and
63.15 (5-way, with an inner step size of 0.1, and two tasks for 5-shot), and of an early SPSA 54.8 and 68.2 (CIFAR-FS,
5-way), 33.3, 46.1, 50.6 (FC100). For backprop their README loads a baseline of another shot; here it is the same.

Methods: baseline; uniform, the same budget as MTM without weighting; those of the paper, spsa, spsa_track, spsa_coarse,
spsa_per_class, backprop, inner_first_order; sin, a control; and ours, spsa_log (weights that follow the losses) and
look_ahead (weights judged by trial steps). As the authors', `spsa` and `spsa_track` start at 1/4 and are normalised to
about 1/2 at update 100, a jump of the gradient that Adam takes hundreds of updates to forget;
`--config.weighting.initial=0.5` is without. Validation adapts as long as the test does (10 steps; theirs: 5), on 400
episodes. `data=omniglot` is ours: strided Conv4-64 as in the MAML paper, and one inner step of 0.4.
"""

import ml_collections

from metajax.config import parse_arg
from metajax.errors import UserError

METHODS = {
  'baseline': dict(name='uniform'),
  'uniform': dict(name='uniform'),
  'spsa': dict(name='spsa', normalize_every=100),
  'spsa_track': dict(name='spsa_track', normalize_every=100),
  'spsa_coarse': dict(name='spsa_per_coarse_class'),
  'spsa_per_class': dict(name='spsa_per_class'),
  'backprop': dict(name='gradient', optimizer='outer'),
  'inner_first_order': dict(name='gradient', optimizer='adam'),
  'sin': dict(name='sin'),
  'spsa_log': dict(name='spsa', space='log', initial=1.0, gain=('constant', 0.1), radius=('constant', 0.1)),
  'look_ahead': dict(name='spsa_look_ahead'),
}


def get_config(arg=None):
  arg = parse_arg(arg, data='mini_imagenet', way=5, shot=1, method='baseline', steps=4000, baseline_steps=0)
  if arg.method not in METHODS:
    raise UserError(f'--config: method is one of {", ".join(METHODS)}, not {arg.method!r}')
  omniglot, baseline = arg.data == 'omniglot', arg.method == 'baseline'
  config = ml_collections.ConfigDict()
  config.total_steps = arg.steps
  if baseline:
    config.total_steps = arg.baseline_steps or (60_000 if arg.data == 'cifar_fs' else 30_000)
  config.eval_every = 500 if baseline else 200
  config.checkpoint_every = 100
  config.data = dict(name=arg.data, tasks=4, way=arg.way, shot=arg.shot, query_shot=15)
  if omniglot:
    config.data.update(split='vinyals', rotations=('train', 'val'))
  config.model = dict(name='conv4', width=64 if omniglot else 32, downsample='stride' if omniglot else 'pool')
  config.algorithm = dict(
    name='maml',
    inner_steps=1 if omniglot else 5,
    inner_lr=0.4 if omniglot else 0.01,
    inner_params=('conv0', 'conv1', 'conv2', 'conv3', 'head'),  # batch norm's scale and shift belong to the outer loop
    batch_norm='transductive',
  )
  config.weighting = METHODS[arg.method]
  config.optimizer = dict(learning_rate=1e-3, schedule='constant')
  config.eval = dict(inner_steps=3 if omniglot else 10, val_episodes=400)
  return config

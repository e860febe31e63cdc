r"""Joint multi-task training, "Bridging Multi-Task Learning and Meta-Learning" (Wang, Zhao & Li 2021).

    metajax train --config=joint:data=mini_imagenet,shot=5
    metajax train --config=joint:data=omniglot,model=conv4,epochs=2 --data_dir=DIR

ResNet-12 and a row for each training class; tasks are 5-way, and at test a logistic regression (C = 3) is fitted to
normalised features. Both the best checkpoint by validation and the last one are tested: the authors' code tests the
last, though it means the best. Published, 5-way accuracy in %, what +- means is not said:

| data | shot | this | MetaOptNet |
| --- | --- | --- | --- |
| mini_imagenet | 1 | 59.84 +- 0.22 | 62.64 +- 0.61 |
| mini_imagenet | 5 | 77.72 +- 0.09 | 78.63 +- 0.46 |
| tiered_imagenet | 1 | 67.11 +- 0.12 | 65.99 +- 0.72 |
| tiered_imagenet | 5 | 83.69 +- 0.02 | 81.56 +- 0.53 |
| cifar_fs | 1 | 69.5 +- 0.3 | 72.0 +- 0.7 |
| cifar_fs | 5 | 84.1 +- 0.1 | 84.2 +- 0.5 |
| fc100 | 1 | 42.4 +- 0.2 | 41.1 +- 0.6 |
| fc100 | 5 | 57.7 +- 0.3 | 55.5 +- 0.6 |

Cost on mini-ImageNet 5-shot: 3.7 GPU-hours, MetaOptNet 85.6 (AWS P3).

An epoch is 1,600 tasks in meta-batches of m; theirs of 6 has one more meta-update, of the four tasks that are left.
`tasks=` is m, by which the lengths of an epoch and of DropBlock's ramp and the running averages' momentum go; `way=` is
of the test, training has 5. Theirs has up to 1,000 epochs and ends after 15 without better validation; so does this.
Test episodes have 30 queries a class (the authors used 50). DropBlock's ramp is of 20 epochs and of training's passes
alone. AdamW's and AdaMax's settings are Optax's; where theirs decays by 0.01 whatever is asked and doubles the step
size, ours do not.
"""

import ml_collections

from metajax.config import parse_arg

# Images of a class in a training task, tasks of a meta-batch: by data set and shot.
CELLS = {
  ('mini_imagenet', 5): (10, 2),
  ('mini_imagenet', 1): (10, 6),
  ('tiered_imagenet', 5): (40, 1),
  ('tiered_imagenet', 1): (40, 2),
  ('cifar_fs', 5): (10, 6),
  ('cifar_fs', 1): (20, 2),
  ('fc100', 5): (10, 6),
  ('fc100', 1): (5, 1),
}
EPOCH = 1600  # tasks


def get_config(arg=None):
  arg = parse_arg(arg, data='mini_imagenet', way=5, shot=5, model='resnet12', epochs=1000, tasks=0)
  images, tasks = CELLS.get((arg.data, arg.shot), (10, 4))
  tasks = arg.tasks or tasks
  config = ml_collections.ConfigDict()
  config.eval_every = config.checkpoint_every = max(EPOCH // tasks, 1)
  config.total_steps = arg.epochs * config.eval_every
  config.stop_patience = 15
  config.data = dict(name=arg.data, tasks=tasks, way=5, shot=images // 2, query_shot=images - images // 2)
  config.model = dict(name=arg.model)
  if arg.model == 'resnet12':
    small = arg.data in ('cifar_fs', 'fc100')
    config.model.update(pool=True, block_size=2 if small else 5, ramp=20 * EPOCH // tasks)
  # Theirs keeps 0.9 of the running averages at each task, one after the other.
  config.algorithm = dict(name='classifier', normalize=arg.data != 'fc100', head_c=3.0, batch_norm_momentum=0.9**tasks)
  config.optimizer = dict(name='radam', learning_rate=1e-3, schedule='plateau')
  config.eval = dict(way=arg.way, shot=arg.shot, query_shot=30, val_episodes=400, episodes=2000, last=True)
  if arg.data in ('mini_imagenet', 'tiered_imagenet'):
    config.data.update(augment=('crop', 'jitter', 'flip'), normalize='metaoptnet_mini')
  elif arg.data in ('cifar_fs', 'fc100'):
    config.data.update(augment=('crop', 'jitter', 'flip'), normalize='rfs_cifar')
  elif arg.data in ('omniglot', 'glyphs'):  # of 20 images a class, and many classes
    config.eval.query_shot = 5
    config.algorithm.row_scale = 1.0
  return config

r"""MAML and Meta-SGD on Quick, Draw!, as in Cloudera Fast Forward Labs' report on meta-learning (2020).

    metajax train --config=quickdraw:way=5,shot=1,drawings=100 --data_dir=DIR
    metajax sweep --config=quickdraw --over way=5,10 shot=1,5,10 drawings=100,20

Their test accuracy in percent, of the last checkpoint, with second-order MAML, on 2,500 (100 drawings) or 1,000 tasks;
intervals were not published. As many queries as shots.

| drawings of a class | way | 1-shot | 5-shot | 10-shot |
| --- | --- | --- | --- | --- |
| 100 | 5 | 68.32 | 82.57 | 85.12 |
| 100 | 10 | 50.69 | 70.48 | 74.91 |
| 20 | 5 | 59.36 | 76.95 | 77.29 |
| 20 | 10 | 42.58 | 58.23 | 60.60 |

20 drawings are of the training classes alone: validation and test always have 100, as theirs had. Ours has the
checkpoint that is best in validation; with 20 drawings theirs lost by taking the last (10-way 10-shot: 64.6 % in
validation after epoch 10, 58.9 after 50). `method=meta_sgd` learns a step size for each tensor, as a class in their
package that nothing used (its initial ones are 0.1; here they are the cell's): `--config.algorithm.learned_lr=element`
is the paper's form; `method=fomaml` is first order. `data=glyphs` runs a cell on drawn characters, without a download.
Initial weights are Glorot-uniform and convolutions have no bias, where theirs are PyTorch's defaults.
"""

import ml_collections

from metajax.config import parse_arg
from metajax.errors import UserError

METHODS = ('maml', 'fomaml', 'meta_sgd')


def get_config(arg=None):
  arg = parse_arg(arg, way=5, shot=1, drawings=100, method='maml', data='quickdraw', epochs=50)
  if arg.method not in METHODS:
    raise UserError(f'--config: method is one of {", ".join(METHODS)}, not {arg.method!r}')
  if not 1 <= arg.drawings <= 100:
    raise UserError(f'--config: drawings={arg.drawings}: 1 to 100, which validation and test have')
  many = arg.drawings > 20
  config = ml_collections.ConfigDict()
  config.total_steps = 100 * arg.epochs
  config.eval_every = config.checkpoint_every = 100
  config.data = dict(name=arg.data, tasks=25 if many else 10, way=arg.way, shot=arg.shot, query_shot=arg.shot, size=28)
  if arg.data == 'quickdraw':
    config.data.update(split='ffl', per_class=100, train_per_class=arg.drawings)
  elif arg.data == 'glyphs':
    config.data.update(classes=(207, 69, 69), images_per_class=arg.drawings)
  config.model = dict(name='conv4', width=20, downsample='pool')
  config.algorithm = dict(
    name='meta_sgd' if arg.method == 'meta_sgd' else 'maml',
    inner_steps=5,
    inner_lr=0.01 if many else 0.005,
    first_order=arg.method == 'fomaml',
    adapt_norm=False,
    batch_norm='transductive',
  )
  if arg.method == 'meta_sgd':
    config.algorithm.learned_lr = 'tensor'
  config.optimizer = dict(learning_rate=1e-3 if many else 5e-4)
  config.eval = dict(episodes=2500 if many else 1000, val_episodes=500)
  return config

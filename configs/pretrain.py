r"""A plain classifier over all training classes: the first phase of Meta-Transfer Learning (Sun et al. 2019).

    metajax train --config=pretrain:data=mini_imagenet,code=tensorflow --workdir=runs/pretrained
    metajax train --config=pretrain:data=omniglot,model=conv4,steps=2000 --data_dir=DIR

Its workdir is what `--config.init_from` of configs/meta_transfer.py takes, or of any learner with the same network. It
is validated, and tested, by few-shot episodes: nearest class means of normalised features. Recipes of the authors' two
codes:

- tensorflow: ResNet-12 of 512 features (`model=resnet18_mtl`: their ResNet-18, likewise, which makes images 224 pixels
  large), images of 84 pixels, dropout 0.1, batches of 64, Adam from 1e-3, halved every 5,000 meta-updates; 10,000 of
  them (theirs run on to 20,000 and take the weights in the middle). Their flipped copies on disk are random flips here.
- pytorch: ResNet-25 of 640 features, images of 80 pixels, batches of 128, a hidden layer of 1,000 units, SGD with
  Nesterov momentum from 0.1, a fifth after every 30 of 110 epochs. Of mini- and tiered-ImageNet images are cut from the
  middle 80 of 92 pixels, where theirs are cut from all of them; those of CIFAR-100 are made 80 pixels large. Its author
  reports 57.8 % in 1-shot validation on mini-ImageNet with a head that begins at random.

Where these differ from ours: the TensorFlow code keeps the weights after a fixed number of meta-updates, 10,000; here
`init_from` takes the best by validation, and the last is tested besides. Its rows are Glorot-uniform and its step size
falls one meta-update later; the PyTorch code's hidden layer is uniform up to PyTorch's bound, ours LeCun-normal. Other
data sets than mini- and tiered-ImageNet, CIFAR-FS and FC100 get no augmentation, and an epoch of 100 batches:
`--config.data.augment="('flip',)"` and `steps=` are yours to choose.

A batch is one task, so that one device has all of it. For four: `--config.data.tasks=4 --config.data.batch=16`, where
each task has batch statistics of its own.
"""

import ml_collections

from metajax.config import parse_arg
from metajax.errors import UserError

IMAGES = {'mini_imagenet': 38_400, 'tiered_imagenet': 448_695, 'cifar_fs': 38_400, 'fc100': 36_000}  # of training
MODELS = {'tensorflow': 'resnet12_mtl', 'pytorch': 'resnet25'}


def get_config(arg=None):
  arg = parse_arg(arg, data='mini_imagenet', code='tensorflow', model='', way=5, shot=1, steps=0)
  if arg.code not in MODELS:
    raise UserError(f'--config: code is one of {", ".join(MODELS)}, not {arg.code!r}')
  config = ml_collections.ConfigDict()
  config.data = dict(name=arg.data, tasks=1, way=arg.way, shot=arg.shot, query_shot=15)
  config.model = dict(name=arg.model or MODELS[arg.code])
  config.algorithm = dict(name='classifier', head='prototype', bias=True)
  if arg.code == 'tensorflow':
    config.total_steps = arg.steps or 10_000
    config.data.batch = 64
    config.optimizer = dict(learning_rate=1e-3)
    if config.total_steps > 5000:
      ends = range(5000, config.total_steps, 5000)
      rates = tuple(1e-3 * 0.5 ** (k + 1) for k in range(len(ends)))
      config.optimizer.update(schedule='steps', boundaries=tuple(ends), rates=rates)
  else:
    config.data.batch = 128
    epoch = IMAGES.get(arg.data, 12_800) // config.data.batch
    config.total_steps = arg.steps or 110 * epoch
    rates = {config.total_steps * k // 110: rate for k, rate in ((30, 0.02), (60, 0.004), (90, 0.0008))}
    rates.pop(0, None)  # of a run of a few meta-updates
    config.algorithm.hidden = 1000
    config.optimizer = dict(name='sgd', learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if rates:
      config.optimizer.update(schedule='steps', boundaries=tuple(rates), rates=tuple(rates.values()))
  config.eval_every = config.checkpoint_every = max(config.total_steps // (20 if arg.code == 'tensorflow' else 110), 1)
  if arg.data in IMAGES:
    config.data.size = 84 if arg.code == 'tensorflow' else 80
    config.data.augment = ('flip',) if arg.code == 'tensorflow' else ('resized_crop', 'flip')
    if arg.code == 'pytorch':
      config.data.normalize = 'mtl'
      if arg.data.endswith('imagenet'):
        config.data.crop = 80 / 92
  config.eval = dict(query_shot=15, val_episodes=600, last=True)
  if arg.data == 'omniglot':
    config.data.query_shot = config.eval.query_shot = 5
  return config

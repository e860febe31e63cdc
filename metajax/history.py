"""What validation so far says of a run: whether its step size falls, and whether its training ends early.

Decisions are functions of the scores of a run's regular validations, those after each `eval_every` meta-updates. They
stand in `metrics.jsonl`, so a run that goes on decides like one that was never stopped.
"""

from metajax import writer
from metajax.errors import UserError


def score(summary):
  """What checkpoints are ranked by, higher is better: the accuracy, in regression minus the loss."""
  return summary.get('accuracy', -summary['loss'])


def plateau_factor(scores, factor, patience):
  """What the step size is multiplied by after validations of these scores, as by PyTorch's ReduceLROnPlateau.

  With mode 'max' and otherwise its defaults. A score that is not higher than the best by 1e-4 of the best's size is a
  bad one; more than `patience` of them in a row multiply by `factor`, and the count begins anew. PyTorch's threshold of
  a negative best, (1 + 1e-4) times it, lies below it, so that a loss could rise without end: here it lies above.

  Args:
    scores: list of floats, in their order.
    factor: of each fall.
    patience: bad ones in a row that are put up with.

  Returns:
    a float, 1.0 before the first fall.
  """
  product, best, bad = 1.0, None, 0
  for value in scores:
    if best is None or value > best + 1e-4 * abs(best):
      best, bad = value, 0
    else:
      bad += 1
    if bad > patience:
      product, bad = product * factor, 0
  return product


def exhausted(scores, patience):
  """Whether none of the last `patience` scores was higher than all before them; never, if `patience` is 0."""
  return 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])


def check(config, splits):
  """Looks whether there will be the validations that the settings ask for.

  Args:
    config: complete.
    splits: names of those that the data has.

  Raises:
    UserError: there will be none.
  """
  if config.stop_patience < 0:
    raise UserError(f'config.stop_patience = {config.stop_patience}: a whole number from 0 on is needed')
  if not _matters(config):
    return
  setting = f'config.stop_patience = {config.stop_patience}' if config.stop_patience else "config.optimizer: 'plateau'"
  if 'val' not in splits:
    raise UserError(f'{setting} goes by validation, but {config.data.name} has no val split: add one, or leave it out')
  if config.eval_every == 0:
    raise UserError(f'{setting} goes by validation, but config.eval_every = 0: choose another')


def scores(workdir, config, step):
  """The scores of a run's regular validations up to a step; none if nothing goes by them.

  Raises:
    UserError: `metrics.jsonl` lacks some.
  """
  if not _matters(config):
    return []
  records = [r for r in writer.read(workdir) if 'val/loss' in r and r['step'] <= step]
  found = [r for r in records if r['step'] % config.eval_every == 0]
  if len(found) != step // config.eval_every:
    raise UserError(
      f'{workdir}/metrics.jsonl has {len(found)} of the {step // config.eval_every} validations up to step {step}, by '
      'which training goes on: restore it, or choose another --workdir'
    )
  return [score({name.removeprefix('val/'): value for name, value in record.items()}) for record in found]


def finished(workdir, config, step):
  """Whether a run whose latest checkpoint is of that step is trained to its end, be it an early one."""
  if step >= config.total_steps:
    return True
  try:
    return exhausted(scores(workdir, config, step), config.stop_patience)
  except UserError:  # to be told by training, which would go on
    return False


def _matters(config):
  return config.stop_patience > 0 or config.optimizer.schedule == 'plateau'

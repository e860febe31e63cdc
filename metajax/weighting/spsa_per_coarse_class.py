"""MTM SPSA-Coarse: a weight for each superclass, such as CIFAR-100's 20 or Omniglot's alphabets."""

from metajax.errors import UserError
from metajax.weighting import spsa_per_class


def make(
  *,
  superclass_ids,
  gain=('power', 0.25, 1 / 6),
  radius=('power', 15.0, 1 / 24),
  space='linear',
  normalize_every=0,
  norm='l2',
  update_from='last',
):
  """As `spsa_per_class.make`, with one weight for all classes of a superclass.

  Args:
    superclass_ids: (classes,), the superclass of each class of the training split, counted from 0; None without any.
    (others as in `spsa_per_class.make`)

  Raises:
    UserError: no superclasses, or see `spsa_per_class.make`.
  """
  if superclass_ids is None:
    raise UserError('spsa_per_coarse_class needs superclasses, and the data set has none: choose spsa_per_class')
  return spsa_per_class.shared(
    superclass_ids,
    update_from=update_from,
    gain=gain,
    radius=radius,
    space=space,
    normalize_every=normalize_every,
    norm=norm,
  )

"""Almost no inner loop (Raghu et al. 2020): MAML whose inner loop moves the head alone."""

import functools

from metajax.algorithms import maml

make = functools.partial(maml.make, inner_params=('head',))

"""Meta-SGD (Li, Zhou, Chen & Li 2017): MAML with a learned step size for every weight, in one inner step.

`learned_lr='tensor'` is the coarser form in Fast Forward Labs' code.
"""

import functools

from metajax.algorithms import maml

make = functools.partial(maml.make, inner_steps=1, inner_lr=0.1, learned_lr='element')

"""Meta-SGD (Li, Zhou, Chen & Li 2017): MAML with a learned step size for every weight.

The paper takes one inner step and draws the initial step sizes at random (`inner_lr_range`); `learned_lr='tensor'` is
the coarser form in Fast Forward Labs' code, which starts from 0.1.
"""

import functools

from metajax.algorithms import maml

make = functools.partial(maml.make, learned_lr='element')

"""MAML++ (Antoniou, Edwards & Storkey 2019): MAML with all that the paper adds, each part an option of `maml.make`.

| the paper's | setting |
| --- | --- |
| multi-step loss optimisation (MSL) | `multi_step_epochs` |
| derivative-order annealing (DA) | `first_order_epochs`; 0 in the authors' last code, so here |
| per-step batch normalisation weights (BNWB) | `adapt_norm=False, per_step_norm=True` |
| per-step statistics (BNRS) | `batch_norm='running', per_step_statistics=True`; the authors' code reads none |
| learned step sizes per layer and step (LSLR) | `learned_lr='tensor_step'` |
| cosine annealing (CA) | `optimizer.schedule`, see `configs/mamlpp.py` |
"""

import functools

from metajax.algorithms import maml

make = functools.partial(
  maml.make, learned_lr='tensor_step', multi_step_epochs=10, adapt_norm=False, per_step_norm=True
)

"""Masks as pure functions, which know nothing of models, optimizers or training: the folder can be read alone.

* ``permutation``: a keyed permutation of 0 … n-1, the same on every device and in every release of torch.
* ``patterns``: what is pruned as one unit (weights, n of every m, blocks, filters, channels).
* ``distributions``: how much of each layer is pruned (uniform, by name, ERK).
* ``plan``: from the user's arguments to a number of units for each layer and cycle.
* ``mask``, ``seeded``, ``explicit``: the masks themselves; seeded ones are drawn when needed, explicit ones are stored.
* ``records``: masks as they are saved.
"""

from .mask import Mask
from .plan import Plan, make_plan
from .seeded import SeededMask

__all__ = ["Mask", "Plan", "SeededMask", "make_plan"]

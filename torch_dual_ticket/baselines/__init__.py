"""What a transformed random ticket is to be compared with; their zeros are kept by the same mechanism.

==========================  =========================================================================================
dense                       train; this module is not needed
random ticket, scratch      ``random_ticket(model, 0.9)`` at initialization; train
magnitude pruning           train; ``hold(model, magnitude_masks(model, 0.9))``; finetune
random after dense          train; ``random_ticket(model, 0.9)``; finetune. RST without its penalty: the control
gradual pruning             :class:`GradualPruning`, transformed (or, with ``max_penalty=0``, by magnitude alone)
lottery ticket              :class:`LotteryTicket`
==========================  =========================================================================================

For a fair comparison give every method the same number of updates in total, and begin training anew after each change
of masks with a new optimizer: its momentum belongs to weights that were masked or rewound.
"""

from .gradual import GradualPruning
from .held import HeldMasks, hold, random_ticket
from .lottery import LotteryTicket
from .magnitude import magnitude_masks

__all__ = ["GradualPruning", "HeldMasks", "LotteryTicket", "hold", "magnitude_masks", "random_ticket"]

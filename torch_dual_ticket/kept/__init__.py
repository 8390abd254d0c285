"""Sparsity that pays while you train: optimizers see, and ranks exchange, the kept weights alone.

Both are for a model whose zeros are in force: after ``finalize()``, or with what :mod:`torch_dual_ticket.baselines`
returns. :class:`KeptParameters` is what an optimizer is built on in place of ``model.parameters()``;
:func:`kept_allreduce_hook` is a communication hook for ``DistributedDataParallel``. Each works without the other.
"""

from .communication import kept_allreduce_hook
from .parameters import KeptParameters

__all__ = ["KeptParameters", "kept_allreduce_hook"]

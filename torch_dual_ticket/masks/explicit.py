"""Explicit masks, weight by weight: the counterpart of the seeded ones in :mod:`torch_dual_ticket.masks.seeded`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ExplicitMask:
    """One mask that is stored, not drawn; it offers what :class:`torch_dual_ticket.masks.seeded.SeededMask` offers.

    >>> mask = ExplicitMask(torch.tensor([[True, False, True]]))
    >>> mask.shape, mask.pruned_weights, mask.draw(offset=(0, 1), size=(1, 2))
    ((1, 3), 1, tensor([[False,  True]]))
    """

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept.detach().to("cpu", copy=True).contiguous()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._kept.shape)

    @cached_property
    def pruned_weights(self) -> int:
        return self._kept.numel() - int(self._kept.count_nonzero())

    def draw(
        self,
        *,
        offset: Sequence[int] | None = None,
        size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The mask, or the block ``offset … offset + size`` of it, as a new bool tensor; True = kept."""
        offset = (0,) * len(self.shape) if offset is None else offset
        size = [full - first for full, first in zip(self.shape, offset, strict=True)] if size is None else size
        block = self._kept[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))]
        return block.to(device or "cpu", copy=True, memory_format=torch.contiguous_format)

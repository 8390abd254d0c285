"""Explicit masks, weight by weight: the counterpart of the seeded ones in :mod:`torch_dual_ticket.masks.seeded`."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

_BITS = torch.tensor([1 << position for position in range(8)], dtype=torch.uint8, device="cpu")


class ExplicitMask:
    """One mask that is stored, not drawn; it offers what :class:`torch_dual_ticket.masks.seeded.SeededMask` offers.

    >>> mask = ExplicitMask(torch.tensor([[True, False, True]]))
    >>> mask.shape, mask.pruned_weights, mask.draw(offset=(0, 1), size=(1, 2))
    ((1, 3), 1, tensor([[False,  True]]))
    """

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept.detach().to("cpu", copy=True).contiguous()

    @classmethod
    def of_bits(cls, bits: Tensor, shape: Sequence[int]) -> ExplicitMask:
        """The mask that has these :attr:`bits`.

        Raises:
            ValueError: they are not those of a mask of this shape.

        >>> ExplicitMask.of_bits(torch.tensor([5], dtype=torch.uint8), (1, 3)).draw()
        tensor([[ True, False,  True]])
        """
        weights = math.prod(shape)
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-weights // 8),):
            raise ValueError(
                f"the bits of a mask of shape {tuple(shape)} are {-(-weights // 8)} bytes, got {tuple(bits.shape)} of"
                f" {bits.dtype}"
            )
        kept = (bits.cpu().unsqueeze(1) & _BITS).flatten()[:weights] != 0
        return cls(kept.view(tuple(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._kept.shape)

    @cached_property
    def pruned_weights(self) -> int:
        return self._kept.numel() - int(self._kept.count_nonzero())

    @property
    def bits(self) -> Tensor:
        """The mask as uint8 on the CPU, eight weights a byte, the first of them in the lowest bit."""
        flat = self._kept.flatten()
        padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
        return (padded * _BITS).sum(1, dtype=torch.uint8)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on shape and values: equal fingerprints mean equal masks."""
        bits = self.bits
        digest = hashlib.sha256(json.dumps(["explicit", self.shape]).encode())
        digest.update(ctypes.string_at(bits.data_ptr(), len(bits)))
        return digest.hexdigest()[:16]

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

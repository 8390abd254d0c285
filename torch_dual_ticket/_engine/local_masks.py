"""The mask of one parameter where it is used: of the local shard, on its device, in the form that the kernels need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dtensor import is_sharded, local_offset, placement
from .kernels import SMALL, squared_norms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..masks.seeded import Mask

PART = 1 << 20  # weights whose mask is computed at a time where masks are not stored
SAMPLE = 1 << 16  # weights that are enough to tell their size by


class LocalMask:
    """Drawn at its first use and kept, one byte per weight; or drawn part by part at each use and thrown away.

    While the ticket is transformed, 1 at the masked weights, as uint8, or in the weight's dtype for small tensors. When
    it is enforced, 1 at the kept weights, as uint8; or, for small tensors, a bool that is True at the masked ones.
    """

    def __init__(self, mask: Mask, name: str, *, enforcing: bool, stored: bool) -> None:
        self._mask = mask
        self._name = name
        self._enforcing = enforcing
        self._stored = stored
        self._drawn: Tensor | None = None
        self._drawn_for: tuple[Any, ...] = ()
        self._drawn_at: tuple[int, torch.dtype, torch.Size] | None = None

    def is_stored_for(self, weight: Tensor) -> bool:
        """Small masks always are: they take next to nothing."""
        return self._stored or weight.numel() <= SMALL

    def whole(self, parameter: Tensor, weight: Tensor) -> Tensor:
        """All of it; ``weight`` is the local shard of the parameter, and the mask has its shape and layout."""
        address = (weight.data_ptr(), weight.dtype, weight.shape)
        if self._drawn is not None and self._drawn_at == address and type(parameter) is nn.Parameter:
            return self._drawn  # the common case, kept short: small models take this path more often than any other
        key = (weight.device, weight.dtype, weight.shape, weight.stride(), *placement(parameter))
        if self._drawn is None or self._drawn_for != key:
            self._check_shape(parameter, weight)
            with torch.inference_mode(False):  # a mask that is kept outlives an evaluation in inference mode
                kept = self._mask.draw(offset=local_offset(parameter), size=tuple(weight.shape), device=weight.device)
                formed = self._formed(kept, weight)
            if not self.is_stored_for(weight):
                return formed
            self._drawn, self._drawn_for = formed, key
        self._drawn_at = address
        return self._drawn

    def parts(self, parameter: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight, and their part of a mask that is not stored."""
        self._check_shape(parameter, weight)  # now, and not when the first part is asked for
        return self._drawn_in_parts(weight, *(local_offset(parameter) or (0,) * weight.dim()))

    def _drawn_in_parts(self, weight: Tensor, first: int, *others: int) -> Iterator[tuple[slice, Tensor]]:
        rows = max(1, PART * len(weight) // weight.numel())
        for start in range(0, len(weight), rows):
            which = slice(start, min(start + rows, len(weight)))
            part = weight[which]
            kept = self._mask.draw(offset=(first + start, *others), size=tuple(part.shape), device=weight.device)
            yield which, self._formed(kept, part)

    def sample(self, parameter: Tensor, weight: Tensor) -> tuple[slice, Tensor]:
        """Some rows of a weight that is not empty, and a bool tensor that is True at the masked ones in them."""
        if not self.is_stored_for(weight):
            rows, mask = next(self.parts(parameter, weight))
        else:
            rows = slice(max(1, SAMPLE * len(weight) // weight.numel()))
            mask = self.whole(parameter, weight)[rows]
        return rows, self._masked(mask)

    def squared_norms(self, parameter: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of squares of the masked weights and of all weights: scalars on its device, as of the kernel."""
        if self.is_stored_for(weight):
            return squared_norms(weight, self._masked(self.whole(parameter, weight)))
        parts = [squared_norms(weight[rows], self._masked(mask)) for rows, mask in self.parts(parameter, weight)]
        masked, total = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
        return masked, total

    def _masked(self, mask: Tensor) -> Tensor:
        return mask == 0 if mask.dtype is torch.uint8 and self._enforcing else mask != 0

    def enforce(self, weight: Tensor | None) -> None:
        """Go over to the form that keeps zeros, in place if it can."""
        self._enforcing = True
        if self._drawn is None or weight is None:
            self._drawn = None
        elif self._drawn.dtype is torch.uint8:
            self._drawn.bitwise_xor_(1)  # 1 stood for masked until now
        else:
            with torch.inference_mode(False):
                self._drawn = self._formed(self._drawn == 0, weight)

    def _formed(self, kept: Tensor, weight: Tensor) -> Tensor:
        """Of a bool tensor that nobody else has: where it can, the result takes its memory."""
        small = weight.numel() <= SMALL
        dtype = torch.uint8 if not small else torch.bool if self._enforcing else weight.dtype
        chosen = kept if self._enforcing and not small else kept.logical_not_()
        if not small and chosen.stride() == weight.stride():
            return chosen.view(dtype)
        return torch.empty_like(weight, dtype=dtype).copy_(chosen)

    def _check_shape(self, parameter: Tensor, weight: Tensor) -> None:
        if not is_sharded(parameter) and tuple(weight.shape) != self._mask.shape:
            raise RuntimeError(
                f"{self._name} has shape {tuple(weight.shape)}, but had {self._mask.shape} when the scheduler was"
                " built. Build a new one, after remove() on this one. (FSDP1 flattens parameters; use fully_shard.)"
            )

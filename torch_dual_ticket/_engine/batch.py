"""Parameters that are treated together: where that is simple, in one call on lists that are made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import Tensor, nn

from .._tensors.kernels import bits, is_simple
from ..masks.mask import Mask
from .parameter import ManagedParameter


class Batch(list["tuple[ManagedParameter, Tensor]"]):
    """Managed parameters with the tensors that they are now, and the groups of the optimizer that has them."""

    def __init__(
        self, managed: Iterable[tuple[ManagedParameter, Tensor]], groups: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__(managed)
        self.groups: Sequence[Mapping[str, Any]] = [{}] * len(self) if groups is None else groups
        self._ordinary = [tensor for _, tensor in self if type(tensor) is nn.Parameter and not tensor.is_meta]
        self._made_for: tuple[Any, ...] = ()
        self._masks: list[Tensor | None] = []
        self.bits: list[Tensor] = []  # integer views of those for which masks() has found one; they count no versions

    def where(self, chosen: Iterable[bool]) -> Batch:
        """Some of them."""
        which = list(chosen)
        return Batch(compress(self, which), list(compress(self.groups, which)))

    def masks(self, masks: Mapping[str, Mask], *, holds: bool) -> list[Tensor | None]:
        """For each parameter the mask for one operation on all of them; None where it takes more than that.

        They are looked up again when other masks apply, or a tensor has got another memory or size.
        """
        memory = [*map(Tensor.data_ptr, self._ordinary), *map(Tensor.numel, self._ordinary)]
        if not self._made_for or self._made_for[0] is not masks or self._made_for[1:] != (holds, memory):
            ordinary = set(map(id, self._ordinary))
            self._masks = [
                one.cache.whole(masks[one.name], tensor, holds=holds)
                if id(tensor) in ordinary and one.cache.is_stored_for(tensor) and is_simple(tensor)
                else None
                for one, tensor in self
            ]
            found = zip(self, self._masks, strict=True)
            self.bits = [bits(tensor.data) for (_, tensor), mask in found if holds and mask is not None]
            self._made_for = (masks, holds, memory)
        return self._masks

"""What the rest of the package needs of a mask, wherever it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor


class Mask(Protocol):
    """The mask of one parameter: a :class:`SeededMask`, which is drawn, or an :class:`ExplicitMask`, which is stored.

    Equal fingerprints mean equal masks. ``draw`` gives a bool tensor, True = kept: of the whole mask, or of the block
    ``offset … offset + size``.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def pruned_weights(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def draw(
        self,
        *,
        offset: Sequence[int] | None = None,
        size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor: ...

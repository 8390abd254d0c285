"""Explicit masks, weight by weight: the counterpart of the seeded ones in :mod:`torch_dual_ticket.masks.seeded`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._model.names import unwrapped_modules, unwrapped_parameters
from .._model.targets import check_model, find_targets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from .._model.targets import Target, TargetType


class ExplicitMask:
    """One mask that is stored, not drawn; it offers what :class:`torch_dual_ticket.masks.SeededMask` offers.

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
        """The mask, or the block ``offset … offset + size`` of it, as a bool tensor of its own; True = kept."""
        offset = (0,) * len(self.shape) if offset is None else offset
        size = [full - first for full, first in zip(self.shape, offset, strict=True)] if size is None else size
        block = self._kept[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))]
        return block.to(device or "cpu", copy=True, memory_format=torch.contiguous_format)


def find_masked(model: nn.Module, masks: Mapping[str, Tensor], types: Sequence[TargetType]) -> list[Target]:
    """The parameters that these masks, by parameter name, are for.

    Raises:
        TypeError: ``model`` is no module, or a mask that is no bool tensor.
        ValueError: no mask at all, a name that stands for no parameter of these types, or another shape than the
            parameter's.
    """
    check_model(model)
    if not masks:
        raise ValueError("there is nothing to hold: masks is empty")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name} must be a bool tensor, True = kept; got {kind}")
    everything = dict(unwrapped_parameters(model))
    wanted = {id(parameter) for name, parameter in everything.items() if name in masks}
    # Layers without a mask may be frozen, lazy or already pruned: they are left out before anything is asked of them.
    others = [
        _literally(name)
        for name, module in unwrapped_modules(model)
        if name and not any(id(parameter) in wanted for parameter in module.parameters())
    ]
    found = {target.name: target for target in find_targets(model, types, others)} if wanted else {}
    for name, mask in masks.items():
        if name not in found:
            first = {id(target.parameter): target.name for target in found.values()}.get(id(everything.get(name)))
            why = "the model has no such parameter"
            if name in everything:
                why = f"it is tied to {first}: name that" if first else "it belongs to none of the types in `targets`"
            names = ", ".join(found) or "none"
            raise ValueError(f"the mask of {name!r} has no parameter to go on: {why}. Found: {names}")
        if tuple(mask.shape) != found[name].shape:
            raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {found[name].shape}")
    return [target for name, target in found.items() if name in masks]


def _literally(name: str) -> str:
    """An fnmatch pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)

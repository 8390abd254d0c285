"""Masks as a user meets them: drawn by name, or applied to a model that nobody holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._model.names import unwrapped_parameters
from .._tensors.dtensor import local, local_offset, reshard
from .._tensors.kernels import clear_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._engine.ticket import Ticket
    from ..masks.mask import Mask


def apply_masks(model: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Set the masked weights to zero in a model that nobody need hold."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_masks() needs a torch.nn.Module, got {type(model).__name__}")
    reshard(model)
    parameters = dict(unwrapped_parameters(model))
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or tuple(parameter.shape) != mask.shape:
            what = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise ValueError(
                f"apply_masks() needs a model of the same structure: {name} has shape {mask.shape} here, and {what} in"
                f" the given {type(model).__name__}"
            )
    for name, mask in masks.items():
        zero_masked(parameters[name], mask)


@torch.no_grad()
def zero_masked(parameter: Tensor, mask: Mask) -> None:
    """Set the masked weights of one parameter to zero; of a DTensor those in this process's shard."""
    weight = local(parameter)
    kept = mask.draw(offset=local_offset(parameter), size=tuple(weight.shape), device=weight.device)
    clear_([(weight, torch.empty_like(weight, dtype=torch.uint8).copy_(kept))])


def still_managed(ticket: Ticket) -> dict[str, Any]:
    """The masks that apply now, but for parameters that were taken out of the ticket."""
    return {name: mask for name, mask in ticket.stage.masks.items() if name not in ticket.detached}


def sparsity_of(masks: Mapping[str, Mask]) -> float:
    """The fraction of masked weights over all of them together."""
    weights = sum(math.prod(mask.shape) for mask in masks.values())
    return sum(mask.pruned_weights for mask in masks.values()) / max(1, weights)


class MaskView(Mapping[str, Tensor]):
    """The masks by parameter name, each drawn when it is asked for."""

    def __init__(self, masks: Mapping[str, Mask], ticket: Ticket) -> None:
        self._masks = masks
        self._ticket = ticket

    def __getitem__(self, name: str) -> Tensor:
        tensor = next((one.tensor() for one in self._ticket.parameters if one.name == name), None)
        return self._masks[name].draw(device=None if tensor is None or tensor.is_meta else tensor.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"masks of {', '.join(self._masks)}"

"""Masks on a model as users meet them: looked at, applied to another model, changed, and taken off."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from .._engine.ticket import Ticket
from .._model.masked import check_given, find_masked
from .._model.names import unwrapped_parameters
from .._tables import Table, TableInNotebooks
from .._tensors.dtensor import local, reshard
from .._tensors.kernels import clear_
from .._tensors.mask_cache import MaskCache
from ..masks.mask import Mask
from ..prune import to_stock_layout
from .cut_warnings import warn_of_emptied
from .ranks import agree_on_masks
from .residual import Report, measure
from .validation import check_directions, check_reachable, modules_of


class ManagedMasks(TableInNotebooks):
    """What an ``RSTScheduler`` and the masks of :func:`torch_dual_ticket.baselines.hold` have in common."""

    _ticket: Ticket
    _model: nn.Module

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stage": self._ticket.stage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stage = state.pop("stage")
        self.__dict__.update(state)
        self._ticket.scheduler, self._ticket.model = weakref.ref(self), weakref.ref(self._model)
        self._ticket.stage = stage

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._layers})"

    def _table(self, width: int) -> Table:
        return replace(measure(self._ticket)._table(width), notes=(repr(self),))

    @property
    def phase(self) -> str:
        """``"transform"`` while masked weights are penalized, ``"finetune"`` while they are held at zero."""
        return self._ticket.stage.phase.value

    @property
    def penalty(self) -> float:
        """λ of the next update; 0 where masked weights are held at zero."""
        return self._ticket.stage.penalty

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor of the full shape, True = kept; those that apply now. Drawn when asked for."""
        return MaskView(self._masks(), self._ticket)

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights over all that have a mask; by the masks that apply now."""
        return sparsity_of(self._masks())

    def apply_masks(self, model: nn.Module) -> None:
        """Set the masked weights of another model of the same structure to zero, such as an EMA copy begun before.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: a parameter's name or shape is not found in ``model``; nothing is changed then.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"apply_masks() needs a torch.nn.Module, got {type(model).__name__}")
        reshard(model)
        parameters, masks = dict(unwrapped_parameters(model)), self._masks()
        for name, mask in masks.items():
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != mask.shape:
                what = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
                raise ValueError(
                    f"apply_masks() needs a model of the same structure: {name} has shape {mask.shape} here, and {what}"
                    f" in the given {type(model).__name__}"
                )
        for name, mask in masks.items():
            parameter = parameters[name]
            pieces: Any = MaskCache(name, stored=False).pieces(mask, parameter, local(parameter).detach(), holds=True)
            clear_(pieces)

    def to_prune(self) -> None:
        """Turn the finalized model into the layout of ``torch.nn.utils.prune``, for stock functions to stack on.

        ``weight_orig``, ``weight_mask`` and torch's own hook take over from this library, in the same order.

        Raises:
            RuntimeError: masked weights are not held at zero: before ``finalize()``, or after ``remove()``.
            ValueError: what this layout cannot carry: DTensor, tied, parametrized, not called (attention's out_proj).
        """
        if not self._ticket.holds:
            raise RuntimeError("to_prune() needs the final masks: call finalize() first")
        if not (self._ticket.parameters or prune.is_pruned(self._model)):  # a second call changes nothing
            raise RuntimeError(
                "to_prune() came after remove(), and no layer is managed any more: call it before. For the zeros that"
                " there are, torch_dual_ticket.baselines.hold(model).to_prune() does it."
            )
        self._ticket.reshard()
        to_stock_layout(self._ticket)

    def remove(self) -> None:
        """Take every hook off and leave a plain model: zeros stay where they are, but nothing holds them."""
        self._ticket.release()

    @property
    def _layers(self) -> str:
        count = len(self._masks())
        return f"{count} layer{'' if count == 1 else 's'} at {self.sparsity:.2%} sparsity"

    @property
    def _steps(self) -> int:
        """Scheduler steps that counted."""
        return self._ticket.stage.steps

    @property
    def _report(self) -> Report:
        return self._ticket.stage.report or Report.of(())

    def _masks(self) -> dict[str, Mask]:
        """Those that apply now, but for parameters that were taken out of the ticket."""
        return {name: mask for name, mask in self._ticket.stage.masks.items() if name not in self._ticket.detached}

    def _checked(self, masks: Mapping[str, Tensor]) -> Mapping[str, Mask]:
        """Other masks for the same parameters, which all ranks have been given. Changes nothing."""
        check_given(masks)
        check_reachable(self._ticket, stacklevel=4, inside=modules_of(self._ticket))
        mine = self._masks()
        if not self._ticket.parameters:
            raise RuntimeError(
                "nothing is managed any more: remove() was called, or the layers are gone. Begin anew on the model."
            )
        wrong = sorted(set(masks) ^ set(mine), key=str)
        if wrong:
            what = "a mask is missing" if wrong[0] in mine else "it is not managed here"
            raise ValueError(
                f"{wrong[0]!r}: {what}. There must be one for each of the parameters that have one here ("
                f"{', '.join(list(mine)[:3])}{', …' if len(mine) > 3 else ''}), and no others."
            )
        found, explicit = find_masked(self._model, masks, frozen=True)
        check_directions(found, explicit)
        agree_on_masks(explicit, self._model)
        warn_of_emptied(
            {name: mask for name, mask in explicit.items() if mine[name].pruned_weights < mask.pruned_weights},
            stacklevel=4,
        )
        return explicit


def sparsity_of(masks: Mapping[str, Mask]) -> float:
    """The fraction of masked weights over all that have a mask."""
    total = sum(math.prod(mask.shape) for mask in masks.values())
    return sum(mask.pruned_weights for mask in masks.values()) / max(1, total)


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

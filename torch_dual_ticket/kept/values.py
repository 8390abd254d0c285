"""The kept weights of a ticket as optimizers see them, and how they stay equal to those in the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .._engine.batch import Batch
from .._engine.enforcement import Enforcement
from .._engine.optimizer_hooks import register
from .._engine.parameter import ManagedParameter
from .._engine.stage import Phase, Stage
from .._engine.ticket import Ticket
from ..masks.mask import Mask
from .index import clear_masked_, kept_index
from .weight import KeptWeight

# They look at rows, columns or means of a weight, which a vector of the kept ones does not have.
_LOOK_AT_SHAPES = {
    *("adafactor", "adahessian", "adai", "adalite", "adammini", "adamp", "adams", "adatam", "alice", "amos", "avagrad"),
    *("came", "conda", "dash", "distributedshampoo", "emofact", "galoreadamw", "kfac", "kron", "mars", "muon", "nero"),
    *("racs", "ranger", "ranger21", "rose", "scion", "scionlight", "sgdp", "sgdsai", "shampoo", "sm3", "soap"),
    *("sparseadam", "splus", "stableadamw", "tam"),
}


class KeptValues(Ticket):
    """All kept weights of a ticket. The engine calls it around the steps of optimizers, as it does any ticket."""

    def __init__(self, ticket: Ticket) -> None:
        masks = ticket.stage.masks
        super().__init__(None, masks)
        self.stage = Stage(Phase.FINETUNE, masks)
        self.weights = {one.name: KeptWeight(one, masks[one.name], tensor) for one, tensor in ticket.managed()}
        self.parameters = tuple(self.weights.values())
        self._of = weakref.ref(ticket)

    def start(self) -> None:
        ticket = self._of()
        assert ticket is not None
        ticket.enforcement = KeptEnforcement(self)  # the switch: what is not done then, is at the next update
        register(self)
        for managed, parameter in ticket.managed():
            ticket.connect(managed, parameter)
            managed.cache.drop()  # a byte for each weight
        ticket.drop_tensors()  # with which it has masks, too
        for weight, parameter in self.sources():
            weight.take_gradient(parameter)

    def stop(self) -> None:
        ticket = self._of()
        if ticket is None or values_of(ticket) is not self:  # stopped already; others may have the gradients now
            return
        for weight, parameter in self.sources():
            weight.disconnect()
            weight.give_back(parameter)
        ticket.enforcement = Enforcement()

    def before_update(self, batch: Batch, optimizer: Optimizer) -> None:
        ticket = self._of()
        if ticket is None or values_of(ticket) is not self or not ticket.holds:
            raise RuntimeError(
                f"this {type(optimizer).__name__} updates kept weights that are in no model any more: KeptParameters"
                " was removed, or the masks are not in force. Build the optimizer on model.parameters(), and move its"
                " state there with kept.move_state()."
            )
        for base in type(optimizer).__mro__:
            if base.__name__.lower() in _LOOK_AT_SHAPES:
                raise RuntimeError(
                    f"{base.__name__} looks at the shape of a weight, and KeptParameters gives it vectors of kept"
                    " weights: its updates would be others. Use an optimizer that treats every weight by itself, such"
                    " as AdamW; or build this one on model.parameters()."
                )
        found = list(self.sources(batch))
        for weight, parameter in found:
            check_whole(weight.name, parameter)
        if ticket.stage.masks is not self.stage.masks:
            self._adopt_masks(ticket.stage.masks)
        for weight, parameter in found:
            weight.take_gradient(parameter)

    def after_update(self, batch: Batch) -> None:
        self.zero(batch)
        # DDP makes zeros of a gradient that it finds and no rank has.
        if dist.is_available() and dist.is_initialized():
            for weight, parameter in self.sources(batch):
                weight.hide_gradient(parameter)

    @torch.no_grad()
    def zero(self, batch: Batch, masks: Any = None) -> None:
        """Write the values to the model, where the masked weights are and stay zero."""
        ticket = self._of()
        changed = [(one.source, parameter) for one, parameter in self.sources(batch) if not one.write(parameter)]
        if changed and ticket is not None:
            ticket.zero(Batch(changed))

    def sources(self, batch: Batch | None = None) -> Iterator[tuple[KeptWeight, Tensor]]:
        for one in self.weights.values() if batch is None else (one for one, _ in batch):
            assert isinstance(one, KeptWeight)
            if (parameter := one.source.tensor()) is not None:
                yield one, parameter

    def _adopt_masks(self, masks: Mapping[str, Mask]) -> None:
        for weight, parameter in self.sources():
            if not torch.equal(weight.index, kept_index(weight.source, masks[weight.name], parameter)):
                raise RuntimeError(
                    f"the mask of {weight.name} has changed since KeptParameters was built, and the optimizer's state"
                    " belongs to other weights. Call kept.remove() before the masks change; then build a new"
                    " KeptParameters and a new optimizer."
                )
        for weight in self.weights.values():
            weight.mask = masks[weight.name]
        self.stage = replace(self.stage, masks=masks)


class KeptEnforcement(Enforcement):
    """Gradients are taken, and none is masked; an index of the kept weights takes the place of masks."""

    def __init__(self, values: KeptValues) -> None:
        self.values = values

    def connect(self, managed: ManagedParameter, parameter: Tensor) -> None:
        if managed.name in self.values.weights:
            self.values.weights[managed.name].connect(parameter)

    def check_update(self, batch: Batch, optimizer: Optimizer) -> None:
        raise RuntimeError(
            f"this {type(optimizer).__name__} has {batch[0][0].name}, whose gradients KeptParameters takes: it would"
            " change nothing. Build it on kept.parameters(); or call kept.remove() to go on with all weights."
        )

    def mask_gradients(self, batch: Batch, masks: Mapping[str, Mask], update: int) -> None:
        for managed, parameter in batch:
            if managed.name in self.values.weights:
                self.values.weights[managed.name].take_gradient(parameter)

    def clear(self, batch: Batch, masks: Mapping[str, Mask]) -> None:
        for managed, parameter in batch:
            clear_masked_(parameter.data, kept_index(managed, masks[managed.name], parameter))

    def stop(self) -> None:
        self.values.stop()


def values_of(ticket: Ticket) -> KeptValues | None:
    """The kept values of a ticket, where these are trained alone."""
    return ticket.enforcement.values if isinstance(ticket.enforcement, KeptEnforcement) else None


def check_whole(name: str, parameter: Tensor) -> None:
    """``RuntimeError`` for a parameter of another type: it may not be in this process as a whole."""
    if type(parameter) is not nn.Parameter:
        raise RuntimeError(
            f"{name} is a {type(parameter).__name__}, and KeptParameters takes ordinary parameters alone. Build the"
            " optimizer on model.parameters(). (FSDP2 and tensor parallelism divide its state among the ranks already.)"
        )

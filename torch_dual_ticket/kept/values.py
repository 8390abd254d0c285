"""The kept weights of a ticket as optimizers see them, and how they stay equal to those in the model."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._engine.batch import Batch
from .._engine.gradient_hook import taking_hooks
from .._engine.optimizer_hooks import register
from .._engine.parameter import MARK, ManagedParameter, is_treated, note_treated, stamp_of
from .._engine.ticket import Phase, Stage, Ticket
from .index import gather, kept_index, laid_out_as, scatter_

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

    from ..masks.mask import Mask

# They look at rows, columns or means of a weight, which a vector of the kept ones does not have.
_LOOK_AT_SHAPES = {
    *("adafactor", "adahessian", "adammini", "adamp", "came", "distributedshampoo", "galoreadamw", "kfac", "muon"),
    *("sgdp", "shampoo", "sm3", "soap", "sparseadam"),
}
_GATHERED = -1  # in the engine's mark on a gradient, in place of the number of an update


class KeptWeight(ManagedParameter):
    """The kept weights of one managed parameter, the source, in a vector: all that an optimizer sees of it."""

    def __init__(self, source: ManagedParameter, mask: Mask, parameter: Tensor) -> None:
        super().__init__(source.name, stores_mask=False)
        self.source, self.mask = source, mask
        self.index = kept_index(source, mask, parameter)
        self.values = nn.Parameter(gather(parameter.detach(), self.index), requires_grad=parameter.requires_grad)
        self.source_stamp = stamp_of(parameter)  # of the parameter when the values were read or written
        self.stamp = stamp_of(self.values)  # of the values, then: if they have changed since, they must be written
        # The parameter's gradient after it was gathered: zeros that take no memory. zero_grad() of the model removes or
        # changes them, which no hook would tell.
        self._stand_in: Tensor | None = None
        self._is_awaited = False  # a gradient is on its way
        self._hooks: tuple[Any, ...] = ()

    def tensor(self) -> Tensor:
        return self.values

    @torch.no_grad()
    def read(self, parameter: Tensor) -> None:
        """Take over the parameter's values, if something else has changed them."""
        if self.source_stamp == stamp_of(parameter):
            return
        self.index = kept_index(self.source, self.mask, parameter)
        values = gather(parameter, self.index)
        if (values.device, values.dtype) == (self.values.device, self.values.dtype):
            self.values.copy_(values)
        else:  # the model was moved or converted
            self.values.data = values
        self.source_stamp, self.stamp = stamp_of(parameter), stamp_of(self.values)

    @torch.no_grad()
    def write(self, parameter: Tensor) -> bool:
        """Write the values to the parameter; returns whether its masked weights are known to be zero."""
        is_clean = self.source.is_clean(parameter)
        scatter_(parameter, self.index, self.values)
        self.source_stamp, self.stamp = stamp_of(parameter), stamp_of(self.values)
        if is_clean:
            self.source.stamp = self.source_stamp
        return is_clean

    # -- gradients -----------------------------------------------------------------------------------------------------

    def connect(self, parameter: Tensor) -> None:
        def before(_: Tensor) -> None:
            self.before_gradient()

        def after(parameter: Tensor) -> None:
            if not _is_deferred():
                self.gather_gradient(parameter)

        self.disconnect()
        source: Any = parameter  # torch has no types for these
        uncompiled: Any = torch.compiler.disable  # a compiled training step would trace into them
        if not parameter.is_inference():
            with taking_hooks(parameter):
                self._hooks = (
                    source.register_hook(uncompiled(before)),
                    source.register_post_accumulate_grad_hook(uncompiled(after)),
                )

    def disconnect(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def before_gradient(self) -> None:
        """A gradient is about to be added to the one that the parameter has."""
        parameter = self.source.tensor()
        if parameter is None:
            return
        if not self._is_gathered(parameter.grad):
            self._zeroed_with_model()
        elif self.values.grad is None:  # zeroed through the optimizer
            parameter.grad = None
        if self._has_stand_in(parameter):
            parameter.grad = None
        self._is_awaited = True

    @torch.no_grad()
    def gather_gradient(self, parameter: Tensor, *, at_end: bool = False) -> None:
        """Take over the parameter's gradient, if that was not done yet.

        At the end of backward() other ranks may have changed it without a trace, even where this one has no part in it.
        """
        grad, values = parameter.grad, self.values
        if grad is None or self._has_stand_in(parameter):
            return
        if self._is_gathered(grad) and not (at_end and values.grad is not None):
            return
        self.read(parameter)
        kept = self.pick(grad, parameter)
        if _is_deferred():
            values.grad, stays = kept, grad
        else:
            values.grad = kept if values.grad is None else values.grad.add_(kept)
            stays = parameter.grad = self._new_stand_in(parameter)
        self._is_awaited = False
        note_treated([stays, values.grad], _GATHERED)

    def before_update(self, parameter: Tensor) -> None:
        """The values and their gradient are about to be used."""
        self.read(parameter)
        self.gather_gradient(parameter)
        grad, values = parameter.grad, self.values
        if grad is None:
            self._zeroed_with_model()
        elif not self._is_gathered(grad) and values.grad is not None:  # a stand-in that was zeroed in place
            values.grad.zero_()
            note_treated([grad], _GATHERED)

    def free_gradient(self, parameter: Tensor) -> None:
        """After an update; the values' gradient is still there, as an optimizer leaves it."""
        if parameter.grad is not None and not self._has_stand_in(parameter):
            parameter.grad.__dict__.pop(MARK, None)  # a view of a bucket comes back
            parameter.grad = None
            if self.values.grad is not None:
                self.values.grad.__dict__.pop(MARK, None)

    @torch.no_grad()
    def give_back(self, parameter: Tensor) -> None:
        """Leave the parameter the gradient that it would have had."""
        if self._has_stand_in(parameter):
            parameter.grad, grad = None, self.values.grad
            if grad is not None:
                parameter.grad = self.spread(grad, parameter)

    def pick(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """The elements at the kept weights of a tensor of the parameter's shape."""
        return gather(laid_out_as(parameter, whole), self.index)

    def spread(self, values: Tensor, parameter: Tensor) -> Tensor:
        """A tensor like the parameter, with these values at the kept weights and zeros at the others."""
        whole = torch.zeros_like(parameter, dtype=values.dtype, requires_grad=False)
        scatter_(whole, self.index, values)
        return whole

    def _is_gathered(self, grad: Tensor | None) -> bool:
        """Whether the parameter's gradient was gathered, and has not changed since.

        Views of a bucket of DistributedDataParallel share a version, which changes with the gradients of biases.
        """
        if grad is None or self._is_awaited or MARK not in grad.__dict__:
            return False
        return is_treated(grad, _GATHERED) or (grad._is_view() and grad is not self._stand_in)

    def _zeroed_with_model(self) -> None:
        grad = self.values.grad
        if grad is not None and MARK in grad.__dict__:  # others are not ours: somebody has assigned them
            self.values.grad = None

    def _has_stand_in(self, parameter: Tensor) -> bool:
        return parameter.grad is not None and parameter.grad is self._stand_in

    def _new_stand_in(self, parameter: Tensor) -> Tensor:
        known = self._stand_in
        if known is None or known.dtype != parameter.dtype or known.device != parameter.device:
            self._stand_in = known = parameter.new_zeros(()).expand(parameter.shape)
        return known


def _is_deferred() -> bool:
    """Whether gradients are gathered at the end of backward, and stay in the model until the update.

    DistributedDataParallel averages what is in the model, and that may have accumulated before.
    """
    return dist.is_available() and dist.is_initialized()


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
        ticket.kept = self  # the switch: what an interruption leaves undone here is done at the next update
        register(self)
        for managed, parameter in ticket.managed():
            ticket.connect(managed, parameter)
        self.gather_gradients()
        self._drop_masks(ticket)

    def stop(self) -> None:
        ticket = self._of()
        for weight, parameter in self.sources():
            weight.disconnect()
            weight.give_back(parameter)
        if ticket is not None and ticket.kept is self:
            ticket.kept = None
            ticket.mask_gradients(ticket.managed())

    # -- what the source's ticket calls --------------------------------------------------------------------------------

    def connect(self, managed: ManagedParameter, parameter: Tensor) -> None:
        if managed.name in self.weights:
            self.weights[managed.name].connect(parameter)

    def gather_gradients(self) -> None:
        at_end = _is_deferred()
        for weight, parameter in self.sources():
            weight.gather_gradient(parameter, at_end=at_end)

    def refuse(self, optimizer: Optimizer | None, batch: Batch) -> None:
        raise RuntimeError(
            f"this {type(optimizer).__name__} has {batch[0][0].name}, whose gradients KeptParameters takes: it would"
            " change nothing. Build it on kept.parameters(); or call kept.remove() to go on with all weights."
        )

    # -- what the hooks of optimizers call -----------------------------------------------------------------------------

    def before_update(self, batch: Batch, optimizer: Optimizer | None = None) -> None:
        ticket = self._of()
        if ticket is None or ticket.kept is not self or not ticket.holds:
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
            weight.before_update(parameter)

    def after_update(self, batch: Batch) -> None:
        self.zero(batch)
        for weight, parameter in self.sources(batch):
            weight.free_gradient(parameter)

    def zero(self, batch: Batch, masks: Any = None, *, counted: bool = False) -> None:
        """Write the values to the model, where the masked weights are and stay zero."""
        ticket = self._of()
        changed = [(one.source, parameter) for one, parameter in self.sources(batch) if not one.write(parameter)]
        if changed and ticket is not None:
            ticket.zero(Batch(changed))
            self._drop_masks(ticket)

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

    def _drop_masks(self, ticket: Ticket) -> None:
        """Free a byte for each weight: masks are drawn again where something else has changed the weights."""
        ticket._managed = Batch([])
        for weight in self.weights.values():
            weight.source.cache.drop()


def check_whole(name: str, parameter: Tensor) -> None:
    """``RuntimeError`` for a parameter that is not in this process as a whole."""
    if type(parameter) is not nn.Parameter:
        raise RuntimeError(
            f"{name} is a {type(parameter).__name__}, and KeptParameters takes whole parameters alone: FSDP2 and tensor"
            " parallelism divide the optimizer's state among the ranks already. Build the optimizer on"
            " model.parameters()."
        )

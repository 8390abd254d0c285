"""A ticket: the managed parameters of one model, and what happens to all of them when."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from .._tensors.dtensor import is_sharded, local, mesh_of, reshard
from .._tensors.kernels import clear_
from ..masks.mask import Mask
from .batch import Batch
from .call_stack import in_functional_call
from .enforcement import Enforcement
from .gradient_hook import gradient_hook, register
from .graph_capture import CapturedPenalty
from .parameter import ManagedParameter, is_treated, stamp_of
from .penalty import add_penalty
from .stage import Phase, Stage
from .updates import Updates


class Ticket:
    """The managed parameters of one model.

    The hooks on the layers own their ticket, so zeros are held for as long as the model lives; a transformation goes on
    for as long as ``scheduler`` lives.
    """

    def __init__(
        self,
        model: nn.Module | None,
        masks: Mapping[str, Mask],
        *,
        scheduler: Any = None,
        optimizer: Optimizer | None = None,
        stores_masks: bool = True,
        before_first: Callable[[Ticket], None] | None = None,
        after_each: Callable[[Ticket, int], None] | None = None,
        before_restoring: Callable[[Ticket, ManagedParameter, Tensor], None] | None = None,
    ) -> None:
        self.stage = Stage(Phase.IDLE, masks)
        self.parameters: tuple[ManagedParameter, ...] = ()
        self.detached: set[str] = set()  # names that prune.remove took out, or whose layers are gone
        self.optimizer = None if optimizer is None else weakref.ref(optimizer)  # the only one that is to penalize
        self.updates = Updates()
        self.captured = CapturedPenalty()
        self.enforcement = Enforcement()
        self.stores_masks = stores_masks
        self.is_released = False
        self.manual = False  # apply_penalty() was called: there may be updates that no hook sees
        self.model: Callable[[], nn.Module | None] = _weak(model)  # unknown to a copy
        self.scheduler = _weak(scheduler)
        self._managed = Batch([])  # as it was when somebody last asked; empty if it may have changed since
        self._before_first = before_first  # called once, before the first update
        self._after_each = after_each  # called with the number of updates of that optimizer in this scheduler step
        self._before_restoring = before_restoring  # called where something else than an optimizer has changed zeros
        self._gradient_hook = gradient_hook(self._on_gradients)

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """That of the stage, or idle where the scheduler of a transformation is gone, or the ticket was released."""
        phase = self.stage.phase
        is_dropped = phase is Phase.TRANSFORM and self.scheduler() is None
        return Phase.IDLE if is_dropped or self.is_released else phase

    @property
    def holds(self) -> bool:
        """Whether the masked weights are held at zero."""
        return self.stage.phase is Phase.FINETUNE

    def mask(self, managed: ManagedParameter) -> Mask:
        return self.stage.masks[managed.name]

    def managed(self) -> Batch:
        """All parameters that are there, with their tensors."""
        known, parameters = self._managed, self.parameters  # once: a copy in another thread may add to them
        tensors = [managed.tensor() for managed in parameters]
        if len(known) != len(tensors) or not all(map(is_, tensors, (tensor for _, tensor in known))):
            found = zip(parameters, tensors, strict=True)
            self._managed = known = Batch([(managed, tensor) for managed, tensor in found if tensor is not None])
        return known

    def drop_tensors(self) -> None:
        """Keep no tensor of the model; each is looked up again when it is needed."""
        self._managed = Batch([])
        for managed in self.parameters:
            managed.shard = None

    def reshard(self) -> None:
        """Put the shards of an FSDP2 model in place, so that changes reach them."""
        if (model := self.model()) is not None:
            reshard(model)

    # -- changes of phase ----------------------------------------------------------------------------------------------

    def transform(self, masks: Mapping[str, Mask], penalty: float, steps: int) -> None:
        """Penalize from now on, with these masks and this λ; weights that were held at zero may grow again."""
        if masks is not self.stage.masks:
            self.captured.masks_change()
        self.captured.fill(penalty)
        if was_held := self.holds:
            self.enforcement.stop()
        self.stage = Stage(Phase.TRANSFORM, masks, penalty, steps)  # the switch
        if was_held:
            for managed in self.parameters:
                managed.stamp = None
                managed.disconnect()

    def hold_zeros(self, masks: Mapping[str, Mask], steps: int = 0, report: Any = None) -> None:
        """Set the masked weights to zero, and hold them there from now on. The shards are in place."""
        self.captured.masks_change()
        managed = self.managed()
        for _, parameter in managed:
            increment_version(local(parameter))  # a backward() through the old values must raise
        self.zero(managed.where(not parameter.is_meta for _, parameter in managed), masks)
        self.updates.number += 1  # gradients that were penalized are to be masked
        self.stage = Stage(Phase.FINETUNE, masks, steps=steps, report=report)  # the switch
        self.mask_gradients(managed)
        self.updates.number += 1  # and once more before the update: until then .data may change them unseen
        torch.clear_autocast_cache()  # it may hold casts of the weights as they were

    def release(self) -> None:
        """Leave a plain model: no hook is left."""
        self.enforcement.stop()
        self.is_released = True  # the switch: hooks that are still there do nothing
        self.stage = replace(self.stage, penalty=0.0)
        for managed in self.parameters:
            managed.remove_hooks()
        self.parameters, self._managed = (), Batch([])

    def detach(self, managed: ManagedParameter) -> None:
        """One parameter leaves the ticket for good; zeros stay where they are."""
        self.detached.add(managed.name)
        self.parameters = tuple(other for other in self.parameters if other is not managed)
        self._managed = Batch([])
        managed.remove_hooks()

    def has_lost_layers(self) -> bool:
        """Whether layers do not exist any more; a parameter that another layer has taken over is not known there."""
        return len(self._managed) < len(self.parameters) and any(one.layer() is None for one in self.parameters)

    def detach_lost(self, inside: Collection[nn.Module] | None = None) -> list[str]:
        """Detach parameters whose layers are gone, or not ``inside`` the model any more, and return their names."""
        lost = [managed for managed in self.parameters if not managed.is_attached(inside)]
        for managed in lost:
            self.detach(managed)
        return [managed.name for managed in lost]

    # -- gradients -----------------------------------------------------------------------------------------------------

    def connect(self, managed: ManagedParameter, parameter: Tensor) -> None:
        """Mask the gradients of this tensor at the end of each backward pass, before clipping looks at them."""
        managed.disconnect()
        managed.hook = register(parameter, self._gradient_hook)
        self.enforcement.connect(managed, parameter)

    def _on_gradients(self, parameter: Tensor | None) -> None:
        """Mask the gradient of this parameter; at the end of a backward pass, for None, all of them.

        Not those alone that have met a hook: DDP brings the gradients of other ranks to layers that this one has not
        used. FSDP2 brings them to shards, which need not be in the model at this moment.
        """
        if self.phase is not Phase.FINETUNE:
            return
        managed = self._managed or self.managed()  # as forwards and updates have last seen them
        if parameter is not None:
            managed = managed.where(one is parameter for _, one in managed)
        self.mask_gradients(managed)
        shards = [(one, one.shard) for one, tensor in managed if one.shard is not None and one.shard is not tensor]
        if shards:
            self.mask_gradients(Batch(shards))

    def mask_gradients(self, batch: Batch) -> None:
        """Set the gradients of the masked weights to zero, where that is not done yet."""
        self.enforcement.mask_gradients(batch, self.stage.masks, self.updates.number)

    # -- the penalty ---------------------------------------------------------------------------------------------------

    def penalize(self, batch: Batch, optimizer: Optimizer | None = None) -> list[tuple[ManagedParameter, Tensor]]:
        """Add λ·w to the gradients of the masked weights, once to each gradient; returns those where it was due."""
        # First: where an update cannot be captured, nothing is drawn, and nothing changed.
        grads = (grad for _, parameter in batch if (grad := parameter.grad) is not None)
        factor = self.captured.factor(grads, self.stage.penalty)
        if self._before_first is not None and self.updates.serial == 0:
            self._before_first(self)
        return add_penalty(batch, self.stage.masks, factor, self.updates, optimizer)

    def apply_penalty(self) -> bool:
        """For loops whose update no hook sees; returns whether a managed parameter had a gradient."""
        self.reshard()
        managed = self.managed()
        if all(parameter.grad is None for _, parameter in managed):
            return False
        # A new update begins here, and not in step(): the one before may be made after that.
        self.updates.number += self.holds or (self.manual and not self.updates.silenced)
        self.manual = self.updates.silenced = True
        if self.holds:
            self.mask_gradients(managed)
            self.zero(managed)
        elif self.penalize(managed):
            self.updates.note()
        return True

    # -- zeros ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def zero(self, batch: Batch, masks: Mapping[str, Mask] | None = None) -> None:
        """Set the masked weights to zero, by default those of the masks that apply now.

        No version is counted for that, so a backward() through them does not complain: they were zero when it saved
        them, or whatever has changed them since was counted.
        """
        self.enforcement.clear(batch, self.stage.masks if masks is None else masks)
        for one, parameter in batch:  # after all changes: views of one tensor share a version
            before, stamp = one.stamp, stamp_of(parameter)
            if before is None or before[0] != stamp[0] or before[1] != stamp[1]:  # a tensor unknown so far
                self.connect(one, parameter)
            one.stamp = stamp
            one.shard = None if type(parameter) is nn.Parameter or not is_sharded(parameter) else parameter

    def before_update(self, batch: Batch, optimizer: Optimizer) -> None:
        """Mask gradients that were assigned, or changed after they had been masked, as by clipping."""
        self.enforcement.check_update(batch, optimizer)
        update = self.updates.number
        if any((grad := tensor.grad) is not None and not is_treated(grad, update) for _, tensor in batch):
            self.mask_gradients(batch)

    def after_update(self, batch: Batch) -> None:
        self.zero(batch)
        self.updates.number += 1

    def at_forward(self, managed: ManagedParameter, *, trusts_stamp: bool) -> None:
        """The safety net of a layer, for changes that no hook of an optimizer has seen: put the zeros back.

        What is written through ``.data`` changes no stamp: it is not trusted before a state_dict(), nor at the first
        forward in another mode, as averages and merged adapters are for evaluation.
        """
        parameter = None if self.is_released else managed.tensor()
        if parameter is None and managed.is_attached():
            managed.check_present()
        # What functional_call puts in is the caller's own. A fake tensor has no values: torch.export traces with it.
        if not isinstance(parameter, nn.Parameter) or isinstance(parameter, FakeTensor):
            return
        shard = managed.shard
        if shard is not None and mesh_of(parameter) != mesh_of(shard):
            # FSDP2 has gathered the parameter for this forward: a passing copy of shards that are managed themselves.
            if self.manual or not managed.is_clean(shard):
                self.zero(Batch([(managed, shard)]))
                kept = self.mask(managed).draw(device=parameter.device)
                clear_([(local(parameter).data, kept.view(torch.uint8))])
            return
        is_clean = managed.is_clean(parameter)
        if is_clean and not self.manual and (trusts_stamp or parameter.is_meta or parameter.is_inference()):
            return
        managed.check_kind(parameter)
        is_known = managed.stamp is None or managed.stamp[0] == parameter._cdata
        if not is_known and in_functional_call():
            return
        is_changed = managed.is_changed(parameter)
        changed = self._changed_in_place() if is_changed else Batch([(managed, parameter)])
        if self._before_restoring is not None and not is_clean:
            for entry in changed:
                self._before_restoring(self, *entry)
        if is_replaced := not (is_clean or is_changed):
            # zero() connects the hook of a new tensor: one that was swapped in can have the address of the one before.
            managed.stamp, self._managed = None, Batch([])
        self.zero(changed)
        if is_replaced:
            self.mask_gradients(changed)

    def _changed_in_place(self) -> Batch:
        """All that were: what updates weights by hand, or clips them, does not stop at one."""
        found = ((one, one.tensor()) for one in self.parameters)
        return Batch([(one, tensor) for one, tensor in found if tensor is not None and one.is_changed(tensor)])

    # -- scheduler steps -----------------------------------------------------------------------------------------------

    def unpenalized(self) -> list[ManagedParameter]:
        """Those without a penalty since the last scheduler step; replays of a graph are taken for granted."""
        since = self.updates.serial_at_step
        return [one for one in self.parameters if one.penalized_at <= since and not self.captured.is_captured]

    def counts(self, *, is_last: bool) -> bool:
        """Whether a scheduler step counts now; for certain, if it is the last one.

        Replays of a CUDA graph are not seen: one is taken for granted.
        """
        self.captured.check_not_capturing()
        return self.updates.settle(wait=is_last) or self.captured.is_captured

    def resume(self, *, pending: bool) -> None:
        """Go on from a saved state: what was applied here before counts no more."""
        self.updates.resume(pending=pending)
        if self.stage.steps:
            for managed in self.parameters:
                managed.penalized_at = max(managed.penalized_at, 0)  # it may have been, before the restart

    def note_update(self, optimizer: Optimizer) -> None:
        """A step of the optimizer is over."""
        if self.updates.complete(optimizer) and self._after_each is not None:
            self._after_each(self, self.updates.count_by_optimizer[id(optimizer)])

    # -- copies --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        names = ("manual", "stores_masks", "detached")
        return {"stage": replace(self.stage, masks={}), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(None, {})  # type: ignore[misc]
        self.__dict__.update(state)  # the hooks of the copied layers adopt their parameters

    def adopt(self, name: str, mask: Mask) -> ManagedParameter:
        """The parameter of this name, which is new to this ticket where a copied layer is the first to have it."""
        known = next((managed for managed in self.parameters if managed.name == name), None)
        if known is None:
            known = ManagedParameter(name, stores_mask=self.stores_masks)
            self.stage = replace(self.stage, masks={**self.stage.masks, name: mask})
            self.parameters = (*self.parameters, known)
        return known


def _weak(thing: Any) -> Callable[[], Any]:
    """What gives the thing for as long as it lives, and then None, as it does where there is none."""
    return (lambda: None) if thing is None else weakref.ref(thing)

"""The forward pre-hook of a layer with a managed parameter, which is also what torch.nn.utils.prune and copies see."""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle

from .call_stack import name_to_prune
from .optimizer_hooks import register
from .parameter import ManagedParameter, WeakOccurrence, remove_hook
from .stage import Phase
from .ticket import Ticket

_FINETUNE = Phase.FINETUNE  # the members of an Enum are slow to look up


class LayerHook(prune.BasePruningMethod):
    """Registered with the ticket, as compiled code ignores hooks that are added later; idle until ``finalize()``."""

    PRUNING_TYPE = "unstructured"
    # The layer's mode at the last forward, None in a new copy. Averages and adapters are put in where it changes, often
    # through .data, which changes no stamp.
    _was_training: bool | None = None

    def __init__(self, ticket: Ticket, managed: ManagedParameter, occurrence: Any) -> None:
        layer, name, attribute = occurrence.layer, occurrence.tensor_name, occurrence.attribute
        self.ticket, self.managed, self._was_training = ticket, managed, layer.training
        self._occurrence = WeakOccurrence(layer, name, occurrence.owner, attribute)
        managed.occurrences.append(self._occurrence)
        # Before the hooks of the older weight_norm and spectral_norm, which compute the weight from this parameter.
        self._occurrence.hook_id = layer.register_forward_pre_hook(self, prepend=attribute != name).id
        layer._state_dict_pre_hooks[self._occurrence.hook_id] = self

    def __call__(self, module: nn.Module, inputs: Any, keep_vars: bool | None = None) -> None:
        """Before a forward; and before a state_dict(), which alone gives ``keep_vars``."""
        if is_compiling():  # first: a trace is not a forward, and would be made anew where what follows changes
            return
        ticket = self.ticket
        if ticket.stage.phase is not _FINETUNE:
            return
        managed = self.managed
        if keep_vars is not None:
            if managed.tensor() is not None:
                ticket.at_forward(managed, trusts_stamp=False)
            return
        training, known = module.training, self._was_training
        if training is known and not ticket.manual:  # the common case, passed most often
            parameter = module._parameters.get(self._occurrence.tensor_name)
            if type(parameter) is Parameter:
                try:
                    if managed.stamp == (parameter._cdata, parameter.data_ptr(), parameter._version):
                        return
                except RuntimeError:  # made in inference mode: it has no version
                    pass
        self._was_training = training
        ticket.at_forward(managed, trusts_stamp=training is known)

    # -- the torch.nn.utils.prune side ---------------------------------------------------------------------------------

    @property
    def _tensor_name(self) -> str:  # type: ignore[override]
        """What torch.nn.utils.prune compares by: its functions ask for it before they change anything."""
        name = self._occurrence.tensor_name
        if name_to_prune() == name:
            advice = (
                "The scheduler was dropped: torch_dual_ticket.release(model) takes off what it has left there."
                if self.ticket.phase is Phase.IDLE
                else "After finalize(), to_prune() on the scheduler turns the model into the layout that the stock"
                f" functions work on; or detach this layer from the scheduler with prune.remove(layer, {name!r})."
            )
            raise RuntimeError(
                f"{self.managed.name} is managed by an RSTScheduler, and torch.nn.utils.prune cannot prune on top of"
                f" that. {advice}"
            )
        return name

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The ticket's mask on top of ``default_mask``; as :meth:`BasePruningMethod.compute_mask`."""
        kept = self.ticket.mask(self.managed).draw(device=t.device)
        return default_mask * kept.to(default_mask.dtype)

    def remove(self, module: nn.Module) -> None:
        """Called by ``prune.remove``: the parameter leaves the ticket for good."""
        self.ticket.detach(self.managed)
        module._forward_pre_hooks[self._occurrence.hook_id] = self  # which prune.remove deletes now

    # -- copies --------------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of a finalized model holds its zeros; one that is made before is a plain model."""
        if self.ticket.phase is not Phase.FINETUNE:
            return NoOpHook, ()
        here, managed = self._occurrence, self.managed
        layer, owner = here.layer(), here.owner()
        place = (layer, here.tensor_name, layer if owner is None else owner, here.attribute, here.hook_id)
        state = self.ticket, managed.name, self.ticket.mask(managed), place, managed.tensor()
        return copyreg.__newobj__, (LayerHook,), state  # type: ignore[attr-defined]  # as weights_only=True allows

    def __setstate__(self, state: Any) -> None:
        self.ticket, name, mask, place, parameter = state
        self.managed = self.ticket.adopt(name, mask)
        self._occurrence = WeakOccurrence(*place)
        self.managed.occurrences.append(self._occurrence)
        # As RemovableHandle does: a hook that is registered later must not take this one's place.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self._occurrence.hook_id + 1)
        if parameter is not None:
            self.managed.stamp = (parameter._cdata, 0, -1)  # the right tensor, whose zeros are still to be checked
            # Not only at the first forward: a child that its parent never calls has none, and clipping comes before
            # the first step.
            self.ticket.connect(self.managed, parameter)
        register(self.ticket)


class NoOpHook:
    """Stands in a copy where the original has its hook."""

    def __call__(self, module: nn.Module, inputs: Any, keep_vars: bool | None = None) -> None: ...


def manage(ticket: Ticket, targets: Iterable[Any]) -> None:
    """Register the ticket's hooks where these parameters occur. It stays idle until it enters a phase.

    A target has a name, and occurrences with layer, tensor_name, owner and attribute; ``users`` are modules that use
    the parameter without calling its layer. Hooks of tickets that are idle, and of copies, leave these layers.
    """
    parameters = []
    for target in targets:
        managed = ManagedParameter(target.name, stores_mask=ticket.stores_masks)
        for occurrence in (*target.occurrences, *target.users):
            for key, hook in list(occurrence.layer._forward_pre_hooks.items()):
                is_ours = isinstance(hook, LayerHook) and hook.ticket is not ticket
                if isinstance(hook, NoOpHook) or (is_ours and hook.ticket.phase is Phase.IDLE):
                    remove_hook(occurrence.layer, key)
            LayerHook(ticket, managed, occurrence)
        parameters.append(managed)
    ticket.parameters = tuple(parameters)
    register(ticket)


def layer_hooks(model: nn.Module) -> Iterator[LayerHook]:
    """The hooks of tickets on the layers of the model."""
    for module in model.modules():
        yield from (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, LayerHook))


def release(model: nn.Module) -> None:
    """Take all hooks of this library off the layers of the model, and end what they belong to."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, LayerHook):
                hook.ticket.release()
            elif isinstance(hook, NoOpHook):
                remove_hook(module, key)

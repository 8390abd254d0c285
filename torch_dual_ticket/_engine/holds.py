"""A hold: one masked parameter, where it stands in the model, and what keeps its masked weights at zero."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle

from .._rst.mask_view import zero_masked
from .dtensor import is_sharded, local, mesh_of, placed_like, version
from .frames import in_functional_call
from .kernels import clear_
from .local_masks import LocalMask
from .vacancy import Vacancy, is_collecting
from .watches import GradientWatch

if TYPE_CHECKING:
    from .._model.targets import Place
    from ..masks.seeded import Mask
    from .tickets import Ticket

    # What a parameter was when its masked weights were last set to zero; and the shard of a DTensor, strongly: tensors
    # that are referenced weakly cannot be swapped.
    Zeroed = tuple[tuple[int, int, int] | None, Tensor | None]


class Hold(prune.BasePruningMethod):
    """A target parameter in the hands of a ticket; also the forward pre-hook of its layer.

    While the ticket is transformed the pre-hook does nothing. It is there so that compiled code, which ignores hooks
    that appear later, knows of it, and so that ``prune.is_pruned`` and ``prune.remove`` do. Modules and parameters are
    looked up each time: ``fully_shard`` and ``load_state_dict(assign=True)`` replace parameters. Modules are referenced
    weakly, as a cycle would keep a dropped model in memory; parameters not at all, as ``swap_tensors``, which
    ``model.to()`` uses, refuses tensors that have weak references.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, ticket: Ticket, name: str, place: Place, mask: Mask, *, primary: bool) -> None:
        self.ticket = ticket
        self.name = name
        self.primary = primary  # False for the further places of a tied parameter
        self.attribute = place.attribute
        self.tensor_name = place.tensor_name
        self.mask = mask
        self._layer = weakref.ref(place.layer)
        self._owner = weakref.ref(place.owner)
        self._forget()
        # Before the hooks of the older weight_norm and spectral_norm, which compute the weight from this parameter.
        self.goes_first = self.attribute != self.tensor_name
        self.hook_id: int = place.layer.register_forward_pre_hook(self, prepend=self.goes_first).id
        self.attached = True

    def _forget(self) -> None:
        """Begin with nothing cached."""
        self._renew_local_mask()
        self.watch = GradientWatch(self)

    def _renew_local_mask(self) -> None:
        enforcing, stored = isinstance(self, ActiveHold), self.ticket.stores_masks
        self.local_mask = LocalMask(self.mask, self.name, enforcing=enforcing, stored=stored)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing: the dense network is trained."""

    # -- the parameter and its mask ------------------------------------------------------------------------------------

    def owner(self) -> nn.Module | None:
        """The module that registers the parameter."""
        return self._owner()

    def parameter(self) -> Tensor | None:
        found = _parameters(self._owner()).get(self.attribute)
        if found is None or self.attribute != self.tensor_name:
            plain = _parameters(self._layer()).get(self.tensor_name)
            if plain is not None:  # weight_norm, say, was removed, and its zeros are the weight's
                self._owner, self.attribute = self._layer, self.tensor_name
                return plain
        return found

    def is_in_place(self) -> bool:
        """Whether the layer lives and has this hook; optimizers that had the parameter may keep a hold for longer."""
        layer = self._layer()
        hooks = {} if layer is None else layer.__dict__.get("_forward_pre_hooks", {})
        has_owner = self._owner() is not None or self.parameter() is not None
        return self.attached and has_owner and hooks.get(self.hook_id) is self

    def check_reachable(self) -> None:
        """The parameter is where it was; ``RuntimeError`` if something has taken it away."""
        if self.parameter() is None:
            raise RuntimeError(
                f"{self.name} is no parameter of its layer any more: a reparametrization (weight_norm, parametrize, "
                "FSDP1) has replaced it, and it can be neither penalized nor held at zero. Build the scheduler after"
                f" that; or take the layer out of its hands with prune.remove(layer, {self.tensor_name!r})."
            )

    def layer(self) -> nn.Module:
        """The module whose forward uses the parameter."""
        layer = self._layer()
        if layer is None:
            raise RuntimeError(f"the layer of {self.name} does not exist any more: its model was dropped")
        return layer

    def device(self) -> torch.device:
        """Where the weight is; the CPU while it has no memory yet."""
        parameter = self.parameter()
        return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device

    def set_mask(self, mask: Mask) -> None:
        self.mask = mask
        self._renew_local_mask()

    # -- enforcement ---------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """From now on the masked weights are zero. The ticket must be enforcing already."""
        parameter = self.parameter()
        self.local_mask.enforce(None if parameter is None else local(parameter))
        self.__class__ = ActiveHold
        if parameter is not None and not self.is_clean(parameter):
            self.zero(parameter)
            self.note_zeroed(parameter)
            self.watch.over(parameter)

    def deactivate(self) -> None:
        self.__class__ = Hold
        self._renew_local_mask()
        self.watch.stop()

    def zero(self, parameter: Tensor, *, counted: bool = True) -> None:
        """Set the masked weights to zero. Call it under ``no_grad``, and :meth:`note_zeroed` after it.

        If not ``counted``, backward() takes no offence at it: right where they should be zero already, or where the
        change that made them something else has been counted.
        """
        weight = local(parameter)
        self._clear(weight if counted else weight.data, parameter, weight)

    def note_zeroed(self, parameter: Tensor) -> None:
        """The masked weights are zero as of now; to be called when those of all parameters are."""
        self.ticket.zeroed[self.name] = _stamp(parameter), parameter if is_sharded(parameter) else None

    def is_clean(self, parameter: Tensor) -> bool:
        """Whether the parameter is unchanged since its masked weights were set to zero."""
        return self._zeroed()[0] == _stamp(parameter)

    def _zeroed(self) -> Zeroed:
        return self.ticket.zeroed.get(self.name, (None, None))

    def mask_gradient(self, parameter: Tensor) -> None:
        """Set the gradients of the masked weights to zero. Call it under ``no_grad``."""
        grad = parameter.grad
        if grad is None:
            return
        weight = local(parameter)
        if grad.is_sparse:
            grad = parameter.grad = grad.coalesce()
            clear_(grad._values(), self.local_mask.whole(parameter, weight)[grad._indices()[0]])
            return
        if grad.is_conj():
            grad = parameter.grad = grad.resolve_conj()
        if is_sharded(grad):
            grad = parameter.grad = placed_like(grad, parameter)
        self._clear(local(grad), parameter, weight)

    def _clear(self, tensor: Tensor, parameter: Tensor, weight: Tensor) -> None:
        """Set the masked elements to zero: of the local shard of the parameter, or of its gradient."""
        if self.local_mask.is_stored_for(weight):
            clear_(tensor, self.local_mask.whole(parameter, weight))
        else:
            for rows, kept in self.local_mask.parts(parameter, weight):
                clear_(tensor[rows], kept)

    @torch.no_grad()
    def squared_norms(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of squares of the masked weights and of all weights in this process's shard."""
        return self.local_mask.squared_norms(parameter, local(parameter).detach())

    # -- the torch.nn.utils.prune side ---------------------------------------------------------------------------------

    @property
    def _tensor_name(self) -> str:  # type: ignore[override]
        """The attribute that torch.nn.utils.prune compares by.

        The stock functions take an earlier method out of the layer's hooks and then ask it for this name; that is the
        moment at which the layer can be put right and they can be refused.
        """
        layer = self._layer()
        if self.attached and layer is not None and layer._forward_pre_hooks.get(self.hook_id) is not self:
            layer._forward_pre_hooks[self.hook_id] = self
            if self.goes_first:
                layer._forward_pre_hooks.move_to_end(self.hook_id, last=False)  # type: ignore[attr-defined]
            else:
                for later in [key for key in layer._forward_pre_hooks if key > self.hook_id]:
                    layer._forward_pre_hooks[later] = layer._forward_pre_hooks.pop(later)
            raise RuntimeError(
                f"{self.name} is held by an RSTScheduler, and torch.nn.utils.prune cannot prune on top of that. After"
                " finalize(), to_prune() on the scheduler turns the model into the layout that the stock functions"
                " work on; or take this layer out of the scheduler's hands with prune.remove(layer,"
                f" {self.tensor_name!r})."
            )
        return self.tensor_name

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The ticket's mask on top of ``default_mask``; as :meth:`BasePruningMethod.compute_mask`."""
        return default_mask * self.mask.draw(device=t.device).to(default_mask.dtype)

    def remove(self, module: nn.Module) -> None:
        """Called by ``prune.remove``: the layer leaves the ticket for good; zeros stay where they are."""
        self.ticket.given_up.add(self.name)
        for hold in self.ticket.holds:
            if hold.name == self.name:
                hold.detach(keep_hook=hold is self)  # prune.remove deletes its hook itself

    def detach(self, *, keep_hook: bool = False) -> None:
        """Take the hooks off the layer and the parameter."""
        self.attached = False
        self.ticket.detached += 1
        self.watch.stop()
        layer = self._layer()
        hooks: dict[int, Any] = {} if layer is None or keep_hook else layer._forward_pre_hooks
        if hooks.get(self.hook_id) is not self:
            return
        if is_collecting():
            hooks[self.hook_id] = Vacancy()
        else:
            del hooks[self.hook_id]

    # -- copies --------------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.ticket.enforcing:
            return Vacancy, ()  # a copy made during the transformation is a plain model
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        names = ("ticket", "name", "primary", "attribute", "tensor_name", "mask", "hook_id", "goes_first")
        parameter = self.parameter()  # which may have moved
        layer, owner = self._layer(), self._owner()
        state = {name: getattr(self, name) for name in names}
        return state | {"layer": layer, "owner": layer if owner is None else owner, "parameter": parameter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layer = weakref.ref(state.pop("layer"))
        self._owner = weakref.ref(state.pop("owner"))
        parameter = state.pop("parameter")
        self.__dict__.update(state)
        self._forget()
        self.attached = True
        # As RemovableHandle does: a hook that is registered later must not take this one's place.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_id + 1)
        self.ticket.add(self)
        if parameter is not None:
            self.ticket.zeroed[self.name] = (parameter._cdata, 0, -1), None  # known, but not known to be clean
            # Not only at the first forward: a child that its parent never calls has none, and clipping comes before
            # the first step.
            self.watch.over(parameter)


class ActiveHold(Hold):
    """A hold of a finalized ticket. The class of a :class:`Hold` is swapped: its place among the hooks stays."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """The safety net, for changes that no optimizer hook has seen: zero again what is not zero any more."""
        if torch.compiler.is_compiling():
            return
        parameter = self.parameter()
        if type(parameter) is nn.Parameter and not self.ticket.by_hand and self.is_clean(parameter):
            return  # the common case
        if parameter is None and self.is_in_place() and module is self._layer():  # not one that a conversion has made
            self.check_reachable()
        # What functional_call puts in is the caller's own. A fake tensor has no values: torch.export traces with it.
        if not isinstance(parameter, nn.Parameter) or isinstance(parameter, FakeTensor):
            return
        stamp, shard = self._zeroed()
        if shard is not None and mesh_of(parameter) != mesh_of(shard):
            # FSDP2 has gathered the parameter for this forward: a passing copy of shards that are held themselves.
            if self.ticket.by_hand or not self.is_clean(shard):
                with torch.no_grad():
                    self.zero(shard)
                    self.note_zeroed(shard)
                zero_masked(parameter, self.mask)
        elif self.ticket.by_hand or not self.is_clean(parameter):
            is_known = stamp is None or stamp[0] == parameter._cdata
            if not is_known and in_functional_call(sys._getframe(1)):
                return
            is_counted = stamp is not None and stamp[:2] == _stamp(parameter)[:2]  # whatever has changed it since
            with torch.no_grad():
                self.zero(parameter, counted=not is_counted)  # which a graph that has it already would not bear
                self.note_zeroed(parameter)
                self.watch.over(parameter)


def _stamp(parameter: Tensor) -> tuple[int, int, int]:
    """Changes with the parameter, its memory and its values; ``.data = …`` changes the memory alone."""
    if type(parameter) is nn.Parameter:
        # What inference mode has made counts no versions: its changes outside optimizers go unseen.
        counted = -1 if parameter.is_inference() else parameter._version
        return parameter._cdata, parameter.data_ptr(), counted
    return parameter._cdata, local(parameter).data_ptr(), version(parameter)


def _parameters(module: nn.Module | None) -> dict[str, Tensor | None]:
    """Empty also for a module that another thread is just copying: its attributes are set last."""
    return {} if module is None else module.__dict__.get("_parameters", {})

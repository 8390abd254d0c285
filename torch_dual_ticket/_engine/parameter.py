"""One managed parameter: where it occurs in the model, its mask on its device, and whether its zeros are in place."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._tensors.dtensor import is_sharded, local, placed_like, version
from .._tensors.kernels import squared_norms
from .._tensors.mask_cache import MaskCache
from ..masks.mask import Mask

MARK = "_dual_ticket_treated"  # the attribute of a gradient that says for which update it was penalized or masked


class WeakOccurrence:
    """A layer that uses the parameter, and the module that registers it: the layer, or a parametrization in it.

    Modules are referenced weakly: a cycle would keep a dropped model in memory.
    """

    def __init__(self, layer: nn.Module, tensor_name: str, owner: nn.Module, attribute: str, hook_id: int = -1) -> None:
        self.layer, self.owner = weakref.ref(layer), weakref.ref(owner)
        self.tensor_name, self.attribute = tensor_name, attribute
        self.hook_id = hook_id  # of the forward pre-hook on the layer

    def is_attached(self, inside: Collection[nn.Module] | None) -> bool:
        """Whether the layer still has its hook, and lives ``inside`` the model with what registers the parameter."""
        layer, owner = self.layer(), self.owner()
        if layer is None or self.hook_id not in layer.__dict__.get("_forward_pre_hooks", {}):
            return False
        if layer._parameters.get(self.tensor_name) is not None:
            owner = layer
        return owner is not None and (inside is None or (layer in inside and owner in inside))


class ManagedParameter:
    """A parameter of a ticket; tied ones occur in several layers.

    The tensor is looked up each time and never kept: ``fully_shard``, ``load_state_dict(assign=True)`` and
    ``swap_tensors`` replace it.
    """

    def __init__(self, name: str, *, stores_mask: bool) -> None:
        self.name = name
        self.occurrences: list[WeakOccurrence] = []
        self.cache = MaskCache(name, stored=stores_mask)
        self.penalized_at = -1  # the serial number of the last penalty batch it was in
        self.shard: Tensor | None = None  # the DTensor whose masked weights were set to zero
        self.hook: Any = None  # the handle of the hook on the gradient
        self.stamp: tuple[int, int, int] | None = None  # of the tensor when its masked weights were set to zero
        self._home: Any = lambda: None  # the module that has the tensor, weakly, and its name there
        self._key = ""

    def tensor(self) -> Tensor | None:
        """The parameter as it is now; None if its layers are gone, or something has taken it out of them."""
        module = self._home()
        found: Tensor | None = None if module is None else module._parameters.get(self._key)
        if found is not None:
            return found
        for one in self.occurrences:
            # First in the layer, as a parametrization may be gone.
            for home, key in ((one.layer, one.tensor_name), (one.owner, one.attribute)):
                # A module that is just being copied, or unpickled, has no attributes yet.
                found = getattr(home(), "__dict__", {}).get("_parameters", {}).get(key)
                if found is not None:
                    if key == one.tensor_name:  # what a parametrization has may go back to the layer
                        self._home, self._key = home, key
                    return found
        return None

    def check_present(self) -> None:
        """``RuntimeError`` if something has taken the parameter out of its layer."""
        if self.tensor() is None:
            raise RuntimeError(
                f"{self.name} is not a parameter of its layer any more: a reparametrization (weight_norm, parametrize,"
                " FSDP1) has replaced it, and it can be neither penalized nor held at zero. Build the scheduler after"
                f" that; or detach the layer from it with prune.remove(layer, {self.occurrences[0].tensor_name!r})."
            )

    def check_kind(self, parameter: Tensor) -> None:
        """``RuntimeError`` if the parameter has become a tensor of a type that hides its values."""
        if is_converted(parameter):
            raise RuntimeError(
                f"{self.name} has become a {type(parameter).__name__}, as by quantization, and its zeros cannot be held"
                " any more. Release it first: remove() on its scheduler, or torch_dual_ticket.release(model) where no"
                " name reaches that, as in a copy; then convert it. Its zeros stay."
            )

    def layer(self) -> nn.Module | None:
        """The first layer that uses the parameter and still exists."""
        return next((layer for one in self.occurrences if (layer := one.layer()) is not None), None)

    def is_attached(self, inside: Collection[nn.Module] | None = None) -> bool:
        """Whether a layer that uses it still has its hook, and is ``inside`` the model, where its modules are given."""
        return any(occurrence.is_attached(inside) for occurrence in self.occurrences)

    def disconnect(self) -> None:
        """Remove the hook on the gradient."""
        if self.hook is not None:
            self.hook.remove()
        self.hook = None

    def remove_hooks(self) -> None:
        """Remove the hooks on the gradient and on the layers."""
        self.disconnect()
        for occurrence in self.occurrences:
            if (layer := occurrence.layer()) is not None:
                remove_hook(layer, occurrence.hook_id)

    def is_clean(self, parameter: Tensor) -> bool:
        """Whether the tensor is the one whose masked weights were set to zero, and unchanged since."""
        return self.stamp == stamp_of(parameter)

    def is_changed(self, parameter: Tensor) -> bool:
        """Whether the tensor is the one whose masked weights were set to zero, and was changed in place since."""
        known = self.stamp
        # Asked first: what functional_call lends may be a wrapper without memory, whose address cannot be asked for.
        if known is None or known[0] != parameter._cdata or parameter.is_meta:
            return False
        now = stamp_of(parameter)
        return known[1] == now[1] and known[2] < now[2]  # a tensor that was swapped in begins with a low version

    def squared_norms(self, mask: Mask, parameter: Tensor, *, holds: bool) -> Tensor:
        """The sums of squares of the masked weights and of all weights in this process's shard."""
        weight = local(parameter).detach()
        pieces: Any = self.cache.pieces(mask, parameter, weight, holds=holds)
        return squared_norms(pieces, 0 if holds else 1, weight.device)

    def weight_pieces(self, mask: Mask, parameter: Tensor) -> Iterable[Any]:
        """Weight and mask, of this process's shard; backward() does not notice changes."""
        return self.cache.pieces(mask, parameter, local(parameter).data, holds=True)

    def gradient_pieces(
        self, mask: Mask, parameter: Tensor, grad: Tensor, *, holds: bool
    ) -> Iterable[tuple[Tensor, ...]]:
        """A writable gradient, weight and mask, of this process's shard; of a sparse one the rows that it has."""
        weight = local(parameter)
        if not grad.is_sparse:
            return self.cache.pieces(mask, parameter, local(grad), weight, holds=holds)
        rows = grad._indices()[0]
        return [(grad._values(), weight[rows], self.cache.whole(mask, parameter, holds=holds)[rows])]


def is_converted(parameter: Tensor) -> bool:
    """Whether it is of a type that hides its values, as the tensors that quantization makes, other than a DTensor."""
    return is_traceable_wrapper_subclass(parameter) and not is_sharded(parameter)


def remove_hook(layer: nn.Module, hook_id: int) -> None:
    """Take a hook of ours off a layer: before its forward and before its state_dict()."""
    layer._state_dict_pre_hooks.pop(hook_id, None)
    layer._forward_pre_hooks.pop(hook_id, None)


def stamp_of(parameter: Tensor) -> tuple[int, int, int]:
    """Changes with the tensor, its memory and its values; ``.data = …`` changes the memory alone."""
    if type(parameter) is nn.Parameter:
        # What inference mode has made counts no versions: its changes outside optimizers go unseen.
        return parameter._cdata, parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version
    return parameter._cdata, local(parameter).data_ptr(), version(parameter)


def is_treated(grad: Tensor, update: int) -> bool:
    """Whether the gradient was penalized or masked for this update, and is unchanged since."""
    mark: tuple[int, int] | None = grad.__dict__.get(MARK)
    return mark is not None and mark == (grad._version if type(grad) is Tensor else version(grad), update)


def note_treated(grads: list[Tensor], update: int) -> None:
    """Call it after all changes: views of one bucket of DDP share a version."""
    for grad in grads:
        grad.__dict__[MARK] = (grad._version if type(grad) is Tensor else version(grad), update)


def writable(parameter: Tensor, grad: Tensor) -> Tensor:
    """The parameter's gradient, which gets a form that can be changed in place, sharded as the parameter is."""
    if grad.is_sparse:
        grad = parameter.grad = grad.coalesce()
    elif grad.is_conj():
        grad = parameter.grad = grad.resolve_conj()
    elif is_sharded(grad):
        grad = parameter.grad = placed_like(grad, parameter)
    return grad

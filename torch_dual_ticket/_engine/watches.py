"""What masks the gradients of one parameter as they arrive, before clipping and optimizers look at them."""

from __future__ import annotations

import weakref
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from .dtensor import is_offloaded
from .forgotten import warn_of_orphaned_parameter
from .hooks import held_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from .holds import Hold


_MARK = "_dual_ticket_masked_at"  # the attribute of a gradient that says when the hook has masked it


class GradientWatch:
    """The post-accumulate hook of a hold, on whatever tensor its parameter is at the moment."""

    def __init__(self, hold: Hold) -> None:
        self._hold = weakref.ref(hold)
        self._hook: RemovableHandle | None = None
        self._watched = 0  # the tensor behind the parameter that has the hook
        self._looks = 0  # how often somebody has asked for masked gradients

    def note_masked(self, grad: Tensor) -> None:
        """The hook has masked this gradient since the last look at it."""
        grad.__dict__[_MARK] = self._looks

    def over(self, parameter: Tensor) -> None:
        """Mask the gradients of this parameter from now on, and the one that is there already, under ``no_grad``."""
        hold = self._hold()
        if hold is None or parameter.is_inference():  # the latter never has a gradient
            return
        if is_offloaded(parameter):  # its gradient may still be on the way when FSDP2 calls the hooks
            hold.mask_gradient(parameter)
            return
        hooks = parameter._post_accumulate_grad_hooks
        if self._hook is not None and hooks and self._hook.id in hooks and self._watched == parameter._cdata:
            grad = parameter.grad
            # It has not met our hook if one before ours is taking the step at this moment, or if it did not come from
            # backward(): torch.autograd.grad, gradient surgery.
            if grad is not None and grad.__dict__.get(_MARK) != self._looks:
                hold.mask_gradient(parameter)
            self._looks += 1
            return
        self.stop()
        if any(_is_of_another_place(other) for other in (hooks or {}).values()):
            return
        hook = partial(_uncompiled(), self._hold, hold.name)
        is_frozen = not parameter.requires_grad
        if is_frozen:  # it may thaw, and its first gradient be clipped; torch takes no hook before that
            parameter.requires_grad_(True)
        self._hook = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        if is_frozen:
            parameter.requires_grad_(False)
        # swap_tensors leaves the hooks where they are, but disconnects them: setting them connects them again.
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
        self._watched = parameter._cdata
        hold.mask_gradient(parameter)

    def stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


def _is_of_another_place(hook: object) -> bool:
    """Whether a hook masks the gradients already: of the same parameter, tied to another place."""
    return isinstance(hook, partial) and hook.func is _uncompiled() and hook.args[0]() is not None


@cache
def _uncompiled() -> Callable[..., None]:
    """The hook, marked: a compiled training step would trace into it. Not at import, where that loads the compiler."""
    hook: Callable[..., None] = torch.compiler.disable(_mask_gradient)  # type: ignore[no-untyped-call]
    return hook


def _mask_gradient(hold_ref: weakref.ref[Hold], name: str, parameter: Tensor) -> None:
    hold = hold_ref()
    if hold is None:
        if id(parameter) not in held_parameters():
            warn_of_orphaned_parameter(name)
        return
    hold.mask_gradient(parameter)
    if parameter.grad is not None:
        hold.watch.note_masked(parameter.grad)

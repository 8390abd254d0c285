"""The hook on the gradients of a ticket's parameters: they are masked before clipping looks at them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

_HOPS = 4  # times that our callback queues itself again, to come after those that DDP queues from within its own
_queue_callback = Variable._execution_engine.queue_callback
_current_task = torch._C._current_graph_task_id


def gradient_hook(mask: Callable[[Tensor | None], None]) -> Callable[[Tensor], None]:
    """A hook that has all gradients masked at the end of each backward pass, and does nothing at any but the first.

    ``mask`` is a method that masks the gradient of this parameter, or of all for None. It is referenced weakly: the
    parameters own the hook, and may outlive the ticket.
    """
    from torch._dynamo.decorators import skip  # not at import, where it loads the compiler

    backward = _Backward(mask)
    at_first = partial(_uncompiled(_Backward.at_first), backward)

    def hook(parameter: Tensor) -> None:  # torch calls it for each gradient: kept short
        if backward.awaited != _current_task():
            at_first(parameter)

    return skip(hook)  # compiled training steps would trace into it; without the cost of a wrapper


class _Backward:
    """The end of a backward pass, and what is to be done there."""

    def __init__(self, mask: Callable[[Tensor | None], None]) -> None:
        self._mask = weakref.WeakMethod(mask)
        self.awaited: int | None = None  # the backward pass whose end is waited for; left over if that has raised

    def at_first(self, parameter: Tensor) -> None:
        task, compiled = _current_task(), sys.modules.get("torch._dynamo.compiled_autograd")
        if task != -1 and not getattr(compiled, "in_compiled_autograd_region", False):
            self.awaited = task
            self._at_end(_HOPS)
        elif (mask := self._mask()) is not None:  # compiled autograd has no end that could be waited for
            mask(parameter)

    def _at_end(self, hops: int) -> None:
        if hops:
            _queue_callback(partial(_uncompiled(_Backward._at_end), self, hops - 1))
            return
        self.awaited = None
        if (mask := self._mask()) is not None:
            mask(None)


def register(parameter: Any, hook: Callable[[Tensor], None]) -> Any:
    """Have the hook called after each gradient of a parameter, whatever becomes of that.

    Returns the handle of the hook; None for a parameter that never has a gradient.
    """
    if parameter.is_inference():
        return None
    is_frozen = not parameter.requires_grad
    if is_frozen:  # it may thaw, and torch takes no hook before that
        parameter.requires_grad_(True)
    handle = parameter.register_post_accumulate_grad_hook(hook)
    if is_frozen:
        parameter.requires_grad_(False)
    # swap_tensors leaves the hooks where they are, but disconnects them: setting them connects them again.
    parameter._backward_hooks = parameter._backward_hooks
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
    return handle


@cache
def _uncompiled(function: Callable[..., None]) -> Callable[..., None]:
    """Marked: a compiled training step would trace into it. Not at import, where that loads the compiler."""
    marked: Callable[..., None] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return marked

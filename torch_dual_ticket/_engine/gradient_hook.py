"""The hook on the gradients of a ticket's parameters: they are masked before clipping looks at them."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Variable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_HOPS = 4  # callbacks at the end of backward() until ours is the last: DDP queues one from within another
_queue_callback = Variable._execution_engine.queue_callback
_current_task = torch._C._current_graph_task_id


class GradientHook:
    """Has all gradients masked at the end of each backward pass, and does nothing at any but the first of them.

    Args:
        mask: a method that masks the gradient of this parameter, or of all for None. It is referenced weakly: the
            parameters own this hook, and may outlive the ticket.
    """

    def __init__(self, mask: Callable[[Tensor | None], None]) -> None:
        self._mask = weakref.WeakMethod(mask)
        self._awaited: int | None = None  # the backward pass whose end is waited for: it stays there if that raises
        self._hook: Callable[[Tensor], None] | None = None

    def register(self, parameter: Tensor) -> Any:
        """Returns the handle of the hook; None for a parameter that never has a gradient."""
        if parameter.is_inference():
            return None
        self._hook = self._hook or self._function()
        with taking_hooks(parameter):
            return parameter.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]

    def _function(self) -> Callable[[Tensor], None]:
        """What torch calls for each gradient: kept short."""
        from torch._dynamo.decorators import skip  # not at import, where it loads the compiler

        at_first = partial(_uncompiled(GradientHook._at_first), self)

        def hook(parameter: Tensor) -> None:
            if self._awaited != _current_task():
                at_first(parameter)

        return skip(hook)  # compiled training steps would trace into it; without the cost of a wrapper

    def _at_first(self, parameter: Tensor) -> None:
        task = _current_task()
        if task != -1:
            self._awaited = task
            self._at_end(_HOPS)
        elif (mask := self._mask()) is not None:  # compiled autograd has no end that could be waited for
            mask(parameter)

    def _at_end(self, hops: int) -> None:
        if hops:
            _queue_callback(partial(_uncompiled(GradientHook._at_end), self, hops - 1))
            return
        self._awaited = None
        if (mask := self._mask()) is not None:
            mask(None)


@contextmanager
def taking_hooks(parameter: Tensor) -> Iterator[None]:
    """Hooks that are registered within come with the parameter, whatever becomes of it."""
    is_frozen = not parameter.requires_grad
    if is_frozen:  # it may thaw, and torch takes no hook before that
        parameter.requires_grad_(True)
    yield
    if is_frozen:
        parameter.requires_grad_(False)
    # swap_tensors leaves the hooks where they are, but disconnects them: setting them connects them again.
    parameter._backward_hooks = parameter._backward_hooks
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


@cache
def _uncompiled(function: Callable[..., None]) -> Callable[..., None]:
    """Marked: a compiled training step would trace into it. Not at import, where that loads the compiler."""
    marked: Callable[..., None] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return marked

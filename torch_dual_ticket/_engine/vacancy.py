"""What stands among a layer's hooks in the place of a hold that is gone, where the place itself cannot go yet."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

_collecting_thread: int | None = None


class Vacancy:
    """A hook that does nothing, and leaves at the layer's next forward.

    A copy made during the transformation has one where the original has its hold. So has a layer whose scheduler was
    found by the garbage collector: that may happen while somebody walks over the layer's hooks, be it the layer's own
    call or ``deepcopy``, and an entry that goes away then is an error in their loop.
    """

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for part in module.modules():  # some are never called, as attention's out_proj
            for key, hook in list(part._forward_pre_hooks.items()):
                if isinstance(hook, Vacancy):
                    part._forward_pre_hooks.pop(key, None)  # or another thread has: both are in the layer's forward


def watch_collector() -> None:
    """Let :func:`is_collecting` know; to be called once in a process."""
    gc.callbacks.append(_note_collection)


def is_collecting() -> bool:
    """Whether the garbage collector is what called, from wherever this thread happened to be."""
    return _collecting_thread == threading.get_ident()


def _note_collection(phase: str, info: Any) -> None:
    global _collecting_thread
    _collecting_thread = threading.get_ident() if phase == "start" else None

"""What the call stack says about who called: unlike a flag, it is never stale after an exception."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.utils.stateless import _functional_call

if TYPE_CHECKING:
    from types import FrameType


def in_functional_call(frame: FrameType | None) -> bool:
    """Whether the frame runs inside ``torch.func.functional_call``, which lends a module the caller's tensors."""
    while frame is not None:
        if frame.f_code is _functional_call.__code__:
            return True
        frame = frame.f_back
    return False

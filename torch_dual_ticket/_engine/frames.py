"""What the call stack says about who called: unlike a flag, it is never stale after an exception."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch.nn.utils.stateless import _functional_call

if TYPE_CHECKING:
    from types import CodeType, FrameType


def in_functional_call(frame: FrameType | None) -> bool:
    """Whether the frame runs inside ``torch.func.functional_call``, which lends a module the caller's tensors."""
    return _is_within(frame, _functional_call.__code__)


def in_rehearsal(frame: FrameType | None) -> bool:
    """Whether the frame runs inside a step that is no update.

    ``torch.distributed.checkpoint`` makes one, with zeros for the gradients and the learning rate, for a new optimizer
    to have a state. A penalty would stay behind in the momentum.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    code = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    return code is not None and _is_within(frame, code)


def _is_within(frame: FrameType | None, code: CodeType) -> bool:
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False

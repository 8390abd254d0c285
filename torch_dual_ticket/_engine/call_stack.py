"""What the call stack says about who called: unlike a flag, it is never stale after an exception."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType

from torch.nn.utils import prune
from torch.nn.utils.stateless import _functional_call
from torch.optim import Optimizer

_STEP_CODE = Optimizer.profile_hook_step(lambda: None).__code__  # of the function that runs hooks around each step
_APPLY_CODE = prune.BasePruningMethod.apply.__func__.__code__  # type: ignore[attr-defined]


def in_functional_call() -> bool:
    """Whether this runs inside ``torch.func.functional_call``, which lends a module the caller's tensors."""
    return any(_calls_of(_functional_call.__code__))


def name_to_prune() -> str | None:
    """What a method of torch.nn.utils.prune is about to prune, if this runs inside its ``apply``."""
    return next((str(call.f_locals["name"]) for call in _calls_of(_APPLY_CODE)), None)


def in_dummy_step() -> bool:
    """Whether the step is one that ``torch.distributed.checkpoint`` makes for a new optimizer to have a state.

    Its gradients and its learning rate are zero; a penalty would stay behind in the momentum.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    code = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    return code is not None and any(_calls_of(code))


def outer_steps() -> list[Optimizer]:
    """The optimizers in whose steps the running step was called."""
    return [call.f_locals["self"] for call in _calls_of(_STEP_CODE)][1:]


def _calls_of(code: CodeType) -> Iterator[FrameType]:
    """The running calls of a function, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            yield frame
        frame = frame.f_back

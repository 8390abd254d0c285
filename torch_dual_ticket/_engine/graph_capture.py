"""λ where CUDA graphs read it: a captured update is replayed without Python, and needs the λ of the moment."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor


class CapturedPenalty:
    """λ as a number on each GPU whose updates may be captured, and whether one was."""

    def __init__(self) -> None:
        self._on_device: dict[torch.device, Tensor] = {}
        self._ready: set[torch.device] = set()  # where an update was made with the masks of now
        self.is_captured = False

    def fill(self, penalty: float) -> None:
        for scalar in self._on_device.values():
            scalar.fill_(penalty)

    def factor(self, grads: Iterable[Tensor], penalty: float) -> float | Tensor:
        """The λ for an update of these gradients: a tensor while a graph is captured.

        Raises:
            RuntimeError: captured without an update before it, as torch.cuda.graph asks for; or on a device whose
                graphs are not supported, in which λ would never grow.
        """
        if not is_in_use():
            return penalty
        devices = {grad.device for grad in grads}
        if not is_capturing():
            for device in filter(may_be_captured, devices - self._ready):
                if device not in self._on_device:
                    self._on_device[device] = torch.full((), penalty, dtype=torch.float64, device=device)
                self._ready.add(device)
            return penalty
        for device in devices - self._ready:  # what is filled now would be filled again at each replay
            raise RuntimeError(
                f"a graph is captured of an update with gradients on {device}, where λ could not grow between its"
                " replays. Run a few updates first, as torch.cuda.graph asks for anyway; and leave updates out of"
                " graphs on devices other than CUDA."
            )
        self.is_captured = True
        return self._on_device[next(iter(devices))] if devices else penalty

    def check_not_capturing(self) -> None:
        """``RuntimeError`` where a scheduler step would be captured: replays would bring back the λ of now."""
        if self._on_device and is_capturing():
            raise RuntimeError("step() was called while a CUDA graph is captured: call it after the graph's replay()")

    def masks_change(self) -> None:
        """Call it where masks change: a captured graph goes on with the old ones."""
        self._ready.clear()
        if self.is_captured:
            self.is_captured = False
            warnings.warn(
                "a CUDA graph of the update was captured before, and knows nothing of the masks that apply from now on:"
                " capture it again",
                stacklevel=4,
            )


def may_be_captured(device: torch.device) -> bool:
    return device.type == "cuda"


def is_in_use() -> bool:
    """Whether this process uses a device that could capture anything: asked first, as it costs next to nothing."""
    return bool(torch.cuda.is_initialized() or torch.xpu.is_initialized())  # type: ignore[no-untyped-call]


def is_capturing() -> bool:
    """Whether a graph is captured on the current stream of CUDA, or of an Intel GPU."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        return True
    xpu = getattr(torch.xpu, "is_current_stream_capturing", None)  # releases before 2.11 cannot capture there
    return xpu is not None and torch.xpu.is_initialized() and bool(xpu())  # type: ignore[no-untyped-call]

"""λ where CUDA graphs read it: a captured update is replayed without Python, and needs the λ of the moment."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class GraphedPenalty:
    """λ as a number on each GPU whose updates may be captured, and whether one was."""

    def __init__(self) -> None:
        self._value = 0.0
        self._on_device: dict[torch.device, Tensor] = {}
        self.is_captured = False

    @property
    def value(self) -> float:
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        if value != self._value:
            for scalar in self._on_device.values():
                scalar.fill_(value)
        self._value = value

    def factor(self, grad: Tensor) -> float | Tensor:
        """What to multiply with in an update of this gradient: a tensor while a graph is captured, else a float.

        Raises:
            RuntimeError: captured without an update before it, as torch.cuda.graph asks for.
        """
        device = grad.device
        if not may_be_captured(device):
            return self._value
        if is_capturing():
            if device not in self._on_device:  # what is filled now would be captured, and filled again at each replay
                raise RuntimeError(
                    f"a CUDA graph is captured on {device} before any update carried the penalty there. Run a few"
                    " updates first, as torch.cuda.graph asks for anyway."
                )
            self.is_captured = True
            return self._on_device[device]
        if device not in self._on_device:
            self._on_device[device] = torch.full((), self._value, dtype=torch.float64, device=device)
        return self._value

    def check_not_capturing(self) -> None:
        """``RuntimeError`` where a tick would be captured: replays would bring back the λ of now."""
        if self._on_device and is_capturing():
            raise RuntimeError("step() was called while a CUDA graph is captured: call it after the graph's replay()")

    def warn_of_old_graphs(self) -> None:
        """Where masks change: a graph goes on with the memory that it has seen."""
        if self.is_captured:
            self.is_captured = False
            warnings.warn(
                "a CUDA graph of the update was captured before, and knows nothing of the masks that hold from now on:"
                " capture it again",
                stacklevel=4,
            )


def may_be_captured(device: torch.device) -> bool:
    return device.type == "cuda"


def is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()

"""Numbers on their way from a device to the host, for code that must not wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncScalar:
    """The values of a tensor as they were when this was made, on the CPU; from CUDA they arrive later.

    >>> scalar = AsyncScalar(torch.ones(2))
    >>> scalar.has_arrived(), scalar.values.tolist()
    (True, [1.0, 1.0])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self.values = tensor.to("cpu", copy=True)
            return
        self.values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)  # else it would wait
        self.values.copy_(tensor, non_blocking=True)
        self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrival.record(torch.cuda.current_stream(tensor.device))

    def has_arrived(self) -> bool:
        """Whether ``values`` are there. Asking does not wait."""
        return self._arrival is None or bool(self._arrival.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until ``values`` are there."""
        if self._arrival is not None:
            self._arrival.synchronize()

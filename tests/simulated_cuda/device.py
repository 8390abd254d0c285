"""The simulated CUDA device as tests see it: loading it, what was waited for, and what it refuses.

``load()`` must be called before torch is imported, so nothing here imports torch at its top.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_library: Any = None


def load(library: Path) -> None:
    """Load the compiled device, and make ``torch.cuda`` of this process say that it is there."""
    global _library
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be loaded before torch, which asks only once what there is")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so"):  # torch itself would not show their symbols to the library
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    _library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _library.simulated_waits.restype = ctypes.c_char_p
    _announce()


@contextmanager
def counted_waits() -> Iterator[dict[str, int]]:
    """Yields a dict that holds at the end what the host would have waited for in between, and how often."""
    waits: dict[str, int] = {}
    _library.simulated_reset_waits()
    yield waits
    waits.update(json.loads(_library.simulated_waits()))


@contextmanager
def without_float64() -> Iterator[None]:
    """The device refuses float64, as GPUs of Apple and some of Intel do."""
    _library.simulated_refuse_float64(True)
    try:
        yield
    finally:
        _library.simulated_refuse_float64(False)


def _announce() -> None:
    """Replace what a CPU build of torch answers about CUDA, or refuses to do."""
    import torch
    import torch._dynamo  # lists the functions of torch.cuda when it is imported: it must see its own

    cuda: Any = torch.cuda
    cuda._initialized = True
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 2
    cuda.current_device = lambda: int(_library.simulated_current_device())
    cuda.set_device = lambda device: _exchange_device(_index(device))
    cuda._exchange_device = cuda._maybe_exchange_device = _exchange_device
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.is_current_stream_capturing = lambda: False
    cuda.manual_seed_all = lambda seed: None
    cuda.synchronize = lambda device=None: _wait("synchronize")
    cuda.current_stream = lambda device=None: Stream()
    cuda.Event = Event
    of_torch = torch.Tensor.__deepcopy__
    torch.Tensor.__deepcopy__ = lambda tensor, memo: (_deepcopy if tensor.is_cuda else of_torch)(tensor, memo)


def _index(device: Any) -> int:
    import torch

    index = device if isinstance(device, int) else torch.device(device).index
    return int(_library.simulated_current_device() if index is None else index)


def _exchange_device(index: int) -> int:
    before = int(_library.simulated_current_device())
    if index >= 0:
        _library.simulated_set_device(index)
    return before


def _wait(name: str) -> None:
    _library.simulated_count_wait(name.encode())


class Stream:
    """The only one of a device."""

    cuda_stream = 0

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None:
        _wait("synchronize")


class Event:
    """Has not happened yet at the first two queries, so that code meets numbers that arrive late."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._queries = 0

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        self._queries += 1
        return self._queries > 2

    def synchronize(self) -> None:
        _wait("synchronize")


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """As torch's own, which asks for storages on the GPU that CPU builds cannot make from Python."""
    import torch

    if id(tensor) in memo:
        return memo[id(tensor)]
    with torch.no_grad():
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        new.copy_(tensor)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new)
    new.requires_grad_(tensor.requires_grad)
    if tensor.grad is not None:
        new.grad = tensor.grad.clone()
    new.__dict__ = copy.deepcopy(tensor.__dict__, memo)
    memo[id(tensor)] = new
    return new

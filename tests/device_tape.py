"""Stand-ins for what only GPUs do: being waited for, and graphs of operations that are replayed without Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable


class NoReading(TorchDispatchMode):
    """Refuses what would wait for a GPU: a number that is read on the host."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        if any(reading in name for reading in ("_local_scalar_dense", "nonzero", "aten.equal", "is_pinned")):
            raise AssertionError(f"{name} waits for the device")
        return operator(*args, **(kwargs or {}))

    def __enter__(self):
        self._tolist, torch.Tensor.tolist = torch.Tensor.tolist, _refuse  # it calls no operator
        return super().__enter__()

    def __exit__(self, *exception):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*exception)


def _refuse(*args, **kwargs):
    raise AssertionError("tolist() waits for the device")


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does: with the memory they use and the Python numbers they are given."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not _is_view(operator):
            self._calls.append((operator, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """All operations again, their results into the memory that they had when they were recorded."""
        with torch.no_grad():
            for operator, args, kwargs, recorded in self._calls:
                result = operator(*args, **kwargs)
                for new, old in zip(_tensors(result), _tensors(recorded), strict=True):
                    if new.data_ptr() != old.data_ptr():
                        old.copy_(new)


def _is_view(operator: Callable[..., Any]) -> bool:
    """Whether the results share memory with the arguments, and so have nothing to compute again."""
    returns = operator._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _tensors(result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [one for one in results if isinstance(one, torch.Tensor)]

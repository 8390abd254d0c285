"""Random tickets for PyTorch: train a sparse network chosen before the first batch."""

import importlib
from typing import Any

from .prune import RandomUnstructured, random_unstructured
from .scheduler import RSTScheduler, release

__version__ = "0.1.0"
__all__ = ["RSTScheduler", "RandomUnstructured", "random_unstructured", "release"]

_SATELLITES = ("baselines", "callbacks", "deploy", "export", "kept", "report")


def __getattr__(name: str) -> Any:
    """The satellites, imported when they are first asked for."""
    if name in _SATELLITES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SATELLITES, "__version__"])

"""Which dimension of a weight holds the inputs: known for the layers of torch, and for one of transformers."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

_OF_ANY_LAYOUT = ("module", "container", "lazy")  # modules of torch.nn.modules whose classes have no weights themselves


def input_dim_of(layer: nn.Module) -> int | None:
    """0 for layers that store (inputs, outputs, …), 1 for the others of torch, None for types that are not known."""
    if isinstance(layer, _ConvTransposeNd) or is_conv1d_of_transformers(layer):
        return 0
    homes = [base.__module__.partition("torch.nn.modules.") for base in type(layer).__mro__]
    return 1 if any(home[1] and home[2] not in _OF_ANY_LAYOUT for home in homes) else None


def is_conv1d_of_transformers(layer: nn.Module) -> bool:
    """By name: importing transformers would take seconds, and a model that has such layers has imported it."""
    kinds = type(layer).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)

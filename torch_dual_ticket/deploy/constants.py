"""The outputs for example inputs, and which input channels of a layer are constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

# For each layer the value of each of its input channels, as float64 on the CPU: NaN where it is not constant.
Constants = dict[nn.Module, Tensor]


def call(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output for a tensor, for a tuple or list of arguments, or for a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors in the output of a model, however it is nested."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def observe(model: nn.Module, example_inputs: Any) -> tuple[list[Tensor], Constants]:
    """One forward pass: the tensors of the output, and the constant inputs of linear and convolutional layers."""
    least: dict[nn.Module, Tensor] = {}
    greatest: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        channels = x.dim() - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
        values = x.detach().movedim(channels, 0).flatten(1)
        low, high = values.amin(1), values.amax(1)
        least[layer] = torch.minimum(least.get(layer, low), low)  # a layer may be called several times
        greatest[layer] = torch.maximum(greatest.get(layer, high), high)

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | _ConvNd)]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            outputs = tensors(call(model, example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return outputs, {layer: _constants(low, greatest[layer]) for layer, low in least.items()}


def _constants(least: Tensor, greatest: Tensor) -> Tensor:
    rounding = 16 * torch.finfo(least.dtype).eps  # vector and scalar code may differ in the last bits
    low, high = least.cpu().double(), greatest.cpu().double()
    return torch.where(high - low <= rounding * torch.maximum(low.abs(), high.abs()), (low + high) / 2, torch.nan)


def check_equal(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same shapes and dtypes, and the same values up to rounding; ``ValueError`` says by how much they differ."""
    found, wanted = [[(tuple(t.shape), t.dtype) for t in some] for some in (outputs, expected)]
    if found != wanted:
        raise ValueError(f"outputs of shapes and dtypes {found} instead of {wanted}")
    for output, reference in zip(outputs, expected, strict=True):
        if not reference.is_floating_point() and not reference.is_complex():
            if not torch.equal(output, reference):
                raise ValueError(f"outputs of dtype {reference.dtype} differ")
        elif reference.numel():
            difference = float((output - reference).abs().max())
            scale = float(reference.abs().max())
            if not difference <= tolerance(reference.dtype) * scale:
                raise ValueError(f"the outputs differ by {difference:.1e}, where the largest is {scale:.1e}")


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest output: 1e-5 for float32, 2e-14 for float64, 3e-2 for half precision."""
    return min(80 * torch.finfo(dtype).eps, 3e-2)

"""Where the kept weights of a parameter lie: one index of four bytes for each, to gather and to scatter with."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._engine.parameter import ManagedParameter
from ..masks.mask import Mask

_indices: weakref.WeakKeyDictionary[ManagedParameter, tuple[Mask, Any, Tensor]] = weakref.WeakKeyDictionary()


def kept_index(managed: ManagedParameter, mask: Mask, parameter: Tensor) -> Tensor:
    """The offsets of the kept weights in the parameter's memory; int32 where that reaches.

    Their order depends on the mask alone, not on the memory format: an optimizer's state can be loaded in another one.
    It takes turns among the quarters of the weight, as a CPU reads faster in several places at once. The index is made
    once for a mask and a layout, which may wait for the device, and shared by all that ask.
    """
    layout = parameter.device, parameter.shape, parameter.stride()
    known = _indices.get(managed)
    if known is not None and known[0] is mask and known[1] == layout:
        return known[2]
    if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
        raise RuntimeError(
            f"{managed.name} has gaps in its memory (shape {tuple(parameter.shape)}, strides {parameter.stride()}), and"
            " its kept weights cannot be trained alone. Make it contiguous first."
        )
    size = parameter.numel()
    dtype = torch.int32 if size < 2**31 else torch.int64
    with torch.inference_mode(False):
        offsets = torch.arange(size, dtype=dtype, device=parameter.device)
        offsets = offsets.as_strided(parameter.shape, parameter.stride())
        index = offsets.masked_select(mask.draw(device=parameter.device))  # in row-major order
        quarter = len(index) // 4
        turns, rest = torch.tensor_split(index, [4 * quarter])
        index = torch.cat([turns.view(4, quarter).t().reshape(-1), rest])
    _indices[managed] = mask, layout, index
    return index


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """The kept elements of a tensor that is laid out as the index says: a new tensor of one dimension."""
    return _flat(tensor).index_select(0, index)


def laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the parameter's shape in the parameter's layout: itself, where it has that."""
    if tensor.layout is torch.strided and not tensor.is_conj() and tensor.stride() == parameter.stride():
        return tensor
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(dense)


def scatter_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write the kept elements back; the others stay."""
    index = index if _scatters_int32(tensor.device.type) else index.long()
    _flat(tensor).scatter_(0, index, values)


def clear_masked_(tensor: Tensor, index: Tensor) -> None:
    """Set all elements but the kept ones to zero."""
    kept = gather(tensor, index)
    scatter_(tensor.zero_(), index, kept)


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the order of the memory, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


@cache
def _scatters_int32(device: str) -> bool:
    """Whether this torch does; older ones take int64 alone."""
    try:
        torch.zeros(1, device=device).scatter_(0, torch.zeros(1, dtype=torch.int32, device=device), 1.0)
    except RuntimeError:
        return False
    return True

"""The mask of one parameter where it is used: of the local shard, on its device, in the form that the kernels need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..masks.mask import Mask
from . import kernels
from .dtensor import coordinates, is_sharded, local, local_offset
from .kernels import INTEGER_OF_SIZE

PART = 1 << 20  # weights whose mask is computed at a time where masks are not stored


class _Cached(NamedTuple):
    tensor: Tensor
    mask: Mask
    holds: bool
    pointer: int  # to the memory of the weight that it was made for: quick to compare, as its size
    size: int
    layout: tuple[Any, ...]  # what the tensor really depends on


class MaskCache:
    """Drawn at its first use and kept, one byte per weight; or drawn part by part at each use and thrown away.

    For the penalty it is 1 at the masked weights: in uint8, or in the weight's dtype for small tensors. To hold zeros
    (``holds``) it is 1 at the kept weights: in uint8, or in the integer of the weight's size for small tensors.
    """

    def __init__(self, name: str, *, stored: bool) -> None:
        self._name, self._stored = name, stored
        self._cached: _Cached | None = None

    def pieces(self, mask: Mask, parameter: Tensor, *tensors: Tensor, holds: bool) -> Iterable[tuple[Tensor, ...]]:
        """The tensors, of the shape of the parameter's local shard, with their mask: in one piece, if it is stored."""
        if self.is_stored_for(parameter):
            return ((*tensors, self.whole(mask, parameter, holds=holds)),)
        return self._parts(mask, parameter, *tensors, holds=holds)

    def drop(self) -> None:
        """Free the mask where none is needed for long; it is drawn again when it is."""
        self._cached = None

    def is_stored_for(self, parameter: Tensor) -> bool:
        """Small masks always are: they take next to nothing."""
        return self._stored or local(parameter).numel() <= kernels.SMALL

    def _parts(self, mask: Mask, parameter: Tensor, *tensors: Tensor, holds: bool) -> Iterator[tuple[Tensor, ...]]:
        weight = local(parameter)
        self._check_shape(mask, parameter, weight)
        first, *others = local_offset(parameter) or (0,) * weight.dim()
        size = max(1, PART * len(weight) // weight.numel())
        for start in range(0, len(weight), size):
            rows = slice(start, min(start + size, len(weight)))
            kept = mask.draw(offset=(first + start, *others), size=tuple(weight[rows].shape), device=weight.device)
            yield (*(tensor[rows] for tensor in tensors), _formed(kept, weight[rows], holds))

    def whole(self, mask: Mask, parameter: Tensor, *, holds: bool) -> Tensor:
        """All of it, with the shape and the layout of the parameter's local shard."""
        weight = local(parameter)
        cached, pointer, numel = self._cached, weight.data_ptr(), weight.numel()
        if (
            cached is not None
            and cached.pointer == pointer
            and cached.mask is mask
            and cached.holds is holds
            and cached.size == numel
            and type(parameter) is nn.Parameter
        ):
            return cached.tensor
        layout = (weight.device, weight.dtype, weight.shape, weight.stride(), *coordinates(parameter))
        with torch.inference_mode(False):  # a mask that is kept outlives an evaluation in inference mode
            if cached is not None and cached.layout == layout and cached.mask == mask:
                tensor = cached.tensor
                if cached.holds is not holds:  # in new memory: an older list may still have this one
                    tensor = _formed(tensor == 0 if holds else tensor != 0, weight, holds)
            else:
                self._check_shape(mask, parameter, weight)
                offset, size = local_offset(parameter), tuple(weight.shape)
                tensor = _formed(mask.draw(offset=offset, size=size, device=weight.device), weight, holds)
        if self.is_stored_for(parameter):
            self._cached = _Cached(tensor, mask, holds, pointer, numel, layout)
        return tensor

    def _check_shape(self, mask: Mask, parameter: Tensor, weight: Tensor) -> None:
        if not is_sharded(parameter) and tuple(weight.shape) != mask.shape:
            raise RuntimeError(
                f"{self._name} has shape {tuple(weight.shape)}, but had {mask.shape} when the scheduler was built: the"
                " layer was changed since (embeddings resized, units cut out, FSDP1). Call remove() before that, and"
                " build a new scheduler after it."
            )


def _formed(kept: Tensor, weight: Tensor, holds: bool) -> Tensor:
    """Made of a bool tensor that nobody else has: where it can, the result takes its memory."""
    chosen, dtype = kept if holds else kept.logical_not_(), torch.uint8
    if weight.numel() <= kernels.SMALL and not (holds and weight.is_complex()):
        dtype = INTEGER_OF_SIZE[weight.itemsize] if holds else weight.dtype
    if dtype is torch.uint8 and chosen.stride() == weight.stride():
        return chosen.view(dtype)
    return torch.empty_like(weight, dtype=dtype).copy_(chosen)

"""The elementwise work on masked tensors, close to the least memory traffic that an in-place update needs.

Masks are uint8 (1 or 0), laid out in memory as the weight is. On the CPU large tensors are walked in chunks, through a
buffer that stays in cache and into which a chunk of the mask is widened: an operation on two dtypes would make that
copy in main memory. What is no larger than a chunk is left to such an operation. Accelerators convert within the
kernel. Small tensors come with a mask of their own dtype, where the cost is in the calls, not in the traffic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SMALL = 4096  # elements
CHUNK = 1 << 18  # elements on CPU
CHUNK_ACCELERATOR = 1 << 25  # elements on a GPU: bounds the temporary memory without starving the device

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def add_scaled_(
    grads: Sequence[Tensor], weights: Sequence[Tensor], masks: Sequence[Tensor], factor: float | Tensor
) -> None:
    """Add ``factor · mask · weight`` to each gradient in place.

    ``factor`` is a Python float, or a 0-dim tensor on a device of theirs, which is never read on the host. A mask is
    uint8 or of the weight's dtype.
    """
    alike: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for grad, weight, mask in zip(grads, weights, masks, strict=True):
        if isinstance(factor, Tensor):
            there = factor.to(weight.device)  # the model may be spread over several
            for grad_part, weight_part, mask_part in _chunks(grad, weight, mask):
                grad_part.add_(torch.mul(weight_part, mask_part).mul_(there))
        elif mask.dtype is weight.dtype:
            alike[0].append(grad)
            alike[1].append(weight)
            alike[2].append(mask)
        elif weight.numel() <= CHUNK and _on_cpu(weight):
            grad.addcmul_(weight, mask.to(weight.dtype), value=factor)
        else:
            for grad_part, weight_part, mask_part in _widened(grad, weight, mask):
                grad_part.addcmul_(weight_part, mask_part, value=factor)
    if alike[0] and not isinstance(factor, Tensor):
        torch._foreach_addcmul_(*alike, value=factor)


def clear_(tensor: Tensor, mask: Tensor) -> None:
    """Set the masked elements of ``tensor`` to exactly +0, whatever they were, in place.

    A bool mask is True at the elements to clear; a uint8 mask is 1 at those to keep. The latter multiplies the bit
    patterns, as integers: a floating-point product would make NaN of NaN and infinities, and -0 of negative numbers.
    """
    if mask.dtype is torch.bool:
        tensor.masked_fill_(mask, 0)
        return
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
        mask = mask.unsqueeze(-1).expand(tensor.shape)
    bits = tensor.view(_INTEGER_OF_SIZE[tensor.itemsize])
    if bits.numel() <= CHUNK:
        bits.mul_(mask)
        return
    for part, kept in _widened(bits, mask):
        part.mul_(kept)


def squared_norms(tensor: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of squares of the pruned elements and of all elements: scalars on the device, in float64 but on MPS."""
    wide = torch.float32 if tensor.is_mps else torch.float64  # which MPS lacks
    masked = torch.zeros((), dtype=wide, device=tensor.device)
    total = torch.zeros((), dtype=wide, device=tensor.device)
    for values, mask in _chunks(tensor, pruned, share=8):  # in float64, twice
        squares = values.abs().to(wide).square_()
        total += squares.sum()
        masked += squares.mul_(mask).sum()
    return masked, total


def _widened(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk the chunks with the last tensor, the mask, widened to the dtype of the first; accelerators need neither."""
    if not _on_cpu(tensors[0]):
        yield tensors
        return
    dtype = tensors[0].dtype
    buffer = None
    for *parts, mask in _chunks(*tensors):
        if mask.dim() != 1:
            widened = mask.to(dtype)
        else:
            if buffer is None:
                buffer = torch.empty(mask.shape, dtype=dtype, device=mask.device)
            elif mask.shape != buffer.shape:  # the last chunk
                buffer = buffer[: len(mask)]
            widened = buffer.copy_(mask)
        yield (*parts, widened)


def _chunks(*tensors: Tensor, share: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Walk tensors of one shape together: flat and in chunks where they share a layout, else as they are.

    The last is a mask, whose elements fill its memory without gaps. Chunks are smaller by ``share`` where large
    temporaries are made of them.
    """
    first = tensors[0]
    size = (CHUNK if _on_cpu(first) else CHUNK_ACCELERATOR) // share
    count = first.numel()
    if count <= size or any(t.stride() != first.stride() for t in tensors):
        yield tensors
        return
    yield from zip(*(torch.split(t.as_strided((count,), (1,)), size) for t in tensors), strict=True)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu

"""The elementwise work on masked tensors, close to the least memory traffic that an in-place update needs.

Masks are laid out in memory as the weight is. Those of large tensors are uint8. On the CPU such tensors are walked in
chunks, through a buffer that stays in cache and into which a chunk of the mask is widened: an operation on two dtypes
would make that copy in main memory. Accelerators convert within the kernel. The masks of small tensors have the dtype
of what they are multiplied with, and all small tensors are done in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

SMALL = 40_960  # elements: measured, a mask of the same dtype is twice as fast, and such layers have few weights
CHUNK = 1 << 18  # elements on CPU
CHUNK_ACCELERATOR = 1 << 25  # elements on a GPU: bounds the temporary memory without starving the device

INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_simple(weight: Tensor) -> bool:
    """Whether one operation on many tensors is the fastest for this one."""
    return not weight.is_complex() and (weight.numel() <= SMALL or not _on_cpu(weight))


def add_scaled_all_(grads: list[Tensor], weights: list[Tensor], masks: list[Tensor], factor: float | Tensor) -> None:
    """Add ``factor · mask · weight`` to each gradient in place, for simple weights.

    A mask is uint8 or of the weight's dtype; ``factor`` may be a 0-dim tensor, which is never read on the host.
    """
    if isinstance(factor, Tensor):
        add_scaled_(zip(grads, weights, masks, strict=True), factor)
    elif grads:
        torch._foreach_addcmul_(grads, weights, masks, value=factor)


def add_scaled_(pieces: Iterable[tuple[Tensor, Tensor, Tensor]], factor: float | Tensor) -> None:
    """The same for any weights, one after the other: pieces are (gradient, weight, mask)."""
    factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # the model may be on several devices
    for grad, weight, mask in pieces:
        if isinstance(factor, Tensor):
            wide = weight.dtype if weight.itemsize > 2 else torch.float32  # float16 does not hold a loss scale
            if (weight.device, wide) not in factors:
                # With a dimension: in a product the dtype of a tensor without one gives way to that of the other.
                factors[weight.device, wide] = factor.to(weight.device, wide).view(1)
            for grad_part, weight_part, mask_part in chunks(grad, weight, mask):
                scaled = factors[weight.device, wide].mul(mask_part).view(mask_part.shape)  # which may have none
                grad_part.addcmul_(weight_part, scaled)
        elif mask.dtype is weight.dtype or not _on_cpu(weight):
            grad.addcmul_(weight, mask, value=factor)
        else:
            for grad_part, weight_part, mask_part in _widened(grad, weight, mask):
                grad_part.addcmul_(weight_part, mask_part, value=factor)


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers of their size: the same memory."""
    return tensor.view(INTEGER_OF_SIZE[tensor.itemsize])


def clear_all_(tensors: list[Tensor], masks: list[Tensor]) -> None:
    """Set the elements where the mask is 0 to exactly +0, whatever they were, in the :func:`bits` of simple weights.

    A floating-point product would make NaN of NaN and infinities, and -0 of negative numbers. A mask is 1 elsewhere, as
    uint8 or as an integer of the tensor's size.
    """
    if tensors:
        torch._foreach_mul_(tensors, masks)


def clear_(pieces: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The same for any tensors, one after the other: pieces are (tensor, mask)."""
    for tensor, mask in pieces:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
            mask = mask.unsqueeze(-1).expand(tensor.shape)
        integers = bits(tensor)
        if mask.dtype is integers.dtype or not _on_cpu(integers):
            integers.mul_(mask)
        else:
            for part, kept in _widened(integers, mask):
                part.mul_(kept)


def squared_norms(
    pieces: Iterable[tuple[Tensor, Tensor]],
    masked: int,
    device: torch.device,
    change: Callable[[Tensor], Tensor] = Tensor.square_,
) -> Tensor:
    """The sums of squares of the masked elements and of all, for pieces (tensor, mask) with this value where masked.

    A tensor of two elements on the device, in float64 where it has that. ``change`` makes something else than squares
    of the magnitudes.
    """
    try:
        sums = torch.zeros(2, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):  # MPS, some Intel GPUs
        sums = torch.zeros(2, dtype=torch.float32, device=device)
    for piece in pieces:
        for values, mask in chunks(*piece, share=8):  # in float64, twice
            squares = change(values.abs().to(sums.dtype))
            sums[1] += squares.sum()
            sums[0] += squares.mul_(mask == masked).sum()
    return sums


def _widened(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk the chunks with the last tensor, the mask, widened to the dtype of the first."""
    buffer = None
    for *parts, mask in chunks(*tensors):
        if mask.dim() != 1:
            yield (*parts, mask.to(tensors[0].dtype))
            continue
        if buffer is None:
            buffer = torch.empty(mask.shape, dtype=tensors[0].dtype, device=mask.device)
        elif len(mask) < len(buffer):  # the last chunk: slicing for each costs 4 %
            buffer = buffer[: len(mask)]
        yield (*parts, buffer.copy_(mask))


def chunks(*tensors: Tensor, share: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Walk tensors of one shape together: flat and in chunks where they share a layout, else as they are.

    The last is a mask, whose elements fill its memory without gaps. Chunks are smaller by ``share`` where large
    temporaries are made of them.
    """
    first = tensors[0]
    size, count = (CHUNK if _on_cpu(first) else CHUNK_ACCELERATOR) // share, first.numel()
    if count <= size or any(t.stride() != first.stride() for t in tensors):
        yield tensors
        return
    yield from zip(*(torch.split(t.as_strided((count,), (1,)), size) for t in tensors), strict=True)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu

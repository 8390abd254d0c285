"""Random masks that are drawn from a seed and need not be stored.

The Dual Lottery Ticket paper (arXiv 2203.04248) chooses the mask of each layer at random before training. Here a keyed
permutation puts the units of a layer (weights, blocks, filters …) into a random order, and the first `pruned` of that
order are masked. So counts are exact, a larger count only removes more, and any block of a mask, such as the shard of
one rank, can be drawn alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from operator import index

import torch
from torch import Tensor

from .patterns import count_units, parse_pattern, tile
from .permutation import KeyedPermutation

ALGORITHM = 1
"""Part of every key and fingerprint; it changes when the same fields would give another mask."""

# Measured: on the CPU, chunks below OpenMP's grain size, which also fit into the cache, are the fastest.
_CPU_CHUNK = 32_768
_GPU_CHUNK = 2**21

_INEXACT_DEVICES = ("mps",)  # they divide integers in floating point, which can be off by one


@dataclass(frozen=True)
class SeededMask:
    """Everything that a mask depends on; `draw` gives the mask itself.

    The same fields give the same mask on any device, in any release of torch, and in any split into shards. All
    fields but `pruned` choose the order in which units go, so of two masks that differ in `pruned` alone, one lies
    within the other.

    Args:
        seed: any integer.
        name: the parameter's name in the unwrapped model; layers of different names get independent masks.
        shape: the full, unsharded shape.
        pruned: how many units are masked, ``0 … units``. The units of "n:m" are
            weights, and its count is fixed: ``units // m * (m - n)``.
        pattern: "unstructured", "n:m", "block:RxC", "filter" or "channel".
        transposed: dimension 0 holds the input units and dimension 1 the output units, as in ``ConvTranspose2d``.
        input_dim: the dimension of the input units, where it is another one than `transposed` says.

    Raises:
        TypeError: `seed`, `pruned` or a size is not an integer.
        ValueError: the pattern is unknown or does not fit the shape, or `pruned` is not possible for it.

    Example:
        >>> spec = SeededMask(seed=0, name="fc.weight", shape=(4, 8), pruned=24)
        >>> mask = spec.draw()
        >>> mask.shape, mask.dtype, int(mask.sum())
        (torch.Size([4, 8]), torch.bool, 8)
        >>> bool((spec.draw(offset=(2, 0), size=(2, 8)) == mask[2:]).all())
        True
    """

    seed: int
    name: str
    shape: tuple[int, ...]
    pruned: int
    pattern: str = "unstructured"
    transposed: bool = False
    input_dim: int | None = None

    def __post_init__(self) -> None:
        # Plain integers: those of other types, such as numpy's, cannot be written into the key.
        object.__setattr__(self, "seed", index(self.seed))
        object.__setattr__(self, "pruned", index(self.pruned))
        object.__setattr__(self, "shape", tuple(index(size) for size in self.shape))
        units = self.units
        if not 0 <= self.pruned <= units:
            raise ValueError(f"pruned must lie in 0 … {units}, the units of shape {self.shape}, got {self.pruned}")
        parsed = parse_pattern(self.pattern)
        if parsed.kind == "n:m":
            implied = units // parsed.second * (parsed.second - parsed.first)
            if self.pruned != implied:
                raise ValueError(
                    f"pattern {self.pattern!r} prunes exactly {implied} of the {units} weights of shape {self.shape}, "
                    f"got pruned={self.pruned}"
                )

    @property
    def units(self) -> int:
        """Number of units of the full mask."""
        return count_units(self.shape, self.pattern, self._inputs)

    @property
    def _inputs(self) -> int:
        return int(not self.transposed) if self.input_dim is None else self.input_dim

    @property
    def pruned_weights(self) -> int:
        """Number of masked weights of the full mask.

        >>> SeededMask(0, "conv.weight", (8, 4, 3, 3), pruned=2, pattern="filter").pruned_weights
        72
        """
        return self.pruned * math.prod(tile(self.shape, self.pattern, self._inputs))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on every field: equal fingerprints mean equal masks.

        >>> a, b = (SeededMask(0, "fc.weight", (4, 8), pruned) for pruned in (24, 25))
        >>> len(a.fingerprint), a.fingerprint == b.fingerprint
        (16, False)
        """
        fields = astuple(self)
        fields = fields[:-1] if self.input_dim is None else fields  # as before there was an input_dim
        return hashlib.sha256(_text(ALGORITHM, *fields)).hexdigest()[:16]

    def draw(
        self,
        *,
        offset: Sequence[int] | None = None,
        size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the mask, or the block ``offset … offset + size`` of it.

        Args:
            offset: first index of the block in each dimension; zeros by default.
            size: the block's shape; all that follows `offset` by default.
            device: where the result is, and where it is computed if integers are exact there; CPU by default.

        Returns:
            A contiguous bool tensor of shape `size`; True = kept.

        Raises:
            ValueError: the block does not lie within `shape`.

        >>> spec = SeededMask(0, "fc.weight", (2, 8), pruned=8, pattern="2:4")
        >>> spec.draw().view(2, 2, 4).sum(-1)
        tensor([[2, 2],
                [2, 2]])
        """
        offset = (0,) * len(self.shape) if offset is None else tuple(offset)
        if size is None:
            size = tuple(full - first for full, first in zip(self.shape, offset, strict=False))
        size = tuple(size)
        if not len(offset) == len(size) == len(self.shape) or any(
            first < 0 or length < 0 or first + length > full
            for first, length, full in zip(offset, size, self.shape, strict=True)
        ):
            raise ValueError(f"the block at offset {offset} of size {size} does not lie within shape {self.shape}")
        where = torch.device("cpu" if device is None else device)
        if 0 in size:
            return torch.empty(size, dtype=torch.bool, device=where)
        if where.type in _INEXACT_DEVICES:
            return self.draw(offset=offset, size=size).to(where)
        if parse_pattern(self.pattern).kind == "n:m":
            return self._draw_n_of_m(offset, size, where)
        return self._draw_units(offset, size, where)

    def _permutation(self, device: torch.device) -> KeyedPermutation:
        key = _text(ALGORITHM, self.seed, self.name, self.shape, self.pattern)
        return KeyedPermutation(key, self.units, device)

    def _draw_units(self, offset: tuple[int, ...], size: tuple[int, ...], device: torch.device) -> Tensor:
        unit = tile(self.shape, self.pattern, self._inputs)
        dims = range(len(size))
        first = [offset[d] // unit[d] for d in dims]
        stop = [-(-(offset[d] + size[d]) // unit[d]) for d in dims]
        grid = [self.shape[d] // unit[d] for d in dims]
        units = [stop[d] - first[d] for d in dims]
        mask = _fill(self._permutation(device), grid, first, units, lambda ranks: ranks >= self.pruned, device=device)
        # Last dimension first: its copies are the strided ones, and the mask is still small then.
        for d in reversed(dims):
            if units[d] == 1 and size[d] > 1:
                mask = mask.expand(*units[:d], *size[d:])
            elif unit[d] > 1:
                rows = torch.arange(offset[d], offset[d] + size[d], device=device).div_(unit[d], rounding_mode="floor")
                mask = mask.index_select(d, rows.sub_(first[d]))
        return mask.contiguous()

    def _draw_n_of_m(self, offset: tuple[int, ...], size: tuple[int, ...], device: torch.device) -> Tensor:
        """Keep the n weights of the highest ranks in each group of m."""
        parsed = parse_pattern(self.pattern)
        n, m = parsed.first, parsed.second
        inputs = self._inputs
        # The block may cut through groups: draw all groups that it touches, then take the block out of them.
        before = offset[inputs] % m
        whole = -(-(before + size[inputs]) // m) * m
        first = [*offset[:inputs], offset[inputs] - before, *offset[inputs + 1 :]]
        covering = [*size[:inputs], whole, *size[inputs + 1 :]]
        inner = math.prod(covering[inputs + 1 :])

        def highest(ranks: Tensor) -> Tensor:
            grouped = ranks.view(-1, m, inner).movedim(1, 0).contiguous()
            beaten = torch.zeros(grouped.shape, dtype=torch.int32, device=device)
            for shift in range(1, m):
                beaten += grouped > grouped.roll(shift, 0)
            return (beaten >= m - n).movedim(0, 1).reshape(-1)

        mask = _fill(self._permutation(device), self.shape, first, covering, highest, multiple=m * inner, device=device)
        return mask.narrow(inputs, before, size[inputs]).contiguous()


def _text(*fields: object) -> bytes:
    return json.dumps(fields).encode()


def _fill(
    permutation: KeyedPermutation,
    shape: Sequence[int],
    offset: Sequence[int],
    size: Sequence[int],
    keep: Callable[[Tensor], Tensor],
    *,
    multiple: int = 1,
    device: torch.device,
) -> Tensor:
    """A bool tensor of shape `size`: `keep` of the ranks of the positions in that block, a chunk at a time.

    Chunks are contiguous in the result, and a multiple of `multiple` long.
    """
    flat = torch.empty(math.prod(size), dtype=torch.bool, device=device)
    chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    chunk = max(chunk // multiple, 1) * multiple
    block = _merge_dims(shape, offset, size)
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        flat[start:stop] = keep(permutation.ranks(_positions(block, start, stop, permutation)))
    return flat.view(tuple(size))


def _merge_dims(shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> list[tuple[int, int, int]]:
    """The same block in as few dimensions as possible, as (full size, offset, size) each; one if it is contiguous."""
    merged: list[tuple[int, int, int]] = [(1, 0, 1)]
    for inner_full, inner_first, inner_length in zip(shape, offset, size, strict=True):
        full, first, length = merged[-1]
        if inner_length == inner_full or length == 1:
            merged[-1] = (full * inner_full, first * inner_full + inner_first, length * inner_length)
        else:
            merged.append((inner_full, inner_first, inner_length))
    return merged


def _positions(block: list[tuple[int, int, int]], start: int, stop: int, permutation: KeyedPermutation) -> Tensor:
    """Linear positions in the full tensor of the elements ``start … stop-1`` of the block."""
    rest = torch.arange(start, stop, dtype=permutation.dtype, device=permutation.device)
    positions, stride = torch.zeros_like(rest), 1
    (_, outermost, _), *inner = block
    for full, first, length in reversed(inner):
        positions.add_(rest.remainder(length).add_(first), alpha=stride)
        rest.div_(length, rounding_mode="floor")
        stride *= full
    return positions.add_(rest.add_(outermost), alpha=stride)

"""What is pruned as one unit: single weights, n of every m, blocks, filters, channels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

ALLOWED = '"unstructured", "n:m" such as "2:4" (1 <= n < m), "block:RxC" such as "block:4x4", "filter" or "channel"'

_NUMBER = "([1-9][0-9]{0,8})"
_N_OF_M = re.compile(f"{_NUMBER}:{_NUMBER}")
_BLOCK = re.compile(f"block:{_NUMBER}x{_NUMBER}")


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    `kind` is "unstructured", "n:m", "block", "filter" or "channel"; `first` and `second` are n and m, or a block's rows
    (output units) and columns (input units), else 1.
    """

    kind: str
    first: int = 1
    second: int = 1

    @property
    def sparsity(self) -> float | None:
        """What "n:m" means: ``1 - n/m``. The others leave it open."""
        return 1 - self.first / self.second if self.kind == "n:m" else None


def parse_pattern(pattern: str) -> Pattern:
    """Parse the text of a pattern; ``ValueError`` lists what is allowed.

    >>> parse_pattern("2:4")
    Pattern(kind='n:m', first=2, second=4)
    >>> parse_pattern("2:4").sparsity
    0.5
    >>> parse_pattern("block:16x8")
    Pattern(kind='block', first=16, second=8)
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string, got {pattern!r}; allowed are {ALLOWED}")
    if pattern in ("unstructured", "filter", "channel"):
        return Pattern(pattern)
    if (match := _N_OF_M.fullmatch(pattern)) and int(match[1]) < int(match[2]):
        return Pattern("n:m", int(match[1]), int(match[2]))
    if match := _BLOCK.fullmatch(pattern):
        return Pattern("block", int(match[1]), int(match[2]))
    raise ValueError(f"unknown pattern {pattern!r}; allowed are {ALLOWED}")


def pruned_units(sparsity: float, units: int) -> int:
    """How many of `units` are pruned: ``round(sparsity * units)``, halves to even.

    >>> pruned_units(0.9, 235), pruned_units(0.5, 5)
    (212, 2)
    """
    return round(sparsity * units)


def tile(shape: Sequence[int], pattern: str, input_dim: int = 1) -> tuple[int, ...]:
    """The shape of one unit in a weight of `shape`; a single weight for "n:m", which chooses weights within groups.

    The input units are those of `input_dim`; the output units are those of dimension 0, or 1 where the inputs are 0.

    Raises ``ValueError`` where the pattern does not fit the shape.

    >>> tile((64, 32, 3, 3), "block:4x2"), tile((64, 32, 3, 3), "filter"), tile((64, 32), "filter", input_dim=0)
    ((4, 2, 1, 1), (1, 32, 3, 3), (64, 1))
    """
    parsed = parse_pattern(pattern)
    shape = tuple(shape)
    if parsed.kind == "unstructured":
        return (1,) * len(shape)
    if len(shape) < 2:
        raise ValueError(
            f"pattern {pattern!r} needs output and input units, that is 2 or more dimensions, got shape {shape}; "
            'exclude it or use pattern="unstructured"'
        )
    inputs, outputs = input_dim, int(input_dim == 0)
    if parsed.kind == "filter":
        return (*shape[:outputs], 1, *shape[outputs + 1 :])
    if parsed.kind == "channel":
        return (*shape[:inputs], 1, *shape[inputs + 1 :])
    if parsed.kind == "n:m":
        _check_divides(shape, inputs, "input", parsed.second, pattern)
        return (1,) * len(shape)
    _check_divides(shape, outputs, "output", parsed.first, pattern)
    _check_divides(shape, inputs, "input", parsed.second, pattern)
    sizes = {outputs: parsed.first, inputs: parsed.second}
    return tuple(sizes.get(dim, 1) for dim in range(len(shape)))


def count_units(shape: Sequence[int], pattern: str, input_dim: int = 1) -> int:
    """How many units a weight of `shape` has. For "n:m" the units are its weights.

    Raises ``ValueError`` where the pattern does not fit the shape.

    >>> count_units((64, 32, 3, 3), "block:4x2"), count_units((64, 32, 3, 3), "filter"), count_units((8, 4), "2:4")
    (2304, 64, 32)
    """
    return math.prod(size // unit for size, unit in zip(shape, tile(shape, pattern, input_dim), strict=True) if unit)


def _check_divides(shape: tuple[int, ...], dim: int, units: str, divisor: int, pattern: str) -> None:
    if shape[dim] % divisor:
        raise ValueError(
            f"pattern {pattern!r} does not fit shape {shape}: its {shape[dim]} {units} units (dimension {dim}) are not "
            f"a multiple of {divisor}; exclude this layer, or choose a pattern that divides it"
        )

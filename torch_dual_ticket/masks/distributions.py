"""How much of each layer is pruned: from one sparsity, or one for each layer, to a number of units for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from fractions import Fraction
from numbers import Real
from typing import Any

from .patterns import pruned_units


def validate_sparsity(value: object, what: str = "sparsity") -> float:
    """`value` as a float in [0, 1); errors speak of `what`.

    Raises:
        TypeError: a bool, or not a real number.
        ValueError: NaN, negative, or 1 and above.

    >>> validate_sparsity(0)
    0.0
    >>> validate_sparsity(90)
    Traceback (most recent call last):
    ...
    ValueError: sparsity must lie in [0, 1), got 90: it is the fraction of weights removed, for example 0.9
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number in [0, 1), got {value!r} (a {type(value).__name__})")
    number: Any = value
    if not (0 <= number < 1 and float(number) < 1):  # NaN fails, and so does a fraction that rounds to 1.0
        raise ValueError(
            f"{what} must lie in [0, 1), got {value!r}: it is the fraction of weights removed, for example 0.9"
        )
    return float(number)


def check_distribution(distribution: str) -> None:
    """One that there is."""
    if distribution not in ("uniform", "erk"):
        raise ValueError(f"unknown distribution {distribution!r}; allowed are 'uniform' and 'erk'")


def uniform(units: Mapping[str, int], sparsities: Mapping[str, float]) -> dict[str, int]:
    """Each layer's own sparsity, rounded to whole units: ``round(sparsity * units)``.

    >>> uniform({"0": 235, "2": 5}, {"0": 0.9, "2": 0.9})
    {'0': 212, '2': 4}
    """
    return {name: pruned_units(sparsities[name], count) for name, count in units.items()}


def by_name(layers: Mapping[str, Sequence[str]], sparsities: Mapping[str, float]) -> dict[str, float]:
    """The sparsity of each weight by fnmatch patterns: the first match wins, and what nothing matches stays dense (0).

    Args:
        layers: name of the weight -> names of the layers that hold it: one, or several if it is tied.
        sparsities: fnmatch pattern of layer names -> sparsity.

    Raises:
        ValueError: a pattern matches no module, or a sparsity is outside [0, 1).
        TypeError: a pattern that is not a string, or a sparsity that is not a number.

    >>> layers = {"conv1.weight": ["conv1"], "layer1.conv.weight": ["layer1.conv"], "fc.weight": ["fc"]}
    >>> by_name(layers, {"layer1.*": 0.9, "conv*": 0.5})
    {'conv1.weight': 0.5, 'layer1.conv.weight': 0.9, 'fc.weight': 0.0}
    """
    require_matches(sparsities, [layer for names in layers.values() for layer in names], "sparsity: pattern")
    valid = {
        pattern: validate_sparsity(sparsity, f"the sparsity of {pattern!r}") for pattern, sparsity in sparsities.items()
    }
    return {
        name: next((valid[pattern] for layer in names for pattern in valid if fnmatchcase(layer, pattern)), 0.0)
        for name, names in layers.items()
    }


def erk(shapes: Mapping[str, Sequence[int]], sparsity: float, units: Mapping[str, int] | None = None) -> dict[str, int]:
    """The Erdős–Rényi-Kernel distribution: large layers become sparser than small ones.

    The density of a layer is proportional to ``sum(shape) / prod(shape)``, so the weights it keeps are proportional to
    ``sum(shape)``. A layer that would keep more than it has becomes dense and the others share what it cannot take
    (Evci et al., Rigging the Lottery, arXiv 1911.11134). Exactly ``round(sparsity * total)`` weights are pruned in all.

    A higher sparsity never prunes less of any layer: units are kept in a fixed order, layer by layer as the density
    grows (Webster's method of apportionment), and the sparsity only says where to stop.

    Args:
        shapes: layer name -> full shape of its weight.
        sparsity: fraction of all these weights that is pruned, in [0, 1).
        units: layer name -> number of units; None: a unit is one weight. The budget is in weights in any case, and
            the total is the nearest to it that the order of the units allows: at most half the largest unit away.

    >>> erk({"conv": (16, 3, 3, 3), "fc": (100, 100)}, 0.9)
    {'conv': 316, 'fc': 9073}
    >>> erk({"small": (4, 4), "large": (100, 100)}, 0.5)
    {'small': 0, 'large': 5008}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"layer {name!r} of shape {tuple(shapes[name])} has no weights to distribute")
    counts = sizes if units is None else units
    unit_sizes = {name: size // counts[name] for name, size in sizes.items()}
    total = sum(sizes.values())
    budget = total - pruned_units(sparsity, total)
    shares = {name: sum(shape) or 1 for name, shape in shapes.items()}
    scale = _water_level(sizes, shares, budget)

    def scale_of_unit(name: str, unit: int) -> Fraction:
        """The scale at which a layer keeps its unit number `unit` (from 1), by rounding to the nearest."""
        return Fraction((2 * unit - 1) * unit_sizes[name], 2 * shares[name])

    kept = {
        name: min(counts[name], math.floor(scale * shares[name] / unit_sizes[name] + Fraction(1, 2))) for name in shapes
    }
    excess = sum(kept[name] * unit_sizes[name] for name in shapes) - budget
    names = list(shapes)  # equal scales: the layer that comes first keeps its unit first
    while excess > 0:
        last = max((name for name in reversed(names) if kept[name]), key=lambda name: scale_of_unit(name, kept[name]))
        kept[last] -= 1
        excess -= unit_sizes[last]
    while excess < 0:
        open_names = (name for name in names if kept[name] < counts[name])
        following = min(open_names, key=lambda name: scale_of_unit(name, kept[name] + 1))
        if excess + unit_sizes[following] >= -excess:
            break
        kept[following] += 1
        excess += unit_sizes[following]
    return {name: counts[name] - kept[name] for name in shapes}


def require_matches(patterns: Iterable[str], names: Iterable[str], what: str = "pattern") -> None:
    """Raise ``ValueError`` for the first of the fnmatch patterns that matches no module name, and say what is close.

    >>> require_matches(["layer1.*"], ["conv1", "layer1.0", "fc"])
    >>> require_matches(["layr1.0"], ["conv1", "layer1.0", "fc"])
    Traceback (most recent call last):
    ...
    ValueError: pattern 'layr1.0' matches no module; close names: 'layer1.0'
    """
    names = list(names)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{what} must be a string with a module's name, where * and ? are wild, got {pattern!r}")
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        known = [name for name in names if name]  # the root's name is empty
        if close := get_close_matches(pattern, known, n=3, cutoff=0.5):
            hint = f"close names: {', '.join(map(repr, close))}"
        else:
            hint = f"there are: {', '.join(map(repr, known[:8]))}{', …' * (len(known) > 8)}" if known else "none exist"
        raise ValueError(f"{what} {pattern!r} matches no module; {hint}")


def _water_level(sizes: Mapping[str, int], shares: Mapping[str, int], budget: int) -> Fraction:
    """The scale at which ``sum(min(size, scale * share))`` is the budget."""
    not_full = dict(sizes)
    while not_full:
        scale = Fraction(budget, sum(shares[name] for name in not_full))
        full = [name for name, size in not_full.items() if scale * shares[name] > size]
        if not full:
            return scale
        for name in full:
            budget -= not_full.pop(name)
    return Fraction(0)

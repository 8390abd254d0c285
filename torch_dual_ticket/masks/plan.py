"""From what a user asks for to the number of units pruned in each layer, in each cycle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .distributions import by_name, check_distribution, erk, uniform, validate_sparsity
from .patterns import count_units, parse_pattern
from .seeded import SeededMask

DEFAULT_SPARSITY = 0.9


class Prunable(Protocol):
    """What a plan needs to know of a parameter."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def input_dim(self) -> int | None: ...
    @property
    def layer_names(self) -> Sequence[str]: ...
    def obstacle(self, kind: str) -> str | None: ...


@dataclass(frozen=True)
class Plan:
    """The masks of a model, up to the seed."""

    pattern: str
    shapes: dict[str, tuple[int, ...]]  # by parameter name
    layouts: dict[str, tuple[bool, int | None]]  # transposed and input_dim, as masks have them
    pruned: list[dict[str, int]]  # units, in each cycle

    def masks(self, seed: int, cycle: int = -1) -> dict[str, SeededMask]:
        """The masks of a cycle (from 0), by default of the last."""
        return {
            name: SeededMask(seed, name, shape, self.pruned[cycle][name], self.pattern, *self.layouts[name])
            for name, shape in self.shapes.items()
        }


def make_plan(
    targets: Sequence[Prunable],
    sparsity: float | Mapping[str, float] | None,
    *,
    distribution: str = "uniform",
    pattern: str = "unstructured",
    cycles: int = 1,
    stacklevel: int = 3,
) -> Plan:
    """How much of each target is pruned in each cycle; targets that stay dense are left out.

    Warns, at the line that ``stacklevel`` says, of layers that are pruned altogether.

    Raises:
        TypeError, ValueError: a sparsity that is not a fraction, contradicts the pattern, or prunes nothing; a pattern
            that does not fit a layer; a name pattern that matches no module.
    """
    implied = parse_pattern(pattern).sparsity
    check_distribution(distribution)
    if sparsity is None:
        sparsity = DEFAULT_SPARSITY if implied is None else implied
    if implied is not None:
        _check_implied(sparsity, implied, pattern, distribution, cycles)
    if isinstance(sparsity, Mapping):
        if distribution != "uniform":
            raise ValueError(
                f"distribution={distribution!r} spreads one sparsity over the layers, but sparsity is a mapping that"
                " already says it layer by layer. Give a number, or leave the distribution at 'uniform'."
            )
        sparsities = by_name({target.name: target.layer_names for target in targets}, sparsity)
    else:
        sparsities = dict.fromkeys((target.name for target in targets), validate_sparsity(sparsity))
    pruned_targets = [target for target in targets if sparsities[target.name] > 0]
    if not pruned_targets:
        raise ValueError(f"nothing to prune: sparsity={sparsity!r} leaves every layer dense")
    units = {target.name: _count_units(target, pattern) for target in pruned_targets}
    shapes = {target.name: target.shape for target in pruned_targets}
    pruned = []
    for cycle in range(1, cycles + 1):
        levels = {name: sparsity_of_cycle(sparsities[name], cycle, cycles) for name in units}
        if distribution == "erk":
            pruned.append(erk(shapes, max(levels.values()), units))
        else:
            pruned.append(uniform(units, levels))
    if not any(pruned[-1].values()):
        raise ValueError(
            f"sparsity={sparsity!r} rounds to no unit in any layer; the largest layer has {max(units.values())} units."
            " Give a higher sparsity."
        )
    emptied = [name for name, count in pruned[-1].items() if 0 < count == units[name]]
    if emptied:
        others = f" and of {len(emptied) - 1} more" if emptied[1:] else ""
        warnings.warn(
            f"sparsity={sparsity!r} rounds to all {units[emptied[0]]} units of {emptied[0]}{others}: nothing goes"
            " through it any more. Leave it dense with exclude, or give it a lower sparsity.",
            stacklevel=stacklevel,
        )
    return Plan(pattern, shapes, {target.name: _layout(target, pattern) for target in pruned_targets}, pruned)


def sparsity_of_cycle(sparsity: float, cycle: int, cycles: int) -> float:
    """What a cycle, counted from 1, aims at: each removes the same fraction of what the one before has left.

    >>> [sparsity_of_cycle(0.75, cycle, 2) for cycle in (1, 2)]
    [0.5, 0.75]
    """
    return sparsity if cycle == cycles else 1 - (1 - sparsity) ** (cycle / cycles)


def _check_implied(
    sparsity: float | Mapping[str, float], implied: float, pattern: str, distribution: str, cycles: int
) -> None:
    values = [value for value in sparsity.values() if value != 0] if isinstance(sparsity, Mapping) else [sparsity]
    for value in values:
        if abs(validate_sparsity(value) - implied) > 1e-9:
            raise ValueError(
                f"pattern {pattern!r} means a sparsity of {implied:g}, but sparsity={value!r} was given. Leave sparsity"
                " out, or choose another pattern."
            )
    if distribution != "uniform":
        raise ValueError(
            f"pattern {pattern!r} prunes every layer alike, so distribution={distribution!r} is not possible"
        )
    if cycles > 1:
        raise ValueError(
            f"pattern {pattern!r} has one sparsity, which cannot be reached in cycles={cycles}; use cycles=1"
        )


def _count_units(target: Prunable, pattern: str) -> int:
    exclusion = f"exclude=[{target.layer_names[0]!r}]"
    if obstacle := target.obstacle(parse_pattern(pattern).kind):
        raise ValueError(
            f"{target.name}: pattern {pattern!r} is not defined for {obstacle}. Leave the layer dense with {exclusion},"
            " or use pattern='unstructured'."
        )
    try:
        return count_units(target.shape, pattern, 1 if target.input_dim is None else target.input_dim)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error} ({exclusion})") from None


def _layout(target: Prunable, pattern: str) -> tuple[bool, int | None]:
    """An unstructured mask has no need of input_dim, and stays what it was before that was known."""
    is_usual = pattern == "unstructured" or target.input_dim == int(not target.transposed)
    return target.transposed, None if is_usual else target.input_dim

"""Layers that stay dense, by patterns of their names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from glob import escape

from ..masks.distributions import require_matches


def check_exclusions(exclude: Sequence[str], names: Iterable[str] | None = None) -> None:
    """A sequence of patterns, each of which matches one of these modules, where they are known."""
    if not isinstance(exclude, Sequence) or isinstance(exclude, str) or not all(isinstance(p, str) for p in exclude):
        raise TypeError(f"exclude is a sequence of name patterns, as in exclude=['conv1', 'head.*']; got {exclude!r}")
    if names is not None:
        require_matches(exclude, names, "exclude: the pattern")


def is_excluded(layer_name: str, exclude: Sequence[str]) -> bool:
    """Whether a pattern matches the module or one that contains it."""
    return any(fnmatchcase(name, pattern) for name in _lineage(layer_name) for pattern in exclude)


def exclusions_for(unwanted: Collection[str], wanted: Collection[str]) -> list[str]:
    """A few patterns that exclude all of the unwanted layers, and none of the wanted ones.

    >>> exclusions_for(["stem", "stage.0.a", "stage.0.b"], ["stage.1.a", "head"])
    ['stage.0', 'stem']
    >>> exclusions_for(["layers.0.q.base", "layers.1.q.base"], ["layers.0.q.lora", "layers.1.q.lora"])
    ['*.base']
    >>> exclusions_for(["a.q", "b.q"], ["a.q.lora", "b.q.lora"])  # a layer can only be excluded with those in it
    ['a.q', 'b.q']
    """
    covered: dict[str, set[str]] = {}
    for layer in unwanted:
        for pattern in _patterns(layer):
            covered.setdefault(pattern, set()).add(layer)
    for layer in wanted:
        for pattern in _patterns(layer):
            covered.pop(pattern, None)
    chosen: list[str] = []
    rest = set(unwanted)
    while best := max(covered, key=lambda one: (len(covered[one] & rest), one[0] != "*", len(one)), default=None):
        if not covered[best] & rest:
            break
        rest -= covered[best]
        chosen.append(best)
    return [*chosen, *sorted(map(escape, rest))]


def _lineage(layer_name: str) -> list[str]:
    parts = layer_name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _patterns(layer_name: str) -> Iterable[str]:
    """The layer, modules that contain it, and what has the same last name as one of these."""
    for name in map(escape, _lineage(layer_name)):
        yield name
        if "." in name:
            yield f"*.{name.rpartition('.')[2]}"

"""How much of a model is pruned, and why the rest stays dense."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from torch import nn

from .exclusions import is_excluded
from .layout import is_conv1d_of_transformers
from .names import unwrapped_modules
from .targets import DEFAULT_TARGETS, Target
from .weights import embedded, largest, type_name, weights_of

EXCLUDED, EMBEDDING, TIED, NO_TARGET = "excluded", "embedding", "tied to an embedding", "not a target type"


def why_dense(model: nn.Module, taken: Collection[int]) -> dict[int, str]:
    """By the ids of the parameters: why a weight of two or more dimensions is not among those that are taken.

    ``EXCLUDED`` by the arguments of whoever has chosen the targets: the default ones would have had it.
    """
    modules = [module for _, module in unwrapped_modules(model)]
    shared = embedded(modules)
    usual = {
        id(parameter)
        for layer in modules
        if _default_type(layer)
        for name, parameter in layer.named_parameters()
        if name.startswith(("weight", "parametrizations.weight."))
    }
    reasons = {}
    for key in [id(weight.parameter) for weight in weights_of(model)]:
        if key not in taken:
            yes, no = (TIED, EMBEDDING) if key in shared else (EXCLUDED, NO_TARGET)
            reasons[key] = yes if key in usual else no
    return reasons


def warn_of_coverage(model: nn.Module, targets: Sequence[Target], exclude: Sequence[str]) -> None:
    """Warn, on behalf of a constructor, where the default targets are less than half of what could be pruned.

    Embeddings, frozen weights and what ``exclude`` matches are not counted.
    """
    taken = {id(target.parameter): target.parameter.numel() for target in targets}
    reasons = why_dense(model, taken)
    dense = [weight for weight in weights_of(model) if id(weight.parameter) in reasons]
    left = [
        weight
        for weight in dense
        if reasons[id(weight.parameter)] == NO_TARGET
        and weight.parameter.requires_grad
        and not is_excluded(weight.layer_name, exclude)
    ]
    size_left = sum(weight.parameter.numel() for weight in left)
    size = sum(taken.values()) + size_left
    if 2 * size_left <= size:
        return
    shares, others = largest(left, size)
    usual = [_default_type(occurrence.layer) for target in targets for occurrence in target.occurrences]
    types = [*dict.fromkeys(type_name(kind) for kind in usual if kind), *others]
    tied = [weight.layer_name for weight in dense if reasons[id(weight.parameter)] == TIED]
    also = f", exclude={[*exclude, *tied]}" if tied else ""  # explicit types take them
    warnings.warn(
        f"only {1 - size_left / size:.0%} of the weights will be pruned: the default targets do not include {shares}."
        f" To prune those too, give targets=({', '.join(types)}){also}; to leave them dense, name them in exclude.",
        stacklevel=4,
    )


def _default_type(layer: nn.Module) -> type | None:
    """The one of the default targets that the layer is."""
    if is_conv1d_of_transformers(layer):
        return type(layer)
    return next((kind for kind in DEFAULT_TARGETS if isinstance(layer, kind)), None)

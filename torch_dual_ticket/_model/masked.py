"""Which parameters the masks are for that somebody gives by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._tensors.dtensor import reshard
from .._tensors.sharding import whole
from ..masks.explicit import ExplicitMask
from .names import first_names, unwrapped_modules, unwrapped_parameters
from .targets import (
    Target,
    all_tensor_names,
    check_model,
    check_parameter,
    check_targets,
    default_entries,
    resolve,
    tensor_names,
)
from .weights import embedded


def find_masked(
    model: nn.Module, masks: Mapping[str, Tensor], *, frozen: bool = False
) -> tuple[list[Target], dict[str, ExplicitMask]]:
    """The parameters that have these names, in the model's order, and their masks. Collective for sharded masks.

    ``TypeError`` or ``ValueError`` for what is not a mask, or not of a parameter that can be pruned; one that is frozen
    can be, if ``frozen`` says so.
    """
    check_model(model)
    check_given(masks)
    if not masks:
        raise ValueError("masks is empty, so there is nothing to hold at zero: give a mask for each parameter to prune")
    reshard(model)
    modules = dict(unwrapped_modules(model))
    named = dict(unwrapped_parameters(model))
    wanted = {id(named[name]) for name in masks if name in named}
    names = first_names(model)
    found: dict[str, Target] = {}
    for layer_name, layer in modules.items():
        if isinstance(layer, parametrize.ParametrizationList):  # the layer above has its parameters
            continue
        for tensor_name in all_tensor_names(layer):
            if wanted.isdisjoint(map(id, _behind(layer, tensor_name))):
                continue
            occurrence = resolve(layer_name, layer, tensor_name)
            name = names[id(occurrence.parameter)]
            found.setdefault(name, Target(name)).add(occurrence, modules)
    for name in masks:
        if name not in found:
            raise ValueError(_why_not(name, named, names, found))
    targets = [found[name] for name in named if name in masks]
    check_targets(targets, None, frozen_too=frozen)
    return targets, {target.name: ExplicitMask(_checked(target, masks[target.name])) for target in targets}


def check_given(masks: Mapping[str, Tensor]) -> None:
    """What is given as masks is a mapping."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks is a mapping from parameter names to masks, got {type(masks).__name__}")


def masks_of_zeros(model: nn.Module) -> dict[str, Tensor]:
    """The masks, by parameter name, that are False where weights of two or more dimensions are zero.

    A weight without zeros has none; nor has one that is nothing but zeros, if it is not a default target; one that an
    embedding also owns, whose padding is zero, one that ``torch.nn.utils.prune`` masks itself, or one behind a
    parametrization that zeros do not survive.
    """
    check_model(model)
    reshard(model)
    names = first_names(model)
    modules = dict(unwrapped_modules(model))
    entries, seen = default_entries(modules.values()), embedded(modules.values())
    masks = {}
    for layer_name, layer in modules.items():
        usual = tensor_names(layer, entries)
        for tensor_name in [] if isinstance(layer, parametrize.ParametrizationList) else all_tensor_names(layer):
            try:
                occurrence = resolve(layer_name, layer, tensor_name)
                check_parameter(Target(tensor_name, [occurrence]))
            except ValueError:  # hold() could not take it
                continue
            parameter = occurrence.parameter
            if id(parameter) in seen or parameter.is_meta or parameter.dim() < 2:
                continue
            seen.add(id(parameter))
            kept = whole(parameter.detach()) != 0
            if not bool(kept.all()) and (tensor_name in usual or bool(kept.any())):
                masks[names[id(parameter)]] = kept
    return masks


def _behind(layer: nn.Module, tensor_name: str) -> Iterator[Any]:
    """The parameters that an attribute of the layer is made of; the older weight_norm keeps them in the layer."""
    yield from (layer._parameters.get(f"{tensor_name}{suffix}") for suffix in ("", "_v", "_orig"))
    if parametrize.is_parametrized(layer, tensor_name):
        yield from layer.parametrizations[tensor_name].parameters()  # type: ignore[union-attr, index]


def _why_not(name: str, named: Mapping[str, Any], names: Mapping[int, str], found: Mapping[str, Target]) -> str:
    first = names.get(id(named.get(name)), name)
    if name not in named:
        why = f"the model has no such parameter, but {', '.join(list(named)[:8])}{', …' if len(named) > 8 else ''}"
    elif first in found:
        why = f"it is tied to {first}: name that"
    else:
        why = "a weight is computed from it by weight_norm or another reparametrization"
    return f"the mask of {name!r} does not belong to a parameter: {why}"


def _checked(target: Target, mask: Any) -> Tensor:
    """The whole mask as a bool tensor."""
    name = target.name
    if not isinstance(mask, Tensor) or mask.is_meta or mask.layout is not torch.strided:
        got = f"{mask.layout} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"the mask of {name} must be a dense tensor of bools, True = kept, or of 0 and 1; got {got}")
    values: Tensor = whole(mask.detach())
    if tuple(values.shape) != target.shape:
        raise ValueError(f"the mask of {name} has shape {tuple(values.shape)}, the parameter {target.shape}")
    if values.dtype == torch.bool:
        return values
    wrong = values[(values != 0) & (values != 1)]
    if wrong.numel():
        raise ValueError(
            f"the mask of {name} must hold 0 (pruned) and 1 (kept) only, got {wrong[0].item()!r}: compare with a"
            " threshold first, as in scores > threshold"
        )
    return values != 0

"""Which parameters are pruned: by module type, name and exclusions, down to the leaf under a reparametrization."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._tensors.dtensor import reshard
from .exclusions import check_exclusions, exclusions_for, is_excluded
from .layout import input_dim_of, is_conv1d_of_transformers
from .names import first_names, unwrapped_modules
from .weights import embedded, largest, type_name, weights_of

TargetType = type | tuple[type, str | Sequence[str]] | tuple[type, str | Sequence[str], int]

DEFAULT_TARGETS: tuple[type, ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""And the Conv1D of transformers, which cannot be named without importing it."""

_TARGETS_ARE = (
    "targets are module types, whose `weight` is taken, or pairs of a module type and a pattern of parameter names, as"
    " in targets=(nn.Linear, (nn.LSTM, 'weight_*')), or these two and the dimension of the weight that holds the inputs"
)


class _Entry(NamedTuple):
    """One of the ``targets``."""

    module_type: type
    patterns: tuple[str, ...] = ("weight",)
    input_dim: int | None = None


@dataclass
class Occurrence:
    """One (module, name) under which a model has a target parameter. A tied parameter has several."""

    layer_name: str
    layer: nn.Module  # the module that users know, the one with `tensor_name`
    tensor_name: str  # the attribute of the layer that its forward uses: "weight"
    owner: nn.Module  # the module that registers the parameter: the layer, or the ParametrizationList under it
    attribute: str  # the parameter's name within the owner: "weight", "weight_v", "original1"
    direction_dim: int | None = None  # weight_norm only: each slice along this dimension is divided by its norm
    given_input_dim: int | None = None  # what the user has said of the layout

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]  # type: ignore[return-value]


@dataclass
class Target:
    """A parameter to prune, with all its occurrences; the first gives it its name."""

    name: str
    occurrences: list[Occurrence] = field(default_factory=list)
    users: list[Occurrence] = field(default_factory=list)  # modules that use the parameter without calling its layer

    def add(self, occurrence: Occurrence, modules: dict[str, nn.Module]) -> None:
        """Only once in each module, which has several names where it is shared."""
        if all((one.owner, one.attribute) != (occurrence.owner, occurrence.attribute) for one in self.occurrences):
            self.occurrences.append(occurrence)
            self.users += users_of(occurrence, modules)

    @property
    def parameter(self) -> nn.Parameter:
        return self.occurrences[0].parameter

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def layer_name(self) -> str:
        return self.occurrences[0].layer_name

    @property
    def layer_names(self) -> list[str]:
        return [occurrence.layer_name for occurrence in self.occurrences]

    @property
    def transposed(self) -> bool:
        return isinstance(self.occurrences[0].layer, _ConvTransposeNd)

    @property
    def input_dim(self) -> int | None:
        """The dimension of the input units; None for a layout that is not known."""
        first = self.occurrences[0]
        return input_dim_of(first.layer) if first.given_input_dim is None else first.given_input_dim % len(self.shape)

    def obstacle(self, kind: str) -> str | None:
        """What a pattern of this kind is not defined for, if that is what the layer is."""
        first = self.occurrences[0]
        if kind == "unstructured":
            return None
        if isinstance(first.layer, _ConvNd) and first.layer.groups > 1:
            return "grouped convolutions"
        name = type_name(type(first.layer))
        if kind == "filter" and isinstance(first.layer, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)):
            return f"{name}: a row of its weights is one gate of a unit, and not a unit"
        if kind != "block" and self.input_dim is None:
            return (
                f"{name}, of which it is not known which dimension holds the inputs. If it is dimension 1 of"
                f" {self.shape}, say so with targets=(…, ({name}, {first.tensor_name!r}, 1))"
            )
        if kind != "n:m" and len(self.shape) > 2 and self.input_dim != input_dim_of(first.layer):
            return f"{name}: of the {len(self.shape)} dimensions of its weight only that of the inputs is known"
        return None


def find_targets(model: nn.Module, types: Sequence[TargetType], exclude: Sequence[str]) -> list[Target]:
    """The parameters to prune, in the order and with the names of ``named_parameters()`` of the unwrapped model.

    ``types`` are module types, whose ``weight`` is taken, or pairs of a module type and an :mod:`fnmatch` pattern of
    parameter names, or several: ``(nn.LSTM, "weight_*")``; a third part is the dimension of the inputs. ``exclude`` are
    fnmatch patterns of module names; a module's name stands for all that is below it, too. A tied parameter is excluded
    with any of its owners; with the default types, one that an embedding owns too is left out.

    Raises:
        TypeError: an entry of ``types`` or ``exclude`` of the wrong kind.
        ValueError: an exclusion that matches no module; lazy, frozen or integer parameters; layers in which zeros would
            not survive; or no target at all.
    """
    check_model(model)
    entries = check_types(types)
    reshard(model)
    modules = dict(unwrapped_modules(model))
    check_exclusions(exclude, modules)
    included = {name: layer for name, layer in modules.items() if not is_excluded(name, exclude)}
    if types == DEFAULT_TARGETS:
        entries = default_entries(modules.values())
    for entry in entries:
        _check_matches(entry, included)

    names = first_names(model)
    found: dict[int, Target] = {}
    for layer_name, layer in included.items():
        for tensor_name, input_dim in tensor_names(layer, entries).items():
            occurrence = resolve(layer_name, layer, tensor_name)
            occurrence.given_input_dim = input_dim
            key = id(occurrence.parameter)
            found.setdefault(key, Target(names[key])).add(occurrence, modules)
    excluded = {  # a parameter of an excluded layer may be tied to one of an included layer
        id(parameter) for name in modules.keys() - included.keys() for parameter in modules[name]._parameters.values()
    }
    if types == DEFAULT_TARGETS:
        excluded |= embedded(modules.values())
    targets = [found[key] for key in names if key in found and key not in excluded]
    if not targets:
        kinds = ", ".join(t if isinstance(t, str) else getattr(t, "__name__", repr(t)) for t in types)
        left = [one for one in weights_of(model) if one.layer_name in included and id(one.parameter) not in excluded]
        shares, advice = largest(left, sum(one.parameter.numel() for one in left))
        hint = f". Its largest weights are {shares}: targets=({', '.join(advice)},) would take them" if left else ""
        raise ValueError(
            f"nothing to prune: {type(model).__name__} has no parameter that matches targets=({kinds}), is not excluded"
            f" by exclude={list(exclude)!r}, and is not shared with an embedding{hint}"
        )
    check_targets(targets, exclude)
    return targets


def default_entries(modules: Iterable[nn.Module]) -> list[_Entry]:
    """What the default targets are in a model of these modules."""
    kinds = {type(module) for module in modules if is_conv1d_of_transformers(module)}
    return [_Entry(kind) for kind in (*DEFAULT_TARGETS, *kinds)]


def runs_forward(layer: nn.Module) -> bool:
    """Whether the layer's own forward is called when its parameters are used, as far as its type tells.

    nn.MultiheadAttention uses the parameters of its out_proj, which is of this type, without calling it; and a
    ParameterList has no forward at all.
    """
    has_forward = type(layer).forward is not nn.Module.forward or "forward" in vars(layer)
    return has_forward and not isinstance(layer, NonDynamicallyQuantizableLinear)


def users_of(occurrence: Occurrence, modules: dict[str, nn.Module]) -> list[Occurrence]:
    """Where the layer's own forward is not called: the parameter as the next module above with a forward has it."""
    name = occurrence.layer_name
    if runs_forward(occurrence.layer):
        return []
    while name:
        name = name.rpartition(".")[0]
        if runs_forward(modules[name]):
            below = occurrence.layer_name[len(name) :].lstrip(".")
            path = f"{below}.{occurrence.tensor_name}"
            return [Occurrence(name, modules[name], path, occurrence.owner, occurrence.attribute)]
    return []


def check_model(model: nn.Module) -> None:
    """A module, of layers that have their own weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: give the model itself")
    wrappers = (
        name or "the model"
        for name, module in model.named_modules()
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)
    )
    # The wrapper may lie above the model, as where Lightning gives the module inside to a callback.
    flattened = (name for name, parameter in model.named_parameters() if hasattr(parameter, "_fsdp_flattened"))
    if first := next(itertools.chain(wrappers, flattened), None):
        raise ValueError(
            f"{first} belongs to a FullyShardedDataParallel (FSDP1), which flattens the weights of many layers into one"
            " parameter. Use FSDP2 instead: torch.distributed.fsdp.fully_shard."
        )


def check_types(types: Sequence[TargetType]) -> list[_Entry]:
    """They are targets, as far as that can be said without a model."""
    if not isinstance(types, Sequence):
        raise TypeError(f"{_TARGETS_ARE}; got {types!r}")
    return [_check_type(entry) for entry in types]


def _check_type(entry: TargetType) -> _Entry:
    parts: tuple[Any, ...] = entry if isinstance(entry, tuple) else (entry,)
    kind, names, input_dim = (*parts, *("weight", None)[len(parts) - 1 :]) if 0 < len(parts) <= 3 else (None,) * 3
    patterns = (names,) if isinstance(names, str) else names
    if (
        not (isinstance(kind, type) and issubclass(kind, nn.Module))
        or not (isinstance(patterns, Sequence) and patterns and all(isinstance(name, str) for name in patterns))
        or not (input_dim is None or type(input_dim) is int)
    ):
        raise TypeError(f"{_TARGETS_ARE}; got {entry!r} among them")
    return _Entry(kind, tuple(patterns), input_dim)


def tensor_names(layer: nn.Module, entries: Sequence[_Entry]) -> dict[str, int | None]:
    """The names under which the layer's forward uses the tensors to prune; with the inputs' dimension, if given."""
    mine = [entry for entry in entries if isinstance(layer, entry.module_type)]
    names: dict[str, int | None] = {}
    for name in all_tensor_names(layer) if mine else ():
        given = [entry.input_dim for entry in mine if any(fnmatchcase(name, pattern) for pattern in entry.patterns)]
        if given:
            names[name] = next((dim for dim in given if dim is not None), None)
    return names


def _check_matches(entry: _Entry, layers: dict[str, nn.Module]) -> None:
    """Where there is a layer of that type, one has such a parameter; an LSTM, for example, has no `weight` to prune."""
    kind = entry.module_type
    of_type = [(name, layer) for name, layer in layers.items() if isinstance(layer, kind)]
    for pattern in entry.patterns if of_type else ():
        if any(tensor_names(layer, [_Entry(kind, (pattern,))]) for _, layer in of_type):
            continue
        name, layer = of_type[0]
        names = [tensor_name for tensor_name in all_tensor_names(layer) if "bias" not in tensor_name]
        example = f"as in targets=(({kind.__name__}, {names[0]!r}), …)" if names else "or leave the type out"
        raise ValueError(
            f"targets: no {kind.__name__} in the model has a parameter {pattern!r}; {name!r} has"
            f" {', '.join(names) or 'none'}. Give a pair of the type and a pattern of its parameter names, {example}."
        )


def all_tensor_names(layer: nn.Module) -> list[str]:
    names = [name for name, parameter in layer._parameters.items() if parameter is not None]
    if parametrize.is_parametrized(layer):
        names += list(layer.parametrizations)  # type: ignore[arg-type]
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            names = [name for name in names if not name.startswith(f"{hook.name}_")] + [hook.name]
        elif isinstance(hook, prune.BasePruningMethod) and f"{hook._tensor_name}_orig" in names:
            names = [hook._tensor_name if name == f"{hook._tensor_name}_orig" else name for name in names]
    return names


def resolve(layer_name: str, layer: nn.Module, tensor_name: str) -> Occurrence:
    """The leaf parameter behind an attribute of a layer; ``ValueError`` says why it cannot be pruned."""
    if tensor_name in layer._parameters:
        return Occurrence(layer_name, layer, tensor_name, layer, tensor_name)
    where = f"{layer_name}.{tensor_name}" if layer_name else tensor_name
    if parametrize.is_parametrized(layer, tensor_name):
        chain: Any = layer.parametrizations[tensor_name]  # type: ignore[index]
        if len(chain) == 1 and isinstance(chain[0], parametrizations._WeightNorm):
            return Occurrence(layer_name, layer, tensor_name, chain, "original1", direction_dim=chain[0].dim)
        if len(chain) == 1 and isinstance(chain[0], parametrizations._SpectralNorm):
            return Occurrence(layer_name, layer, tensor_name, chain, "original")
        kinds = " and ".join(type(link).__name__ for link in chain)
        raise ValueError(
            f"{where} is parametrized by {kinds}; zeros put into the parameter behind it would not be zeros of"
            f" {tensor_name}. Leave the layer dense with exclude=[{layer_name!r}], or remove the parametrization first."
        )
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == tensor_name:
            return Occurrence(layer_name, layer, tensor_name, layer, f"{tensor_name}_v", direction_dim=hook.dim)
        if isinstance(hook, SpectralNorm) and hook.name == tensor_name:
            return Occurrence(layer_name, layer, tensor_name, layer, f"{tensor_name}_orig")
    raise ValueError(
        f"{where} is already pruned by torch.nn.utils.prune. Make it permanent with prune.remove(module,"
        f" {tensor_name!r}), or leave the layer alone with exclude=[{layer_name!r}]."
    )


def check_targets(targets: list[Target], exclude: Sequence[str] | None, *, frozen_too: bool = False) -> None:
    """They can be pruned. What may be true of many at once is said of all, with patterns that leave them all out.

    ``exclude`` is None where the targets are those that masks name.
    """
    for target in targets:
        check_parameter(target)
    frozen = [target for target in targets if not target.parameter.requires_grad]
    if frozen and not frozen_too:
        it = "them" if frozen[1:] else "it"
        raise ValueError(
            f"{_listed(frozen)} frozen (requires_grad is False), so no penalty can move what is known there. Unfreeze"
            f" {it}, or leave {it} out{_exclude(frozen, targets, exclude)}."
        )
    standardized = [target for target in targets if _standardizes(target.occurrences[0].layer)]
    if standardized:
        kind = type(standardized[0].occurrences[0].layer).__name__
        raise ValueError(
            f"{_listed(standardized)} standardized by the forward of {kind}, so zeros put into the parameter would not"
            f" be zeros of the kernel. Leave such layers out{_exclude(standardized, targets, exclude)}."
        )


def _standardizes(layer: nn.Module) -> bool:
    """Weight standardization within the forward, as in StdConv2d and ScaledStdConv2d of timm: known by its name."""
    return any("StdConv" in base.__name__ or "Standardized" in base.__name__ for base in type(layer).__mro__)


def _listed(targets: list[Target]) -> str:
    more = f" and {len(targets) - 3} more" if targets[3:] else ""
    return f"{', '.join(target.name for target in targets[:3])}{more} {'are' if targets[1:] else 'is'}"


def _exclude(unwanted: list[Target], targets: list[Target], exclude: Sequence[str] | None) -> str:
    if exclude is None:
        return " of the masks"
    names = {target.name for target in unwanted}
    others = [name for target in targets if target.name not in names for name in target.layer_names]
    return f" with exclude={[*exclude, *exclusions_for([target.layer_name for target in unwanted], others)]}"


def check_parameter(target: Target) -> None:
    name, parameter, leave_out = target.name, target.parameter, f"exclude=[{target.layer_name!r}]"
    if is_lazy(parameter):
        raise ValueError(f"{name} has no shape yet: run one forward pass through the lazy module before pruning it")
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(
            f"{name} has dtype {parameter.dtype}; only floating-point and complex weights can be pruned. Leave the"
            f" layer out with {leave_out}."
        )
    given = target.occurrences[0].given_input_dim
    if given is not None and not -parameter.dim() <= given < parameter.dim():
        raise ValueError(
            f"targets: {given} is given as the dimension of the inputs of {name}, whose shape is {target.shape}"
        )
    if parameter.is_conj():
        raise ValueError(
            f"{name} is a lazily conjugated view, which cannot be changed in place. Make it a parameter with its own"
            " memory: nn.Parameter(weight.resolve_conj())."
        )
    if parameter.layout is not torch.strided:
        raise ValueError(
            f"{name} has layout {parameter.layout}; only dense (strided) weights can be pruned. Leave the layer out"
            f" with {leave_out}."
        )

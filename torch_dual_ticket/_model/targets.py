"""Which parameters are pruned: by module type, name and exclusions, down to the leaf under a reparametrization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._engine.dtensor import reshard
from .names import unwrapped_modules, unwrapped_parameters

if TYPE_CHECKING:
    TargetType = type | tuple[type, str]

DEFAULT_TARGETS: tuple[TargetType, ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

_TARGETS_ARE = (
    "targets are module types, whose `weight` is taken, or pairs of a module type and a pattern of parameter names, as"
    " in targets=(nn.Linear, (nn.LSTM, 'weight_*'))"
)


@dataclass
class Place:
    """One place in a model where a target parameter stands. A tied parameter has several."""

    layer_name: str
    layer: nn.Module  # the module that people know, the one with `tensor_name`
    tensor_name: str  # the attribute of the layer that its forward uses: "weight"
    owner: nn.Module  # the module that registers the parameter: the layer, or the ParametrizationList under it
    attribute: str  # the parameter's name within the owner: "weight", "weight_v", "original1"
    direction_dim: int | None = None  # weight_norm only: the dimension along which each slice has a norm of its own

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]  # type: ignore[return-value]


@dataclass
class Target:
    """A parameter to prune, and all places where it stands; the first gives it its name."""

    name: str
    places: list[Place] = field(default_factory=list)
    users: list[Place] = field(default_factory=list)  # seen from the modules that use it without calling its layer

    @property
    def parameter(self) -> nn.Parameter:
        return self.places[0].parameter

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def layer_name(self) -> str:
        return self.places[0].layer_name

    @property
    def transposed(self) -> bool:
        return isinstance(self.places[0].layer, _ConvTransposeNd)

    @property
    def grouped(self) -> bool:
        layer = self.places[0].layer
        return isinstance(layer, _ConvNd) and layer.groups > 1


def find_targets(model: nn.Module, types: Sequence[TargetType], exclude: Sequence[str]) -> list[Target]:
    """The parameters to prune, in the order and with the names of ``named_parameters()`` of the unwrapped model.

    ``types`` are module types, whose ``weight`` is taken, or pairs of a module type and an :mod:`fnmatch` pattern of
    parameter names: ``(nn.LSTM, "weight_*")``. ``exclude`` are fnmatch patterns of module names; a module's name stands
    for everything below it too. A tied parameter is excluded with any of its owners.

    Raises:
        TypeError: an entry of ``types`` or ``exclude`` of the wrong kind.
        ValueError: an exclusion that matches no module, a lazy, frozen or integer parameter, a reparametrization under
            which zeros would not survive, or no target at all.
    """
    check_model(model)
    if not isinstance(types, Sequence):
        raise TypeError(f"{_TARGETS_ARE}; got {types!r}")
    pairs = [_check_type(entry) for entry in types]
    reshard(model)
    modules = list(unwrapped_modules(model))
    check_exclusions(exclude, [name for name, _ in modules])
    for pair in pairs:
        _check_matches(pair, [(name, layer) for name, layer in modules if not is_excluded(name, exclude)])

    first_names: dict[int, str] = {}
    for name, parameter in unwrapped_parameters(model):
        first_names.setdefault(id(parameter), name)
    found: dict[int, Target] = {}
    excluded: set[int] = set()
    for layer_name, layer in modules:
        if is_excluded(layer_name, exclude):  # a tied parameter of it may also belong to a layer that is not
            excluded.update(id(parameter) for parameter in layer._parameters.values() if parameter is not None)
            continue
        for tensor_name in _tensor_names(layer, pairs):
            place = _resolve(layer_name, layer, tensor_name)
            if isinstance(place, str):
                raise ValueError(place)
            key = id(place.parameter)
            target = found.setdefault(key, Target(first_names[key]))
            if not any(known.owner is place.owner and known.attribute == place.attribute for known in target.places):
                target.places.append(place)
    targets = [found[key] for key in first_names if key in found and key not in excluded]
    if not targets:
        names = ", ".join(t if isinstance(t, str) else getattr(t, "__name__", repr(t)) for t in types)
        raise ValueError(
            f"nothing to prune: {type(model).__name__} has no parameter that matches targets=({names}) "
            f"and is not excluded by exclude={list(exclude)!r}"
        )
    for target in targets:
        _check_parameter(target)
        users = [_user(place, dict(modules)) for place in target.places if not runs_forward(place.layer)]
        target.users = [user for user in users if user is not None]
    return targets


def runs_forward(layer: nn.Module) -> bool:
    """Whether the layer's own forward is called when its parameters are used, as far as its type tells.

    nn.MultiheadAttention uses the parameters of its out_proj, which is of this type, itself; and a ParameterList has no
    forward at all.
    """
    has_forward = type(layer).forward is not nn.Module.forward or "forward" in vars(layer)
    return has_forward and not isinstance(layer, NonDynamicallyQuantizableLinear)


def _user(place: Place, modules: dict[str, nn.Module]) -> Place | None:
    """The parameter as seen from the next module above that runs its forward."""
    name = place.layer_name
    while name:
        name = name.rpartition(".")[0]
        if runs_forward(modules[name]):
            below = place.layer_name[len(name) :].lstrip(".")
            return Place(name, modules[name], f"{below}.{place.tensor_name}", place.owner, place.attribute)
    return None


def check_model(model: nn.Module) -> None:
    """A module, of layers that have their own weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: give the model itself")
    for name, module in model.named_modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is a FullyShardedDataParallel (FSDP1), which flattens the weights of many"
                " layers into one parameter. Use FSDP2 instead: torch.distributed.fsdp.fully_shard."
            )


def _check_type(entry: TargetType) -> tuple[type, str]:
    module_type, pattern = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, "weight")
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module) and isinstance(pattern, str)):
        raise TypeError(f"{_TARGETS_ARE}; got {entry!r} among them")
    return module_type, pattern


def check_exclusions(exclude: Sequence[str], names: Sequence[str]) -> None:
    """A sequence of patterns, each of which matches one of these modules."""
    if not isinstance(exclude, Sequence) or isinstance(exclude, str) or not all(isinstance(p, str) for p in exclude):
        raise TypeError(f"exclude is a sequence of name patterns, as in exclude=['conv1', 'head.*']; got {exclude!r}")
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(map(repr, names[1:9])) + (", …" if len(names) > 9 else "")
            raise ValueError(f"exclude: the pattern {pattern!r} matches no module. The model has: {known}")


def is_excluded(layer_name: str, exclude: Sequence[str]) -> bool:
    """Whether a pattern matches the module or one that it is in."""
    parts = layer_name.split(".")
    lineage = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in lineage for pattern in exclude)


def _tensor_names(layer: nn.Module, pairs: list[tuple[type, str]]) -> list[str]:
    """The names under which the layer's forward uses the tensors to prune."""
    patterns = [pattern for module_type, pattern in pairs if isinstance(layer, module_type)]
    names = _all_tensor_names(layer) if patterns else []
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check_matches(pair: tuple[type, str], layers: list[tuple[str, nn.Module]]) -> None:
    """A layer of that type, where there is one, has such a parameter: an LSTM has no `weight` to prune."""
    module_type, pattern = pair
    of_type = [(name, layer) for name, layer in layers if isinstance(layer, module_type)]
    if of_type and not any(_tensor_names(layer, [pair]) for _, layer in of_type):
        name, layer = of_type[0]
        names = [tensor_name for tensor_name in _all_tensor_names(layer) if "bias" not in tensor_name]
        example = f"as in targets=(({module_type.__name__}, {names[0]!r}), …)" if names else "or leave the type out"
        raise ValueError(
            f"targets: no {module_type.__name__} in the model has a parameter {pattern!r}; {name!r} has"
            f" {', '.join(names) or 'none'}. Give a pair of the type and a pattern of its parameter names, {example}."
        )


def _all_tensor_names(layer: nn.Module) -> list[str]:
    names = [name for name, parameter in layer._parameters.items() if parameter is not None]
    if parametrize.is_parametrized(layer):
        names += list(layer.parametrizations)  # type: ignore[arg-type]
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            names = [name for name in names if not name.startswith(f"{hook.name}_")] + [hook.name]
        elif isinstance(hook, prune.BasePruningMethod) and f"{hook._tensor_name}_orig" in names:
            names = [hook._tensor_name if name == f"{hook._tensor_name}_orig" else name for name in names]
    return names


def _resolve(layer_name: str, layer: nn.Module, tensor_name: str) -> Place | str:
    """The leaf parameter behind an attribute of a layer, or why it cannot be pruned."""
    where = f"{layer_name}.{tensor_name}" if layer_name else tensor_name
    if tensor_name in layer._parameters:
        return Place(layer_name, layer, tensor_name, layer, tensor_name)
    if parametrize.is_parametrized(layer, tensor_name):
        chain: Any = layer.parametrizations[tensor_name]  # type: ignore[index]
        if len(chain) == 1 and isinstance(chain[0], parametrizations._WeightNorm):
            return Place(layer_name, layer, tensor_name, chain, "original1", direction_dim=chain[0].dim)
        if len(chain) == 1 and isinstance(chain[0], parametrizations._SpectralNorm):
            return Place(layer_name, layer, tensor_name, chain, "original")
        kinds = " and ".join(type(link).__name__ for link in chain)
        return (
            f"{where} is parametrized by {kinds}; zeros put into the parameter behind it would not be zeros of"
            f" {tensor_name}. Leave the layer dense with exclude=[{layer_name!r}], or remove the parametrization first."
        )
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == tensor_name:
            return Place(layer_name, layer, tensor_name, layer, f"{tensor_name}_v", direction_dim=hook.dim)
        if isinstance(hook, SpectralNorm) and hook.name == tensor_name:
            return Place(layer_name, layer, tensor_name, layer, f"{tensor_name}_orig")
    return (
        f"{where} is already pruned by torch.nn.utils.prune. Make it permanent with prune.remove(module,"
        f" {tensor_name!r}), or leave the layer alone with exclude=[{layer_name!r}]."
    )


def _check_parameter(target: Target) -> None:
    name, layer, parameter = target.name, target.layer_name, target.parameter
    if is_lazy(parameter):
        raise ValueError(f"{name} has no shape yet: run one forward pass through the lazy module before pruning it")
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(
            f"{name} has dtype {parameter.dtype}; only floating-point and complex weights can be pruned. "
            f"Leave the layer out with exclude=[{layer!r}]."
        )
    if not parameter.requires_grad:
        raise ValueError(
            f"{name} is frozen (requires_grad is False), so no penalty can move what it knows. Unfreeze it, or leave"
            f" the layer out with exclude=[{layer!r}]."
        )
    if parameter.is_conj():
        raise ValueError(
            f"{name} is a lazily conjugated view, which cannot be changed in place. Make it a parameter with memory of"
            " its own: nn.Parameter(weight.resolve_conj())."
        )
    if parameter.layout is not torch.strided:
        raise ValueError(
            f"{name} has layout {parameter.layout}; only dense (strided) weights can be pruned. Leave the layer out"
            f" with exclude=[{layer!r}]."
        )

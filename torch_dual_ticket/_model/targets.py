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

from .._tensors.dtensor import reshard
from ..masks.distributions import require_matches
from .names import unwrapped_modules, unwrapped_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable

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
class Occurrence:
    """One (module, name) under which a model has a target parameter. A tied parameter has several."""

    layer_name: str
    layer: nn.Module  # the module that users know, the one with `tensor_name`
    tensor_name: str  # the attribute of the layer that its forward uses: "weight"
    owner: nn.Module  # the module that registers the parameter: the layer, or the ParametrizationList under it
    attribute: str  # the parameter's name within the owner: "weight", "weight_v", "original1"
    direction_dim: int | None = None  # weight_norm only: each slice along this dimension is divided by its norm

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]  # type: ignore[return-value]


@dataclass
class Target:
    """A parameter to prune, with all its occurrences; the first gives it its name."""

    name: str
    occurrences: list[Occurrence] = field(default_factory=list)
    users: list[Occurrence] = field(default_factory=list)  # modules that use the parameter without calling its layer

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
    def grouped(self) -> bool:
        layer = self.occurrences[0].layer
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
    modules = dict(unwrapped_modules(model))
    check_exclusions(exclude, modules)
    included = {name: layer for name, layer in modules.items() if not is_excluded(name, exclude)}
    for pair in pairs:
        _check_matches(pair, included)

    first_names: dict[int, str] = {}
    for name, parameter in unwrapped_parameters(model):
        first_names.setdefault(id(parameter), name)
    found: dict[int, Target] = {}
    for layer_name, layer in included.items():
        for tensor_name in _tensor_names(layer, pairs):
            occurrence = _resolve(layer_name, layer, tensor_name)
            key = id(occurrence.parameter)
            target = found.setdefault(key, Target(first_names[key]))
            known = [(other.owner, other.attribute) for other in target.occurrences]
            if (occurrence.owner, occurrence.attribute) not in known:  # a shared module has several names
                target.occurrences.append(occurrence)
    excluded = {  # a parameter of an excluded layer may be tied to one of an included layer
        id(parameter) for name in modules.keys() - included.keys() for parameter in modules[name]._parameters.values()
    }
    targets = [found[key] for key in first_names if key in found and key not in excluded]
    if not targets:
        names = ", ".join(t if isinstance(t, str) else getattr(t, "__name__", repr(t)) for t in types)
        raise ValueError(
            f"nothing to prune: {type(model).__name__} has no parameter that matches targets=({names}) "
            f"and is not excluded by exclude={list(exclude)!r}"
        )
    for target in targets:
        _check_parameter(target)
        target.users = [user for occurrence in target.occurrences for user in _users(occurrence, modules)]
    return targets


def runs_forward(layer: nn.Module) -> bool:
    """Whether the layer's own forward is called when its parameters are used, as far as its type tells.

    nn.MultiheadAttention uses the parameters of its out_proj, which is of this type, without calling it; and a
    ParameterList has no forward at all.
    """
    has_forward = type(layer).forward is not nn.Module.forward or "forward" in vars(layer)
    return has_forward and not isinstance(layer, NonDynamicallyQuantizableLinear)


def _users(occurrence: Occurrence, modules: dict[str, nn.Module]) -> list[Occurrence]:
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


def check_exclusions(exclude: Sequence[str], names: Iterable[str]) -> None:
    """A sequence of patterns, each of which matches one of these modules."""
    if not isinstance(exclude, Sequence) or isinstance(exclude, str) or not all(isinstance(p, str) for p in exclude):
        raise TypeError(f"exclude is a sequence of name patterns, as in exclude=['conv1', 'head.*']; got {exclude!r}")
    require_matches(exclude, names, "exclude: the pattern")


def is_excluded(layer_name: str, exclude: Sequence[str]) -> bool:
    """Whether a pattern matches the module or one that contains it."""
    parts = layer_name.split(".")
    lineage = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in lineage for pattern in exclude)


def _tensor_names(layer: nn.Module, pairs: list[tuple[type, str]]) -> list[str]:
    """The names under which the layer's forward uses the tensors to prune."""
    patterns = [pattern for module_type, pattern in pairs if isinstance(layer, module_type)]
    names = _all_tensor_names(layer) if patterns else []
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check_matches(pair: tuple[type, str], layers: dict[str, nn.Module]) -> None:
    """Where there is a layer of that type, one has such a parameter; an LSTM, for example, has no `weight` to prune."""
    module_type, pattern = pair
    of_type = [(name, layer) for name, layer in layers.items() if isinstance(layer, module_type)]
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


def _resolve(layer_name: str, layer: nn.Module, tensor_name: str) -> Occurrence:
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


def _check_parameter(target: Target) -> None:
    name, parameter, leave_out = target.name, target.parameter, f"exclude=[{target.layer_name!r}]"
    if is_lazy(parameter):
        raise ValueError(f"{name} has no shape yet: run one forward pass through the lazy module before pruning it")
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(
            f"{name} has dtype {parameter.dtype}; only floating-point and complex weights can be pruned. Leave the"
            f" layer out with {leave_out}."
        )
    if not parameter.requires_grad:
        raise ValueError(
            f"{name} is frozen (requires_grad is False), so no penalty can move what it knows. Unfreeze it, or leave"
            f" the layer out with {leave_out}."
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

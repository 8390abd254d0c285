"""The weights of a model that could be pruned: its parameters of two or more dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .names import unwrapped_modules


class Weight(NamedTuple):
    """A parameter of two or more dimensions, and the first module that has it."""

    layer_name: str
    layer: nn.Module
    key: str  # where the parameter is parametrized: of the tensor that is computed from it
    parameter: nn.Parameter

    @property
    def kind(self) -> type:
        return parametrize.type_before_parametrizations(self.layer)

    @property
    def name(self) -> str:
        return f"{self.layer_name}.{self.key}" if self.layer_name else self.key


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """Each once, in the order of ``named_parameters()``."""
    seen: set[int] = set()
    users: dict[int, tuple[str, nn.Module, str]] = {}  # of what is behind parametrizations
    for layer_name, layer in unwrapped_modules(model):
        chains: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
        users |= {id(chain): (layer_name, layer, key) for key, chain in chains.items()}
        for key, parameter in layer._parameters.items():
            if parameter is not None and not is_lazy(parameter) and parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Weight(*users.get(id(layer), (layer_name, layer, key)), parameter)


def embedded(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters that embeddings own, also where a layer of another type shares them."""
    embeddings = [module for module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    return {id(parameter) for module in embeddings for parameter in module._parameters.values()}


def largest(weights: Sequence[Weight], size: int) -> tuple[str, list[str]]:
    """The three largest in words, with their share of ``size`` weights; and the ``targets`` that would take them."""
    three = sorted(weights, key=lambda weight: -weight.parameter.numel())[:3]
    shares = [f"{one.name} ({one.kind.__name__}, {one.parameter.numel() / size:.0%})" for one in three]
    targets = []
    for kind in dict.fromkeys(one.kind for one in three):
        keys = list(dict.fromkeys(one.key for one in weights if one.kind is kind))
        keys = [key for key in keys if "bias" not in key] or keys
        targets.append(type_name(kind) if keys == ["weight"] else f"({type_name(kind)}, {keys})")
    return ", ".join(shares), targets


def type_name(kind: type) -> str:
    """As a user writes it; with its module where a layer of torch has the same name."""
    of_torch = getattr(nn, kind.__name__, None)
    if of_torch is None:
        return kind.__name__
    return f"nn.{kind.__name__}" if of_torch is kind else f"{kind.__module__}.{kind.__name__}"

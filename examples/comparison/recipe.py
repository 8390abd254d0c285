"""A custom model and its data, from a file or from functions, in the comparison."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torch_dual_ticket.baselines import random_ticket

from .data import DATA, Tensors
from .models import MODELS, OPTIMIZERS, Optimizer, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .data import Part

PARTS = ("train", "validation", "test")
NEEDS = {
    "model": "it returns a new torch.nn.Module at each call",
    "data": "it returns {'train': part, 'validation': part, 'test': part}; each part is a pair of tensors (x, y), or a"
    " torch.utils.data.Dataset of such pairs (torch.utils.data.random_split makes two of one)",
}


class RecipeError(ValueError):
    """What a recipe lacks, or gives that cannot be used."""


def read_recipe(path: Path) -> str:
    """Add the recipe in a file; returns the name that its model and its data have from then on."""
    if not path.is_file() or path.suffix != ".py":
        raise RecipeError(f"{path} is not a Python file: write one with the functions model() and data()")
    sys.path.append(str(path.parent.resolve()))  # for what lies beside it, as for a program
    module, code = ModuleType(f"recipe {path.stem}"), path.read_bytes()
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where pickle and inspect look for it
    exec(compile(code, path, "exec"), vars(module))  # an import could take the bytecode of an earlier text
    for name, need in NEEDS.items():
        if not callable(getattr(module, name, None)):
            raise RecipeError(f"{path} has no function {name}(): {need}")
    options = {name: getattr(module, name) for name in ("dense_layers", "optimizer", "rates") if hasattr(module, name)}
    return add_recipe(path.name, module.model, module.data, code=code, **options)


def add_recipe(
    name: str,
    model: Callable[[], nn.Module],
    data: Callable[[], Mapping[str, Any]],
    *,
    dense_layers: Sequence[str] = (),
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    rates: Sequence[float] = (),
    code: bytes = b"",
) -> str:
    """Look at all that a recipe gives, and add it to the networks and the data of the comparison; returns the name."""
    torch.manual_seed(0)  # for a split that is drawn: it must be the same in every process
    built = model()
    if not isinstance(built, nn.Module):
        raise RecipeError(f"{name}: model() returned a {type(built).__name__}: {NEEDS['model']}")
    if model() is built:
        raise RecipeError(f"{name}: model() returned the same module twice: {NEEDS['model']}")
    if isinstance(dense_layers, str):
        raise RecipeError(f"{name}: dense_layers is {dense_layers!r}: make it a list of names, [{dense_layers!r}]")
    if not isinstance(rates, (list, tuple)) or not all(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
        raise RecipeError(f"{name}: rates is {rates!r}: make it a list of learning rates, such as [0.03, 0.1]")
    if optimizer is not None and not rates:
        raise RecipeError(f"{name}: optimizer(parameters, lr) needs rates, the learning rates to choose from")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what this sparsity would do
            random_ticket(built, 0.5, exclude=dense_layers, seed=0).remove()
    except ValueError as error:
        raise RecipeError(f"{name}: dense_layers = {list(dense_layers)}: {error}") from error
    parts = parts_of(name, data())
    classes = classes_of(name, built, parts)

    code += str(built).encode() + "".join(sorted({source_of(type(module)) for module in built.modules()})).encode()
    tensors = Tensors(parts, classes, code)
    DATA[name] = lambda _: copy.copy(tensors)  # as it is moved to a device
    chosen = "sgd"
    if optimizer is not None:
        chosen = f"optimizer() of {name}"
        OPTIMIZERS[chosen] = Optimizer(
            lambda parameters, lr, weight_decay: optimizer(parameters, lr), tuple(rates), 0.0
        )
    MODELS[name] = Recipe(lambda shape, classes: model(), tuple(dense_layers), chosen, "images", tuple(rates))
    return name


def parts_of(name: str, given: Any) -> dict[str, Part]:
    if not isinstance(given, Mapping) or set(given) != set(PARTS):
        keys = f" with {', '.join(map(repr, given))}" if isinstance(given, Mapping) else ""
        raise RecipeError(f"{name}: data() returned a {type(given).__name__}{keys}: {NEEDS['data']}")
    return {part: pair_of(f"{name}: {part!r} of data()", given[part]) for part in PARTS}


def pair_of(what: str, given: Any) -> Part:
    if isinstance(given, Dataset):
        pairs = [given[index] for index in range(len(given))]  # type: ignore[arg-type]
        given = tuple(torch.stack([torch.as_tensor(pair[side]) for pair in pairs]) for side in (0, 1))
    if not isinstance(given, (tuple, list)) or [isinstance(side, Tensor) for side in given] != [True, True]:
        raise RecipeError(f"{what} is a {type(given).__name__}: give a pair of tensors (x, y), or a Dataset of pairs")
    x, y = given
    if not len(x) == len(y) > 0:
        raise RecipeError(f"{what} has {len(x):,} examples and {len(y):,} labels: there must be a label for each")
    if y.is_floating_point() or y.is_complex() or int(y.min()) < 0:
        raise RecipeError(f"{what}: labels are numbers of classes, integers from 0; got {y.dtype} from {y.min():g}")
    return x, y.long()


@torch.no_grad()
def classes_of(name: str, model: nn.Module, parts: dict[str, Part]) -> int:
    """How many classes the model knows; it is run on one example."""
    x, y = parts["train"]
    logits = model.eval()(x[:1])
    if not isinstance(logits, Tensor) or logits.shape[:-1] != y[:1].shape:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        want = ", ".join(map(str, (*y[:1].shape, "classes")))
        raise RecipeError(f"{name}: for one example the model gave {got}: it must give a tensor of shape ({want})")
    largest = max(int(labels.max()) for _, labels in parts.values())
    if largest >= logits.shape[-1]:
        raise RecipeError(f"{name}: the model knows {logits.shape[-1]} classes, but a label is {largest}")
    return logits.shape[-1]


def source_of(kind: type) -> str:
    """The code of a layer, which may lie in another file; nothing for torch's own."""
    if kind.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return ""

"""Names of the unwrapped model: those before DDP, torch.compile, Fabric … added levels to them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Wrappers by class name, with the level that they add to every name. Importing some of the classes would take seconds.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "DifferentiallyPrivateDistributedDataParallel": "module",  # Opacus
    "AbstractGradSampleModule": "_module",
    "_FabricModule": "_forward_module",  # Lightning Fabric; it has the same model as _original_module, too
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def unwrapped_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like ``named_modules(remove_duplicate=False)``, without the levels that wrappers add."""
    child = _wrapped_child(model)
    if child is not None:
        yield from unwrapped_modules(model._modules[child], prefix)  # type: ignore[arg-type]
        return
    yield prefix, model
    for name, module in model._modules.items():
        if module is not None:
            yield from unwrapped_modules(module, f"{prefix}.{name}" if prefix else name)


def unwrapped_name(model: nn.Module, key: str) -> str:
    """A key of ``model.state_dict()`` without the levels of wrappers; some wrappers remove theirs themselves."""
    kept = []
    module: nn.Module | None = model
    for part in key.split("."):
        while module is not None and (child := _wrapped_child(module)) is not None:
            module = module._modules[child]
            if part == child:
                break
        else:
            kept.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def _wrapped_child(module: nn.Module) -> str | None:
    """The name of a wrapper's only child; None for other modules."""
    for base in type(module).__mro__:
        child = _WRAPPERS.get(base.__name__)
        if child is not None and child in module._modules:
            return child
    return None


def unwrapped_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Like ``named_parameters(remove_duplicate=False)``, without the levels that wrappers add."""
    for prefix, module in unwrapped_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def first_names(model: nn.Module) -> dict[int, str]:
    """By the id of each parameter its name in ``named_parameters()``: the first, where it is tied."""
    names: dict[int, str] = {}
    for name, parameter in unwrapped_parameters(model):
        names.setdefault(id(parameter), name)
    return names

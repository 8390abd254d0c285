"""What every conversion begins with: a plain copy of the model, and its linear layers."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.utils import prune

from .._model.names import unwrapped_modules
from .._model.targets import check_model, runs_forward
from .._tensors.dtensor import is_sharded


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without wrappers, masks and hooks: zeros are zeros in the weights.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a parameter is sharded, or flattened by FSDP1.
    """
    check_model(model)
    inner = next(unwrapped_modules(model))[1]
    for name, parameter in inner.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is sharded: load the whole state_dict (as save_ticket() and load_ticket() do) into a model"
                " that is not, and use that"
            )
    with torch.no_grad():  # recompute masked weights: with a gradient history they cannot be copied
        for layer in inner.modules():
            for hook in _pruning_hooks(layer):
                hook(layer, ())
    copied = copy.deepcopy(inner)
    for layer in copied.modules():
        while hooks := _pruning_hooks(layer):
            prune.remove(layer, hooks[0]._tensor_name)  # type: ignore[no-untyped-call]
    return copied.eval()


def _pruning_hooks(layer: nn.Module) -> list[prune.BasePruningMethod]:
    """Those of torch.nn.utils.prune; this library's hooks are such too."""
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those that register their weight and whose forward is called, unlike that of attention's out_proj."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and runs_forward(layer) and "weight" in layer._parameters
    }


def leave_fast_paths(model: nn.Module, converted: Collection[nn.Module]) -> None:
    """Keep transformers from passing the weights of converted layers to kernels for dense ones."""
    for module in model.modules():
        if set(converted).isdisjoint(module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False

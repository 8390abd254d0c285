"""Everything about a model, and about the process, that a call which raises must leave alone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from torch_dual_ticket._rst import validation

if TYPE_CHECKING:
    from torch import Tensor, nn


def snapshot(*models: nn.Module) -> list[Any]:
    """Comparable by ``==``: objects by identity, and the values of tensors."""
    return [_of_process(), *(_of_module(name, module) for model in models for name, module in model.named_modules())]


def _of_process() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate()]


def _of_module(name: str, module: nn.Module) -> list[Any]:
    attributes = [
        (key, _of_items(value) if isinstance(value, dict) else id(value)) for key, value in vars(module).items()
    ]
    parameters = [(key, _of_parameter(value)) for key, value in module._parameters.items() if value is not None]
    buffers = [(key, _values(value)) for key, value in module._buffers.items() if value is not None]
    return [name, id(module), module.training, attributes, parameters, buffers]


def _of_items(items: dict[Any, Any]) -> list[tuple[Any, int]]:
    return [(key, id(value)) for key, value in items.items()]


def _of_parameter(parameter: Tensor) -> list[Any]:
    if torch.nn.parameter.is_lazy(parameter):
        return [id(parameter), type(parameter)]
    hooks_of_gradient = [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    return [
        id(parameter),
        parameter.requires_grad,
        id(parameter) in validation.managed_parameters(),
        _of_items(vars(parameter)),
        [None if items is None else _of_items(items) for items in hooks_of_gradient],
        _values(parameter),
        None if parameter.grad is None else (id(parameter.grad), _values(parameter.grad)),
    ]


def _values(tensor: Tensor) -> list[Any]:
    dense = tensor.detach().to_dense().resolve_conj().contiguous()
    return [dense.dtype, dense.shape, dense.flatten().view(torch.uint8).tolist()]

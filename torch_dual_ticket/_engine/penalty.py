"""The penalty on many gradients at once: λ·w on those of the masked weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._tensors.dtensor import sum_over_shards
from .._tensors.kernels import add_scaled_, add_scaled_all_
from ..masks.mask import Mask
from .batch import Batch
from .parameter import MARK, ManagedParameter, is_treated, note_treated, writable
from .updates import Updates


@torch.no_grad()
def add_penalty(
    batch: Batch, masks: Mapping[str, Mask], factor: float | Tensor, updates: Updates, optimizer: Optimizer | None
) -> list[tuple[ManagedParameter, Tensor]]:
    """Add λ·w to the gradients of the masked weights, once to each gradient; returns those where it was due.

    The optimizer is the one whose step is about to use the gradients; None where no hook sees the update.
    """
    update, serial = updates.number, updates.serial + 1
    grads: list[Tensor] = []  # of simple parameters, in the order of these three
    weights: list[Tensor] = []
    masked: list[Tensor] = []
    others: dict[bool, list[tuple[ManagedParameter, Tensor, Tensor]]] = defaultdict(list)  # True: to be maximized
    penalized: list[tuple[ManagedParameter, Tensor]] = []
    for entry, group, mask in zip(batch, batch.groups, batch.masks(masks, holds=False), strict=True):
        one, parameter = entry
        grad = parameter.grad
        if grad is None:
            continue
        one.penalized_at = serial
        if MARK in grad.__dict__ and is_treated(grad, update):
            continue  # before a step that raised, or in the step around this one
        penalized.append(entry)
        maximizes = group.get("maximize", False)
        if maximizes or mask is None or type(grad) is not Tensor or grad.is_sparse:
            others[maximizes].append((one, parameter, writable(parameter, grad)))
        else:
            grads.append(grad)
            weights.append(parameter)
            masked.append(mask)
    updates.serial = serial
    if penalized:
        scale = getattr(optimizer, "grad_scale", None)  # which GradScaler leaves to a fused optimizer to undo
        factor = factor if scale is None else scale * factor
        if isinstance(factor, Tensor) or factor != 0:
            add_scaled_all_(grads, weights, masked, factor)
            for maximizes, entries in others.items():
                pieces: Any = (
                    piece
                    for one, parameter, grad in entries
                    for piece in one.gradient_pieces(masks[one.name], parameter, grad, holds=False)
                )
                add_scaled_(pieces, -factor if maximizes else factor)
        note_treated([*grads, *(grad for entries in others.values() for _, _, grad in entries)], update)
    if optimizer is not None and any(one.penalized_at == serial for one, _ in batch):
        updates.begin(optimizer)
    return penalized


@torch.no_grad()
def loss_term(entries: Iterable[tuple[ManagedParameter, Tensor]], masks: Mapping[str, Mask], penalty: float) -> Any:
    """½·λ·‖masked weights‖²: the term of the loss whose gradient the penalty is."""
    norms = (sum_over_shards(one.squared_norms(masks[one.name], p, holds=False)[0], p) for one, p in entries)
    return 0.5 * penalty * sum(norms)

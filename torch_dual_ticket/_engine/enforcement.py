"""How masked weights are held at zero: by masks on their gradients, and on themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._tensors.kernels import bits, clear_, clear_all_
from ..masks.mask import Mask
from .batch import Batch
from .parameter import MARK, ManagedParameter, is_treated, note_treated, writable


class Enforcement:
    """Masks gradients and weights. The other methods do nothing here: a subclass with another way may need them."""

    def connect(self, managed: ManagedParameter, parameter: Tensor) -> None:
        """The tensor is a new one of this parameter."""

    def check_update(self, batch: Batch, optimizer: Optimizer) -> None:
        """``RuntimeError`` if an optimizer that has these parameters must not update them."""

    @torch.no_grad()
    def mask_gradients(self, batch: Batch, masks: Mapping[str, Mask], update: int) -> None:
        """Set the gradients of the masked weights to zero, where that is not done yet for this update."""
        grads: list[Tensor] = []
        kept: list[Tensor] = []
        others: list[tuple[ManagedParameter, Tensor, Tensor]] = []
        for (one, parameter), mask in zip(batch, batch.masks(masks, holds=True), strict=True):
            grad = parameter.grad
            if grad is None or (MARK in grad.__dict__ and is_treated(grad, update)):
                continue
            if mask is None or type(grad) is not Tensor or grad.is_sparse:
                others.append((one, parameter, writable(parameter, grad)))
            else:
                grads.append(grad)
                kept.append(mask)
        clear_all_([bits(grad) for grad in grads], kept)
        clear_(
            (part, mask)
            for one, parameter, grad in others
            for part, _, mask in one.gradient_pieces(masks[one.name], parameter, grad, holds=True)
        )
        note_treated([*grads, *(grad for _, _, grad in others)], update)

    @torch.no_grad()
    def clear(self, batch: Batch, masks: Mapping[str, Mask]) -> None:
        """Set the masked weights to zero; backward() does not notice."""
        found = batch.masks(masks, holds=True)
        clear_all_(batch.bits, [kept for kept in found if kept is not None])
        others = [entry for entry, kept in zip(batch, found, strict=True) if kept is None]
        clear_(piece for one, tensor in others for piece in one.weight_pieces(masks[one.name], tensor))

    def stop(self) -> None:
        """The masks are about to be lifted."""

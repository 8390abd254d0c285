"""The penalty of a ticket: λ·w on the gradients of the masked weights, once for each update."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._tensors.dtensor import sum_over_shards
from .._tensors.kernels import add_scaled_, add_scaled_all_
from .graph_capture import CapturedPenalty
from .parameter import MARK, ManagedParameter, is_treated, note_treated
from .updates import Updates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch.optim import Optimizer

    from ..masks.mask import Mask
    from .batch import Batch


class Transformation:
    """Applies the penalty, and knows which updates since the last scheduler step have had it."""

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self.optimizer = None if optimizer is None else weakref.ref(optimizer)  # the only one that is to apply it
        self.updates = Updates()
        self.serial = 0  # of the last penalty batch
        self.silenced = False  # apply_penalty() stands in for the optimizer hook until the next scheduler step
        self.captured = CapturedPenalty()
        self._serial_at_step = 0

    def factor(self, batch: Batch, penalty: float) -> float | Tensor:
        """λ for an update of these parameters; ``RuntimeError`` if it is captured in a way that λ could not grow."""
        return self.captured.factor((grad for _, tensor in batch if (grad := tensor.grad) is not None), penalty)

    @torch.no_grad()
    def penalize(
        self,
        batch: Batch,
        masks: Mapping[str, Mask],
        factor: float | Tensor,
        update: int,
        optimizer: Optimizer | None = None,
        *,
        after: int = -1,
        outer: Callable[[], set[int]] | None = None,
    ) -> list[tuple[ManagedParameter, Tensor]]:
        """Add λ·w to the gradients of the masked weights, once to each gradient; returns those where it was due.

        Args:
            batch: what to penalize.
            masks: by parameter name.
            factor: λ.
            update: the number of the update that the gradients are for.
            optimizer: whose step is about to use the gradients; None where no hook sees the update.
            after: a serial number; what has been penalized since is left out.
            outer: gives the ids of the parameters that are updated by steps around this one. A step may be made within
                a step that has penalized the gradient already, and has changed or replaced it since.
        """
        at_step, serial = self._serial_at_step, self.serial + 1
        grads: list[Tensor] = []  # of simple parameters, in the order of these three
        weights: list[Tensor] = []
        gone: list[Tensor] = []
        others: list[tuple[ManagedParameter, Tensor, Tensor]] = []
        maximized: list[tuple[ManagedParameter, Tensor, Tensor]] = []
        penalized: list[tuple[ManagedParameter, Tensor]] = []
        is_applied = False
        updated_outside: set[int] | None = None
        for entry, group, mask in zip(batch, batch.groups, batch.masks(masks, holds=False), strict=True):
            one, parameter = entry
            grad = parameter.grad
            if grad is None or one.penalized_at > after >= 0:
                continue
            if MARK in grad.__dict__ and is_treated(grad, update):
                is_applied = True  # before a step that raised, or in the step around this one
                one.penalized_at = serial
                continue
            if outer is not None and one.penalized_at > at_step:
                updated_outside = outer() if updated_outside is None else updated_outside
                if id(parameter) in updated_outside:
                    continue
            one.penalized_at = serial
            penalized.append(entry)
            if group.get("maximize"):
                maximized.append((one, parameter, grad))
            elif mask is None or type(grad) is not Tensor or grad.is_sparse:
                others.append((one, parameter, grad))
            else:
                grads.append(grad)
                weights.append(parameter)
                gone.append(mask)
        self.serial = serial
        if penalized:
            scale = getattr(optimizer, "grad_scale", None)  # which GradScaler leaves to a fused optimizer to undo
            factor = factor if scale is None else scale * factor
            if isinstance(factor, Tensor) or factor != 0:
                add_scaled_all_(grads, weights, gone, factor)
                for entries in filter(None, (others, maximized)):
                    pieces: Any = (
                        piece
                        for one, parameter, grad in entries
                        for piece in one.gradient_pieces(masks[one.name], parameter, grad, holds=False)
                    )
                    add_scaled_(pieces, factor if entries is others else -factor)
            note_treated([*grads, *(p.grad for _, p, _ in (*others, *maximized) if p.grad is not None)], update)
        if optimizer is not None and (penalized or is_applied):
            self.updates.begin(optimizer)
        return penalized

    @staticmethod
    @torch.no_grad()
    def term(entries: Iterable[tuple[ManagedParameter, Tensor]], masks: Mapping[str, Mask], penalty: float) -> Any:
        """½·λ·‖masked weights‖²: the term of the loss whose gradient the penalty is."""
        norms = (sum_over_shards(one.squared_norms(masks[one.name], p, holds=False)[0], p) for one, p in entries)
        return 0.5 * penalty * sum(norms)

    def unpenalized(self, parameters: Iterable[ManagedParameter]) -> list[ManagedParameter]:
        """Those without a penalty since the last scheduler step; replays of a graph are taken for granted."""
        since = self._serial_at_step
        return [managed for managed in parameters if managed.penalized_at <= since and not self.captured.is_captured]

    def counts(self, *, is_last: bool) -> bool:
        """Whether a scheduler step counts now; for certain, if it is the last one.

        Replays of a CUDA graph are not seen: one is taken for granted.
        """
        self.captured.check_not_capturing()
        return self.updates.settle(wait=is_last) or self.captured.is_captured

    def begin_step(self, *, pending: bool = False) -> None:
        """Begin a new scheduler step; ``pending`` as a saved state says."""
        self.updates.restart(pending=pending)
        self.silenced = False
        self._serial_at_step = self.serial

    def resume(self, *, pending: bool) -> None:
        """Go on from a saved state: what was applied here before counts no more."""
        self.updates = Updates()
        self.begin_step(pending=pending)

"""The penalty of one update: collected over the parameters first, because small tensors are cheaper together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .dtensor import is_sharded, local, placed_like
from .kernels import add_scaled_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from .holds import Hold


class Dues:
    """Gradients that are due a penalty, with weights and masks: alike in memory, each on its process's own shard."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []
        self._whole: dict[int, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {1: ([], [], []), -1: ([], [], [])}
        self._in_parts: list[tuple[Iterator[tuple[slice, Tensor]], Tensor, Tensor, int]] = []

    def take(self, hold: Hold, parameter: Tensor, grad: Tensor, sign: int) -> None:
        """Take up a parameter and its gradient; ``sign`` is -1 where the optimizer maximizes."""
        weight = local(parameter)
        grads, weights, masks = self._whole[sign]
        if grad.is_sparse:
            grad = parameter.grad = grad.coalesce()
            rows = grad._indices()[0]
            grads.append(grad._values())
            weights.append(weight[rows])
            masks.append(hold.local_mask.whole(parameter, weight)[rows])
        else:
            if is_sharded(grad):
                grad = parameter.grad = placed_like(grad, parameter)
            if grad.is_conj():
                grad = parameter.grad = grad.resolve_conj()
            if hold.local_mask.is_stored_for(weight):
                grads.append(local(grad))
                weights.append(weight)
                masks.append(hold.local_mask.whole(parameter, weight))
            else:
                self._in_parts.append((hold.local_mask.parts(parameter, weight), local(grad), weight, sign))
        self.grads.append(grad)

    def add_(self, factor: float | Tensor) -> None:
        """Add ``factor`` · weight to the gradient of each masked weight."""
        for sign, (grads, weights, masks) in self._whole.items():
            add_scaled_(grads, weights, masks, sign * factor)
        for parts, grad, weight, sign in self._in_parts:
            for part, mask in parts:
                add_scaled_([grad[part]], [weight[part]], [mask], sign * factor)

"""How much arithmetic a run takes, in theory: masked weights cost nothing while they are held at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


class FlopCount:
    """FLOPs of a forward pass on one example, dense or under masks. A training step is taken to be three of them."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        was_training = model.training
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model.eval()(example)
        model.train(was_training)
        counts = counter.get_flop_counts()
        root = type(model).__name__
        self.dense = counter.get_total_flops()
        self._of_layer = {name.removeprefix(f"{root}."): sum(ops.values()) for name, ops in counts.items()}

    def forward(self, masks: Mapping[str, Tensor]) -> float:
        """The count under masks by parameter name."""
        saved = 0.0
        for name, mask in masks.items():
            pruned = 1 - float(mask.float().mean())
            saved += pruned * self._of_layer.get(
                name.rpartition(".")[0], 0
            )  # attention calls no out_proj; norms have none
        return self.dense - saved

    def training(self, updates: int, batch: int, masks: Mapping[str, Tensor]) -> float:
        return 3.0 * updates * batch * self.forward(masks)

"""The slow truth: dual lottery tickets in an explicit loop that hides nothing.

The penalty is added to ``.grad`` just before the update; after the mask is applied, gradients and weights are
multiplied by it around every update. Everything that the library does is measured against this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


class ExplicitLoop:
    """What a careful person would write into their own training loop."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        steps: int,
        max_penalty: float = 1.0,
        schedule: Callable[[float], float] = lambda progress: progress,
    ) -> None:
        named = dict(model.named_parameters())
        self.targets = [(named[name], mask.clone()) for name, mask in masks.items()]
        self.steps, self.max_penalty, self.schedule = steps, max_penalty, schedule
        self.updates = 0
        self.finalized = False

    @property
    def penalty(self) -> float:
        return self.max_penalty * self.schedule(min(1.0, (self.updates + 1) / self.steps))

    @torch.no_grad()
    def before_update(self, sign: float = 1.0) -> None:
        for parameter, kept in self.targets:
            if parameter.grad is None:
                continue
            if self.finalized:
                parameter.grad.mul_(kept)
            else:
                parameter.grad.add_(sign * self.penalty * parameter * ~kept)

    @torch.no_grad()
    def after_update(self) -> None:
        self.updates += 1
        if self.finalized:
            for parameter, kept in self.targets:
                parameter.mul_(kept)

    @torch.no_grad()
    def finalize(self) -> None:
        self.finalized = True
        for parameter, kept in self.targets:
            parameter.mul_(kept)

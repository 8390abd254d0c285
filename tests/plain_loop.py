"""The plainest loop with clipped gradients, for tests whose concern is the model and not the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lives import updates

if TYPE_CHECKING:
    from collections.abc import Callable

    from lives import Side
    from torch import Tensor, nn

    from torch_dual_ticket import RSTScheduler


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).abs().square().mean()


def train_on(
    inputs: Callable[[int], tuple[Any, ...]], optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
) -> Callable[[nn.Module, Side], None]:
    """The loop as :func:`lives.assert_same_life` runs it; ``inputs`` gives the arguments of forward for each update.

    Gradients are clipped, so that masked ones which are only put right in the update would show.
    """

    def train(model: nn.Module, side: Side) -> None:
        chosen = optimizer(model)
        for index in updates(side):
            chosen.zero_grad()
            loss_of(model(*inputs(index))).backward()
            side.after_backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            side.before_update()
            chosen.step()
            side.after_update()

    return train


def assert_holds_zeros(model: nn.Module, rst: RSTScheduler) -> None:
    """The masked weights of the model are zero, and of the kept ones none is."""
    for name, kept in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, kept), name

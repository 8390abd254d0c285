"""A ticket's whole life on one model, beside the loop by hand on its twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from models import assert_same, finalize_quietly
from reference import ByHand

from torch_dual_ticket import RSTScheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

TRANSFORMATION = FINETUNING = 12


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).abs().square().mean()


def live_alike(
    model: nn.Module,
    other: nn.Module,
    inputs: Callable[[int], tuple[Any, ...]],
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    tolerance: float = 1e-12,
    **settings: Any,
) -> RSTScheduler:
    """Transform, finalise and finetune ``model`` with the library and ``other``, its twin, by hand, and compare.

    Gradients are clipped, so that zeros which are only put right after the update would show. ``inputs`` gives the
    arguments of the model's forward for each update. Returns the scheduler.
    """
    rst = RSTScheduler(model, **{"sparsity": 0.6, "steps": 8, "seed": 1, **settings})
    by_hand = ByHand(other, rst.masks, steps=8)
    mine, theirs = optimizer(model), optimizer(other)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for index in range(TRANSFORMATION + FINETUNING):
        if index == TRANSFORMATION:
            assert_same(model, other, tolerance)
            assert rst.done
            finalize_quietly(rst)
            by_hand.finalize()
        mine.zero_grad()
        loss_of(model(*inputs(index))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        mine.step()
        rst.step()

        theirs.zero_grad()
        loss_of(other(*inputs(index))).backward()
        if by_hand.finalized:
            by_hand.before_update()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        if not by_hand.finalized:
            by_hand.before_update()
        theirs.step()
        by_hand.after_update()
    assert_same(model, other, tolerance)
    assert_holds_zeros(model, rst)
    assert all(not torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())
    return rst


def assert_holds_zeros(model: nn.Module, rst: RSTScheduler) -> None:
    """The masked weights of the model are zero, and of the kept ones none is."""
    for name, kept in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, kept), name

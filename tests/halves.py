"""A ticket's whole life on two ranks, beside the same life in one process with the explicit loop.

Of each batch every rank gets a half. The ranks' gradients are averaged, so the reference adds up the gradients of the
two halves, each divided by two, in the same order.
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from models import batch, finalize_quietly
from ranks import everywhere
from reference import ExplicitLoop
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch_dual_ticket import RSTScheduler

    Loss = Callable[[nn.Module, int, int], Tensor]

SHAPE = (12,)
STEPS, FINALIZE_AT, UPDATES = 12, 15, 30
CLIP = 0.05  # below every norm that occurs, so that clipping acts in each update


def uneven_mlp() -> nn.Module:
    """Layers whose rows divide by two, or do not; and one of a single row, of which the second rank has none."""
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 5)
    )


def half_loss(model: nn.Module, index: int, half: int) -> Tensor:
    """The loss of one half of a batch."""
    x, y = batch(index, SHAPE)
    return nn.functional.cross_entropy(model(x.chunk(2)[half]), y.chunk(2)[half])


def full_loss(model: nn.Module, index: int, half: int) -> Tensor:
    """The loss of all of a batch, where the ranks share the work on it."""
    x, y = batch(index, SHAPE)
    return nn.functional.cross_entropy(model(x), y)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


class InOneProcess:
    """The reference: a copy of the model, its loop, and the explicit ticket.

    What is clipped is the gradient of the network that is being trained: without the penalty, and without the gradients
    of masked weights.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
        loss: Loss = half_loss,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.ticket = ExplicitLoop(self.model, masks, steps=STEPS)
        self.optimizer = make_optimizer(self.model.parameters())
        self.loss = loss

    def update(self, batches: Iterable[int]) -> None:
        """One update with the sum of the gradients of these batches."""
        self.optimizer.zero_grad()
        for half in range(2):
            for index in batches:
                (self.loss(self.model, index, half) / 2).backward()
        if self.ticket.finalized:
            self.ticket.before_update()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.ticket.before_update()
        self.optimizer.step()
        self.ticket.after_update()

    def residual(self) -> float:
        """‖masked weights‖ / ‖all target weights‖"""
        masked = sum(parameter.detach()[~kept].square().sum().item() for parameter, kept in self.ticket.targets)
        total = sum(parameter.detach().square().sum().item() for parameter, _ in self.ticket.targets)
        return (masked / total) ** 0.5


def live_alike(
    model: nn.Module,
    rst: RSTScheduler,
    reference: InOneProcess,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    updates: Iterable[int] = range(UPDATES),
    micro_batches: int = 1,
    set_to_none: bool = True,
    tolerance: float = 1e-12,
    disturb: Callable[[], object] = lambda: None,
) -> torch.optim.Optimizer:
    """Train the model on the ranks and the reference in each process, with finalize() in the middle, and compare.

    ``disturb`` is called at the points of an update at which a loop may do something else in between.
    """
    optimizer = sgd(model.parameters()) if optimizer is None else optimizer
    half = dist.get_rank() if dist.is_initialized() else 0
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    start = [parameter.detach().clone() for parameter in reference.model.parameters()]
    for update in updates:
        batches = range(micro_batches * update, micro_batches * (update + 1))
        disturb()
        if update == FINALIZE_AT:
            assert_agrees(model, reference, tolerance)
            assert rst.done
            disturb()
            finalize_quietly(rst)
            reference.ticket.finalize()
            assert_agrees(model, reference, tolerance)
            disturb()
        optimizer.zero_grad(set_to_none=set_to_none)
        for index in batches:
            with gradients_in_sync(model, index == batches[-1]):
                reference.loss(model, index, half).backward()
        disturb()
        # Not model.parameters(): after a forward without gradients FSDP2 has put other ones there.
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        rst.step()
        reference.update(batches)
    assert_agrees(model, reference, tolerance)
    if reference.ticket.finalized:
        assert_zero(model, rst.masks)
    trained = [parameter.grad is not None for parameter in reference.model.parameters()]
    changed = [not torch.equal(a, b) for a, b in zip(start, reference.model.parameters(), strict=True)]
    assert any(trained)
    assert all(changed[index] for index, was_trained in enumerate(trained) if was_trained)
    return optimizer


def gradients_in_sync(model: nn.Module, sync: bool) -> contextlib.AbstractContextManager[None]:
    """Average the gradients of the backward in this context, or leave them to a later one."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(sync)
    elif not sync:
        return model.no_sync()
    return contextlib.nullcontext()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the unwrapped model, with whole tensors. Collective."""
    return {
        name.removeprefix("module."): tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }


def assert_agrees(model: nn.Module, reference: InOneProcess, tolerance: float = 1e-12) -> None:
    """The ranks' model has the parameters of the reference, relative to the largest value of each."""
    expected = reference.model.state_dict()
    found = whole_state(model)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        error = float((tensor.double() - expected[name].double()).abs().max() / expected[name].abs().max())
        assert error <= tolerance, f"{name} differs by {error:.2e} relative"


def assert_zero(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """The masked weights are exactly zero, and no others."""
    found = whole_state(model)
    for name, kept in masks.items():
        assert torch.equal(found[name] != 0, kept), f"the zeros of {name} are not those of its mask"


def assert_replicated(model: nn.Module) -> None:
    """The ranks hold the same bits."""
    ours, theirs = everywhere([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def shard(model: nn.Module, nesting: str = "nested", **options: object) -> nn.Module:
    """Every layer by itself, or the root with all in it."""
    from torch.distributed.fsdp import fully_shard

    if nesting == "nested":
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, **options)
    return fully_shard(model, **options)

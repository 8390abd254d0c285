"""The plainest loop with clipped gradients, for tests whose concern is the model and not the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lives import assert_same_life, updates
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from lives import Side

    from torch_dual_ticket import RSTScheduler


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


class UninitializedWrapper(torch.optim.Optimizer):
    """Is an optimizer by name alone: it shares the groups of the one inside, and has no hooks itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def loss_of(output: Any) -> Tensor:
    """Of the output, or of the first of several, as recurrent layers and attention have them."""
    first = output[0] if isinstance(output, tuple) else output
    return (first - 1).abs().square().mean()


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of one tensor: its number -> the arguments of forward."""
    return lambda index: (torch.randn(*shape, generator=torch.Generator().manual_seed(index), dtype=dtype),)


def train_on(
    inputs: Callable[[int], tuple[Any, ...]],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    *,
    clips: bool = True,
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
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            side.before_update()
            chosen.step()
            side.after_update()

    return train


def assert_lives_alike(
    build: Callable[[], nn.Module], inputs: Callable[[int], tuple[Any, ...]], names: list[str], **settings: Any
) -> RSTScheduler:
    """A whole life beside the explicit loop; the parameters of these names are the ones that are pruned."""
    rst = assert_same_life(train_on(inputs), build, **{"sparsity": 0.6, **settings})
    assert list(rst.masks) == names
    return rst


def assert_holds_zeros(model: nn.Module, rst: RSTScheduler) -> None:
    """The masked weights of the model are zero, and of the kept ones none is."""
    for name, kept in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, kept), name

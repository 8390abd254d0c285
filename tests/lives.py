"""One training loop, run twice: once with the library, once with everything explicit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from models import INPUT_SHAPES, assert_same, assert_same_states, finalize_quietly, loss_of, mlp, twins
from reference import ExplicitLoop

from torch_dual_ticket import RSTScheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

UPDATES = 40
MIDDLE = 20


class Library:
    """The moments of a loop at which the library needs to be called."""

    is_explicit = False

    def __init__(self, model: nn.Module, rst: RSTScheduler) -> None:
        self.model, self.rst = model, rst

    def finalize(self) -> None:
        self.transformed = copy.deepcopy(self.model.state_dict())
        finalize_quietly(self.rst)

    def scheduler_step(self) -> None:
        self.rst.step()

    def after_backward(self) -> None: ...
    def before_update(self, sign: float = 1.0) -> None: ...
    def updated(self) -> None: ...
    def after_update(self) -> None:
        self.rst.step()

    def penalty_of_loss(self) -> float:
        return 0.0


class Explicit:
    """The moments of a loop at which a careful person has something to do.

    ``after_update`` is an update and a scheduler step. Where they are not one to one, ``updated`` and
    ``scheduler_step`` are called separately.
    """

    is_explicit = True

    def __init__(self, model: nn.Module, reference: ExplicitLoop) -> None:
        self.model, self.reference = model, reference

    @property
    def finalized(self) -> bool:
        return self.reference.finalized

    def finalize(self) -> None:
        self.transformed = copy.deepcopy(self.model.state_dict())
        self.reference.finalize()

    def after_backward(self) -> None:
        """Gradients of masked weights are zero, before anything (clipping) looks at them."""
        if self.finalized:
            self.reference.before_update()

    def before_update(self, sign: float = 1.0) -> None:
        self.reference.before_update(sign)

    def after_update(self) -> None:
        self.reference.after_update()

    def updated(self) -> None:
        self.reference.after_update()
        self.reference.updates -= 1

    def scheduler_step(self) -> None:
        self.reference.updates += 1

    def penalty_of_loss(self) -> Tensor | float:
        """½·λ·‖masked weights‖²."""
        if self.finalized:
            return 0.0
        squares = [(parameter.detach() * ~kept).square().sum() for parameter, kept in self.reference.targets]
        return 0.5 * self.reference.penalty * torch.stack(squares).sum()


Side = Library | Explicit


def updates(side: Side, count: int = UPDATES, middle: int = MIDDLE) -> Iterator[int]:
    """The indices of the updates, with ``finalize()`` before that of the middle."""
    for index in range(count):
        if index == middle:
            side.finalize()
        yield index


def training_with(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], build: Callable[[], nn.Module] = mlp
) -> Callable[[nn.Module, Side], None]:
    """The plain loop with one optimizer."""

    def train(model: nn.Module, side: Side) -> None:
        optimizer = make_optimizer(model)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[build]).backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    return train


def assert_same_life(
    train: Callable[..., None],
    build: Callable[[], nn.Module] = mlp,
    *,
    prepare: Callable[[nn.Module], Any] | None = None,
    dtype: torch.dtype | None = torch.float64,
    tolerance: float = 1e-12,
    sparsity: float = 0.8,
    steps: int = 12,
    max_penalty: float = 1.0,
    schedule: Callable[[float], float] = lambda progress: progress,
    **settings: Any,
) -> RSTScheduler:
    """Run ``train(model, side)`` on both sides: the weights agree before ``finalize()`` and at the end.

    ``prepare(model)`` runs before the scheduler is made; what it returns is passed to ``train`` as a third argument.
    """
    model, other = twins(build, dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepared = () if prepare is None else (prepare(model),)
    prepared_other = () if prepare is None else (prepare(other),)
    rising: Any = {"steps": steps, "max_penalty": max_penalty, "schedule": schedule}
    rst = RSTScheduler(model, sparsity=sparsity, seed=3, **rising, **settings)
    loop = ExplicitLoop(other, rst.masks, **rising)
    library, explicit = Library(model, rst), Explicit(other, loop)
    train(model, library, *prepared)
    train(other, explicit, *prepared_other)
    assert rst.phase == "finetune"
    assert_same_states(library.transformed, explicit.transformed, tolerance)
    assert_same(model, other, tolerance)
    for name, kept in rst.masks.items():
        weight = model.get_parameter(name)
        assert is_plus_zero(weight[~kept]), f"{name} has masked weights that are not zero"
        assert not torch.equal(weight[kept], before[name][kept]), f"{name} was not trained"
    return rst


def is_plus_zero(values: Tensor) -> bool:
    """Whether all are +0, not -0."""
    parts = torch.view_as_real(values) if values.is_complex() else values
    return bool((parts == 0).all()) and not bool(torch.signbit(parts).any())

"""One training on either device: the transformation, ``finalize()``, and some updates of the sparse network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from models import assert_same_states, finalize_quietly
from torch import nn

from torch_dual_ticket import RSTScheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

STEPS, FINETUNING = 6, 4


def network() -> nn.Module:
    """Layers of less and of more than the 4,096 weights up to which the library works in one call.

    Without BatchNorm, whose statistics the simulated device does not write back.
    """
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 64),
        nn.Tanh(),
        nn.Linear(64, 5),
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def new_network(device: str = "cuda", build: Callable[[], nn.Module] = network) -> nn.Module:
    torch.manual_seed(0)
    return build().to(device)


def loss_of(model: nn.Module, index: int, shape: tuple[int, ...] = (4, 3, 8, 8)) -> Tensor:
    """Of the batch of this index, which is drawn on the CPU and moved to where the model begins."""
    first = next(model.parameters())
    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(index), device="cpu")
    return (model(x.to(first.device, first.dtype)) - 1).abs().square().mean()


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    optimizer.zero_grad()
    if scaler is None:
        loss().backward()
        optimizer.step()
    else:
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()


def train(
    device: str,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    *,
    build: Callable[[], nn.Module] = network,
    shape: tuple[int, ...] = (4, 3, 8, 8),
    autocast: torch.dtype | None = None,
    is_scaled: bool = False,
    infinite_at: tuple[int, ...] = (),
    built_on: str | None = None,
    place: Callable[[nn.Module], Any] | None = None,
    moves: dict[int, str] | None = None,
    finetuning: int = FINETUNING,
    **settings: Any,
) -> tuple[nn.Module, RSTScheduler]:
    """The model and its scheduler after the whole life.

    Args:
        infinite_at: updates whose loss is infinite, which the scaler skips.
        built_on: where the model is when the scheduler is built; it moves to ``device`` after that.
        place: moves parts of the model to other devices, before the scheduler is built.
        moves: before which updates the model moves, and to where.
    """
    kind = torch.device(device).type
    model = new_network(built_on or device, build)
    if place is not None:
        place(model)
    settings = {"sparsity": 0.75, "steps": STEPS, "max_penalty": 5, "seed": 3, **settings}
    rst = RSTScheduler(model, **settings)
    if built_on is not None:
        model.to(device)
    transformation = settings["steps"] * settings.get("cycles", 1)
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler(kind, init_scale=128.0) if is_scaled else None
    index = left = 0
    while left < finetuning:
        if moves and index in moves:
            model.to(moves[index])

        def loss(index: int = index) -> Tensor:
            with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
                return loss_of(model, index, shape) * (float("inf") if index in infinite_at else 1)

        update(model, optimizer, loss, scaler)
        rst.step()
        if rst.phase == "finetune":
            left += 1
        elif rst.done:
            finalize_quietly(rst)
        index += 1
        assert index < 50, "the schedule does not end"
    skipped = sum(at <= transformation for at in infinite_at)
    assert index == transformation + skipped + finetuning, "an update was counted that was none, or was not counted"
    return model, rst


def assert_same_life(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    *,
    tolerance: float = 1e-5,
    on_cuda: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """A training on the device ends as the one on the CPU; ``on_cuda`` are options that only the former has."""
    expected, reference = train("cpu", make_optimizer, **options)
    model, rst = train("cuda", make_optimizer, **{**options, **(on_cuda or {})})
    assert_same_states(on_host(model), on_host(expected), tolerance)
    assert rst.masks.keys() == reference.masks.keys()
    for name, mask in rst.masks.items():
        assert torch.equal(mask.cpu(), reference.masks[name].cpu()), f"{name} has another mask"
    assert_holds_zeros(model, rst)


def on_host(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in model.state_dict().items()}


def assert_holds_zeros(model: nn.Module, rst: Any) -> None:
    """The masked weights are zero and the kept ones are not, as most of them."""
    for name, mask in rst.masks.items():
        weight, kept = model.get_parameter(name).detach().cpu(), mask.cpu()
        assert not weight[~kept].count_nonzero(), f"{name} has masked weights that are not zero"
        assert weight[kept].count_nonzero() > 0.9 * kept.sum(), f"{name} has kept weights that are zero"

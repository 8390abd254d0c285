"""What is trained: models, optimizers and settings of the schedulers, chosen by a seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

# -- models ------------------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """The first two layers have more than 4,096 weights, the last one fewer."""
    return nn.Sequential(nn.Linear(12, 350), nn.Tanh(), nn.Linear(350, 16), nn.Tanh(), nn.Linear(16, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 60, 3),
        nn.BatchNorm2d(60),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(60, 5),
    )


class Tied(nn.Module):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Twice(nn.Module):
    """One layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(66, 66), nn.Linear(66, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Attention(nn.Module):
    """The forward of out_proj is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(6, 34, batch_first=True), nn.Linear(34, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


def weight_norm() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(12, 350)), nn.Tanh(), nn.Linear(350, 5), nn.Tanh()
    )


class Borrowing(nn.Module):
    """The parent uses the weight of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.lender, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, self.lender.weight, self.lender.bias).tanh())


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input
    layers: tuple[str, ...]  # those that are pruned
    targets: tuple[Any, ...] = (nn.Linear, nn.Conv2d)
    divides: bool = False  # whether its layers can be given to two schedulers
    sees_all: bool = True  # whether a forward restores the zeros of all weights
    can_assign: bool = True  # whether load_state_dict(assign=True) leaves it the same model, and is exact at once
    can_pickle: bool = True
    most: float = 0.8  # sparsity


MODELS = {
    "mlp": Model(mlp, (12,), ("0", "2", "4"), divides=True),
    "cnn": Model(cnn, (3, 5, 5), ("0", "3", "8"), divides=True),
    "tied": Model(Tied, (12,), ("first", "head"), can_assign=False),
    "twice": Model(Twice, (66,), ("layer", "head")),
    "attention": Model(
        Attention, (4, 12), ("attention", "head"), targets=(nn.Linear, (nn.MultiheadAttention, "*_proj_weight"))
    ),
    "lstm": Model(Recurrent, (4, 6), ("recurrent", "head"), targets=(nn.Linear, (nn.LSTM, "weight_*"))),
    "weight_norm": Model(weight_norm, (12,), ("0", "2"), can_pickle=False, most=0.5),
    "borrowing": Model(Borrowing, (12,), ("lender", "head"), sees_all=False, can_assign=False),
}

# -- optimizers --------------------------------------------------------------------------------------------------------


class Halving(torch.optim.SGD):
    """Changes the gradients, and hands on to the step that it inherits, which calls all hooks again."""

    def step(self, closure: Any = None) -> Any:
        def changed() -> Any:
            loss = None if closure is None else closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)
            return loss

        if closure is not None:
            return super().step(changed)
        changed()
        return super().step()


class SAM(torch.optim.Optimizer):
    """Takes the gradient a little uphill, and has another optimizer for the update."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.03})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.03, momentum=0.9)
        self.param_groups = self.inner.param_groups
        self.before_update: Callable[[], None] = lambda: None  # for the reference

    def _with_gradients(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def climb(self) -> None:
        self._moved = self._with_gradients()
        norm = torch.stack([parameter.grad.norm() for parameter in self._moved]).norm()  # type: ignore[union-attr]
        for parameter in self._moved:
            self.state[parameter]["here"] = parameter.detach().clone()
            parameter.add_(parameter.grad, alpha=0.02 / float(norm))  # type: ignore[arg-type]

    @torch.no_grad()
    def descend(self) -> None:
        for parameter in self._moved:
            parameter.data = self.state[parameter].pop("here")
        self.before_update()
        self.inner.step()

    def step(self, closure: Any = None) -> Any:
        self.climb()
        with torch.enable_grad():
            loss = closure()
        self.descend()
        return loss


Parameters = list[nn.Parameter]


def _two(parameters: Parameters) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters[:2], lr=0.03, momentum=0.9), torch.optim.AdamW(parameters[2:], lr=0.01)]


def _groups(parameters: Parameters) -> list[torch.optim.Optimizer]:
    small, large = [p for p in parameters if p.dim() < 2], [p for p in parameters if p.dim() > 1]
    groups: list[dict[str, Any]] = [{"params": small, "lr": 0.01}, {"params": large, "weight_decay": 0.02}]
    return [torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True)]


def _muon(parameters: Parameters) -> list[torch.optim.Optimizer]:
    matrices, others = [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]
    muon: Any = torch.optim.Muon  # type: ignore[attr-defined]
    return [muon(matrices, lr=0.01), torch.optim.SGD(others, lr=0.03)]


def _one(kind: Any, **settings: Any) -> Callable[[Parameters], list[torch.optim.Optimizer]]:
    return lambda parameters: [kind(parameters, **settings)]


OPTIMIZERS: dict[str, Callable[[Parameters], list[torch.optim.Optimizer]]] = {
    "sgd": _one(torch.optim.SGD, lr=0.05),
    "sgd-momentum": _one(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=0.01, foreach=False),
    "sgd-foreach": _one(torch.optim.SGD, lr=0.03, momentum=0.9, foreach=True),
    "sgd-fused": _one(torch.optim.SGD, lr=0.03, momentum=0.9, fused=True),
    "sgd-maximize": _one(torch.optim.SGD, lr=0.03, momentum=0.9, maximize=True),
    "adam": _one(torch.optim.Adam, lr=0.01, foreach=False),
    "adam-maximize": _one(torch.optim.Adam, lr=0.01, maximize=True),
    "adamw-foreach": _one(torch.optim.AdamW, lr=0.01, foreach=True),
    "adamw-fused": _one(torch.optim.AdamW, lr=0.01, fused=True),
    "rmsprop": _one(torch.optim.RMSprop, lr=0.003, momentum=0.5),
    "adagrad": _one(torch.optim.Adagrad, lr=0.02),
    "lbfgs": _one(torch.optim.LBFGS, lr=0.3, max_iter=3, history_size=4),
    "lbfgs-wolfe": _one(torch.optim.LBFGS, lr=0.5, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
    "halving": _one(Halving, lr=0.06, momentum=0.8),
    "sam": _one(SAM),
    "two": _two,
    "groups": _groups,
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = _muon
for _kind in (torch.optim.SGD, Halving):  # torch calls the hooks of a step that is inherited from the first on
    _kind([torch.zeros(1)])

# -- schedulers --------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "quadratic": lambda progress: progress**2,
    "late": lambda progress: max(0.0, 2 * progress - 1),  # λ is 0 for a while, and those updates count
}


@dataclass(frozen=True)
class Ticket:
    """The settings of one scheduler."""

    sparsities: dict[str, float]  # by the name of a layer
    steps: int
    hold: int
    cycles: int
    max_penalty: float
    schedule: str
    store_masks: bool

    def of_cycle(self, cycle: int) -> dict[str, float]:
        """The sparsities that this cycle (from 1) aims at."""
        return {name: 1 - (1 - value) ** (cycle / self.cycles) for name, value in self.sparsities.items()}

    @property
    def total(self) -> int:
        return self.cycles * (self.steps + self.hold)


@dataclass(frozen=True)
class Setup:
    """A run, but for the actions of its user."""

    model: str
    optimizer: str
    tickets: tuple[Ticket, ...]
    optimizer_first: bool  # whether it is made before the scheduler
    compiles: bool = field(default=False)

    @property
    def kind(self) -> Model:
        return MODELS[self.model]

    @property
    def needs_closure(self) -> bool:
        return self.optimizer.startswith(("lbfgs", "sam"))

    @property
    def is_lbfgs(self) -> bool:
        return self.optimizer.startswith("lbfgs")

    @property
    def maximizes(self) -> bool:
        return self.optimizer.endswith("maximize")

    def optimizers(self, parameters: Iterable[nn.Parameter]) -> list[torch.optim.Optimizer]:
        return OPTIMIZERS[self.optimizer](list(parameters))

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.kind.build().double()

    def inputs(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(6, *self.kind.shape, generator=generator, dtype=torch.float64)


def draw_setup(choose: random.Random, *, compile_share: float = 0.02) -> Setup:
    model = choose.choice(list(MODELS))
    kind = MODELS[model]
    parts: list[tuple[str, ...]] = [kind.layers]
    if kind.divides and choose.random() < 0.3:
        parts = [kind.layers[:2], kind.layers[2:]]
    ticket = partial(_draw_ticket, choose, kind)
    return Setup(
        model,
        choose.choice(list(OPTIMIZERS)),
        tuple(ticket(part) for part in parts),
        optimizer_first=choose.random() < 0.5,
        compiles=choose.random() < compile_share,
    )


def _draw_ticket(choose: random.Random, kind: Model, layers: tuple[str, ...]) -> Ticket:
    return Ticket(
        {name: choose.uniform(0.2, kind.most) for name in layers},
        steps=choose.randint(1, 8),
        hold=choose.choice([0, 0, 2]),
        cycles=choose.choice([1, 1, 1, 2, 3]),
        max_penalty=choose.choice([0.0, 0.5, 1.0, 2.0]),
        schedule=choose.choice(list(SCHEDULES)),
        store_masks=choose.random() < 0.8,
    )

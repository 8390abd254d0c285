"""Small models and data that the tests share. Everything is seeded, float64, and on the CPU."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


class SmallTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def transformer() -> nn.Module:
    return SmallTransformer()


INPUT_SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {
    mlp: (12,),
    cnn: (3, 6, 6),
    transformer: (4, 8),
}


def make(build: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().to(dtype)


def twins(
    build: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights."""
    model = make(build, seed, dtype)
    return model, copy.deepcopy(model)


def batch(
    index: int, shape: tuple[int, ...], size: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The inputs and class labels (of 5) of one batch."""
    generator = torch.Generator().manual_seed(1000 + index)
    x = torch.randn(size, *shape, generator=generator, dtype=dtype)
    return x, torch.randint(5, (size,), generator=generator)


def loss_of(model: nn.Module, index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = batch(index, shape, dtype=dtype)
    return nn.functional.cross_entropy(model(x), y)


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    """All parameters and buffers agree, relative to the largest value of each tensor."""
    theirs = dict(b.state_dict())
    for name, mine in a.state_dict().items():
        scale = max(float(theirs[name].abs().max()), 1e-300) if theirs[name].numel() else 1.0
        error = float((mine.double() - theirs[name].double()).abs().max()) / scale if mine.numel() else 0.0
        assert error <= tolerance, f"{name} differs by {error:.2e} relative"


def finalize_quietly(rst: object, **options: str) -> object:
    """``finalize()`` after a transformation that is too short to squeeze everything out, as most tests' are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the masked weights still held")
        return rst.finalize(**options)  # type: ignore[attr-defined]

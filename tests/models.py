"""Small models and data that the tests share. Everything is seeded, float64, and on the CPU."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))


def wide() -> nn.Module:
    """With a layer of more than the 4,096 weights up to which the library works in one call."""
    return nn.Sequential(nn.Linear(12, 360), nn.Tanh(), nn.Linear(360, 5))


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
    wide: (12,),
    cnn: (3, 6, 6),
    transformer: (4, 8),
}


def make(build: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    """The model with seeded weights; without a dtype, those that it is built with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    return model if dtype is None else model.to(dtype)


def twins(
    build: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype | None = torch.float64
) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights. Built twice: torch copies no module with an old-style weight_norm."""
    return make(build, seed, dtype), make(build, seed, dtype)


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
    assert_same_states(a.state_dict(), b.state_dict(), tolerance)


def assert_same_states(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """All tensors agree, relative to the largest value of each."""
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        wide = torch.complex128 if value.is_complex() else torch.float64
        scale = max(float(theirs[name].abs().max()), 1e-300) if value.numel() else 1.0
        error = float((value.to(wide) - theirs[name].to(wide)).abs().max()) / scale if value.numel() else 0.0
        assert error <= tolerance, f"{name} differs by {error:.2e} relative"


def finalize_quietly(rst: object, **options: str) -> object:
    """``finalize()`` after a transformation that is too short to squeeze everything out, as most tests' are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the masked weights still held")
        return rst.finalize(**options)  # type: ignore[attr-defined]

"""The networks that are compared on, and how each is trained.

Each leaves dense what the paper leaves dense: its first convolution and its last linear layer. The paper would prune
the first linear layer of LeNet; "first-dense" tells what comes of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


class LeNet300100(nn.Sequential):
    """Two hidden layers of 300 and 100 units (LeCun et al., 1998)."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        inputs = shape[0] * shape[1] * shape[2]
        super().__init__(
            nn.Flatten(), nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes)
        )


class SmallConvNet(nn.Sequential):
    """Four convolutions with batch normalization, and a linear layer."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        layers: list[nn.Module] = []
        channels = shape[0]
        for width, stride in ((32, 1), (32, 2), (64, 1), (64, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        # The shortcut has no parameters: every second pixel, and zeros for the channels that are new.
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """The residual network of depth 6n+2 for CIFAR (He et al., 2016)."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, depth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for width in (16, 32, 64):
            for index in range((depth - 2) // 6):
                blocks.append(ResidualBlock(channels, width, 2 if width > channels and index == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.fc(x.mean((2, 3)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """A small decoder: four blocks of width 128, one logit per character at each position."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, width: int = 128) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape[0], width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads=4) for _ in range(4)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.characters(x) + self.positions)))


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, the learning rates that every method may choose from, and its weight decay."""

    build: Callable[..., torch.optim.Optimizer]
    rates: tuple[float, ...]
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """A network, and the part of its training that no method may choose for itself."""

    build: Callable[[tuple[int, ...], int], nn.Module]
    dense_layers: tuple[str, ...]
    optimizer: str
    reads: str  # "images" or "text"
    rates: tuple[float, ...] = ()  # to choose from; those of the optimizer where there are none


OPTIMIZERS = {
    "sgd": Optimizer(partial(torch.optim.SGD, momentum=0.9), (0.03, 0.1, 0.3), 5e-4),
    "adamw": Optimizer(partial(torch.optim.AdamW, betas=(0.9, 0.98)), (3e-4, 1e-3, 3e-3), 0.05),
}
MODELS = {
    "lenet-300-100": Recipe(LeNet300100, ("5",), "sgd", "images"),
    "lenet-300-100-first-dense": Recipe(LeNet300100, ("1", "5"), "sgd", "images"),
    "convnet": Recipe(SmallConvNet, ("0", "14"), "sgd", "images"),
    **{
        f"resnet{depth}": Recipe(partial(ResNet, depth=depth), ("conv", "fc"), "sgd", "images")
        for depth in (8, 20, 32, 56)
    },
    "char-transformer": Recipe(CharTransformer, ("head",), "adamw", "text"),
}

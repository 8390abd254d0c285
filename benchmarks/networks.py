"""The networks whose training steps are timed, with random inputs of a fitting size."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """The three-convolution block of ResNet-50 (He et al., 2015)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class BasicBlock(nn.Module):
    """The two-convolution block of the CIFAR ResNets."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity() if stride == 1 and inputs == width else nn.Conv2d(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(block: type[nn.Module], widths: list[int], depths: list[int], stem: int, expansion: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
    inputs = stem
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            layers.append(block(inputs, width, 2 if stage and not index else 1))
            inputs = width * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Transformer(nn.Module):
    """Twelve encoder layers on vectors, read out at the mean position."""

    def __init__(self, width: int = 256, heads: int = 4, feedforward: int = 1024) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def resnet_for_large_images() -> nn.Module:
    """ResNet-50 with the stem that quarters height and width."""
    model = resnet(Bottleneck, [64, 128, 256, 512], [3, 4, 6, 3], 64, 4)
    model[0] = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
    return model.insert(3, nn.MaxPool2d(3, 2, padding=1))


NETWORKS = {
    "ResNet-20": (lambda: resnet(BasicBlock, [16, 32, 64], [3, 3, 3], 16, 1), (3, 32, 32)),
    "ResNet-50": (lambda: resnet(Bottleneck, [64, 128, 256, 512], [3, 4, 6, 3], 64, 4), (3, 32, 32)),
    "Transformer-12": (Transformer, (32, 256)),
}
FOR_GPUS = {
    "ResNet-50, 224²": (resnet_for_large_images, (3, 224, 224)),
    "Transformer-12, 768": (lambda: Transformer(768, heads=12, feedforward=3072), (128, 768)),
}

"""Plain loops under a scheduler, for tests whose concern is its steps."""

from __future__ import annotations

import math

import torch
from models import loss_of, make
from torch import nn


def shrinking(count: int = 40) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer whose loss has no gradient: with a learning rate of 1, update k multiplies masked weights by 1 - λ_k."""
    layer = make(lambda: nn.Linear(count, 1, bias=False))
    return layer, torch.optim.SGD(layer.parameters(), lr=1.0)


def update(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()


def train(model, optimizer, rst, updates, shape, start=0):
    for index in range(start, start + updates):
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()
        rst.step()


@torch.no_grad()
def norm_share(model, masks) -> float:
    masked = sum(float((model.get_parameter(name) * ~kept).square().sum()) for name, kept in masks.items())
    return math.sqrt(masked / sum(float(model.get_parameter(name).square().sum()) for name in masks))

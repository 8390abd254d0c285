"""How many kernels a ticket adds to an update: what small batches on a GPU pay for is their number."""

from __future__ import annotations

import functools

import pytest
import torch
from models import finalize_quietly
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dual_ticket import RSTScheduler

from .process import on_simulated_cuda
from .training import new_network, update

LAYERS = 10
WIDTHS = {"small": 32, "large": 80}  # of layers with less and with more than 4,096 weights
OPTIMIZERS = {
    "SGD foreach": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True),
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
}

# (layers, phase, whether λ is multiplied by a scale on the device): at most so many kernels per layer, and per update.
ALLOWED = {
    ("small", "transform", False): (0, 2),  # addcmul of all layers; λ is written to the device, for graphs
    ("large", "transform", False): (1, 1),  # addcmul of each layer; λ
    ("small", "transform", True): (2, 4),  # mask · factor, addcmul; 3 to find the factor; λ
    ("large", "transform", True): (2, 4),  # the same
    ("small", "finetune", False): (0, 2),  # zeros in all gradients, zeros in all weights
    ("large", "finetune", False): (2, 0),  # the same, for each layer
    ("small", "finetune", True): (0, 2),  # there is no λ
    ("large", "finetune", True): (2, 0),
}


class Launches(TorchDispatchMode):
    """Counts the kernels that operators would start on a GPU, where ``_foreach`` operators need one for many tensors.

    That is so where these are of one device and dtype; otherwise each tensor takes one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name.startswith("_foreach_"):
            lists = [arg for arg in args if isinstance(arg, (list, tuple)) and isinstance(arg[0], torch.Tensor)]
            kinds = {(tensor.device, tensor.dtype) for tensors in lists for tensor in tensors}
            self.count += 1 if len(kinds) == 1 else len(lists[0])
        elif not name.startswith(("empty", "_local_scalar_dense")) and not is_view(operator):
            self.count += 1
        return result


def is_view(operator) -> bool:
    """Whether the results share memory with the arguments, which takes no kernel."""
    returns = operator._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def kernels(width: int, phase: str, optimizer_name: str, is_scaled: bool) -> int:
    """Of one update in this phase; without a ticket in the phase "dense"."""

    def deep():
        return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.Tanh())))

    model = new_network("cuda", deep)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0) if is_scaled else None
    rst = None if phase == "dense" else RSTScheduler(model, 0.5, steps=9, seed=0)
    x = torch.randn(4, width).cuda()

    def one_update():
        update(model, optimizer, lambda: model(x).square().mean(), scaler)
        if rst is not None:
            rst.step()

    one_update()
    one_update()
    if phase == "finetune":
        finalize_quietly(rst)
        one_update()
    with Launches() as launches:
        one_update()
    return launches.count


@pytest.mark.parametrize("phase", ["transform", "finetune"])
@pytest.mark.parametrize("is_scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layers", WIDTHS)
@on_simulated_cuda
def test_kernels_that_a_ticket_adds(layers, optimizer, is_scaled, phase):
    """A GradScaler hands its scale to fused optimizers; other ones get gradients without it."""
    width = WIDTHS[layers]
    per_layer, per_update = ALLOWED[layers, phase, is_scaled and "fused" in optimizer]
    added = kernels(width, phase, optimizer, is_scaled) - kernels(width, "dense", optimizer, is_scaled)
    assert 0 < added <= LAYERS * per_layer + per_update, f"{added} kernels for {LAYERS} layers"


@on_simulated_cuda
def test_how_kernels_are_counted():
    x, y = (torch.ones(3, device="cuda") for _ in range(2))
    with Launches() as launches:
        torch.empty_like(x).view(3, 1)
    assert launches.count == 0
    with Launches() as launches:
        torch._foreach_mul_([x, y], 2.0)
    assert launches.count == 1
    with Launches() as launches:
        torch._foreach_mul_([x, y], [x, y.to(torch.uint8)])
    assert launches.count == 3, "the conversion, and one for each"

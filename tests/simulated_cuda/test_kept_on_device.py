"""The kept weights alone, on the device: the same training as on the CPU, and the host waits for nothing."""

import functools

import pytest
import torch

from torch_dual_ticket.baselines import random_ticket
from torch_dual_ticket.kept import KeptParameters

from .device import counted_waits
from .process import on_simulated_cuda
from .training import assert_holds_zeros, loss_of, new_network, on_host, update

OPTIMIZERS = {
    "SGD foreach": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "AdamW foreach": functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True),
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
with_and_without_scaler = pytest.mark.parametrize("is_scaled", [False, True], ids=["", "GradScaler"])


class Loop:
    def __init__(self, name, device, kept=True, is_scaled=False):
        self.model = new_network(device)
        self.held = random_ticket(self.model, 0.75, seed=3)
        self.kept = KeptParameters(self.held) if kept else None
        self.optimizer = OPTIMIZERS[name]((self.kept or self.model).parameters())
        self.scaler = torch.amp.GradScaler(device, init_scale=128.0) if is_scaled else None

    def updates(self, *indices):
        for index in indices:
            update(self.model, self.optimizer, lambda index=index: loss_of(self.model, index), self.scaler)


@with_and_without_scaler
@every_optimizer
@on_simulated_cuda
def test_the_training_is_that_on_the_cpu(name, is_scaled):
    here = Loop(name, "cuda", is_scaled=is_scaled)
    here.updates(*range(5))
    dense = Loop(name, "cpu", kept=False, is_scaled=is_scaled)
    dense.updates(*range(5))
    for (key, mine), theirs in zip(on_host(here.model).items(), on_host(dense.model).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=key)
    assert_holds_zeros(here.model, here.held)
    assert all(parameter.is_cuda for parameter in here.kept.parameters())


@with_and_without_scaler
@every_optimizer
@on_simulated_cuda
def test_an_update_waits_for_nothing(name, is_scaled):
    """From the first on; but for what torch's GradScaler reads for optimizers that are not fused."""
    loop = Loop(name, "cuda", is_scaled=is_scaled)
    x = torch.randn(4, 3, 8, 8).cuda()
    with counted_waits() as waits:
        for _ in range(4):
            update(loop.model, loop.optimizer, lambda: (loop.model(x) - 1).square().mean(), loop.scaler)
    assert waits == ({"aten::_local_scalar_dense": 4} if is_scaled and "fused" not in name else {})


@on_simulated_cuda
def test_a_model_that_moves_to_the_device():
    loop, dense = Loop("AdamW fused", "cpu"), Loop("AdamW fused", "cpu", kept=False)
    for each in (loop, dense):
        each.updates(0, 1)
        each.model.to("cuda")
        each.optimizer = OPTIMIZERS["AdamW fused"]((each.kept or each.model).parameters())
        each.updates(2, 3)
    for mine, theirs in zip(on_host(loop.model).values(), on_host(dense.model).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

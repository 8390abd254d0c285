"""What the host waits for: in a step of either phase nothing, from the second update on; the first draws the masks."""

import functools

import pytest
import torch
from models import finalize_quietly

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.report import History

from .device import counted_waits
from .process import on_simulated_cuda
from .training import new_network, update

OPTIMIZERS = {
    "SGD foreach": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "AdamW capturable": functools.partial(torch.optim.AdamW, lr=1e-3, capturable=True),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
with_and_without_scaler = pytest.mark.parametrize("is_scaled", [False, True], ids=["", "GradScaler"])


class Loop:
    """A training on the device whose loss is fed from there, with or without a ticket."""

    def __init__(self, make_optimizer, is_scaled, ticket=True, **settings):
        self.model = new_network()
        self.rst = RSTScheduler(self.model, 0.75, steps=12, seed=3, **settings) if ticket else None
        self.optimizer = make_optimizer(self.model.parameters())
        self.scaler = torch.amp.GradScaler("cuda", init_scale=128.0) if is_scaled else None
        self.x = torch.randn(4, 3, 8, 8).cuda()

    def updates(self, count):
        for _ in range(count):
            update(self.model, self.optimizer, lambda: (self.model(self.x) - 1).square().mean(), self.scaler)
            if self.rst is not None:
                self.rst.step()

    def waits(self, count=4):
        with counted_waits() as waits:
            self.updates(count)
        return waits


@with_and_without_scaler
@every_optimizer
@on_simulated_cuda
def test_an_update_waits_for_nothing(name, is_scaled):
    """Only what torch's own GradScaler reads for optimizers that are not fused: whether to skip the step."""
    dense = Loop(OPTIMIZERS[name], is_scaled, ticket=False)
    dense.updates(1)
    reads = {"aten::_local_scalar_dense": 4} if is_scaled and "fused" not in name else {}
    assert dense.waits() == reads
    loop = Loop(OPTIMIZERS[name], is_scaled)
    loop.updates(1)
    assert (waits := loop.waits()) == reads, f"{waits} in the transformation"
    finalize_quietly(loop.rst)
    assert (waits := loop.waits()) == reads, f"{waits} in finetuning"


@on_simulated_cuda
def test_a_closure_waits_for_nothing():
    loop = Loop(functools.partial(torch.optim.SGD, lr=0.05), is_scaled=False)

    def closure():
        loop.optimizer.zero_grad()
        loss = loop.model(loop.x).square().mean()
        loss.backward()
        return loss

    def updates():
        for _ in range(3):
            loop.optimizer.step(closure)
            loop.rst.step()

    updates()
    with counted_waits() as waits:
        updates()
    assert waits == {}
    finalize_quietly(loop.rst)
    with counted_waits() as waits:
        updates()
    assert waits == {}


@on_simulated_cuda
def test_a_new_cycle_waits_only_when_its_masks_are_drawn():
    loop = Loop(functools.partial(torch.optim.SGD, lr=0.05), is_scaled=False, cycles=2)
    loop.updates(13)
    assert loop.rst.progress > 0.5
    assert loop.waits() == {}


@on_simulated_cuda
def test_a_history_waits_when_it_is_read():
    loop = Loop(functools.partial(torch.optim.SGD, lr=0.05), is_scaled=False)
    history = History(loop.rst, every=1)
    loop.updates(1)
    with counted_waits() as waits:
        for _ in range(5):
            loop.updates(1)
            history.record()
    assert waits == {}
    with counted_waits() as waits:
        assert len(history.records) == 5
    assert waits["copy to the host"] >= 1


@on_simulated_cuda
def test_the_first_update_draws_the_masks():
    """Which waits, and shows that the tests above would see it."""
    assert Loop(OPTIMIZERS["SGD fused"], is_scaled=False).waits(1) != {}

"""The simulated device itself: what the other tests here rely on that it notices."""

import pytest
import torch

from .device import counted_waits, without_float64
from .process import on_simulated_cuda

WAITING = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy from pageable memory": lambda x: x.copy_(torch.ones(3), non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "index of a mask": lambda x: x[x > 0],
    "synchronize": lambda x: torch.cuda.synchronize(),
}
NOT_WAITING = {
    "arithmetic": lambda x: x.mul_(2).add(x.sum()),
    "fill": lambda x: torch.full((3,), 2.0, device="cuda"),
    "number written where a mask is": lambda x: x.__setitem__(x > 0, 1.0),
    "copy to another device": lambda x: x.to("cuda:1"),
    "copy to pinned memory": lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    "query of an event": lambda x: torch.cuda.Event().query(),
}


@pytest.mark.parametrize("name", [*WAITING, *NOT_WAITING])
@on_simulated_cuda
def test_what_counts_as_waiting(name):
    x = torch.ones(3, device="cuda")
    with counted_waits() as waits:
        {**WAITING, **NOT_WAITING}[name](x)
    assert bool(waits) == (name in WAITING), waits


@on_simulated_cuda
def test_tensors_of_different_devices_do_not_mix():
    here, there = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    for other in (there, there.sum(), torch.ones(3)):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            here.add_(other)
    assert here.add_(torch.ones(())).device == torch.device("cuda:0"), "a number of the CPU may come along"


@on_simulated_cuda
def test_float64_can_be_refused():
    with without_float64(), pytest.raises(RuntimeError, match="float64 is not supported"):
        torch.ones(2, device="cuda").double()
    assert torch.ones(2, device="cuda").double().dtype is torch.float64

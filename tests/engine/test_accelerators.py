"""What matters on accelerators, as far as it can be shown on a CPU: no waiting, their kernels, captured updates."""

import copy

import pytest
import torch
from device_tape import NoReading, Tape
from models import assert_same, finalize_quietly
from plain_loop import assert_holds_zeros, loss_of, normal, sgd
from reference import ByHand
from torch import nn
from torch._subclasses import FakeTensorMode

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._engine import graphed, kernels

STEPS = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 900), nn.Tanh(), nn.Linear(900, 5)).double()


def update(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model(x)).backward()
    optimizer.step()


def test_updates_read_nothing_on_the_host():
    """A number that is read on the host waits for the GPU. Masks are drawn in the first update, and do wait once."""
    model = network()
    optimizer = sgd(model)
    rst = RSTScheduler(model, 0.5, steps=STEPS, hold=9, seed=0)
    x = normal(3, 6)(0)[0]
    update(model, optimizer, x)
    rst.step()

    def two_updates():
        for _ in range(2):
            update(model, optimizer, x)
            rst.step()

    with NoReading():
        two_updates()
    finalize_quietly(rst)
    with NoReading():
        two_updates()
    with pytest.raises(AssertionError, match="waits"), NoReading():
        rst.residual()


# --------------------------------------------------------------- kernels


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """The kernels take the path without chunks and buffers; a CPU makes the conversions that it relies on, too."""
    monkeypatch.setattr(kernels, "_on_cpu", lambda tensor: False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5, dtype=torch.float64)], ids=["float", "tensor"])
def test_kernels_of_accelerators(as_on_an_accelerator, dtype, factor):
    weight, grad = torch.randn(7, 900).to(dtype), torch.randn(7, 900).to(dtype)
    mask = (torch.rand(7, 900) < 0.5).to(torch.uint8)
    expected = torch.where(mask.bool(), grad + 0.5 * weight, grad)
    memory = grad.data_ptr()
    kernels.add_scaled_([grad], [weight], [mask], factor)
    assert (grad.dtype, grad.data_ptr()) == (dtype, memory)
    torch.testing.assert_close(grad, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    assert torch.equal(grad[mask == 0], expected[mask == 0])

    weight[0, 0] = float("nan")
    kept = mask.clone()
    kept[0, 0] = 0
    expected = torch.where(kept.bool(), weight, torch.zeros((), dtype=dtype))
    kernels.clear_(weight, kept)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_kernels_stay_on_the_device(dtype):
    """On a GPU that has shapes and no values, an operand from elsewhere or a number read on the host is an error."""
    with FakeTensorMode():
        weight, grad = (torch.empty(3, 1 << 20, dtype=dtype, device="cuda") for _ in range(2))
        mask = torch.empty(weight.shape, dtype=torch.uint8, device="cuda")
        factor = torch.empty((), dtype=torch.float64, device="cuda")
        kernels.add_scaled_([grad], [weight], [mask], 0.5)
        kernels.add_scaled_([grad], [weight], [mask], factor)
        kernels.add_scaled_(*([tensor.to("cuda:1")] for tensor in (grad, weight, mask)), factor)  # as torch's own scale
        kernels.clear_(weight, mask)
        assert [norm.device.type for norm in kernels.squared_norms(weight, mask.bool())] == ["cuda", "cuda"]
        with pytest.raises(RuntimeError, match=r"(?i)device"):
            kernels.add_scaled_([grad], [weight], [mask.cpu()], 0.5)


# ----------------------------------------------------- captured updates


@pytest.fixture
def capturing(monkeypatch):
    """Sets whether a CUDA graph is captured at this moment, on a device that has no graphs."""
    state = {"now": False}
    monkeypatch.setattr(graphed, "may_be_captured", lambda device: True)
    monkeypatch.setattr(graphed, "is_capturing", lambda: state["now"])

    def capture(is_on):
        state["now"] = is_on

    return capture


def test_an_update_that_is_captured_and_replayed(capturing):
    """λ grows between replays, and each of them is a tick."""
    model = network()
    other = copy.deepcopy(model)
    inputs = [normal(3, 6)(index)[0] for index in range(12)]
    rst = RSTScheduler(model, 0.5, steps=len(inputs), seed=0)
    by_hand, optimizer = ByHand(other, rst.masks, steps=len(inputs)), sgd(other)
    for x in inputs:
        optimizer.zero_grad()
        loss_of(other(x)).backward()
        by_hand.before_update()
        optimizer.step()
        by_hand.after_update()

    optimizer, place = sgd(model), torch.empty_like(inputs[0])
    for x in inputs[:3]:
        update(model, optimizer, place.copy_(x))
        rst.step()
    tape = Tape()
    optimizer.zero_grad()
    place.copy_(inputs[3])
    capturing(True)
    with tape:
        loss_of(model(place)).backward()
        optimizer.step()
    capturing(False)
    rst.step()
    for parameter in model.parameters():
        parameter.grad = None  # a graph keeps its own memory
    for x in inputs[4:]:
        place.copy_(x)
        tape.replay()
        rst.step()
    assert rst.progress == 1
    assert_same(model, other, tolerance=1e-12)


def test_a_graph_does_not_outlive_its_masks(capturing):
    model = network()
    rst = RSTScheduler(model, 0.5, steps=STEPS, cycles=2, seed=0)
    optimizer, x = sgd(model), normal(3, 6)(0)[0]

    def capture():
        update(model, optimizer, x)
        capturing(True)
        update(model, optimizer, x)
        capturing(False)

    capture()
    for _ in range(STEPS - 1):
        rst.step()
    with pytest.warns(UserWarning, match="capture it again"):
        rst.step()  # the second cycle begins
    assert rst.progress == 0.5
    rst.step()  # neither an update nor a replay that is known
    assert rst.progress == 0.5
    capture()
    with pytest.warns(UserWarning, match="masked weights still held"), pytest.warns(UserWarning, match="capture it"):
        rst.finalize()
    assert rst.penalty == 0
    capture()
    assert_holds_zeros(model, rst)


def test_what_must_not_be_captured(capturing):
    model = network()
    rst = RSTScheduler(model, 0.5, steps=STEPS, seed=0)
    optimizer, x = sgd(model), normal(3, 6)(0)[0]
    capturing(True)
    with pytest.raises(RuntimeError, match="Run a few updates first"):
        update(model, optimizer, x)
    capturing(False)
    update(model, optimizer, x)
    capturing(True)
    with pytest.raises(RuntimeError, match="after the graph's replay"):
        rst.step()
    capturing(False)
    rst.step()
    assert rst.progress == 1 / STEPS

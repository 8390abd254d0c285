"""What matters on accelerators, as far as it can be shown on a CPU: no waiting, their kernels, captured updates."""

import copy

import pytest
import torch
from device_tape import Tape
from models import assert_same
from plain_loop import assert_holds_zeros, loss_of, normal, sgd
from reference import ExplicitLoop
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._engine import graph_capture
from torch_dual_ticket._tensors.mask_cache import MaskCache
from torch_dual_ticket.masks.explicit import ExplicitMask

STEPS = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 900), nn.Tanh(), nn.Linear(900, 5)).double()


def update(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model(x)).backward()
    optimizer.step()


# ----------------------------------------------------- captured updates


@pytest.fixture
def capturing(monkeypatch):
    """Sets whether a CUDA graph is captured at this moment, on a device that has no graphs."""
    state = {"now": False}
    monkeypatch.setattr(graph_capture, "may_be_captured", lambda device: True)
    monkeypatch.setattr(graph_capture, "is_in_use", lambda: True)
    monkeypatch.setattr(graph_capture, "is_capturing", lambda: state["now"])

    def capture(is_on):
        state["now"] = is_on

    return capture


def test_an_update_that_is_captured_and_replayed(capturing):
    """λ grows between replays, and each of them is a scheduler step."""
    model = network()
    other = copy.deepcopy(model)
    inputs = [normal(3, 6)(index)[0] for index in range(12)]
    rst = RSTScheduler(model, 0.5, steps=len(inputs), seed=0)
    explicit, optimizer = ExplicitLoop(other, rst.masks, steps=len(inputs)), sgd(other)
    for x in inputs:
        optimizer.zero_grad()
        loss_of(other(x)).backward()
        explicit.before_update()
        optimizer.step()
        explicit.after_update()

    optimizer, captured = sgd(model), torch.empty_like(inputs[0])
    for x in inputs[:3]:
        update(model, optimizer, captured.copy_(x))
        rst.step()
    tape = Tape()
    optimizer.zero_grad()
    captured.copy_(inputs[3])
    capturing(True)
    with tape:
        loss_of(model(captured)).backward()
        optimizer.step()
    capturing(False)
    rst.step()
    for parameter in model.parameters():
        parameter.grad = None  # a graph keeps its own memory
    for x in inputs[4:]:
        captured.copy_(x)
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


# ----------------------------------------------------- masks in lists


def test_a_list_of_masks_stays_as_it_was_when_the_phase_changes():
    """An update keeps its list; where finalize() is interrupted, it is still used."""
    weight = nn.Parameter(torch.zeros(90, 60))  # large enough for a mask in uint8
    kept = torch.arange(90 * 60).view(90, 60) % 3 == 0
    mask, cache = ExplicitMask(kept), MaskCache("weight", stored=True)
    penalized = cache.whole(mask, weight, holds=False)
    assert penalized.dtype is torch.uint8
    held = cache.whole(mask, weight, holds=True)
    assert torch.equal(penalized.bool(), ~kept)
    assert torch.equal(held.bool(), kept)

"""CUDA graphs: what a first update says that is captured. Nothing is captured here, torch.cuda only says so."""

import pytest
import torch
from models import assert_same_states, finalize_quietly

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.masks.seeded import SeededMask

from .device import counted_waits
from .process import on_simulated_cuda
from .training import loss_of, new_network, on_host, sgd


class Capture:
    """Says that a graph is captured, refuses that a mask is drawn meanwhile, and counts what CUDA would refuse."""

    def __enter__(self):
        self._capturing = torch.cuda.is_current_stream_capturing
        self._draw = SeededMask.draw
        torch.cuda.is_current_stream_capturing = lambda: True
        SeededMask.draw = self._refuse
        self._counting = counted_waits()
        self.waits = self._counting.__enter__()
        return self

    def __exit__(self, *exception):
        self._counting.__exit__(None, None, None)
        torch.cuda.is_current_stream_capturing = self._capturing
        SeededMask.draw = self._draw

    def _refuse(self, *args, **options):
        raise AssertionError("a mask is drawn while a graph is captured")


def state_of(model, optimizer):
    """All that an update may change."""
    state = {**on_host(model), **{f"gradient of {n}": p.grad.cpu() for n, p in model.named_parameters()}}
    moments = {id(p): s for p, s in optimizer.state.items()}
    return {**state, **{f"{k} of {n}": v.cpu() for n, s in moments.items() for k, v in s.items() if v is not None}}


@on_simulated_cuda
def test_a_first_update_that_is_captured():
    model = new_network()
    rst = RSTScheduler(model, 0.75, steps=6, seed=3)
    optimizer = sgd(model)
    loss_of(model, 0).backward()
    before = state_of(model, optimizer)
    with Capture() as capture, pytest.raises(RuntimeError, match="Run a few updates first"):
        optimizer.step()
    assert capture.waits == {}
    assert_same_states(state_of(model, optimizer), before, 0)
    rst.step()
    assert rst.progress == 0, "no update was made"
    optimizer.step()
    rst.step()
    assert rst.progress == 1 / 6, "and the scheduler goes on"


@on_simulated_cuda
def test_the_first_captured_update_of_a_new_cycle():
    model = new_network()
    rst = RSTScheduler(model, 0.75, steps=2, cycles=2, seed=3)
    optimizer = sgd(model)

    def backward():
        optimizer.zero_grad()
        loss_of(model, 0).backward()

    for _ in range(2):
        backward()
        optimizer.step()
        rst.step()
    backward()
    before = state_of(model, optimizer)
    with Capture() as capture, pytest.raises(RuntimeError, match="Run a few updates first"):
        optimizer.step()
    assert capture.waits == {}
    assert_same_states(state_of(model, optimizer), before, 0)


@on_simulated_cuda
def test_later_updates_can_be_captured():
    """In either phase: nothing is drawn, and nothing waits."""
    model = new_network()
    rst = RSTScheduler(model, 0.75, steps=6, seed=3)
    optimizer = sgd(model)
    batch = torch.ones(4, 3, 8, 8, device="cuda")

    def one_update():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    one_update()
    rst.step()
    with Capture() as capture:
        one_update()
    assert capture.waits == {}
    rst.step()
    with pytest.warns(UserWarning, match="capture it again"):
        finalize_quietly(rst)
    one_update()
    with Capture() as capture:
        one_update()
    assert capture.waits == {}

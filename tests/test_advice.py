"""Early word on a penalty that cannot do its work."""

import math
import warnings

import pytest
import torch
from models import loss_of, make, mlp

from torch_dual_ticket import RSTScheduler

SHAPE = (12,)


def train(ticks, *, make_optimizer=torch.optim.SGD, optimizer_options=None, **options):
    """A model after so many ticks, with the warnings of each tick."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, seed=0, **options)
    optimizer = make_optimizer(model.parameters(), **(optimizer_options or {}))
    caught = []
    for index in range(ticks):
        optimizer.zero_grad()
        loss_of(model, index, SHAPE).backward()
        optimizer.step()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            rst.step()
        caught += [(index + 1, str(warning.message), warning.filename) for warning in found]
    return model, rst, caught


def test_says_after_a_tenth_that_too_little_will_shrink():
    _, _, [(tick, message, filename)] = train(100, steps=60, hold=40, optimizer_options={"lr": 0.01, "momentum": 0.5})
    assert tick == 10
    left = math.exp(-0.01 * (sum(range(1, 61)) / 60 + 40) / 0.5)
    assert f"100 updates will leave about {left:.0%} of the masked weights" in message
    assert "lr=0.01, momentum=0.5 and a penalty up to 1" in message
    assert filename == __file__


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_it_asks_for_is_enough(momentum):
    """The prediction is about weights that no gradient holds up."""

    def shrunk(max_penalty):
        torch.manual_seed(0)
        layer = torch.nn.Linear(20, 20, bias=False, dtype=torch.float64)
        rst = RSTScheduler(layer, sparsity=0.8, seed=0, steps=200, max_penalty=max_penalty)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=momentum)
        pruned = ~rst.masks["weight"]
        before = layer.weight.detach()[pruned].norm()
        messages = []
        for _ in range(200):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                rst.step()
            messages += [str(warning.message) for warning in found]
        return float(layer.weight.detach()[pruned].norm() / before), messages

    weak = 0.2 if momentum else 1.0
    left, [message] = shrunk(weak)
    predicted = float(message.partition("leave about ")[2].partition("%")[0]) / 100
    assert left == pytest.approx(predicted, rel=0.2)
    times = float(message.rpartition("together ")[2].partition(" times")[0])
    left, messages = shrunk(1.05 * times * weak)
    assert messages == []
    assert left < 0.06


def test_says_that_the_masked_weights_will_diverge():
    options = {"lr": 0.1, "momentum": 0.9}
    _, _, [(tick, message, _)] = train(20, steps=100, max_penalty=40.0, optimizer_options=options)
    assert tick == 10
    assert "the masked weights will diverge" in message
    assert "2·(1 + momentum) = 3.8. Lower max_penalty to less than 38." in message


@pytest.mark.parametrize(("max_penalty", "diverges"), [(36.0, False), (40.0, True)])
def test_the_limit_is_where_it_diverges(max_penalty, diverges):
    layer = torch.nn.Linear(20, 20, bias=False, dtype=torch.float64)
    rst = RSTScheduler(layer, sparsity=0.8, seed=0, steps=1, hold=400, max_penalty=max_penalty)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(400):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will diverge")
            rst.step()
    largest = float(layer.weight.detach()[~rst.masks["weight"]].abs().max())
    assert (largest > 1e3) == diverges


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 100, "optimizer_options": {"lr": 0.2, "momentum": 0.9}},
        {"steps": 100, "make_optimizer": torch.optim.Adam, "optimizer_options": {"lr": 1e-6}},
        {"steps": 100, "optimizer_options": {"lr": torch.tensor(1e-6)}},
        {"steps": 100, "max_penalty": 0.0, "optimizer_options": {"lr": 0.1}},
    ],
    ids=["enough", "adam", "tensor", "none"],
)
def test_is_silent(options):
    assert train(100, **options)[2] == []


def test_says_it_once_also_after_a_restart():
    _, rst, caught = train(15, steps=100, optimizer_options={"lr": 0.001})
    assert len(caught) == 1
    state = rst.state_dict()
    model = make(mlp)
    resumed = RSTScheduler(model, sparsity=0.8, seed=0, steps=100)
    resumed.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(5):
            loss_of(model, index, SHAPE).backward()
            optimizer.step()
            resumed.step()

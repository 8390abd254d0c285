"""Early word on a penalty that cannot do its work."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from device_tape import NoReading
from models import loss_of, make, mlp

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.readings import Reading

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
        {"steps": 100, "max_penalty": 10, "make_optimizer": torch.optim.Adam, "optimizer_options": {"lr": 0.01}},
        {"steps": 100, "make_optimizer": torch.optim.Adam, "optimizer_options": {"lr": torch.tensor(1e-6)}},
        {"steps": 100, "make_optimizer": torch.optim.Adamax, "optimizer_options": {"lr": 1e-6}},
        {"steps": 100, "optimizer_options": {"lr": torch.tensor(1e-6)}},
        {"steps": 100, "max_penalty": 0.0, "optimizer_options": {"lr": 0.1}},
        {"steps": 100, "max_penalty": 0.0, "make_optimizer": torch.optim.Adam},
    ],
    ids=["enough", "enough Adam", "Adam, tensor", "Adamax", "tensor", "none", "none, Adam"],
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


# ---------------------------------------------------------------------- Adam

ADAMS = [torch.optim.Adam, torch.optim.AdamW]


def shrunk_by(make_optimizer, updates, gradient, *, lr=0.01, max_penalty=1.0, store_masks=True):
    """What share of a layer's masked weights is left, where gradients have random signs; and what was said."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 100, bias=False)
    options = {"steps": updates, "max_penalty": max_penalty, "store_masks": store_masks}
    rst = RSTScheduler(layer, sparsity=0.8, seed=0, **options)
    optimizer = make_optimizer(layer.parameters(), lr=lr, weight_decay=0)
    pruned = ~rst.masks["weight"]
    before = layer.weight.detach()[pruned].norm()
    caught = []
    for _ in range(updates):
        layer.weight.grad = gradient * torch.randn_like(layer.weight).sign()
        optimizer.step()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            rst.step()
        caught += [(str(warning.message), warning.filename) for warning in found]
    return float(layer.weight.detach()[pruned].norm() / before), caught


def number(message, before, after):
    return float(message.partition(before)[2].partition(after)[0])


@pytest.mark.parametrize("store_masks", [True, False])
@pytest.mark.parametrize("make_optimizer", ADAMS)
def test_says_what_no_penalty_of_adam_can_reach(make_optimizer, store_masks):
    """Weights up to 1/√80 = 0.11, and 0.05 to move."""
    options = {"gradient": 1e-6, "max_penalty": 100.0, "lr": 0.001, "store_masks": store_masks}
    left, [(message, filename)] = shrunk_by(make_optimizer, 50, **options)
    assert "with lr=0.001, 45 more updates will leave" in message
    said = number(message, "will leave ", "%") / 100
    assert left == pytest.approx(said, abs=0.1)
    assert said == pytest.approx(((0.1118 - 0.05) / 0.1118) ** 1.5, abs=0.03)  # of evenly distributed weights
    assert filename == __file__
    times = number(message, "together ", " times")
    left, caught = shrunk_by(make_optimizer, round(50 * times), **options)
    assert caught == []
    assert left < 0.1


@pytest.mark.parametrize("make_optimizer", ADAMS)
def test_says_where_adam_comes_to_rest(make_optimizer):
    gradient = 0.1
    left, [(message, filename)] = shrunk_by(make_optimizer, 500, gradient)
    assert "come to rest" in message
    assert "a penalty up to 1 " in message
    assert 0.25 < left <= number(message, "at up to ", "%") / 100
    assert filename == __file__
    times = number(message, "Make max_penalty ", " times")
    left, caught = shrunk_by(make_optimizer, 500, gradient, max_penalty=times)
    assert caught == []
    assert left < 0.2


def test_a_penalty_that_is_large_from_the_start_is_no_gradient_of_the_loss():
    """Adam's second moments hold its squares."""
    left, caught = shrunk_by(torch.optim.Adam, 500, 1e-3)
    assert caught == []
    assert left < 0.05


def test_reads_nothing_on_the_host_for_adam(monkeypatch):
    """Nor does it speak before the numbers are there."""
    there, ticks = [], []
    with monkeypatch.context() as patch:
        patch.setattr(Reading, "has_arrived", lambda self: bool(there))
        layer = torch.nn.Linear(8, 8)
        rst = RSTScheduler(layer, sparsity=0.5, seed=0, steps=40)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-5)
        for tick in range(1, 8):
            layer.weight.grad = torch.zeros_like(layer.weight)
            if tick == 6:
                there.append(True)
            optimizer.step()
            with NoReading() if tick == 4 else nullcontext(), warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                rst.step()
            ticks += [tick for _ in found]
    assert ticks == [6]


def test_a_copy_of_a_scheduler_awaits_no_numbers(monkeypatch):
    monkeypatch.setattr(Reading, "has_arrived", lambda self: False)
    _, rst, _ = train(20, steps=100, make_optimizer=torch.optim.Adam)
    assert rst._advice._expected
    assert not copy.deepcopy(rst)._advice._expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_reading_from_a_gpu():
    reading = Reading(torch.arange(3.0, device="cuda"))
    torch.cuda.synchronize()
    assert reading.has_arrived()
    assert reading.values.tolist() == [0, 1, 2]


def test_a_reading_is_of_the_moment_that_it_was_made_at():
    numbers = torch.zeros(2)
    reading = Reading(numbers)
    numbers += 1
    assert reading.values.tolist() == [0, 0]

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
from torch_dual_ticket._engine.readings import Reading

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
    assert "must stay below 3.8, what this SGD bears. Lower max_penalty to less than 38, unless" in message


@pytest.mark.parametrize(
    ("options", "max_penalty", "diverges"),
    [
        ({}, 36.0, False),
        ({}, 40.0, True),
        ({"nesterov": True}, 13.0, False),
        ({"nesterov": True}, 14.2, True),
        ({"dampening": 0.5}, 74.0, False),
        ({"dampening": 0.5}, 78.0, True),
        ({"momentum": 0.0, "dampening": 0.5}, 19.0, False),
        ({"momentum": 0.0, "dampening": 0.5}, 21.0, True),
    ],
)
def test_the_limit_is_where_it_diverges(options, max_penalty, diverges):
    layer = torch.nn.Linear(20, 20, bias=False, dtype=torch.float64)
    rst = RSTScheduler(layer, sparsity=0.8, seed=0, steps=1, hold=400, max_penalty=max_penalty)
    optimizer = torch.optim.SGD(layer.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})
    messages = []
    for _ in range(400):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            rst.step()
        messages += [str(warning.message) for warning in found]
    largest = float(layer.weight.detach()[~rst.masks["weight"]].abs().max())
    assert (largest > 1e3) == diverges
    assert ["will diverge" in message for message in messages] == [True] * diverges


def test_a_scalar_parameter_under_adam_needs_no_rows():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match="rounds to all 1 units of scale"):
        rst = RSTScheduler(model, sparsity=0.9, seed=0, steps=2, targets=((torch.nn.Module, "scale"),))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        model.scale.grad = torch.zeros(())
        optimizer.step()
        rst.step()
    assert rst.done


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 100, "optimizer_options": {"lr": 0.2, "momentum": 0.9}},
        {"steps": 100, "max_penalty": 10, "make_optimizer": torch.optim.Adam, "optimizer_options": {"lr": 0.01}},
        {"steps": 100, "make_optimizer": torch.optim.Adam, "optimizer_options": {"lr": torch.tensor(1e-6)}},
        {"steps": 100, "make_optimizer": torch.optim.Adamax, "optimizer_options": {"lr": 1e-6}},
        {"steps": 100, "optimizer_options": {"lr": torch.tensor(1e-6)}},
        {"steps": 100, "optimizer_options": {"lr": 1e-6, "momentum": 1.0}},
        {"steps": 100, "max_penalty": 0.0, "optimizer_options": {"lr": 0.1}},
        {"steps": 100, "max_penalty": 0.0, "make_optimizer": torch.optim.Adam},
    ],
    ids=["enough", "enough Adam", "Adam, tensor", "Adamax", "tensor", "all momentum", "none", "none, Adam"],
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


def shrunk_by(make_optimizer, updates, noise=0.0, *, mean=0.0, hold=0, lr=0.01, edit=None, weight_decay=0, **options):
    """What share of a layer's masked weights is left under gradients of this mean and noise; and what was said."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 100, bias=False)
    if edit is not None:
        edit(layer.weight.detach())
    rst = RSTScheduler(layer, sparsity=0.8, seed=0, steps=updates - hold, hold=hold, **options)
    optimizer = make_optimizer(layer.parameters(), lr=lr, weight_decay=weight_decay)
    pruned = ~rst.masks["weight"]
    towards = mean * torch.randn_like(layer.weight).sign()
    before = layer.weight.detach()[pruned].norm()
    caught = []
    for _ in range(updates):
        layer.weight.grad = (towards + noise * torch.randn_like(layer.weight)) * pruned  # what is kept does not run off
        optimizer.step()
        caught += warnings_of(rst)
    return float(layer.weight.detach()[pruned].norm() / before), caught


def warnings_of(rst):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        rst.step()
    return [(str(warning.message), warning.filename) for warning in found]


def number(message, before, after):
    return float(message.partition(before)[2].partition(after)[0])


@pytest.mark.parametrize("store_masks", [True, False])
@pytest.mark.parametrize("make_optimizer", ADAMS)
def test_says_what_no_penalty_of_adam_can_reach(make_optimizer, store_masks):
    """Weights up to 1/√80 = 0.11, and 0.05 to move."""
    options = {"max_penalty": 100.0, "lr": 0.001, "store_masks": store_masks}
    left, [(message, filename)] = shrunk_by(make_optimizer, 50, 1e-6, **options)
    assert "with lr=0.001, 45 more updates will leave" in message
    said = number(message, "will leave ", "%") / 100
    assert left == pytest.approx(said, abs=0.1)
    assert said == pytest.approx(((0.1118 - 0.05) / 0.1118) ** 1.5, abs=0.03)  # of evenly distributed weights
    assert filename == __file__
    times = number(message, "together ", " times")
    left, caught = shrunk_by(make_optimizer, round(50 * times), 1e-6, **options)
    assert caught == []
    assert left < 0.1


@pytest.mark.parametrize(
    ("gradients", "updates"), [({"noise": 0.1}, 500), ({"mean": 0.03, "lr": 1e-3}, 400)], ids=["random", "steady"]
)
@pytest.mark.parametrize("make_optimizer", ADAMS)
def test_says_where_adam_comes_to_rest(make_optimizer, gradients, updates):
    left, [(message, filename)] = shrunk_by(make_optimizer, updates, **gradients)
    assert "come to rest" in message
    assert "a penalty up to 1 " in message
    assert 0.75 * left < number(message, "at about ", "%") / 100 < left
    assert filename == __file__
    times = number(message, "Make max_penalty ", " times")
    left, caught = shrunk_by(make_optimizer, updates, **gradients, max_penalty=times)
    assert caught == []
    assert left < 0.1


def test_no_more_is_left_than_there_was():
    _, [(message, _)] = shrunk_by(torch.optim.Adam, 40, mean=0.03, lr=0.01, max_penalty=1e-3)
    assert number(message, "at about ", "%") <= 100 * 2**0.5


@pytest.mark.parametrize(
    ("updates", "options"),
    [
        (500, {"noise": 1e-3}),  # Adam's second moments hold the penalty's squares
        (2000, {"noise": 1e-4, "lr": 1e-3, "schedule": lambda progress: 1.0}),  # and those of weights that are gone
        (2000, {"noise": 1e-4, "lr": 1e-3, "hold": 1999}),
        (3000, {"noise": 0.03, "lr": 3e-4, "hold": 1000, "max_penalty": 0.4}),  # noise larger than the penalty ever is
    ],
    ids=["penalty", "from the start", "held from the start", "noise"],
)
def test_no_false_alarm(updates, options):
    left, caught = shrunk_by(torch.optim.Adam, updates, **options)
    assert caught == []
    assert left < 0.07


def test_weight_decay_in_the_gradients_is_none_of_the_loss():
    left, caught = shrunk_by(torch.optim.Adam, 200, 1e-4, lr=1e-3, weight_decay=0.05, max_penalty=0.1)
    assert caught == []
    assert left < 0.15


def test_outliers_are_what_is_out_of_reach():
    left, [(message, _)] = shrunk_by(torch.optim.Adam, 200, 1e-6, lr=1e-3, edit=lambda w: w[:2].mul_(10))
    assert left == pytest.approx(number(message, "will leave ", "%") / 100, abs=0.1)
    assert number(message, "together ", " times") == pytest.approx(10 * 0.1118 / 0.18, rel=0.1)


@pytest.mark.parametrize(
    ("updates", "options"),
    [(20, {"lr": 0.0}), (1, {}), (20, {"cycles": 10}), (20, {"cycles": 30}), (20, {"schedule": lambda progress: -1.0})],
    ids=["no rate", "one update", "ten cycles", "thirty cycles", "a penalty that pushes away"],
)
def test_where_there_is_nothing_to_say(updates, options):
    assert shrunk_by(torch.optim.Adam, updates, 1e-6, max_penalty=10.0, **{"lr": 0.01, **options})[1] == []


def small_ticket(steps=100, **options):
    layer = torch.nn.Linear(8, 8)
    return layer, RSTScheduler(layer, sparsity=0.5, seed=0, steps=steps, **options)


def advised(rst, layer, *optimizers, updates=60):
    caught = []
    for _ in range(updates):
        layer.weight.grad = torch.zeros_like(layer.weight)
        for optimizer in optimizers:
            optimizer.step()
        caught += warnings_of(rst)
    return caught


def test_a_rate_that_is_still_to_rise():
    layer, rst = small_ticket()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1e-6 * (update + 1))
    assert advised(rst, layer, optimizer, warm_up) == []


def test_a_rate_that_has_fallen_for_good():
    """torch's schedulers leave the one before it in the group."""
    layer, rst = small_ticket()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.01)
    optimizer.step()
    decay.step()
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    [(message, _)] = advised(rst, layer, optimizer)
    assert "with lr=0.001, momentum=0" in message


@pytest.mark.parametrize("named", [None, "0.1", [0.1, 0.2], math.nan])
@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_what_somebody_else_keeps_in_a_group(make_optimizer, named):
    layer, rst = small_ticket()
    optimizer = make_optimizer([{"params": layer.parameters(), "max_lr": named, "initial_lr": named}], lr=1e-6)
    rising = torch.optim.lr_scheduler.LambdaLR(make_optimizer([torch.zeros(1)]), lambda update: 1.0)
    rising.step = lambda: optimizer.param_groups[0].update(lr=optimizer.param_groups[0]["lr"] * 1.01)
    assert len(advised(rst, layer, optimizer, rising)) == 1


@pytest.mark.parametrize("change", ["state loaded", "another optimizer"])
def test_a_rate_that_rises_in_a_group_that_came_later(change):
    layer, rst = small_ticket()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, 1.0, 40)
    assert advised(rst, layer, optimizer, warm_up, updates=2) == []
    if change == "state loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, 1.0, 40)
    assert advised(rst, layer, optimizer, warm_up) == []


def test_updates_before_the_first_tick_are_no_measure():
    layer, rst = small_ticket()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(500):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    [(message, _)] = advised(rst, layer, optimizer)
    assert "100 updates will leave" in message


def test_an_optimizer_without_a_rate():
    class Signs(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            self.param_groups[0]["params"][0].mul_(0.9)

    layer, rst = small_ticket()
    assert advised(rst, layer, Signs(layer.parameters(), {})) == []
    assert rst.progress == 0.6


def test_a_restart_within_an_epoch_that_is_a_tick():
    """The one update that is left of it is not what the next ticks will have."""
    layer, rst = small_ticket()
    optimizer = torch.optim.SGD(layer.parameters(), lr=2e-2)

    def updates(scheduler, count, tick_every=10):
        caught = []
        for update in range(count):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            caught += warnings_of(scheduler) if update % tick_every == tick_every - 1 else []
        return caught

    assert updates(rst, 90) == []
    state = rst.state_dict()
    rst.remove()
    resumed = RSTScheduler(layer, sparsity=0.5, seed=0, steps=100)
    resumed.load_state_dict(state)
    assert updates(resumed, 1, tick_every=1) == []
    assert updates(resumed, 100) == []


def test_optimizers_that_carry_no_penalty_are_not_judged():
    layer, rst = small_ticket()
    old, new = (torch.optim.Adam(layer.parameters(), lr=lr) for lr in (1e-6, 0.1))
    assert advised(rst, layer, old, updates=3) == []
    assert advised(rst, layer, new) == []
    layer = torch.nn.Linear(8, 8)
    sgd, adam = torch.optim.SGD(layer.parameters(), lr=0.5), torch.optim.Adam(layer.parameters(), lr=1e-7)
    rst = RSTScheduler(layer, sparsity=0.5, seed=0, steps=100, optimizer=sgd)
    assert advised(rst, layer, adam, sgd) == []


def test_the_layers_count_by_their_size():
    """A small layer far out of reach says little of a large one within it."""
    torch.manual_seed(0)

    def said(sizes):
        model = torch.nn.Sequential(*[torch.nn.Linear(10, size, bias=False) for size in sizes])
        with torch.no_grad():
            model[0].weight.uniform_(-0.01, 0.01)
            model[1].weight.uniform_(-0.1, 0.1)
        rst = RSTScheduler(model, sparsity=0.5, seed=0, steps=100)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
        caught = []
        for _ in range(20):
            for layer in model:
                layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            caught += warnings_of(rst)
        return number(caught[0][0], "will leave ", "%")

    left = 0.5**1.5  # of the second layer: half of 0.1 is out of reach
    assert said([10, 100]) == pytest.approx(100 * left, abs=4)
    assert said([20000, 100]) == pytest.approx(100 * left * 3**-0.5, abs=4)  # it has a third of the squared norm


def test_all_optimizers_are_judged():
    model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Linear(40, 8))
    rst = RSTScheduler(model, sparsity=0.5, seed=0, steps=100)
    optimizers = [torch.optim.Adam(layer.parameters(), lr=lr) for layer, lr in zip(model, (1e-7, 0.1), strict=True)]
    caught = []
    for _ in range(12):
        for layer, optimizer in zip(model, optimizers, strict=True):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
        caught += warnings_of(rst)
    assert len(caught) == 1
    assert "with lr=1e-07" in caught[0][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(exp_avg_sq=torch.zeros(8, 1)),
        lambda state: state.pop("exp_avg_sq"),
        lambda state: state.pop("step"),
        lambda state: state.update(exp_avg=state["exp_avg"].to("meta")),
    ],
    ids=["smaller", "another", "no step", "elsewhere"],
)
def test_an_adam_with_a_state_of_its_own_is_not_judged(change):
    layer, rst = small_ticket()

    class Own(torch.optim.Adam):
        def step(self):
            super().step()
            change(self.state[layer.weight])

    optimizer = Own(layer.parameters(), lr=1e-6)
    caught = []
    for _ in range(11):
        optimizer.state.clear()
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        caught += warnings_of(rst)
    assert caught == []


def test_a_target_without_a_state_and_a_layer_that_is_a_long_row():
    """Only a part of large layers is looked at."""
    model = torch.nn.Sequential(torch.nn.Linear(200_000, 2, bias=False), torch.nn.Linear(2, 8, bias=False))
    rst = RSTScheduler(model, sparsity=0.5, seed=0, steps=100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-7)
    caught = []
    for _ in range(12):
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        optimizer.step()
        caught += warnings_of(rst)
    assert len(caught) == 1
    assert "will leave 99%" in caught[0][0] or "will leave 100%" in caught[0][0]


def test_half_precision():
    layer = torch.nn.Linear(80, 100, bias=False, dtype=torch.bfloat16)
    rst = RSTScheduler(layer, sparsity=0.5, seed=0, steps=100)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-4)
    [(message, _)] = advised(rst, layer, optimizer, updates=12)
    assert number(message, "will leave ", "%") == pytest.approx(100 * (1 - 0.02 / 0.1118) ** 1.5, abs=4)


def test_a_warning_that_is_an_error_comes_after_the_tick():
    layer, rst = small_ticket()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-7)
    raised = 0
    for _ in range(20):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                rst.step()
            except UserWarning:
                raised += 1
    assert raised == 1
    assert rst.progress == pytest.approx(0.2)


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


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_tick_for_several_updates(make_optimizer):
    """What a tenth of the updates could not do is done where ten of them share a tick."""

    def said(updates_per_tick, max_penalty):
        layer, rst = small_ticket(max_penalty=max_penalty)
        optimizer = make_optimizer(layer.parameters(), lr=2e-2 if make_optimizer is torch.optim.SGD else 1e-3)
        caught = []
        for update in range(60 * updates_per_tick):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            if update % updates_per_tick == updates_per_tick - 1:
                caught += warnings_of(rst)
        return [message for message, _ in caught]

    assert said(10, 1.0) == []
    assert len(said(1, 1.0)) == 1
    weak = said(10, 0.1)
    if make_optimizer is torch.optim.SGD:
        left = math.exp(-10 * 2e-2 * 0.1 * sum(range(1, 101)) / 100)
        assert f"1,000 updates will leave about {left:.0%}" in weak[0]


@pytest.mark.parametrize(("make_optimizer", "highest"), [(torch.optim.SGD, 0.2), (torch.optim.Adam, 0.02)])
def test_a_rate_that_rises_for_longer_than_a_tenth(make_optimizer, highest):
    layer, rst = small_ticket()
    optimizer = make_optimizer(layer.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=300, cycle_momentum=False)
    caught = []
    for _ in range(60):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        schedule.step()
        caught += warnings_of(rst)
    assert caught == []


def test_a_finalize_that_does_not_come():
    """A loop in which it was forgotten would end with a dense network."""
    _, _, caught = train(360, steps=120, optimizer_options={"lr": 1.0})
    [(tick, message, filename)] = caught
    assert tick == 240
    assert "has been over for 120 ticks, and nothing is masked yet: call rst.finalize()" in message
    assert filename == __file__
    assert train(109, steps=10, optimizer_options={"lr": 1.0})[2] == []
    assert len(train(110, steps=10, optimizer_options={"lr": 1.0})[2]) == 1

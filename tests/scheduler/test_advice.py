"""Early warnings: a penalty that cannot do its work, and a finalize() that does not come."""

import copy
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from device_tape import NoReading
from models import loss_of, make, mlp

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors.async_scalar import AsyncScalar

ADAMS = [torch.optim.Adam, torch.optim.AdamW]


def ticket(layer=None, steps=100, **options):
    layer = torch.nn.Linear(8, 8) if layer is None else layer
    return layer, RSTScheduler(layer, **{"sparsity": 0.5, "seed": 0, "steps": steps, **options})


def warnings_of(rst):
    """What one scheduler step warns of: messages, with the files that they point to."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        rst.step()
    return [(str(warning.message), warning.filename) for warning in found]


def advised(rst, model, *optimizers, updates=60, updates_per_step=1):
    """The messages of a training whose loss has no gradient: only the penalty moves weights."""
    caught = []
    for update in range(1, updates + 1):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        caught += warnings_of(rst) if update % updates_per_step == 0 else []
    assert all(filename == __file__ for _, filename in caught)
    return [message for message, _ in caught]


def number(message, before, after):
    return float(message.partition(before)[2].partition(after)[0])


# ---------------------------------------------------------------------- SGD


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.05},
    ],
    ids=str,
)
def test_predicts_what_sgd_leaves(options):
    """In the worst case: that the kept weights grow twofold."""

    def shrunk(max_penalty):
        torch.manual_seed(0)
        layer, rst = ticket(torch.nn.Linear(20, 20, bias=False).double(), 150, hold=50, max_penalty=max_penalty)
        messages = advised(rst, layer, SGD(layer.parameters(), lr=0.01, **options), updates=200)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return rst.finalize().total, messages

    weak = 0.2 if "momentum" in options else 1.0
    total, [message] = shrunk(weak)
    assert "with lr=0.01, 180 more updates will leave the masked weights at least" in message
    least = total.masked_norm / math.hypot(total.masked_norm, 2 * total.kept_norm)
    assert number(message, "at least ", "%") / 100 == pytest.approx(least, rel=0.2, abs=0.015)
    assert shrunk(10 * weak)[1] == []


@pytest.mark.parametrize(
    ("options", "max_penalty", "limit"),
    [
        ({}, 36.0, None),
        ({}, 40.0, "3.8 with this SGD, and is 4"),
        ({"nesterov": True}, 13.0, None),
        ({"nesterov": True}, 14.2, "1.35714"),
        ({"dampening": 0.5}, 74.0, None),
        ({"dampening": 0.5}, 78.0, "7.6"),
        ({"momentum": 0.0, "dampening": 0.5}, 19.0, None),
        ({"momentum": 0.0, "dampening": 0.5}, 21.0, "2 with"),
    ],
)
def test_the_limit_is_where_sgd_diverges(options, max_penalty, limit):
    layer, rst = ticket(torch.nn.Linear(20, 20, bias=False).double(), 1, hold=400, max_penalty=max_penalty)
    optimizer = torch.optim.SGD(layer.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})
    messages = advised(rst, layer, optimizer, updates=400)
    largest = float(layer.weight.detach()[~rst.masks["weight"]].abs().max())
    assert (largest > 1e3) == (limit is not None)
    said = f"will diverge, unless lr falls in time: lr times max_penalty must stay below {limit}"
    assert [said in message for message in messages] == [True] * (limit is not None)


@pytest.mark.parametrize(
    ("steps", "hold", "max_penalty", "options"),
    [(4, 0, 1.0, {"lr": 1.0}), (1, 149, 1.0, {"lr": 0.0025, "momentum": 0.9})],
    ids=["large steps", "critical damping"],
)
def test_the_factor_of_sgd_is_exact(steps, hold, max_penalty, options):
    """1 - lr·λ is less than exp(-lr·λ), and momentum adds to that."""
    layer, rst = ticket(steps=steps, hold=hold, max_penalty=max_penalty)
    assert advised(rst, layer, SGD(layer.parameters(), **options), updates=steps + hold) == []
    assert rst.finalize().total.residual < 0.01


def rising(times, schedule=None, **options):
    """What is said where lr·λ rises to so many times the limit; what finalize() says, and the residual then."""
    torch.manual_seed(0)
    layer, rst = ticket(torch.nn.Linear(20, 20, bias=False).double(), max_penalty=times * 20.0, **options)
    optimizer = SGD(layer.parameters(), lr=0.1)
    rates, early = schedule(optimizer) if schedule else None, []
    while not rst.done:
        layer.weight.grad = 1e-3 * torch.randn_like(layer.weight)
        optimizer.step()
        early += [message for message, _ in warnings_of(rst)]
        if rates:
            rates.step()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        residual = rst.finalize().total.residual
    return early, [str(warning.message) for warning in found], residual


def test_it_is_what_all_steps_do_that_diverges():
    """λ passes the limit in the last steps, when next to nothing is left to grow; earlier; very early."""
    early, late, residual = rising(1.02)
    assert (early, late) == ([], [])
    assert residual < 0.01
    early, [late], residual = rising(1.4)
    assert early == []
    assert "Lower max_penalty or lr (lr times max_penalty must stay below 2 with this SGD)" in late
    assert residual > 0.99
    [early], _, _ = rising(2.0)
    assert "will diverge" in early
    [early], _, residual = rising(3.0)
    assert (
        "will diverge, unless lr falls in time: lr times max_penalty must stay below 2 with this SGD, and is 6" in early
    )
    assert residual > 0.99


def test_a_scheduler_of_torch_may_lower_lr_in_time():
    """Unless there is nothing left to save."""
    drop = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 25)  # noqa: E731
    early, _, residual = rising(3.0, drop)
    assert early == []
    assert residual < 0.01
    [early], _, _ = rising(3.0, drop, steps=4, hold=196)
    assert "will diverge" in early


def test_a_rate_that_falls_already_may_fall_in_time():
    layer, rst = ticket(max_penalty=30.0)
    optimizer = SGD(layer.parameters(), lr=0.1)
    rates, messages = RATES.CosineAnnealingLR(optimizer, 100), []
    for _ in range(100):
        messages += advised(rst, layer, optimizer, updates=1)
        rates.step()
    assert messages == []
    assert rst.finalize().total.residual < 0.01


# ---------------------------------------------------------------------- Adam


def shrunk_by_adam(make_optimizer, updates, *, edit=None, **options):
    """What share of a layer's masked weights is left of those that it has when the warning comes; and the messages."""
    torch.manual_seed(0)
    layer, rst = ticket(torch.nn.Linear(80, 100, bias=False), updates, max_penalty=100.0, **options)
    if edit is not None:
        edit(layer.weight.detach())
    optimizer = make_optimizer(layer.parameters(), lr=0.001)
    pruned = ~rst.masks["weight"]
    messages = advised(rst, layer, optimizer, updates=updates // 10)
    before = layer.weight.detach()[pruned].norm()
    messages += advised(rst, layer, optimizer, updates=updates - updates // 10)
    return float(layer.weight.detach()[pruned].norm() / before), messages


@pytest.mark.parametrize("store_masks", [True, False])
@pytest.mark.parametrize("make_optimizer", ADAMS)
def test_says_where_no_penalty_of_adam_can_reach(make_optimizer, store_masks):
    """Weights up to 1/√80 = 0.112, and at first 0.05 to move, then 0.15."""
    left, [message] = shrunk_by_adam(make_optimizer, 50, store_masks=store_masks)
    assert "with lr=0.001, 45 more updates will leave the masked weights at least" in message
    assert "raise steps, hold or lr" in message
    assert 0.1 < number(message, "at least ", "%") / 100 < left
    left, messages = shrunk_by_adam(make_optimizer, 150)
    assert messages == []
    assert left < 0.1


def test_it_is_the_masked_weights_that_count():
    """Here the kept ones are far out of reach."""

    def enlarge_kept(weight):
        weight[ticket(torch.nn.Linear(80, 100, bias=False))[1].masks["weight"]] *= 100

    assert shrunk_by_adam(torch.optim.Adam, 150, edit=enlarge_kept)[1] == []


def test_outliers_count():
    left, [message] = shrunk_by_adam(torch.optim.Adam, 200, edit=lambda weight: weight[:2].mul_(10))
    assert 0.1 < number(message, "at least ", "%") / 100 < left


def test_half_precision():
    layer, rst = ticket(torch.nn.Linear(80, 100, bias=False, dtype=torch.bfloat16))
    [message] = advised(rst, layer, torch.optim.Adam(layer.parameters(), lr=2e-4), updates=12)
    assert 30 < number(message, "at least ", "%") < 45  # of half of the weights, where the others may grow twofold


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights():
    model = torch.nn.Sequential(torch.nn.Linear(0, 4), torch.nn.Linear(4, 8))
    rst = RSTScheduler(model, sparsity=0.5, seed=0, steps=100)
    assert len(advised(rst, model, torch.optim.Adam(model.parameters(), lr=1e-7), updates=12)) == 1


def test_layers_without_updates_and_scalars():
    model = torch.nn.Sequential(torch.nn.Linear(200, 2, bias=False), torch.nn.Linear(2, 8, bias=False))
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match="rounds to all 1 units of scale"):
        rst = RSTScheduler(model, sparsity=0.9, seed=0, steps=50, targets=((torch.nn.Module, "[ws]*"),))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-7)
    messages = []
    for _ in range(12):
        model[0].weight.grad, model.scale.grad = torch.zeros_like(model[0].weight), torch.zeros(())
        optimizer.step()
        messages += warnings_of(rst)
    [(message, _)] = messages
    assert number(message, "at least ", "%") > 50


# ---------------------------------------------------------------------- all that stands in the way


def _by_hand(optimizer, updates=30):
    """A warm-up that leaves no trace in the groups."""
    [group] = optimizer.param_groups
    high, group["lr"] = group["lr"], group["lr"] / updates

    class Rates:
        def step(self):
            group["lr"] = min(high, group["lr"] + high / updates)

    return Rates()


RATES = torch.optim.lr_scheduler


def trained(make_optimizer, *, loss_scale=1.0, schedule=None, updates=80, **options):
    """What is said in a training with a loss, and at its end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    rst = RSTScheduler(model, sparsity=0.9, seed=0, steps=updates * 3 // 4, hold=updates // 4, **options)
    optimizer = make_optimizer(model.parameters())
    rates = schedule(optimizer) if schedule else None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(updates):
            x = torch.randn(64, 32)
            optimizer.zero_grad()
            (loss_scale * torch.nn.functional.mse_loss(model(x), x.sin())).backward()
            optimizer.step()
            rst.step()
            if rates:
                rates.step()
        report = rst.finalize()
    return [str(warning.message) for warning in found], report.total.residual


def test_adam_on_a_loss_that_is_a_sum_names_the_penalty_and_that_helps():
    """And not the time, of which there is enough."""
    [late], before = trained(lambda p: Adam(p, lr=3e-3), loss_scale=2048.0)
    assert "The loss's gradients were larger than the penalty: raise max_penalty" in late
    assert "steps" not in late
    _, after = trained(lambda p: Adam(p, lr=3e-3), loss_scale=2048.0, max_penalty=1000.0)
    assert after < before / 3


def test_all_that_stands_in_the_way_is_in_one_message():
    schedule = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)  # noqa: E731
    late = trained(lambda p: Adam(p, lr=3e-3), loss_scale=2048.0, schedule=schedule)[0][-1]
    assert "transform for longer, or while lr is high. The loss's gradients were larger than the penalty" in late


@pytest.mark.parametrize("make_optimizer", [lambda p: Adam(p, lr=3e-3), lambda p: torch.optim.AdamW(p, lr=3e-3)])
def test_a_loss_that_is_a_mean_is_no_obstacle(make_optimizer):
    messages, residual = trained(make_optimizer)
    assert not any("make max_penalty" in message for message in messages)
    assert residual < 0.05


@pytest.mark.parametrize("max_penalty", [1.0, 10.0, 100.0])
@pytest.mark.parametrize(
    ("schedule", "is_foreseen"),
    [
        (lambda o: RATES.OneCycleLR(o, 2e-3, total_steps=400), True),
        (lambda o: RATES.LambdaLR(o, lambda update: min(1.0, (update + 1) / 120)), True),
        (lambda o: _by_hand(o, 120), False),
    ],
    ids=["OneCycle", "LambdaLR", "manual"],
)
def test_a_warm_up_that_lasts_longer_than_the_transformation_is_named_by_its_lever(schedule, is_foreseen, max_penalty):
    """No weight gets there, whatever the penalty. It is foreseen where the optimizer's groups say how far lr rises."""
    messages, residual = trained(
        lambda p: torch.optim.AdamW(p, lr=2e-3), schedule=schedule, updates=100, max_penalty=max_penalty
    )
    assert residual > 0.3
    assert ["with lr=0.002, 80 more updates will leave" in message for message in messages[:-1]] == [True] * is_foreseen
    assert all("whatever the penalty: raise steps, hold or lr" in message for message in messages)


@pytest.mark.parametrize("make_optimizer", [lambda p: SGD(p, lr=0.5), lambda p: Adam(p, lr=2e-3)], ids=["SGD", "Adam"])
def test_a_rate_that_has_fallen_is_named_as_the_lever(make_optimizer):
    schedule = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # noqa: E731
    messages, _ = trained(make_optimizer, schedule=schedule)
    assert "transform for longer, or while lr is high" in messages[-1]


@pytest.mark.parametrize("early", [True, False])
def test_it_is_said_how_far_max_penalty_and_lr_can_be_raised_with_sgd(early):
    layer, rst = ticket(max_penalty=5.0, steps=20)
    optimizer = SGD(layer.parameters(), lr=0.02)
    messages = advised(rst, layer, optimizer, updates=20)
    if not early:
        with pytest.warns(UserWarning, match="Transform for longer, or with a higher") as found:
            rst.finalize()
        messages = [str(found[0].message)]
    assert "max_penalty or lr" in messages[0]
    assert "lr times max_penalty must stay below 2 with this SGD" in messages[0]


@pytest.mark.parametrize(
    ("settings", "max_penalty", "updates", "is_limited"),
    [
        ({"momentum": 0.9}, 1.0, 20, True),
        ({"momentum": 0.9}, 0.1, 20, False),  # the ramp reaches full speed late: a higher one helps
        ({"momentum": 0.9}, 0.3, 5, False),  # weights have just begun to swing: a higher one hurries them
        ({"momentum": 0.9, "nesterov": True}, 1.0, 20, False),
        ({"momentum": 0.9, "dampening": 0.9}, 1.0, 20, False),  # of which a tenth arrives
        ({"momentum": 0.1}, 1.0, 20, False),
    ],
)
def test_momentum_that_shrinks_no_faster_is_named_and_time_helps(settings, max_penalty, updates, is_limited):
    def make_optimizer(parameters):
        return SGD(parameters, lr=0.1, **settings)

    messages, residual = trained(make_optimizer, updates=updates, max_penalty=max_penalty)
    said = "Transform for longer: an update leaves 0.949 of a weight, whatever the penalty" in messages[-1]
    assert said == is_limited
    _, of_more_time = trained(make_optimizer, updates=100, max_penalty=max_penalty)
    _, of_more_penalty = trained(make_optimizer, updates=updates, max_penalty=3 * max_penalty)
    assert of_more_time < residual / 2
    assert (of_more_penalty > residual) == is_limited


@pytest.mark.parametrize(("steps", "warns"), [(30, True), (46, False)])
def test_the_threshold_is_that_of_finalize(steps, warns):
    """exp(-0.2 · steps / 2) is 1 % after 46 steps, and half of that where the kept weights grow twofold."""
    layer, rst = ticket(steps=steps)
    assert len(advised(rst, layer, SGD(layer.parameters(), lr=0.2), updates=steps)) == warns


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        lambda o: RATES.CosineAnnealingLR(o, 60),
        lambda o: RATES.CosineAnnealingWarmRestarts(o, 15),
        lambda o: RATES.OneCycleLR(o, o.param_groups[0]["lr"], total_steps=200, cycle_momentum=False),
        lambda o: RATES.LambdaLR(o, lambda update: min(1.0, (update + 1) / 30)),
        _by_hand,
    ],
    ids=["constant", "cosine", "restarts", "OneCycle", "warm-up", "manual"],
)
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p, scale: SGD(p, lr=0.1 * scale),
        lambda p, scale: SGD(p, lr=0.02 * scale, momentum=0.9, weight_decay=1e-3),
        lambda p, scale: SGD(p, lr=0.02 * scale, momentum=0.9, nesterov=True),
        lambda p, scale: Adam(p, lr=4e-3 * scale),
        lambda p, scale: torch.optim.AdamW(p, lr=4e-3 * scale, weight_decay=0.1),
    ],
    ids=["SGD", "momentum", "nesterov", "Adam", "AdamW"],
)
def test_no_early_word_is_false(make_optimizer, schedule):
    early_words = 0
    for scale, max_penalty in ((0.1, 1.0), (0.5, 3.0), (1.0, 1.0), (2.0, 3.0)):
        messages, residual = trained(
            lambda p, scale=scale: make_optimizer(p, scale), schedule=schedule, updates=60, max_penalty=max_penalty
        )
        early = [message for message in messages if "more updates" in message or "will diverge" in message]
        early_words += len(early)
        assert len(messages) - len(early) == (residual > 0.01)  # what finalize() says
        assert residual > 0.01 or not early
    assert early_words or schedule is not None


# ---------------------------------------------------------------------- silence where it is not sure


class Custom(torch.optim.SGD):
    """A subclass may update in another way."""


class CustomAdam(torch.optim.Adam):
    """A subclass may update in another way."""


class Signs(torch.optim.Optimizer):
    """It has no learning rate."""

    @torch.no_grad()
    def step(self):
        self.param_groups[0]["params"][0].mul_(0.9)


SGD, Adam = torch.optim.SGD, torch.optim.Adam


@pytest.mark.parametrize(
    ("make_optimizer", "settings", "options"),
    [
        (SGD, {"lr": 0.2, "momentum": 0.9}, {}),
        (Adam, {"lr": 0.01}, {}),
        (SGD, {"lr": torch.tensor(1e-6)}, {}),
        (Adam, {"lr": torch.tensor(1e-6)}, {}),
        (Custom, {"lr": 1e-6}, {}),
        (CustomAdam, {"lr": 1e-6}, {}),
        (torch.optim.Adamax, {"lr": 1e-6}, {}),
        (Signs, {"defaults": {}}, {}),
        (SGD, {"lr": 1e-6, "momentum": 1.0}, {}),
        (SGD, {"lr": 0.0}, {}),
        (Adam, {"lr": 0.0}, {}),
        (SGD, {"lr": math.nan}, {}),
        (SGD, {"lr": 0.1}, {"max_penalty": 0.0}),
        (Adam, {"lr": 1e-6}, {"max_penalty": 0.0}),
        (Adam, {"lr": 1e-6}, {"schedule": lambda progress: -1.0}),
        (Adam, {"lr": 1e-6}, {"steps": 1}),
        (Adam, {"lr": 1e-6}, {"steps": 2}),
    ],
)
def test_is_silent(make_optimizer, settings, options):
    layer, rst = ticket(**options)
    assert advised(rst, layer, make_optimizer(layer.parameters(), **settings)) == []
    assert rst.progress > 0.5


@pytest.mark.parametrize("make_optimizer", [SGD, Adam])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1e-6 * (update + 1)),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=300, cycle_momentum=False),
    ],
    ids=["LambdaLR", "OneCycleLR"],
)
def test_is_silent_during_a_warm_up(make_optimizer, schedule):
    layer, rst = ticket()
    optimizer = make_optimizer(layer.parameters(), lr=0.2)
    assert advised(rst, layer, optimizer, schedule(optimizer)) == []


@pytest.mark.parametrize("named", [None, "0.1", [0.1, 0.2], math.nan, math.inf])
def test_what_others_keep_in_a_group_does_not_matter(named):
    layer, rst = ticket()
    groups = [{"params": layer.parameters(), "max_lr": named, "initial_lr": named}]
    [message] = advised(rst, layer, SGD(groups, lr=1e-6))
    assert "with lr=1e-06" in message


def test_optimizers_that_do_not_apply_the_penalty_are_not_judged():
    layer, rst = ticket()
    old, new = (Adam(layer.parameters(), lr=lr) for lr in (1e-6, 0.1))
    assert advised(rst, layer, old, updates=3) == []
    assert advised(rst, layer, new) == []
    layer = torch.nn.Linear(8, 8)
    sgd, adam = SGD(layer.parameters(), lr=0.5), Adam(layer.parameters(), lr=1e-7)
    assert advised(ticket(layer, optimizer=sgd)[1], layer, adam, sgd) == []


# ---------------------------------------------------------------------- when it speaks


def test_speaks_once_after_a_tenth_also_after_a_restart():
    layer, rst = ticket()
    optimizer = SGD(layer.parameters(), lr=0.001)
    assert advised(rst, layer, optimizer, updates=9) == []
    assert len(advised(rst, layer, optimizer, updates=1)) == 1
    assert advised(rst, layer, optimizer, updates=5) == []
    state = rst.state_dict()
    rst.remove()
    _, resumed = ticket(layer)
    resumed.load_state_dict(state)
    assert advised(resumed, layer, optimizer, updates=50) == []


@pytest.mark.parametrize(("make_optimizer", "lr"), [(SGD, 2e-2), (Adam, 1e-3)])
def test_a_scheduler_step_for_several_updates(make_optimizer, lr):
    """What is too little with one update for each scheduler step is enough with ten."""

    def said(updates_per_step, max_penalty):
        torch.manual_seed(0)
        layer, rst = ticket(max_penalty=max_penalty)
        optimizer = make_optimizer(layer.parameters(), lr=lr)
        return advised(rst, layer, optimizer, updates=60 * updates_per_step, updates_per_step=updates_per_step)

    assert said(10, 1.0) == []
    assert len(said(1, 1.0)) == 1


def test_a_restart_within_an_epoch_that_is_a_scheduler_step():
    """The one update that is left of the epoch says nothing of the next epochs."""
    layer, rst = ticket()
    optimizer = SGD(layer.parameters(), lr=2e-2)
    assert advised(rst, layer, optimizer, updates=90, updates_per_step=10) == []
    state = rst.state_dict()
    rst.remove()
    _, resumed = ticket(layer)
    resumed.load_state_dict(state)
    assert advised(resumed, layer, optimizer, updates=1) == []
    assert advised(resumed, layer, optimizer, updates=100, updates_per_step=10) == []


def test_of_two_optimizers_nothing_is_said_early():
    """What each leaves says little of the whole."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Linear(40, 8))
    rst = RSTScheduler(model, sparsity=0.5, seed=0, steps=100)
    optimizers = [Adam(layer.parameters(), lr=lr) for layer, lr in zip(model, (0.1, 1e-7), strict=True)]
    assert advised(rst, model, *optimizers, updates=12) == []


@pytest.mark.parametrize("make_optimizer", [SGD, Adam])
def test_a_warning_that_is_an_error_comes_after_the_scheduler_step(make_optimizer):
    layer, rst = ticket()
    optimizer = make_optimizer(layer.parameters(), lr=1e-7)
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


def test_never_waits_for_the_weights_of_adam(monkeypatch):
    """It speaks when they have arrived."""
    arrived, spoke_at = [], []
    monkeypatch.setattr(AsyncScalar, "has_arrived", lambda self: bool(arrived))
    layer, rst = ticket(steps=40)
    optimizer = Adam(layer.parameters(), lr=1e-5)
    for step in range(1, 8):
        layer.weight.grad = torch.zeros_like(layer.weight)
        if step == 6:
            arrived.append(True)
        optimizer.step()
        with NoReading() if step == 4 else nullcontext():
            spoke_at += [step] * len(warnings_of(rst))
    assert spoke_at == [6]


def test_a_copy_of_a_scheduler_does_not_await_weights(monkeypatch):
    monkeypatch.setattr(AsyncScalar, "has_arrived", lambda self: False)
    layer, rst = ticket()
    advised(rst, layer, Adam(layer.parameters()), updates=20)
    assert rst._advice._squares
    assert not copy.deepcopy(rst)._advice._squares
    assert not pickle.loads(pickle.dumps(rst._advice.__getstate__()))["_squares"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_reading_from_a_gpu():
    reading = AsyncScalar(torch.arange(3.0, device="cuda"))
    torch.cuda.synchronize()
    assert reading.has_arrived()
    assert reading.values.tolist() == [0, 1, 2]


def test_a_reading_has_the_values_of_the_moment_when_it_was_made():
    numbers = torch.zeros(2)
    reading = AsyncScalar(numbers)
    numbers += 1
    assert reading.values.tolist() == [0, 0]


# ---------------------------------------------------------------------- a finalize() that does not come


@pytest.mark.parametrize(("steps", "speaks_at"), [(120, 240), (10, 110)])
def test_a_missing_finalize_is_noticed(steps, speaks_at):
    """A loop without it would end with a dense network."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, seed=0, steps=steps)
    optimizer = SGD(model.parameters(), lr=1.0)
    caught = {}
    for step in range(1, speaks_at + 120):
        optimizer.zero_grad()
        loss_of(model, step, (12,)).backward()
        optimizer.step()
        if found := warnings_of(rst):
            caught[step] = found
    [(message, filename)] = caught.pop(speaks_at)
    assert f"has been over for {speaks_at - steps} steps, and nothing is masked yet: call rst.finalize()" in message
    assert filename == __file__
    assert not caught

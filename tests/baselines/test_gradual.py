"""Masks that are chosen little by little: the life of an explicit loop that chooses them, and restarts anywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from models import INPUT_SHAPES, assert_same, cnn, finalize_quietly, loss_of, make, mlp, twins
from reference import ExplicitLoop
from test_baselines import smallest_manually, targets_of
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import GradualPruning, magnitude_masks
from torch_dual_ticket.export import save_ticket
from torch_dual_ticket.report import History, summary

STEPS, HOLD, INTERVALS = 20, 4, 5
ENDS = {3: 1, 5: 2, 8: 3, 10: 4, 12: 5}  # scheduler step -> interval: the mask grows over the first 12 steps


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, pruning, updates, optimizer=None, shape=(12,), first=0):
    optimizer = optimizer or sgd(model)
    for index in range(first, first + updates):
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()
        pruning.step()
        if pruning.done:
            finalize_quietly(pruning)


def chosen_manually(model, masks, sparsity, distribution, interval):
    weights = {name: dict(model.named_parameters())[name].detach() for name in masks}
    share = 1 - (1 - interval / INTERVALS) ** 3
    if distribution == "global":
        count = round(share * round(sparsity * sum(mask.numel() for mask in masks.values())))
        return smallest_manually(weights, masks, count)
    return {
        name: smallest_manually({name: weights[name]}, {name: mask}, round(share * round(sparsity * mask.numel())))[
            name
        ]
        for name, mask in masks.items()
    }


@pytest.mark.parametrize("max_penalty", [4.0, 0.0])
@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_agrees_with_an_explicit_loop_that_chooses_the_masks(build, distribution, max_penalty):
    """Transformed: nothing is zero before the end. Without a penalty: gradual magnitude pruning, in force at once."""
    model, other = twins(build)
    shape = INPUT_SHAPES[build]
    options = {"hold": HOLD, "max_penalty": max_penalty, "intervals": INTERVALS, "distribution": distribution}
    pruning = GradualPruning(model, 0.8, STEPS, **options)
    optimizer, other_optimizer = sgd(model), sgd(other)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in targets_of(other).items()}
    loop = ExplicitLoop(other, masks, steps=STEPS, max_penalty=max_penalty)
    named = dict(other.named_parameters())
    for update in range(1, 31):
        train(model, pruning, 1, optimizer, shape, first=update)
        other_optimizer.zero_grad()
        loss_of(other, update, shape).backward()
        loop.before_update()
        other_optimizer.step()
        loop.after_update()
        if interval := ENDS.get(update):
            masks = chosen_manually(other, masks, 0.8, distribution, interval)
            loop.targets = [(named[name], mask) for name, mask in masks.items()]
        if update == STEPS + HOLD or (update in ENDS and not max_penalty):
            loop.finalize()
        assert all(torch.equal(pruning.masks[name], mask) for name, mask in masks.items()), update
        assert (pruning.phase == "transform") == (update < STEPS + HOLD and max_penalty > 0)
    assert pruning.sparsity == pytest.approx(0.8, abs=0.01)
    assert_same(model, other)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_erk_and_counts_by_name_are_those_of_one_shot_pruning():
    for options in ({"sparsity": 0.8, "distribution": "erk"}, {"sparsity": {"0": 0.5, "4": 0.9}}):
        model = make(mlp)
        pruning = GradualPruning(model, steps=5, intervals=3, **options)
        expected = magnitude_masks(model, **options)
        train(model, pruning, 5)
        assert {name: int(mask.sum()) for name, mask in pruning.masks.items()} == {
            name: int(mask.sum()) for name, mask in expected.items()
        }


@pytest.mark.parametrize("intervals", [1, 4, 50])
def test_two_of_four_is_complete_at_the_end_and_nested_before(intervals):
    model = make(mlp)
    pruning = GradualPruning(model, None, 10, pattern="2:4", intervals=intervals, exclude=["4"])
    optimizer = sgd(model)
    before, levels = {}, []
    for index in range(10):
        train(model, pruning, 1, optimizer, first=index)
        for name, mask in pruning.masks.items():
            assert not (mask & ~before.get(name, mask)).any()
            assert (mask.view(-1, 4).sum(1) >= 2).all()
        before, levels = dict(pruning.masks), [*levels, pruning.sparsity]
    assert levels[-1] == levels[5] == 0.5
    assert len(set(levels)) == min(intervals, 6) + (intervals < 6)


@pytest.mark.parametrize("max_penalty", [0, 1.0])
def test_filters_are_chosen_whole(max_penalty):
    """By the sums of their magnitudes at that time, and what was chosen stays so."""
    model = make(mlp)
    pruning = GradualPruning(model, 0.5, 10, pattern="filter", intervals=4, max_penalty=max_penalty, exclude=["4"])
    optimizer = sgd(model)
    for index in range(10):
        before = dict(pruning.masks)
        train(model, pruning, 1, optimizer, first=index)
        for name, mask in pruning.masks.items():
            kept, earlier = mask.all(1), before[name].all(1)
            assert torch.equal(kept, mask.any(1))
            assert not (kept & ~earlier).any()
            sums = model.get_parameter(name).detach().abs().sum(1)
            if not torch.equal(kept, earlier) and max_penalty:  # else they are zero already
                assert sums[kept].min() >= sums[earlier & ~kept].max()
    pruning.finalize()
    assert [float(mask.float().mean()) for mask in pruning.masks.values()] == [0.5, 0.5]


@pytest.mark.filterwarnings("ignore:80.00 % of the weights to prune were exactly zero")  # of the first pruning
def test_scores_are_asked_for_each_time():
    """Movement: what training makes smaller goes first."""
    model = make(mlp)
    origin = copy.deepcopy(targets_of(model))
    asked = []

    def movement(given):
        asked.append(given)
        return {name: weight.abs() - origin[name].abs() for name, weight in targets_of(given).items()}

    pruning = GradualPruning(model, 0.8, 10, intervals=3, max_penalty=0, scores=movement)
    train(model, pruning, 2)
    assert asked == [model]
    first = targets_of(model)
    train(model, pruning, 12, first=2)
    assert asked == [model] * 3
    assert pruning.sparsity == pytest.approx(0.8, abs=0.01)
    assert first.keys() == pruning.masks.keys()

    fixed = {name: torch.rand_like(weight) for name, weight in targets_of(model).items()}
    pruning.remove()
    pruning = GradualPruning(model, 0.5, 3, scores=fixed)
    expected = magnitude_masks(model, 0.5, scores=fixed)
    train(model, pruning, 3)
    assert all(torch.equal(pruning.masks[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_what_is_chosen_stays_chosen_whatever_the_scores_say_later(distribution):
    model = make(mlp)
    options = {"intervals": 5, "distribution": distribution}
    pruning = GradualPruning(
        model, 0.8, 10, scores=lambda model: {n: -torch.rand_like(w) for n, w in targets_of(model).items()}, **options
    )
    optimizer, before = sgd(model), {}
    for index in range(8):
        train(model, pruning, 1, optimizer, first=index)
        assert not any((mask & ~before.get(name, mask)).any() for name, mask in pruning.masks.items())
        before = dict(pruning.masks)
    assert pruning.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("max_penalty", [4.0, 0.0])
@pytest.mark.parametrize("stop", [0, 2, 3, 7, 12, 20, 24, 27])
def test_a_restart_at_any_time(stop, max_penalty):
    options = {"hold": HOLD, "max_penalty": max_penalty, "intervals": INTERVALS}
    model, other = twins(mlp)
    pruning, optimizer = GradualPruning(model, 0.8, STEPS, **options), sgd(model)
    train(model, pruning, stop, optimizer)
    saved = copy.deepcopy([thing.state_dict() for thing in (pruning, model, optimizer)])

    again, other_optimizer = GradualPruning(other, 0.8, STEPS, **options), sgd(other)
    train(other, again, 5, other_optimizer)  # it may have gone another way before
    for thing, state in zip((again, other, other_optimizer), saved, strict=True):
        thing.load_state_dict(state)
    assert (again.progress, again.phase, again.sparsity) == (pruning.progress, pruning.phase, pruning.sparsity)
    for trained, its, its_optimizer in ((model, pruning, optimizer), (other, again, other_optimizer)):
        train(trained, its, 30 - stop, its_optimizer, first=stop)
    assert_same(model, other, tolerance=0)
    assert str(pruning.finalize()) == str(again.finalize()) != ""
    assert len(again.finalize().layers) == 3


def test_states_of_others_are_refused():
    model = make(mlp)
    pruning = GradualPruning(model, 0.8, 10)
    with pytest.raises(ValueError, match=r"not a state_dict\(\) of GradualPruning"):
        pruning.load_state_dict(RSTScheduler(make(mlp), 0.5).state_dict())
    with pytest.raises(ValueError, match=r"'4\.weight': a mask is missing"):
        pruning.load_state_dict(GradualPruning(make(mlp), 0.8, 10, exclude=["4"]).state_dict())
    with pytest.raises(RuntimeError, match="chooses its masks"):
        pruning.set_masks(dict(pruning.masks))


@pytest.mark.parametrize(("max_penalty", "other"), [(4.0, 0.0), (0.0, 4.0)])
def test_a_state_of_the_other_kind_is_refused_until_it_is_finalized(max_penalty, other):
    model, pruning = make(mlp), GradualPruning(make(mlp), 0.8, 10, max_penalty=other)
    saved = GradualPruning(model, 0.8, 10, max_penalty=max_penalty)
    before = (pruning.phase, repr(pruning))
    with pytest.raises(ValueError, match=f"max_penalty is {'positive' if other else '0,'}.*in the state it is"):
        pruning.load_state_dict(saved.state_dict())
    assert (pruning.phase, repr(pruning)) == before
    train(model, saved, 10)
    saved.finalize()
    pruning.load_state_dict(saved.state_dict())
    assert (pruning.phase, pruning.sparsity) == ("finetune", saved.sparsity)


@pytest.mark.parametrize("max_penalty", [4.0, 0.0])
def test_an_early_end_warns_and_has_the_final_sparsity(max_penalty):
    model = make(mlp)
    pruning = GradualPruning(model, 0.8, 20, intervals=5, max_penalty=max_penalty)
    train(model, pruning, 4)
    assert pruning.sparsity < 0.5
    with pytest.warns(UserWarning, match=r"after 1 of 5 intervals|masked weights still held") as told:
        report = pruning.finalize()
    assert str(told[0].message).startswith("finalize() after 1 of 5 intervals")
    assert {warning.filename for warning in told} == {__file__}
    assert len(told) == 2  # the other: what the masked weights still held
    assert report.total.sparsity == pruning.sparsity == pytest.approx(0.8, abs=0.01)
    assert report.total.residual > 0.01
    assert pruning.finalize() == report
    before = pruning.state_dict()["ticks"]
    pruning.step()
    assert pruning.state_dict()["ticks"] == before
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in pruning.masks.items())


def test_a_detached_layer_stays_detached():
    model = make(mlp)
    pruning = GradualPruning(model, 0.8, 10, intervals=5, max_penalty=0)
    train(model, pruning, 3)
    prune.remove(model[2], "weight")
    zeros = int((model[2].weight == 0).sum())
    train(model, pruning, 10, first=3)
    assert list(pruning.masks) == ["0.weight", "4.weight"]
    assert int((model[2].weight == 0).sum()) < zeros


def test_it_is_taken_like_a_scheduler(tmp_path):
    model = make(mlp)
    pruning = GradualPruning(model, 0.8, 10, intervals=5)
    history = History(pruning, every=1)
    optimizer = sgd(model)
    for index in range(14):
        train(model, pruning, 1, optimizer, first=index)
        history.record()
    assert [record.phase for record in history.records].count("transform") == 10
    sparsities = [record.sparsity for record in history.records]
    assert sparsities == sorted(sparsities)
    assert summary(pruning).layers[0].pattern == "explicit"
    assert "GradualPruning(finetune: 100% of 10 steps" in repr(pruning)
    save_ticket(pruning, tmp_path / "ticket")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "must lie in"),
        ({"sparsity": 0.0}, ValueError, "nothing to prune"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
        ({"intervals": 0}, ValueError, "intervals must be an integer of at least 1"),
        ({"pattern": "block:5x5"}, ValueError, "not a multiple of 5"),
        ({"distribution": "local"}, ValueError, "unknown distribution"),
        ({"pattern": "2:4", "sparsity": 0.7}, ValueError, r"means a sparsity of 0\.5"),
        ({"max_penalty": -1.0}, ValueError, "max_penalty"),
        ({"scores": 3}, TypeError, "scores must be a mapping"),
        ({"exclude": ["head"]}, ValueError, "matches no module"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_changed(options, error, message):
    model = make(mlp)
    with pytest.raises(error, match=message):
        GradualPruning(model, **{"sparsity": 0.8, "steps": 10} | options)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scores_that_fail_leave_the_step_undone():
    """It can be called again."""
    model = make(mlp)
    scores = [{"0.weight": torch.ones(20, 12)}]
    pruning = GradualPruning(model, 0.5, 5, intervals=1, scores=lambda model: scores[0])
    train(model, pruning, 2)
    optimizer = sgd(model)
    loss_of(model, 2, (12,)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"scores must have a tensor of shape \(16, 20\) for 2\.weight, got nothing"):
        pruning.step()
    for nothing in (None, torch.ones(3)):  # a function without its return, for one: not the magnitudes in silence
        scores[0] = nothing
        message = f"must return a mapping from parameter names to tensors, but returned {type(nothing).__name__}"
        with pytest.raises(TypeError, match=message):
            pruning.step()
    assert (pruning.progress, pruning.sparsity) == (2 / 5, 0)
    scores[0] = {name: weight.abs() for name, weight in targets_of(model).items()}
    pruning.step()
    assert (pruning.progress, pruning.sparsity) == (3 / 5, 0.5)
    assert isinstance(model, nn.Sequential)


# ---------------------------------------------------------------------- layers that leave


@pytest.mark.parametrize("max_penalty", [4.0, 0.0])
def test_a_layer_that_was_replaced_is_left_alone(max_penalty):
    model = make(mlp)
    pruning = GradualPruning(model, 0.8, 10, intervals=5, max_penalty=max_penalty)
    train(model, pruning, 2)
    model[4] = nn.Linear(16, 7, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"4\.weight will not be pruned any more"):
        train(model, pruning, 2, first=2)
    train(model, pruning, 7, first=4)
    assert list(pruning.masks) == ["0.weight", "2.weight"]
    assert pruning.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("max_penalty", [4.0, 0.0])
def test_steps_after_remove_do_nothing(max_penalty):
    model = make(mlp)
    pruning = GradualPruning(model, 0.8, 10, intervals=5, max_penalty=max_penalty)
    train(model, pruning, 3)
    pruning.remove()
    train(model, pruning, 8, first=3)
    assert pruning.progress == 0.3


@pytest.mark.parametrize("max_penalty", [4.0, 0.0])
def test_one_threshold_for_the_layers_that_are_left(max_penalty):
    """What the detached layer would have lost is not taken from the others."""
    model = make(mlp)
    pruning = GradualPruning(model, 0.8, 10, intervals=5, max_penalty=max_penalty, distribution="global")
    train(model, pruning, 2)
    prune.remove(model[2], "weight")
    train(model, pruning, 9, first=2)
    assert list(pruning.masks) == ["0.weight", "4.weight"]
    assert sum(int((~mask).sum()) for mask in pruning.masks.values()) == 256

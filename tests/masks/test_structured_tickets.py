"""Tickets of every shape: the penalty and the zeros follow the pattern, and the counts are exact."""

import pytest
import torch
from models import INPUT_SHAPES, assert_same, cnn, finalize_quietly, loss_of, mlp, twins
from reference import ExplicitLoop
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import LotteryTicket, hold, random_ticket
from torch_dual_ticket.baselines.magnitude import magnitude_masks


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("2:4", None), ("1:4", None), ("block:1x4", 0.75), ("block:4x2", 0.5), ("filter", 0.5), ("channel", 0.4)],
)
@pytest.mark.parametrize("build", [mlp, cnn], ids=lambda build: build.__name__)
def test_whole_life_agrees_with_the_reference_loop(build, pattern, sparsity):
    model, other = twins(build)
    shape = INPUT_SHAPES[build]
    exclude = {mlp: ("4",), cnn: ("0", "3", "8")}[build]  # shapes that the patterns do not divide
    if build is cnn:
        for twin in (model, other):
            twin[3] = nn.Conv2d(8, 8, 3, padding=1).double()
        other[3].load_state_dict(model[3].state_dict())
        exclude = ("0", "8")
    rst = RSTScheduler(model, sparsity, pattern=pattern, steps=40, seed=2, exclude=exclude)
    reference = ExplicitLoop(other, rst.masks, steps=40)
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer, other_optimizer = (torch.optim.SGD(m.parameters(), **settings) for m in (model, other))
    for index in range(100):
        if index == 50:
            report = finalize_quietly(rst)
            reference.finalize()
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()
        rst.step()
        other_optimizer.zero_grad()
        loss_of(other, index, shape).backward()
        reference.before_update()
        other_optimizer.step()
        reference.after_update()
    assert_same(model, other)
    for layer in report.layers:
        weight = model.get_parameter(layer.name)
        assert int((weight == 0).sum()) == layer.pruned
        kept = weight != 0
        if ":" in pattern and "x" not in pattern:
            n, m = map(int, pattern.split(":"))
            assert (kept.movedim(1, -1).reshape(-1, m).sum(1) == n).all()
        elif pattern == "filter":
            assert sorted(set(kept.flatten(1).sum(1).tolist())) == [0, kept[0].numel()]
        elif pattern == "channel":
            assert sorted(set(kept.movedim(1, 0).flatten(1).sum(1).tolist())) == [0, kept[:, 0].numel()]
        else:
            rows, columns = map(int, pattern.removeprefix("block:").split("x"))
            blocks = kept.unfold(0, rows, rows).unfold(1, columns, columns).flatten(-2).sum(-1)
            assert sorted(set(blocks.flatten().tolist())) == [0, rows * columns]


@pytest.mark.filterwarnings("ignore:pattern='filter' masks 2 of the 4 outputs of 0")
def test_the_dimensions_swap_for_transposed_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3))
    filters = RSTScheduler(model, 0.5, pattern="filter", seed=0)
    assert sorted(set(filters.masks["0.weight"].movedim(1, 0).flatten(1).sum(1).tolist())) == [0, 54]
    filters.remove()
    channels = RSTScheduler(model, 0.5, pattern="channel", seed=0)
    assert sorted(set(channels.masks["0.weight"].flatten(1).sum(1).tolist())) == [0, 36]


@pytest.mark.parametrize("pattern", ["2:4", "block:2x2", "filter", "channel"])
def test_grouped_convolutions_are_refused_by_name(pattern):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ValueError, match=r"1\.weight: .*grouped.*exclude=\['1'\]"):
        RSTScheduler(model, None if pattern == "2:4" else 0.5, pattern=pattern)
    RSTScheduler(model, None if pattern == "2:4" else 0.5, pattern=pattern, exclude=["1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:4"}, r"0\.weight: .*\(6, 7\).*multiple of 4"),
        ({"pattern": "block:4x7", "sparsity": 0.5}, r"0\.weight: .*multiple of 4"),
        ({"pattern": "2:4", "sparsity": 0.9}, r"means a sparsity of 0\.5"),
        ({"pattern": "2:4", "cycles": 2}, "cycles=2"),
        ({"pattern": "2:4", "distribution": "erk"}, "erk"),
        ({"pattern": "4:2"}, "unknown pattern '4:2'"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RSTScheduler(nn.Sequential(nn.Linear(7, 6)), **settings)


def test_sparsities_that_agree_with_the_pattern():
    """To rounding: 2/3 is not 1 - 1/3 in floating point. In a mapping, 0 leaves a layer alone."""
    assert 2 / 3 != 1 - 1 / 3
    assert RSTScheduler(nn.Linear(6, 4), 2 / 3, pattern="1:3").sparsity == pytest.approx(2 / 3)
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 4))
    assert list(RSTScheduler(model, {"0": 0, "*": 0.5}, pattern="2:4").masks) == ["1.weight"]


def test_two_of_four_is_what_semi_structured_sparsity_accepts():
    """At least n of m are zero in each group of m inputs, whatever the weights."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    rst = RSTScheduler(model, pattern="2:4", seed=1)
    for kept in rst.masks.values():
        assert (kept.view(-1, 4).sum(1) == 2).all()
    assert rst.sparsity == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pattern": "channel", "sparsity": {"0": 0.9}},
            r"rounds to all 3 units of 0\.weight: nothing goes through it",
        ),
        ({"sparsity": 0.999}, r"rounds to all 216 units of 0\.weight and of 1 more: nothing goes through"),
        ({"sparsity": {"0": 0.999}, "cycles": 3}, r"rounds to all 216 units of 0\.weight: nothing goes through it"),
    ],
    ids=["the channels of an RGB image", "two layers", "the last cycle"],
)
def test_a_mask_that_empties_a_layer_is_warned_of(settings, message):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 40, 3))
    with pytest.warns(UserWarning, match=message) as seen:
        RSTScheduler(model, seed=0, **settings)
    assert seen[0].filename == __file__


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_does_not_count_as_emptied():
    assert RSTScheduler(nn.Sequential(nn.Linear(6, 8), nn.Linear(0, 4)), 0.5, seed=0).sparsity == 0.5


@pytest.mark.parametrize("make", [magnitude_masks, LotteryTicket, random_ticket])
def test_a_mask_that_empties_a_layer_in_a_baseline(make):
    with pytest.warns(UserWarning, match="rounds to all 2 units of 0") as seen:
        make(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 40)), 0.9)
    assert seen[0].filename == __file__


def collapsing():
    """With a layer whose weights are the smallest of all."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5))
    model[1].weight.data.mul_(1e-3)
    return model


def test_an_explicit_mask_that_empties_a_layer():
    model = collapsing()
    masks = magnitude_masks(model, 0.8, distribution="global")
    with pytest.warns(UserWarning, match=r"the mask keeps no weight of 1\.weight: nothing will go through") as seen:
        hold(model, masks)
    assert seen[0].filename == __file__
    ticket = LotteryTicket(collapsing(), 0.8, distribution="global", rounds=2)
    with pytest.warns(UserWarning, match=r"keeps no weight of 1\.weight") as seen:
        ticket.prune_and_rewind()
    assert seen[0].filename == __file__


@pytest.mark.parametrize("make", [RSTScheduler, random_ticket])
def test_filters_of_the_last_layer_are_warned_of(make):
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    told = r"masks 5 of the 10 outputs of 2: if .* will be constant.*exclude=\['2'\]"
    with pytest.warns(UserWarning, match=told) as seen:
        make(model, 0.5, pattern="filter", seed=0)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("make", [RSTScheduler, random_ticket])
def test_filters_that_other_layers_read_are_not_warned_of(make):
    """Warnings are errors here: the head is dense, or registered first, or there is none; filters alone are meant."""

    def model():
        return nn.Sequential(nn.Linear(64, 200), nn.Linear(200, 10))

    make(model(), 0.5, pattern="filter", exclude=["1"], seed=0)
    make(model(), {"0": 0.5}, pattern="filter", seed=0)
    make(model(), 0.5, pattern="channel", seed=0)
    make(nn.LayerNorm(8), 0.5, targets=[nn.LayerNorm], seed=0)  # without any outputs
    make(nn.ModuleDict({"head": nn.Linear(16, 10), "body": nn.Linear(8, 16)}), {"body": 0.5}, pattern="filter", seed=0)
    make(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)), 0.5, pattern="filter", seed=0)

"""The baselines: a manual loop and the library end in the same weights, bit for bit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import INPUT_SHAPES, cnn, loss_of, make, mlp, transformer, twins
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import LotteryTicket, hold, magnitude_masks, random_ticket
from torch_dual_ticket.masks.explicit import ExplicitMask


def new_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(model, shape, updates, first=0):
    optimizer = new_optimizer(model)
    for index in range(first, first + updates):
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()


def train_manually(model, masks, shape, updates, first=0):
    parameters = dict(model.named_parameters())
    optimizer = new_optimizer(model)
    for index in range(first, first + updates):
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        for name, mask in masks.items():
            parameters[name].grad[~mask] = 0
        optimizer.step()
        for name, mask in masks.items():
            parameters[name].data[~mask] = 0


def smallest_manually(weights, masks, count):
    """One weight at a time: the smallest of those that are left, the first of equal ones."""
    masks = {name: mask.clone() for name, mask in masks.items()}
    removed = sum(int((~mask).sum()) for mask in masks.values())
    left = [
        (abs(float(value)), position, name, index)
        for position, (name, weight) in enumerate(weights.items())
        for index, value in enumerate(weight.flatten())
        if masks[name].flatten()[index]
    ]
    for _, _, name, index in sorted(left, key=lambda entry: (entry[0], entry[1], entry[3]))[: count - removed]:
        masks[name].view(-1)[index] = False
    return masks


def targets_of(model):
    return {
        f"{name}.weight": layer.weight.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def lottery_manually(model, sparsity, rounds, scope, shape, early):
    """Train, prune, rewind, as one would write it for one model."""
    weights = targets_of(model)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    train(model, shape, early)
    origin = copy.deepcopy(model.state_dict())
    for number in range(1, rounds + 1):
        train_manually(model, masks, shape, 10, first=early)
        level = sparsity if number == rounds else 1 - (1 - sparsity) ** (number / rounds)
        weights = {name: dict(model.named_parameters())[name].detach() for name in masks}
        if scope == "global":
            total = sum(weight.numel() for weight in weights.values())
            masks = smallest_manually(weights, masks, round(level * total))
        else:
            for name in masks:
                one = {name: masks[name]}
                masks |= smallest_manually({name: weights[name]}, one, round(level * masks[name].numel()))
        model.load_state_dict(origin)
        for name, mask in masks.items():
            dict(model.named_parameters())[name].data[~mask] = 0
    train_manually(model, masks, shape, 10, first=early)
    return masks


@pytest.mark.parametrize("build", [mlp, cnn, transformer])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize(("rounds", "early"), [(1, 0), (3, 0), (3, 5)])
def test_lottery_ticket_is_the_one_of_a_manual_loop(build, scope, rounds, early):
    model, manual = twins(build)
    shape = INPUT_SHAPES[build]
    expected = lottery_manually(manual, 0.8, rounds, scope, shape, early)

    ticket = LotteryTicket(model, 0.8, rounds=rounds, distribution=scope)
    if early:
        train(model, shape, early)
        ticket.remember()
    while not ticket.done:
        train(model, shape, 10, first=early)
        ticket.prune_and_rewind()
    train(model, shape, 10, first=early)

    assert list(ticket.masks) == list(expected)
    assert all(torch.equal(ticket.masks[name], mask) for name, mask in expected.items())
    for (name, mine), theirs in zip(model.state_dict().items(), manual.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert ticket.sparsity == pytest.approx(0.8, abs=0.01)


def test_rounds_are_nested_and_have_the_counts_of_iterative_rst():
    model = make(mlp)
    ticket = LotteryTicket(model, 0.9, rounds=3)
    before = {}
    for number in range(1, 4):
        train(model, (12,), 5)
        ticket.prune_and_rewind()
        for name, mask in ticket.masks.items():
            assert int((~mask).sum()) == round((1 - 0.1 ** (number / 3)) * mask.numel())
            assert not (mask & ~before.get(name, mask)).any()
        before = dict(ticket.masks)
    with pytest.raises(RuntimeError, match="all 3 rounds"):
        ticket.prune_and_rewind()


def test_rewinding_restores_buffers_and_drops_gradients():
    model = make(cnn)
    origin = copy.deepcopy(model.state_dict())
    ticket = LotteryTicket(model, 0.5)
    train(model, (3, 6, 6), 5)
    ticket.prune_and_rewind()
    for name, value in model.state_dict().items():
        kept = ticket.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, origin[name] * kept), name
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="before the first"):
        ticket.remember()


def test_a_layer_detached_by_prune_remove_stays_detached():
    model = make(mlp)
    ticket = LotteryTicket(model, 0.9, rounds=2)
    ticket.prune_and_rewind()
    prune.remove(model[2], "weight")
    ticket.prune_and_rewind()
    assert list(ticket.masks) == ["0.weight", "4.weight"]
    assert not (model[2].weight == 0).any()


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_magnitude_masks_remove_the_smallest(distribution):
    model = make(mlp)
    masks = magnitude_masks(model, 0.7, distribution=distribution, exclude=["4"])
    assert list(masks) == ["0.weight", "2.weight"]
    weights = targets_of(model)
    for name, mask in masks.items():
        assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()
    removed = [int((~mask).sum()) for mask in masks.values()]
    assert sum(removed) == round(0.7 * (12 * 20 + 20 * 16))
    if distribution == "uniform":
        assert removed == [round(0.7 * 240), round(0.7 * 320)]
    if distribution == "global":
        kept = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
        gone = torch.cat([weights[name][~mask].abs() for name, mask in masks.items()])
        assert kept.min() >= gone.max()


def test_of_equal_magnitudes_the_first_are_removed_and_masked_ones_before_all():
    model = nn.Linear(6, 1)
    nn.init.ones_(model.weight)
    assert magnitude_masks(model, 0.5)["weight"].tolist() == [[False] * 3 + [True] * 3]
    earlier = {"weight": torch.tensor([[True, True, True, True, False, False]])}
    assert magnitude_masks(model, 0.5, within=earlier)["weight"].tolist() == [[False, True, True, True, False, False]]


def test_a_mapping_chooses_the_sparsity_by_name():
    masks = magnitude_masks(make(mlp), {"0": 0.5, "4": 0.9})
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 120, "4.weight": 72}


@pytest.mark.parametrize("options", [{}, {"distribution": "erk"}, {"pattern": "2:4", "sparsity": None}])
def test_a_random_ticket_is_that_of_a_scheduler_with_the_same_seed(options):
    model, other = twins(mlp)
    options = {"sparsity": 0.9, "exclude": ["4"], "seed": 3} | options
    held = random_ticket(model, **options)
    rst = RSTScheduler(other, **options)
    assert list(held.masks) == list(rst.masks)
    assert all(torch.equal(mask, rst.masks[name]) for name, mask in held.masks.items())
    assert held.sparsity == rst.sparsity


@pytest.mark.parametrize("build", [mlp, cnn, transformer])
def test_held_masks_stay_in_force_through_training_copies_and_deletion(build):
    model, manual = twins(build)
    masks = {name: torch.rand_like(weight) > 0.5 for name, weight in targets_of(model).items()}
    held = hold(model, masks)
    shape = INPUT_SHAPES[build]
    with torch.no_grad():
        for name, mask in masks.items():
            dict(manual.named_parameters())[name].mul_(mask)
    train(model, shape, 20)
    train_manually(manual, masks, shape, 20)
    assert all(map(torch.equal, model.state_dict().values(), manual.state_dict().values()))
    assert prune.is_pruned(model)

    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    train(clone, shape, 5)
    del held
    train(model, shape, 5)
    for trained in (clone, model):
        parameters = dict(trained.named_parameters())
        assert all(torch.equal(parameters[name] == 0, ~mask) for name, mask in masks.items())


def test_after_remove_the_model_is_plain():
    model = make(mlp)
    held = random_ticket(model, 0.9, seed=0)
    held.remove()
    assert not prune.is_pruned(model)
    train(model, (12,), 3)
    assert not (model[0].weight == 0).any()
    hold(model, magnitude_masks(model, 0.5))


def test_apply_masks_zeroes_an_earlier_copy():
    model, average = twins(mlp)
    held = random_ticket(model, 0.9, seed=0)
    held.apply_masks(average)
    assert torch.equal(average[0].weight == 0, ~held.masks["0.weight"])


def test_tied_frozen_and_pruned_neighbors_do_not_matter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)

    model = Tied()
    mask = torch.rand(7, 4) > 0.5
    held = hold(model, {"embedding.weight": mask})
    assert torch.equal(model.head.weight == 0, ~mask)
    assert held.sparsity == pytest.approx(float((~mask).float().mean()))


def test_weight_norm_masks_the_direction_but_may_not_empty_it():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    name = "0.parametrizations.weight.original1"
    mask = torch.tensor([[True, False, True, False]] * 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="whole slice"):
        hold(model, {name: torch.zeros(3, 4, dtype=torch.bool)})
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    held = hold(model, {name: mask})
    assert torch.equal(model[0].weight == 0, ~mask)
    with pytest.raises(ValueError, match="whole slice"):
        held.set_masks({name: torch.zeros(3, 4)})
    assert torch.equal(model[0].weight == 0, ~mask)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({}, ValueError, "nothing to hold"),
        ({"0.weight": torch.full((20, 12), 0.5)}, ValueError, r"0.weight must hold 0 \(pruned\) and 1 .*, got 0.5"),
        ({"0.weight": torch.full((20, 12), torch.nan)}, ValueError, "0.weight must hold 0 .*, got nan"),
        ({"0.weight": [[True]]}, TypeError, "0.weight must be a dense tensor of bools.*got list"),
        ({"0.weight": torch.ones(20, 12).to_sparse()}, TypeError, "0.weight must be a dense tensor.*sparse_coo"),
        ({"0.weight": torch.ones(20, 12, device="meta")}, TypeError, "0.weight must be a dense tensor.*meta"),
        ([torch.ones(20, 12)], TypeError, "masks is a mapping from parameter names to masks, got list"),
        ({"0.weight": torch.ones(12, 20, dtype=torch.bool)}, ValueError, r"shape \(12, 20\), the parameter \(20, 12\)"),
        ({"9.weight": torch.ones(2, dtype=torch.bool)}, ValueError, "the model has no such parameter"),
    ],
)
def test_bad_masks_are_refused_and_nothing_is_changed(masks, error, message):
    model = make(mlp)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        hold(model, masks)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert not prune.is_pruned(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: random_ticket(model, 0.5),
        lambda model: magnitude_masks(model, 0.5),
        lambda model: LotteryTicket(model),
        lambda model: hold(model, {"weight": torch.ones(2, dtype=torch.bool)}),
    ],
)
def test_other_objects_than_modules_are_refused(call):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict: give the model itself"):
        call(dict(make(mlp).state_dict()))


@pytest.mark.parametrize("given", [3, [torch.ones(2)], "masks"])
def test_masks_without_names_are_refused(given):
    with pytest.raises(TypeError, match="masks is a mapping from parameter names to masks, got"):
        hold(nn.Linear(2, 2), given)


def test_a_refused_random_ticket_draws_no_seed():
    model, layer = make(mlp), parametrizations.weight_norm(nn.Linear(4, 3))
    random_ticket(model, 0.5, seed=0)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="is managed by another"):
        random_ticket(model, 0.9)
    with pytest.raises(ValueError, match="would empty a whole slice"):
        random_ticket(layer, 0.9)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mask_under_the_second_name_of_a_tied_weight_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'1\.weight' does not belong to a parameter: it is tied to 0\.weight"):
        hold(model, {"1.weight": torch.ones(4, 4, dtype=torch.bool)})


def test_managed_parameters_are_refused():
    model = make(mlp)
    random_ticket(model, 0.5, seed=0)
    for again in (
        lambda: random_ticket(model, 0.9, seed=1),
        lambda: hold(model, {"0.weight": torch.ones(20, 12, dtype=torch.bool)}),
        lambda: LotteryTicket(model, 0.9),
        lambda: RSTScheduler(model, 0.9),
    ):
        with pytest.raises(ValueError, match=r"is managed by another RSTScheduler, or held masks\..*no mask for it"):
            again()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "must lie in"),
        ({"rounds": 10**30}, ValueError, "rounds must be an integer of at least 1 and at most 1,000"),
        ({"sparsity": 0.0}, ValueError, "nothing to prune"),
        ({"sparsity": 0.0, "distribution": "global"}, ValueError, "nothing to prune"),
        ({"sparsity": {"0": 0.5}, "distribution": "global"}, ValueError, "give a number"),
        ({"distribution": "local"}, ValueError, "'local'.*'global'"),
        ({"rounds": 0}, ValueError, "rounds"),
        ({"exclude": ["head"]}, ValueError, "matches no module"),
    ],
)
def test_bad_arguments_of_the_lottery_ticket_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LotteryTicket(make(mlp), **options)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4).flatmap(
        lambda shape: st.tuples(
            st.just(shape),
            *[
                st.integers(0, size - 1).flatmap(
                    lambda first, size=size: st.tuples(st.just(first), st.integers(0, size - first))
                )
                for size in shape
            ],
        )
    )
)
def test_any_block_of_an_explicit_mask_is_a_block_of_the_whole(drawn):
    shape, *blocks = drawn
    kept = torch.rand(shape) > 0.5
    mask = ExplicitMask(kept)
    expected = kept[tuple(slice(first, first + length) for first, length in blocks)]
    offset, size = [first for first, _ in blocks], [length for _, length in blocks]
    assert torch.equal(mask.draw(offset=offset, size=size), expected)
    assert torch.equal(mask.draw(), kept)
    assert mask.pruned_weights == math.prod(shape) - int(kept.sum())

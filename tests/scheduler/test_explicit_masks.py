"""Masks that somebody chose, transformed: as any ticket, and exchanged on the way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lives import Explicit, Library, updates
from models import INPUT_SHAPES, assert_same, assert_same_states, cnn, finalize_quietly, loss_of, make, mlp, twins
from reference import ExplicitLoop
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import hold, magnitude_masks

SHAPE = INPUT_SHAPES[mlp]


def some_masks(model, density=0.5, seed=0, names=None):
    """Random ones, of the weights of two or more dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and (names is None or name in names)
    }


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(model, rst, count=3, first=0):
    optimizer = sgd(model)
    for index in range(first, first + count):
        optimizer.zero_grad()
        loss_of(model, index, SHAPE).backward()
        optimizer.step()
        rst.step()


@pytest.mark.parametrize("store_masks", [True, False])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_explicit_masks_live_as_in_the_explicit_loop(build, store_masks):
    """Layers without a mask stay dense. The masks change on the way, between a backward and its update too."""
    model, other = twins(build)
    before = copy.deepcopy(model.state_dict())
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1][:2]
    lives = [some_masks(model, 0.9 - 0.2 * number, seed=number, names=names) for number in range(4)]
    rst = RSTScheduler(model, masks=lives[0], steps=12, max_penalty=2.0, store_masks=store_masks)
    loop = ExplicitLoop(other, lives[0], steps=12, max_penalty=2.0)
    named = dict(other.named_parameters())
    for trained, side in ((model, Library(model, rst)), (other, Explicit(other, loop))):
        optimizer = sgd(trained)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(trained, index, INPUT_SHAPES[build]).backward()
            if index in (5, 11, 18):
                masks = lives[1 + (5, 11, 18).index(index)]
                if side.is_explicit:
                    loop.targets = [(named[name], mask) for name, mask in masks.items()]
                else:
                    rst.set_masks(masks)
            side.before_update()
            optimizer.step()
            side.after_update()
    assert_same(model, other)
    assert list(rst.masks) == names
    for name in names:
        assert torch.equal(rst.masks[name], lives[3][name])
        assert torch.equal(model.get_parameter(name) == 0, ~lives[3][name])
    for name, parameter in model.named_parameters():
        assert name in names or (parameter != 0).all()
        assert not torch.equal(parameter, before[name])


def test_masks_of_zeros_and_ones_of_any_dtype_and_of_any_parameter():
    model = nn.Sequential(nn.LSTM(4, 3), nn.Embedding(5, 4)).double()
    kept = some_masks(model) | {"0.bias_hh_l0": torch.arange(12) % 2 == 0}
    kinds = [torch.int64, torch.float16, torch.uint8, torch.complex64]
    given = {name: mask.to(kind) for (name, mask), kind in zip(kept.items(), kinds, strict=True)}
    rst = RSTScheduler(model, masks=given)
    assert all(torch.equal(rst.masks[name], kept[name]) for name in kept)
    assert rst.masks["1.weight"].dtype == torch.bool


def test_given_masks_are_copied():
    model = make(mlp)
    masks = some_masks(model)
    rst = RSTScheduler(model, masks=masks)
    expected = masks["0.weight"].clone()
    masks["0.weight"].fill_(False)
    assert torch.equal(rst.masks["0.weight"], expected)


def test_no_seed_is_drawn():
    model = make(mlp)
    state = torch.get_rng_state()
    rst = RSTScheduler(model, masks=some_masks(model))
    assert rst.seed is None
    assert "explicit masks" in repr(rst)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "other",
    [
        {"sparsity": 0.9},
        {"pattern": "2:4"},
        {"distribution": "erk"},
        {"seed": 0},
        {"cycles": 2},
        {"targets": [nn.Linear]},
        {"exclude": ["4"]},
    ],
)
def test_what_says_which_weights_are_pruned_is_said_once(other):
    model = make(mlp)
    with pytest.raises(ValueError, match=f"masks and {next(iter(other))} were given.* leave out {next(iter(other))}"):
        RSTScheduler(model, masks=some_masks(model), **other)
    assert not any(module._forward_pre_hooks for module in model.modules())


def frozen_layer():
    model = make(mlp)
    model[2].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("build", "masks", "error", "message"),
    [
        (mlp, {}, ValueError, "masks is empty"),
        (mlp, {"0.weight": torch.full((20, 12), 2)}, ValueError, r"0.weight must hold 0 .* and 1 .*, got 2"),
        (mlp, {"0.weight": torch.ones(12, 20)}, ValueError, r"shape \(12, 20\), the parameter \(20, 12\)"),
        (
            mlp,
            {"1.weight": torch.ones(2)},
            ValueError,
            r"'1.weight' does not belong .* no such parameter, but 0.weight",
        ),
        (frozen_layer, {"2.weight": torch.ones(16, 20)}, ValueError, "2.weight is frozen"),
        (
            lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))),
            {"0.parametrizations.weight.original": torch.ones(4, 4)},
            ValueError,
            "parametrized by _Orthogonal",
        ),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
            {"0.parametrizations.weight.original0": torch.ones(3, 1)},
            ValueError,
            "computed from it by weight_norm",
        ),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
            {"0.parametrizations.weight.original1": torch.zeros(3, 4)},
            ValueError,
            "would empty a whole slice",
        ),
        (
            lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)),
            {"0.weight_orig": torch.zeros(3, 4)},
            ValueError,
            r"already pruned by torch\.nn\.utils\.prune",
        ),
    ],
)
def test_bad_masks_are_refused_and_nothing_is_changed(build, masks, error, message):
    model = build()
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(error, match=message):
        RSTScheduler(model, masks=masks)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_other_parameters_of_the_layer_may_be_frozen_or_parametrized():
    model = make(mlp)
    model[0].bias.requires_grad_(False)
    parametrizations.spectral_norm(model[4])
    name = "4.parametrizations.weight.original"
    rst = RSTScheduler(model, masks={"0.weight": torch.rand(20, 12) > 0.5, name: torch.rand(5, 16) > 0.5})
    train(model, rst)
    finalize_quietly(rst)
    assert torch.equal(model[4].weight == 0, ~rst.masks[name])


# ---------------------------------------------------------------------- set_masks


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (lambda m: {"0.weight": m["0.weight"]}, ValueError, "'2.weight': a mask is missing"),
        (lambda m: m | {"4.bias": torch.ones(5)}, ValueError, "'4.bias': it is not managed here"),
        (lambda m: m | {"0.weight": torch.ones(20)}, ValueError, r"0.weight has shape \(20,\)"),
        (lambda m: m | {"0.weight": m["0.weight"] * 3}, ValueError, "0.weight must hold 0"),
    ],
)
def test_masks_that_do_not_fit_leave_the_ones_before(masks, error, message):
    model = make(mlp)
    first = some_masks(model)
    rst = RSTScheduler(model, masks=first, steps=10)
    train(model, rst)
    state = copy.deepcopy(rst.state_dict())
    with pytest.raises(error, match=message):
        rst.set_masks(masks(first))
    assert rst.state_dict() == state
    assert all(torch.equal(rst.masks[name], first[name]) for name in first)


def test_set_masks_is_for_explicit_masks_before_finalize():
    model, other = twins(mlp)
    seeded = RSTScheduler(other, 0.5, seed=0)
    with pytest.raises(RuntimeError, match=r"drawn from a seed: build it with masks="):
        seeded.set_masks(some_masks(model))
    rst = RSTScheduler(model, masks=some_masks(model), steps=3)
    train(model, rst)
    finalize_quietly(rst)
    with pytest.raises(RuntimeError, match=r"comes before finalize\(\)"):
        rst.set_masks(some_masks(model))
    rst.remove()
    held = hold(model, some_masks(model))
    held.remove()
    with pytest.raises(RuntimeError, match=r"remove\(\) was called"):
        held.set_masks(some_masks(model))


def test_everything_speaks_of_the_masks_that_apply_now():
    model = make(mlp)
    rst = RSTScheduler(model, masks={name: torch.ones_like(mask) for name, mask in some_masks(model).items()}, steps=9)
    assert (rst.sparsity, rst.residual()) == (0.0, 0.0)
    train(model, rst)  # nothing is masked, and updates count
    assert rst.progress == 3 / 9
    masks = magnitude_masks(model, 0.5)
    rst.set_masks(masks)
    squares = [model.get_parameter(name).detach()[~mask].square().sum() for name, mask in masks.items()]
    norms = [model.get_parameter(name).detach().square().sum() for name in masks]
    assert rst.sparsity == pytest.approx(0.5)
    assert rst.residual() == pytest.approx(float((sum(squares) / sum(norms)).sqrt()))
    prune.remove(model[0], "weight")
    rst.set_masks({name: mask for name, mask in masks.items() if name != "0.weight"})
    report = finalize_quietly(rst)
    assert [layer.name for layer in report.layers] == ["2.weight", "4.weight"]
    assert (model[0].weight != 0).all()


# ---------------------------------------------------------------------- restarts and copies


@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_a_restart_with_the_last_masks(phase):
    """The state holds fingerprints: the masks are given again."""
    model, other = twins(mlp)
    rst = RSTScheduler(model, masks=some_masks(model), steps=5)
    train(model, rst)
    last = some_masks(model, seed=1)
    rst.set_masks(last)
    if phase == "finetune":
        finalize_quietly(rst)
    saved = copy.deepcopy((model.state_dict(), rst.state_dict()))
    assert not any(isinstance(value, torch.Tensor) for value in saved[1]["masks"].values())
    again = RSTScheduler(other, masks=last, steps=5)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.state_dict() == saved[1]
    for trained, scheduler in ((model, rst), (other, again)):
        train(trained, scheduler, first=3)
        finalize_quietly(scheduler)
        train(trained, scheduler, first=6)
    assert_same(model, other, tolerance=0)


def test_a_state_of_other_masks_is_refused():
    model = make(mlp)
    masks = some_masks(model)
    state = RSTScheduler(model, masks=masks, steps=5).state_dict()
    masks["2.weight"][0, 0] ^= True
    for build in (lambda: RSTScheduler(make(mlp), masks=masks, steps=5), lambda: RSTScheduler(make(mlp), 0.5, steps=5)):
        rst = build()
        before = rst.state_dict()
        with pytest.raises(ValueError, match=r"the state belongs to other masks: [02]\.weight differs.*the same masks"):
            rst.load_state_dict(state)
        assert rst.state_dict() == before
    seeded = RSTScheduler(make(mlp), 0.5, seed=3).state_dict()
    rst = RSTScheduler(make(mlp), masks=masks)
    with pytest.raises(ValueError, match=r"the seeds differ: no seed here, 3 in the state"):
        rst.load_state_dict(seeded)


def test_copies_have_their_own_masks():
    model = make(mlp)
    masks = some_masks(model)
    rst = RSTScheduler(model, masks=masks, steps=4)
    train(model, rst)
    copied_model, copied = pickle.loads(pickle.dumps(copy.deepcopy((model, rst))))
    rst.set_masks(some_masks(model, seed=1))
    assert all(torch.equal(copied.masks[name], masks[name]) for name in masks)
    finalize_quietly(rst)
    clone = copy.deepcopy(model)
    train(clone, rst)
    assert all(torch.equal(clone.get_parameter(name) == 0, ~mask) for name, mask in rst.masks.items())
    assert_same_states(copied_model.state_dict(), pickle.loads(pickle.dumps(copied_model)).state_dict())


def test_masks_of_a_seeded_ticket_give_the_same_life():
    """The kinds of masks differ in where they come from alone."""
    lives = []
    for as_given in (False, True):
        model = make(mlp)
        seeded = RSTScheduler(make(mlp), 0.8, seed=3)
        rst = (
            RSTScheduler(model, masks=dict(seeded.masks), steps=5)
            if as_given
            else RSTScheduler(model, 0.8, seed=3, steps=5)
        )
        train(model, rst, 6)
        finalize_quietly(rst)
        train(model, rst, 6)
        lives.append(model)
    assert_same(*lives, tolerance=0)


def test_to_prune_and_apply_masks():
    model, average = twins(mlp)
    masks = some_masks(model)
    rst = RSTScheduler(model, masks=masks, steps=3)
    train(model, rst)
    finalize_quietly(rst)
    rst.apply_masks(average)
    rst.to_prune()
    for name, mask in masks.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight_mask, mask.double())
        assert torch.equal(average.get_parameter(name) == 0, ~mask)

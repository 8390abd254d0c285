"""The end of the transformation: the report, its warning, exact zeros that stay, and their release."""

import math
import re

import pytest
import torch
from lives import is_plus_zero
from models import INPUT_SHAPES, cnn, finalize_quietly, loss_of, make, mlp, transformer, wide
from scheduled_loop import norm_share, shrinking, train, update
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import random_ticket


@pytest.mark.parametrize("build", [cnn, wide], ids=lambda build: build.__name__)
def test_residual_and_the_report_of_finalize(build):
    model = make(build)
    rst = RSTScheduler(model, 0.7, steps=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    masks = dict(rst.masks)
    assert rst.residual() == pytest.approx(norm_share(model, masks), rel=1e-12)
    train(model, optimizer, rst, 4, INPUT_SHAPES[build])
    shares = {name: norm_share(model, {name: kept}) for name, kept in masks.items()}
    total = norm_share(model, masks)
    assert isinstance(rst.residual(), float)
    assert rst.residual() == pytest.approx(total, rel=1e-12)

    with pytest.warns(UserWarning, match=re.escape(f"held {total:.1%} of the norm")) as caught:
        report = rst.finalize()

    assert caught[0].filename == __file__
    assert "λ had reached 1" in str(caught[0].message)
    assert [layer.name for layer in report.layers] == list(masks)
    for layer in report.layers:
        kept = masks[layer.name]
        assert (layer.pruned, layer.size) == (round(0.7 * kept.numel()), kept.numel())
        assert layer.sparsity == layer.pruned / layer.size
        assert layer.residual == pytest.approx(shares[layer.name], rel=1e-12)
    assert report.total.pruned == sum(layer.pruned for layer in report.layers)
    assert report.total.size == sum(layer.size for layer in report.layers)
    assert report.total.sparsity == rst.sparsity
    assert report.total.residual == pytest.approx(total, rel=1e-12)
    assert [line.split()[0] for line in str(report).splitlines()] == ["parameter", *masks, "total"]
    assert rst.residual() == 0


@pytest.mark.parametrize(("residual", "warns"), [(0.0099, False), (0.0101, True)])
def test_finalize_warns_of_what_it_takes_away(residual, warns):
    layer, optimizer = shrinking()
    rst = RSTScheduler(layer, 0.5, steps=1, max_penalty=0.0, seed=0)
    update(layer, optimizer)
    rst.step()
    kept = rst.masks["weight"]
    with torch.no_grad():
        layer.weight.copy_(torch.where(kept, math.sqrt(1 - residual**2), residual))  # as many are kept as masked
    if warns:
        with pytest.warns(
            UserWarning, match=r"still held 1\.0% of the norm .* There was no penalty, as max_penalty is 0"
        ):
            rst.finalize()
    else:
        rst.finalize()  # warnings are errors here


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_finalize_says_that_the_training_has_diverged(value):
    """More penalty would not help."""
    layer, optimizer = shrinking()
    rst = RSTScheduler(layer, 0.5, steps=1, seed=0)
    update(layer, optimizer)
    rst.step()
    with torch.no_grad():
        layer.weight[0, 0] = value
    with pytest.warns(UserWarning, match=r"Weights are not finite .* has diverged\. Lower max_penalty or lr"):
        rst.finalize()


def test_finalizing_twice_changes_nothing():
    model = make(mlp)
    rst = RSTScheduler(model, 0.7, steps=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, rst, 2, (12,))
    report = finalize_quietly(rst)
    train(model, optimizer, rst, 3, (12,), start=2)
    state, weights = rst.state_dict(), [parameter.detach().clone() for parameter in model.parameters()]
    progress = rst.progress
    assert rst.finalize() is report
    assert rst.state_dict() == state
    assert rst.progress == progress == 0.5  # step() does nothing any more
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("build", [mlp, cnn, transformer], ids=lambda build: build.__name__)
def test_zeros_are_exact_and_stay_through_two_hundred_updates(build):
    model = make(build)
    rst = RSTScheduler(model, 0.8, steps=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)
    assert prune.is_pruned(model)
    train(model, optimizer, rst, 6, INPUT_SHAPES[build])
    finalize_quietly(rst)
    for name, kept in rst.masks.items():
        weight = model.get_parameter(name)
        assert is_plus_zero(weight[~kept])
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
    before = {name: model.get_parameter(name).detach().clone() for name in rst.masks}
    train(model, optimizer, rst, 200, INPUT_SHAPES[build], start=6)
    for name, kept in rst.masks.items():
        weight = model.get_parameter(name)
        assert is_plus_zero(weight[~kept])
        assert (weight[kept] != before[name][kept]).all()
    assert prune.is_pruned(model)


@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_remove_leaves_a_plain_model(phase):
    model = make(mlp)
    rst = RSTScheduler(model, 0.8, steps=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, rst, 2, (12,))
    if phase == "finetune":
        finalize_quietly(rst)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    masks = dict(rst.masks)

    rst.remove()

    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not prune.is_pruned(model)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert rst.penalty == 0
    train(model, optimizer, rst, 1, (12,), start=2)
    for name, kept in masks.items():
        assert (model.get_parameter(name)[~kept] != 0).any()  # nothing holds the zeros
    rst.remove()
    assert rst.state_dict()["phase"] == phase


@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_stock_remove_takes_one_layer_out_for_good(phase):
    model = make(mlp)
    rst = RSTScheduler(model, 0.8, steps=4, seed=0)
    kept = rst.masks["2.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, rst, 2, (12,))
    if phase == "finetune":
        finalize_quietly(rst)

    assert prune.remove(model[2], "weight") is model[2]

    if phase == "finetune":
        assert torch.equal(model[2].weight != 0, kept)
    assert not prune.is_pruned(model[2])
    assert prune.is_pruned(model)
    assert list(rst.masks) == ["0.weight", "4.weight"] == list(rst.state_dict()["masks"])
    assert rst.sparsity == (round(0.8 * 240) + round(0.8 * 80)) / 320
    if phase == "transform":
        finalize_quietly(rst)
        assert (model[2].weight != 0).all()
    train(model, optimizer, rst, 3, (12,), start=2)
    assert (model[2].weight[~kept] != 0).any()
    for name, mask in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_apply_masks_zeroes_another_model():
    model, ema, early = make(mlp), torch.optim.swa_utils.AveragedModel(make(mlp, 1)), make(mlp, 2)
    rst = RSTScheduler(model, 0.8, steps=4, seed=0)
    rst.apply_masks(early)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), rst, 2, (12,))
    finalize_quietly(rst)
    dense = {name: parameter.detach().clone() for name, parameter in ema.module.named_parameters()}
    rst.apply_masks(ema)
    rst.remove()
    rst.apply_masks(late := make(mlp, 3))  # a scheduler knows its masks for as long as it lives
    for name, kept in rst.masks.items():
        for other in (ema.module, early, late):
            weight = other.get_parameter(name)
            assert is_plus_zero(weight[~kept])
        assert torch.equal(ema.module.get_parameter(name)[kept], dense[name][kept])
    assert torch.equal(ema.module[0].bias, dense["0.bias"])
    assert not prune.is_pruned(ema)


@pytest.mark.parametrize(
    ("scheduler_steps", "advice"), [(0, r"rst\.step\(\) was never called"), (3, "after 3 of 8 .*, with λ at 0.375")]
)
def test_an_unfinished_schedule_is_named_as_the_reason(scheduler_steps, advice):
    model = make(mlp)
    rst = RSTScheduler(model, 0.7, steps=8, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in range(max(1, scheduler_steps)):
        loss_of(model, index, INPUT_SHAPES[mlp]).backward()
        optimizer.step()
        if scheduler_steps:
            rst.step()
    with pytest.warns(UserWarning, match=f"of the norm when they were set to zero.*{advice}"):
        rst.finalize()


@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
def test_an_evaluation_in_inference_mode_before_training_spoils_nothing(build):
    """It draws the masks, which are inverted in place later."""
    model = make(build)
    rst = RSTScheduler(model, 0.7, steps=4, seed=0)
    with torch.inference_mode():
        rst.residual()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), rst, 4, INPUT_SHAPES[build])
    finalize_quietly(rst)
    for name, kept in rst.masks.items():
        assert is_plus_zero(model.get_parameter(name).detach()[~kept])


def test_what_had_no_gradient_is_left_as_it_is_for_backward():
    """Two branches, whose graphs are both there before the first is updated."""
    model = nn.ModuleList([nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 1)) for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ticket = random_ticket(model, 0.5, seed=0)
    losses = [branch(torch.ones(4, 20)).square().mean() for branch in model]
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, kept in ticket.masks.items():
        assert is_plus_zero(model.get_parameter(name).detach()[~kept])


class _FreesGradients(torch.optim.Optimizer):
    """Writes to ``.data``, which changes no version counter, and drops each gradient as it goes."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter.data))
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.data.add_(momentum, alpha=-0.05)
                parameter.grad = None


@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
def test_zeros_stay_under_an_optimizer_that_writes_to_data_and_frees_gradients(build):
    model = make(build)
    optimizer = _FreesGradients(model.parameters())
    rst = RSTScheduler(model, 0.7, steps=4, seed=0)
    train(model, optimizer, rst, 4, INPUT_SHAPES[build])
    finalize_quietly(rst)
    for index in range(3):
        train(model, optimizer, rst, 1, INPUT_SHAPES[build], start=index)
        for name, kept in rst.masks.items():
            assert is_plus_zero(model.get_parameter(name).detach()[~kept])

"""What a scheduler promises in a loop of one process: λ, scheduler steps and phases."""

import math

import pytest
import torch
from models import finalize_quietly, make, mlp, transformer
from scheduled_loop import shrinking, train, update
from torch import nn

from torch_dual_ticket import RSTScheduler


def measured_penalty(layer, optimizer, kept) -> float:
    """λ of one update, read off what it does; the weights that stay do not move."""
    before = layer.weight.detach().clone()
    update(layer, optimizer)
    ratio = (layer.weight / before).detach()
    assert (ratio[kept] == 1).all()
    assert torch.allclose(ratio[~kept], ratio[~kept][0].expand(int((~kept).sum())), rtol=1e-12)
    return 1 - float(ratio[~kept][0])


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("linear", lambda t: t),
        ("quadratic", lambda t: t**2),
        ("cubic", lambda t: t**3),
        (lambda t: math.sin(t), lambda t: math.sin(t)),
        (lambda t: 0.25, lambda t: 0.25),
    ],
    ids=["linear", "quadratic", "cubic", "function", "constant"],
)
def test_update_k_applies_lambda_k(schedule, formula):
    layer, optimizer = shrinking()
    rst = RSTScheduler(layer, 0.5, steps=8, hold=3, max_penalty=0.6, schedule=schedule, seed=0)
    kept = rst.masks["weight"]
    for k in range(1, 14):
        expected = 0.6 * formula(min(1, k / 8))
        assert rst.penalty == pytest.approx(expected, rel=1e-14)
        assert rst.progress == pytest.approx(min(1, (k - 1) / 11))
        assert rst.done is (k > 11)
        assert rst.phase == "transform"
        assert measured_penalty(layer, optimizer, kept) == pytest.approx(expected, rel=1e-9)
        rst.step()
    finalize_quietly(rst)
    assert (rst.penalty, rst.progress, rst.done, rst.phase) == (0, 1, True, "finetune")


@pytest.mark.parametrize("position", ["after the update", "before the update", "before backward"])
def test_where_step_stands_in_the_loop_does_not_matter(position):
    layer, optimizer = shrinking()
    rst = RSTScheduler(layer, 0.5, steps=8, seed=0)
    kept = rst.masks["weight"]
    applied = []
    for _ in range(6):
        if position == "before backward":
            rst.step()
        layer.weight.grad = torch.zeros_like(layer.weight)
        if position == "before the update":
            rst.step()
        before = layer.weight.detach().clone()
        optimizer.step()
        applied.append(1 - float((layer.weight.detach() / before)[~kept][0]))
        if position == "after the update":
            rst.step()
    assert applied == pytest.approx([k / 8 for k in range(1, 7)])


def test_updates_between_two_scheduler_steps_apply_the_same_penalty():
    layer, optimizer = shrinking()
    rst = RSTScheduler(layer, 0.5, steps=8, seed=0)
    kept = rst.masks["weight"]
    for k in range(1, 5):
        assert [measured_penalty(layer, optimizer, kept) for _ in range(3)] == pytest.approx([k / 8] * 3)
        rst.step()
        assert rst.progress == k / 8


def test_a_scheduler_step_without_an_update_does_not_count():
    layer, optimizer = shrinking()
    rst = RSTScheduler(layer, 0.5, steps=8, seed=0)
    rst.step()
    assert (rst.progress, rst.penalty) == (0, 1 / 8)
    update(layer, optimizer)
    rst.step()
    rst.step()
    assert (rst.progress, rst.penalty) == (1 / 8, 2 / 8)
    layer.weight.grad = None
    optimizer.step()  # nothing to update, so nothing applied the penalty
    rst.step()
    assert rst.progress == 1 / 8


def test_an_update_with_lambda_zero_counts():
    layer, optimizer = shrinking()
    rst = RSTScheduler(layer, 0.5, steps=4, schedule=lambda t: max(0.0, t - 0.5), seed=0)
    kept = rst.masks["weight"]
    for expected in (0, 0, 0.25, 0.5):
        assert measured_penalty(layer, optimizer, kept) == pytest.approx(expected, abs=1e-15)
        rst.step()
    assert rst.done


def test_a_scheduler_without_a_penalty_counts_and_finalizes():
    model = make(mlp)
    rst = RSTScheduler(model, 0.5, steps=3, max_penalty=0, seed=0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), rst, 3, (12,))
    assert rst.done
    assert finalize_quietly(rst).total.residual > 0.1


@pytest.mark.parametrize("build", [mlp, transformer], ids=lambda build: build.__name__)
@pytest.mark.parametrize("cycles", [1, 3])
def test_repr_says_where_it_is_on_one_screen(build, cycles):
    model = nn.Sequential(*[make(build) for _ in range(60)])
    rst = RSTScheduler(model, 0.75, steps=2, hold=2, cycles=cycles, seed=7)
    text = repr(rst)
    assert len(text) < 240
    assert "\n" not in text
    layers = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    masks = f"masks for {layers} layers at {rst.sparsity:.2%} sparsity, not applied yet"
    for part in ("transform", f"0% of {4 * cycles} ", "λ=0.5", masks, "seed=7"):
        assert part in text
    assert ("cycle 1 of 3" in text) is (cycles == 3)


def test_the_given_optimizer_alone_applies_the_penalty():
    layer, optimizer = shrinking()
    other = torch.optim.SGD(layer.parameters(), lr=1.0)
    rst = RSTScheduler(layer, 0.5, steps=8, seed=0, optimizer=optimizer)
    kept = rst.masks["weight"]
    assert measured_penalty(layer, other, kept) == 0
    rst.step()
    assert rst.progress == 0
    assert measured_penalty(layer, optimizer, kept) == pytest.approx(1 / 8)
    rst.step()
    assert rst.progress == 1 / 8

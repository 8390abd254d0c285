"""Iterative RST: nested masks in cycles, λ starting again in each, on all that is masked so far."""

import copy

import pytest
import torch
from models import INPUT_SHAPES, assert_same, finalize_quietly, loss_of, mlp, transformer, twins
from reference import ExplicitLoop

from torch_dual_ticket import RSTScheduler

STEPS, HOLD, CYCLES, SPARSITY = 12, 5, 5, 0.9


def build_scheduler(model, **settings):
    return RSTScheduler(model, sparsity=SPARSITY, steps=STEPS, hold=HOLD, cycles=CYCLES, seed=5, **settings)


def train(model, optimizer, rst, updates, shape, start=0):
    for index in range(start, start + updates):
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()
        rst.step()


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("build", [mlp, transformer], ids=lambda build: build.__name__)
def test_five_cycles_agree_with_the_explicit_loop(build, distribution):
    model, other = twins(build)
    shape = INPUT_SHAPES[build]
    rst = build_scheduler(model, distribution=distribution)
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    other_optimizer = torch.optim.SGD(other.parameters(), **settings)
    index = 0
    for cycle in range(CYCLES):
        explicit = ExplicitLoop(other, rst.masks, steps=STEPS)
        for _ in range(STEPS + HOLD):
            assert rst.progress == pytest.approx(index / (CYCLES * (STEPS + HOLD)))
            assert rst.penalty == explicit.penalty
            assert f"cycle {cycle + 1} of {CYCLES}" in repr(rst)
            train(model, optimizer, rst, 1, shape, index)
            other_optimizer.zero_grad()
            loss_of(other, index, shape).backward()
            explicit.before_update()
            other_optimizer.step()
            explicit.after_update()
            index += 1
        assert_same(model, other)
    assert rst.done
    finalize_quietly(rst)
    explicit.finalize()
    for _ in range(20):
        train(model, optimizer, rst, 1, shape, index)
        other_optimizer.zero_grad()
        loss_of(other, index, shape).backward()
        explicit.before_update()
        other_optimizer.step()
        explicit.after_update()
        index += 1
    assert_same(model, other)


def test_masks_of_the_cycles_are_nested_and_have_the_exact_counts():
    model, _ = twins(mlp)
    rst = build_scheduler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    earlier = None
    for cycle in range(1, CYCLES + 1):
        masks = dict(rst.masks)
        for kept in masks.values():
            assert int((~kept).sum()) == round((1 - (1 - SPARSITY) ** (cycle / CYCLES)) * kept.numel())
        if earlier is not None:
            assert all((kept <= earlier[name]).all() for name, kept in masks.items())
        earlier = masks
        assert not any((parameter == 0).any() for parameter in model.parameters())  # nothing is zeroed in between
        train(model, optimizer, rst, STEPS + HOLD, (12,))


def test_erk_counts_are_nested_and_exact_in_total():
    model, _ = twins(mlp)
    rst = build_scheduler(model, distribution="erk")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    earlier = None
    for cycle in range(1, CYCLES + 1):
        masks = dict(rst.masks)
        total = sum(kept.numel() for kept in masks.values())
        assert sum(int((~kept).sum()) for kept in masks.values()) == round(
            (1 - (1 - SPARSITY) ** (cycle / CYCLES)) * total
        )
        if earlier is not None:
            assert all((kept <= earlier[name]).all() for name, kept in masks.items())
        earlier = masks
        train(model, optimizer, rst, STEPS + HOLD, (12,))


def test_finalize_with_cycles_outstanding_warns_and_ends_at_the_sparsity():
    model, _ = twins(mlp)
    rst = build_scheduler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, rst, STEPS + HOLD + 3, (12,))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserWarning, match="finalize\\(\\) in cycle 2 of 5"):
        rst.finalize()
    assert rst.phase == "transform"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="cycle 2 of 5"), pytest.warns(UserWarning, match="still held"):
        report = rst.finalize()
    assert [(layer.pruned, layer.size) for layer in report.layers] == [(216, 240), (288, 320), (72, 80)]
    assert rst.sparsity == SPARSITY


@pytest.mark.parametrize("updates", [3, STEPS + HOLD, 2 * (STEPS + HOLD) + 7, CYCLES * (STEPS + HOLD)])
def test_resuming_in_any_cycle_gives_the_undisturbed_run(updates):
    undisturbed, model = twins(mlp)
    rst = build_scheduler(undisturbed)
    optimizer = torch.optim.SGD(undisturbed.parameters(), lr=0.02, momentum=0.9)
    train(undisturbed, optimizer, rst, CYCLES * (STEPS + HOLD) + 5, (12,))

    rst = build_scheduler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train(model, optimizer, rst, updates, (12,))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), rst.state_dict()))
    rst.remove()
    restarted = mlp().double()
    rst = RSTScheduler(restarted, sparsity=SPARSITY, steps=STEPS, hold=HOLD, cycles=CYCLES)  # adopts the seed
    optimizer = torch.optim.SGD(restarted.parameters(), lr=0.02, momentum=0.9)
    for thing, state in zip((restarted, optimizer, rst), saved, strict=True):
        thing.load_state_dict(state)
    train(restarted, optimizer, rst, CYCLES * (STEPS + HOLD) + 5 - updates, (12,), start=updates)
    assert_same(restarted, undisturbed, tolerance=0)
    assert rst.state_dict()["ticks"] == CYCLES * (STEPS + HOLD)

"""Where and how often ``rst.step()`` is called."""

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, finalize_quietly, loss_of, make, mlp
from reference import ExplicitLoop

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]
POSITIONS = ["before-zero-grad", "before-backward", "before-update", "after-update"]


@pytest.mark.parametrize("position", POSITIONS)
def test_the_position_within_the_loop(position):
    """Update number k applies the k-th penalty, wherever ``rst.step()`` is called."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def step_at(here):
            if not side.is_explicit and position == here:
                side.scheduler_step()

        for index in updates(side):
            step_at("before-zero-grad")
            optimizer.zero_grad()
            loss = loss_of(model, index, SHAPE)
            step_at("before-backward")
            loss.backward()
            step_at("before-update")
            side.before_update()
            optimizer.step()
            step_at("after-update")
            side.updated()
            if side.is_explicit:
                side.scheduler_step()

    assert_same_life(train)


@pytest.mark.parametrize("every", [2, 5, 10], ids=lambda every: f"every-{every}")
def test_a_scheduler_step_for_several_updates(every):
    """All of them apply one λ, be it for each n updates or for each epoch."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            optimizer.step()
            side.updated()
            if index % every == every - 1:
                side.scheduler_step()

    rst = assert_same_life(train, steps=4)
    assert rst.state_dict()["ticks"] == min(4, 20 // every)


def test_no_scheduler_step_at_all():
    """λ stays what it is for the first update."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            optimizer.step()
            side.updated()

    rst = assert_same_life(train, steps=3)
    assert rst.progress == 0.0


def test_scheduler_steps_without_updates():
    """They do not count: not before the first update, not between two."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            if not side.is_explicit:
                side.scheduler_step()
                side.scheduler_step()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_lambda_as_it_is_shown():
    """``penalty`` is that of the next update; the schedule ends at the ceiling and stays there while it is held."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rst = RSTScheduler(model, sparsity=0.5, steps=4, hold=3, max_penalty=0.8)
    reference = ExplicitLoop(model, rst.masks, steps=4, max_penalty=0.8)
    shown = []
    for index in range(9):
        shown.append((rst.penalty, rst.progress, rst.done))
        assert rst.penalty == reference.penalty
        optimizer.zero_grad()
        loss_of(model, index, SHAPE).backward()
        optimizer.step()
        rst.step()
        reference.updates += 1
    assert [progress for _, progress, _ in shown] == [min(1.0, step / 7) for step in range(9)]
    assert [done for _, _, done in shown] == [step >= 7 for step in range(9)]
    finalize_quietly(rst)
    before = rst.state_dict()
    rst.step()
    assert rst.penalty == 0.0
    assert rst.state_dict() == before


def test_a_finalize_between_forward_and_backward_is_noticed():
    """The gradients would be those of the dense weights and of the sparse ones at once."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rst = RSTScheduler(model, sparsity=0.5, steps=1)
    loss_of(model, 0, SHAPE).backward()
    optimizer.step()
    rst.step()
    loss = loss_of(model, 1, SHAPE)
    finalize_quietly(rst)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

"""state_dict() and load_state_dict(): where a scheduler was, and that it goes on there."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from models import INPUT_SHAPES, assert_same, finalize_quietly, loss_of, make, mlp, wide
from scheduled_loop import train
from torch import nn

from torch_dual_ticket import RSTScheduler


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def begin(build=mlp, **settings):
    model = make(build)
    return model, sgd(model), RSTScheduler(model, **{"sparsity": 0.8, "steps": 6, "seed": 3, **settings})


@pytest.mark.parametrize("order", ["scheduler last", "scheduler first"])
@pytest.mark.parametrize("saved_at", [0, 1, 5, 6, 9, 12])
def test_goes_on_where_it_was(saved_at, order):
    """Twelve updates, ``finalize()`` after eight; a restart changes no bit."""
    model, optimizer, rst = begin()
    for index in range(12):
        if index == 8:
            finalize_quietly(rst)
        if index == saved_at:
            saved = copy.deepcopy((rst.state_dict(), model.state_dict(), optimizer.state_dict()))
            seen = (rst.penalty, rst.progress, rst.done, rst.phase, repr(rst))
        train(model, optimizer, rst, 1, (12,), start=index)
    if saved_at == 12:
        saved = copy.deepcopy((rst.state_dict(), model.state_dict(), optimizer.state_dict()))
        seen = (rst.penalty, rst.progress, rst.done, rst.phase, repr(rst))

    again = make(mlp, 1)
    new_optimizer, restarted = sgd(again), RSTScheduler(again, 0.8, steps=6, seed=3)
    if order == "scheduler first":
        restarted.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    new_optimizer.load_state_dict(saved[2])
    if order == "scheduler last":
        restarted.load_state_dict(saved[0])
    assert (restarted.penalty, restarted.progress, restarted.done, restarted.phase, repr(restarted)) == seen
    for index in range(saved_at, 12):
        if index == 8:
            finalize_quietly(restarted)
        train(again, new_optimizer, restarted, 1, (12,), start=index)
    assert_same(again, model, tolerance=0)
    if saved_at >= 8:
        assert restarted.finalize().total.pruned == rst.finalize().total.pruned


def test_an_update_that_has_no_scheduler_step_yet_is_in_the_state():
    model, optimizer, rst = begin()
    train(model, optimizer, rst, 2, (12,))
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    state = rst.state_dict()
    assert (state["ticks"], state["update_pending"]) == (2, True)
    _, _, restarted = begin()
    restarted.load_state_dict(state)
    restarted.step()
    assert restarted.progress == 3 / 6
    restarted.step()
    assert restarted.progress == 3 / 6

    rst.step()
    assert rst.state_dict()["update_pending"] is False
    restarted.load_state_dict(rst.state_dict())
    restarted.step()
    assert restarted.progress == 3 / 6


def test_the_state_has_no_masks_and_no_weights():
    model = nn.Linear(1000, 1000)
    rst = RSTScheduler(model, seed=0)
    state = rst.state_dict()
    assert len(json.dumps(state)) < 300  # of a million weights; and it consists of plain numbers and strings
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state
    rst.load_state_dict(state)


def test_a_scheduler_without_a_seed_adopts_that_of_the_state():
    _, _, rst = begin()
    _, _, fresh = begin(seed=None)
    assert fresh.seed != 3
    fresh.load_state_dict(rst.state_dict())
    assert fresh.seed == 3
    assert all(torch.equal(kept, rst.masks[name]) for name, kept in fresh.masks.items())


def test_the_adopted_masks_are_those_that_are_penalized_and_enforced():
    model, optimizer, rst = begin()
    train(model, optimizer, rst, 3, (12,))
    state = rst.state_dict()
    other, other_optimizer, fresh = begin(seed=None)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh.load_state_dict(state)
    for one, its_optimizer, its_rst in ((model, optimizer, rst), (other, other_optimizer, fresh)):
        train(one, its_optimizer, its_rst, 3, (12,), start=3)
        finalize_quietly(its_rst)
        train(one, its_optimizer, its_rst, 3, (12,), start=6)
    assert_same(other, model, tolerance=0)


@pytest.mark.parametrize("use", ["step", "finalize", "step and finalize"])
def test_a_scheduler_in_use_adopts_no_seed(use):
    _, _, rst = begin()
    model, optimizer, other = begin(seed=None)
    loss_of(model, 0, INPUT_SHAPES[mlp]).backward()
    optimizer.step()
    if "step" in use:
        other.step()
    if "finalize" in use:
        finalize_quietly(other)
    seed = other.seed
    with pytest.raises(ValueError, match=r"0\.weight differs"):
        other.load_state_dict(rst.state_dict())
    assert other.seed == seed


def test_one_update_without_a_scheduler_step_does_not_count_as_use():
    """torch.distributed.checkpoint makes one, to have the state of a new optimizer in place before it loads."""
    _, _, rst = begin()
    model, optimizer, other = begin(seed=None)
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    other.load_state_dict(rst.state_dict())
    assert other.state_dict() == rst.state_dict()
    assert all(torch.equal(kept, rst.masks[name]) for name, kept in other.masks.items())


@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
def test_back_from_finetuning_to_the_transformation(build):
    model, optimizer, rst = begin(build)
    train(model, optimizer, rst, 3, (12,))
    saved = copy.deepcopy((rst.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, rst, 3, (12,), start=3)
    later = copy.deepcopy(model.state_dict())
    finalize_quietly(rst)
    train(model, optimizer, rst, 3, (12,), start=6)

    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    rst.load_state_dict(saved[0])

    assert rst.phase == "transform"
    train(model, optimizer, rst, 3, (12,), start=3)
    assert (model[0].weight != 0).all()
    assert all(torch.equal(value, later[name]) for name, value in model.state_dict().items())


def test_a_finetuning_state_brings_the_zeros_with_it():
    model, optimizer, rst = begin()
    train(model, optimizer, rst, 3, (12,))
    finalize_quietly(rst)
    other, _, fresh = begin(seed=None)
    fresh.load_state_dict(rst.state_dict())  # and never the weights
    assert fresh.phase == "finetune"
    for name, kept in rst.masks.items():
        assert torch.equal(other.get_parameter(name) != 0, kept)


def test_the_report_stays_that_of_finalize():
    """What was lost then cannot be measured later."""
    model, optimizer, rst = begin()
    train(model, optimizer, rst, 3, (12,))
    report = finalize_quietly(rst)
    assert report.total.residual > 0
    rst.load_state_dict(rst.state_dict())
    assert rst.finalize() == report
    restarted = begin()[2]  # its weights say nothing of what was lost
    restarted.load_state_dict(json.loads(json.dumps(rst.state_dict())))
    assert restarted.finalize() == report


def test_another_schedule_may_go_on_from_a_state():
    """Only the masks must be the same: somebody may prolong a transformation."""
    model, optimizer, rst = begin()
    train(model, optimizer, rst, 3, (12,))
    _, _, longer = begin(steps=12)
    longer.load_state_dict(rst.state_dict())
    assert (longer.progress, longer.penalty) == (3 / 12, 4 / 12)
    _, _, shorter = begin(steps=2)
    shorter.load_state_dict(rst.state_dict())
    assert (shorter.progress, shorter.done, shorter.penalty) == (1, True, 1)


def test_a_schedule_that_raises_leaves_everything_as_it_was():
    def breaks(progress):
        if progress > 0.5:
            raise ArithmeticError
        return progress

    model, optimizer, rst = begin()
    train(model, optimizer, rst, 3, (12,))
    fresh = begin(seed=None, schedule=breaks)[2]
    seed = fresh.seed
    with pytest.raises(ArithmeticError):
        fresh.load_state_dict(rst.state_dict())
    assert (fresh.seed, fresh.progress) == (seed, 0)


def test_weights_changed_without_a_trace_before_a_second_finalize():
    """Through ``.data``: nothing tells them from those that the first one set to zero."""
    model, optimizer, rst = begin()
    train(model, optimizer, rst, 3, (12,))
    saved = rst.state_dict()
    finalize_quietly(rst)
    rst.load_state_dict(saved)
    for parameter in model.parameters():
        parameter.data.fill_(1)
    finalize_quietly(rst)
    for name, kept in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, kept)


def test_back_to_the_beginning():
    """What was applied before counts no more: the penalty is added anew, also to gradients that have it."""
    model, optimizer, rst = begin()
    start, kept = rst.state_dict(), rst.masks["0.weight"]
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    loss_of(model, 0, INPUT_SHAPES[mlp]).backward()
    expected = model[0].weight.grad + 2 * rst.penalty * ~kept * model[0].weight
    optimizer.step()
    rst.load_state_dict(start)
    with pytest.raises(RuntimeError, match="no update ever applied the penalty"):
        rst.finalize()
    optimizer.step()
    assert torch.allclose(model[0].weight.grad, expected, rtol=1e-12)
    rst.step()
    assert rst.progress == 1 / 6


def test_back_between_apply_penalty_and_its_scheduler_step():
    """An update by an optimizer of torch applies the penalty again."""
    model, optimizer, rst = begin()
    start = rst.state_dict()
    loss_of(model, 0, INPUT_SHAPES[mlp]).backward()
    rst.apply_penalty()
    rst.load_state_dict(start)
    train(model, optimizer, rst, 1, (12,))
    assert rst.progress == 1 / 6


def test_a_scheduler_step_before_weights_are_loaded():
    """They have changed since it, and no update applied the penalty; no call is missing, and nothing is said."""
    model, optimizer, rst = begin()
    rst.step()
    model.load_state_dict(make(mlp, seed=1).state_dict())
    rst.load_state_dict(rst.state_dict())
    rst.step()  # warnings are errors
    train(model, optimizer, rst, 1, (12,))
    assert rst.progress == 1 / 6


def test_a_finalized_state_needs_layers_to_hold():
    model, optimizer, rst = begin()
    train(model, optimizer, rst, 3, (12,))
    _, rst_of_copy = copy.deepcopy((model, rst))
    finalize_quietly(rst)
    before = rst_of_copy.state_dict()
    with pytest.raises(RuntimeError, match="manages no layer"):
        rst_of_copy.load_state_dict(rst.state_dict())
    assert rst_of_copy.phase == "transform"
    assert rst_of_copy.state_dict() == before


def test_numpy_integers_leave_a_state_that_can_be_saved():
    model, optimizer, rst = begin(steps=np.int64(3), hold=np.int64(1))
    train(model, optimizer, rst, 6, (12,))
    assert json.loads(json.dumps(rst.state_dict())) == rst.state_dict()

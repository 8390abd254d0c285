"""A transformation that never ends: the schedule that fits a training, and the word where none came to finalize()."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from torch_dual_ticket import RSTScheduler, release

ENDED = "a transformation ended at"


@pytest.fixture(autouse=True)
def no_exception_before(monkeypatch):
    """Of a test that failed: what ends after an exception is not warned of."""
    monkeypatch.delattr(sys, "last_value", raising=False)


def begun(steps=4, made=2):
    """A scheduler that has made some of its steps."""
    model = nn.Linear(8, 4)
    rst = RSTScheduler(model, 0.5, steps=steps, max_penalty=9.0, seed=0)
    train(model, rst, made)
    return model, rst


def train(model, rst, updates=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(updates):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        rst.step()


def said(end):
    """What is said of an end, and where."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        end()
    return [(str(warning.message), warning.filename) for warning in found if ENDED in str(warning.message)]


def test_a_scheduler_that_is_dropped_midway_says_how_far_it_came():
    kept = [begun()]
    [(message, filename)] = said(kept.clear)
    assert "ended at 2 of 4 steps" in message
    assert "updates=N" in message
    assert filename == __file__


def test_a_schedule_that_is_over_but_not_finalized():
    kept = [begun(made=4)]
    [(message, _)] = said(kept.clear)
    assert "call rst.finalize() when rst.done says so" in message


def never_stepped():
    return begun(made=0)


def finalized():
    model, rst = begun()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rst.finalize()
    return model, rst


def removed():
    model, rst = begun()
    rst.remove()
    return model, rst


def released():
    model, rst = begun()
    release(model)
    return model, rst


def resumed_to_look_at(is_pending=False):
    model, rst = begun()
    if is_pending:
        model(torch.ones(2, model.in_features)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    state = rst.state_dict()
    rst.remove()
    rst = RSTScheduler(model, 0.5, steps=4, seed=0)
    rst.load_state_dict(state)
    return model, rst


def resumed_between_an_update_and_its_step():
    return resumed_to_look_at(is_pending=True)


def saved():
    model, rst = begun()
    rst.state_dict()
    return model, rst


@pytest.mark.parametrize(
    "make",
    [
        never_stepped,
        finalized,
        removed,
        released,
        resumed_to_look_at,
        resumed_between_an_update_and_its_step,
        saved,
    ],
)
def test_nothing_is_said_where_nothing_was_left_undone(make):
    kept = [make()]
    assert said(kept.clear) == []


def test_steps_after_the_last_saved_state_are_lost():
    kept = [saved()]
    train(*kept[0])
    [(message, _)] = said(kept.clear)
    assert "ended at 3 of 4 steps" in message
    assert "where it goes on later, rst.state_dict() after its last step" in message


def test_what_is_over_does_not_go_on_from_a_saved_state():
    kept = [begun(made=4)]
    kept[0][1].state_dict()
    [(message, _)] = said(kept.clear)
    assert "call rst.finalize()" in message


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_nothing_is_said_of_copies(duplicate):
    kept = begun()
    copies = [duplicate(kept)]
    assert said(copies.clear) == []
    assert kept[1].progress == 0.5


def test_nothing_is_said_where_an_exception_has_ended_the_training():
    kept = [begun()]

    def end():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            kept.clear()

    assert said(end) == []


END = """
import torch
from torch import nn
from torch_dual_ticket import RSTScheduler

def train():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rst = RSTScheduler(model, 0.5, steps=400, max_penalty=90.0)
    for _ in range(3):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        rst.step()
    return model, rst

"""


@pytest.mark.parametrize(
    ("last", "times"),
    [
        ("kept = train()", 1),
        ("train()", 1),
        ("import sys; kept = train(); sys.exit()", 1),
        ("kept = train(); kept[1].remove()", 0),
        ("import sys; kept = train(); kept[1].state_dict(); sys.exit()", 0),
        ("import sys\ndef main(): kept = train(); 1 / 0\ntry: main()\nexcept Exception as error: sys.exit(1)", 1),
        ("import os; kept = train(); child = os.fork(); child and os.waitpid(child, 0)", 1),
        ("kept = train(); 1 / 0", 0),
        ("kept = train(); raise KeyboardInterrupt", 0),
    ],
)
def test_a_process_that_ends_midway(last, times):
    shown = subprocess.run([sys.executable, "-c", END + last], capture_output=True, text=True, timeout=120)
    assert shown.stderr.count(f"{ENDED} 3 of 400 steps") == times
    assert "ignored" not in shown.stderr
    assert "weakref.py" not in shown.stderr


# ---------------------------------------------------------------------- a schedule that fits the training


@pytest.mark.parametrize(
    ("updates", "cycles", "steps", "hold"),
    [(20_000, 1, 4000, 1000), (403, 1, 80, 20), (4, 1, 1, 0), (20_000, 5, 800, 200), (20, 5, 1, 0), (399, 3, 27, 6)],
)
def test_updates_of_the_whole_training_are_shared_out(updates, cycles, steps, hold):
    """A quarter of them for all cycles together, a fifth of that at the ceiling."""
    settings = {"cycles": cycles, "seed": 0, "max_penalty": 2.0}
    rst = RSTScheduler(nn.Linear(40, 40), 0.9, updates=updates, **settings)
    same = RSTScheduler(nn.Linear(40, 40), 0.9, steps=steps, hold=hold, **settings)
    assert repr(rst) == repr(same)
    assert (rst._timeline.steps, rst._timeline.hold) == (steps, hold)
    assert cycles * (steps + hold) <= updates / 4


def test_without_updates_the_paper_decides():
    assert "0% of 10,000 steps" in repr(RSTScheduler(nn.Linear(4, 4)))


def test_the_sparsity_of_masks_that_are_not_applied_yet_is_not_that_of_the_model():
    _model, rst = begun()
    assert "masks for 1 layer at 50.00% sparsity, not applied yet" in repr(rst)
    _model, rst = finalized()
    assert "steps, λ=0, 1 layer at 50.00% sparsity, seed=0" in repr(rst)

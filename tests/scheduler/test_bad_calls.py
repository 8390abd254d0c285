"""Methods called at the wrong time or with what they cannot use: the right error, and nothing changed."""

import re

import pytest
import torch
from models import finalize_quietly
from snapshots import snapshot
from test_bad_input import named, plain, weight_normed
from torch import nn

from torch_dual_ticket import RSTScheduler


def tied() -> nn.Module:
    model = named(first=nn.Linear(8, 8), second=nn.Linear(8, 8))
    model.second.weight = model.first.weight
    return model


def update(model: nn.Module, rst: RSTScheduler, count: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.ones(2, next(iter(model.parameters())).shape[1])
    for _ in range(count):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        rst.step()


def begin(build=plain, **settings):
    model = build()
    return model, RSTScheduler(model, **{"sparsity": 0.5, "seed": 0, "steps": 9, **settings})


def underway(build=plain, **settings):
    model, rst = begin(build, **settings)
    update(model, rst)
    return model, rst


def finalized(build=plain, **settings):
    model, rst = underway(build, **settings)
    finalize_quietly(rst)
    return model, rst


def without_gradients():
    model, rst = underway()
    model.zero_grad()
    return model, rst


def removed(life=underway):
    model, rst = life()
    rst.remove()
    return model, rst


def about_to_fail():
    """The next step of the schedule raises."""
    model, rst = begin(schedule=lambda progress: float("nan") if progress > 0.5 else progress)
    update(model, rst)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return model, rst


STATE = underway()[1].state_dict()
STATE_OF_A_MODEL = plain().state_dict()
OTHER_NAMES, OTHER_SHAPES = nn.Linear(6, 8), named(first=nn.Linear(7, 8))
OTHER_LAYERS = RSTScheduler(named(first=nn.Linear(6, 8)), 0.5, seed=0).state_dict()
FOREIGN = r"not a state_dict\(\) of an RSTScheduler: needs version, ticks.* got "
DAMAGED = r"a damaged state_dict\(\) of an RSTScheduler, with "
NOT_MINE = "the state belongs to other masks: {}.*Build the scheduler as the saved one was built: same seed, sparsity"

# id: the life so far, the call, the type of the error, and what its message must have
CALLS = {
    "finalize-at-once": (begin, lambda rst: rst.finalize(), RuntimeError, "no update ever applied .*rst.apply_penalty"),
    "finalize-removed": (
        removed,
        lambda rst: rst.finalize(),
        RuntimeError,
        "manages no layer.*Build a new RSTScheduler",
    ),
    "finalize-layout": (
        underway,
        lambda rst: rst.finalize(layout="csr"),
        ValueError,
        "layout 'csr'; allowed are 'plain' and 'prune'",
    ),
    "finalize-prune-tied": (
        lambda: underway(tied),
        lambda rst: rst.finalize(layout="prune"),
        ValueError,
        "first.weight is tied.* Leave the model in the plain layout",
    ),
    "finalize-prune-parametrized": (
        lambda: underway(weight_normed),
        lambda rst: rst.finalize(layout="prune"),
        ValueError,
        "head.parametrizations.weight.original1 is parametrized.* plain layout",
    ),
    "to_prune-early": (underway, lambda rst: rst.to_prune(), RuntimeError, r"call finalize\(\) first"),
    "to_prune-removed": (
        lambda: removed(finalized),
        lambda rst: rst.to_prune(),
        RuntimeError,
        r"no layer is managed any more: call it before.*hold\(model\)\.to_prune\(\)",
    ),
    "to_prune-tied": (lambda: finalized(tied), lambda rst: rst.to_prune(), ValueError, "first.weight is tied"),
    "apply_penalty-early": (
        without_gradients,
        lambda rst: rst.apply_penalty(),
        RuntimeError,
        r"no gradient on any target; call it after loss.backward",
    ),
    "apply_masks-no-module": (
        finalized,
        lambda rst: rst.apply_masks({}),
        TypeError,
        "needs a .*Module, got dict",
    ),
    "apply_masks-name": (
        finalized,
        lambda rst: rst.apply_masks(OTHER_NAMES),
        ValueError,
        r"same structure: first.weight has shape \(8, 6\) here, and no such parameter in the given Linear",
    ),
    "apply_masks-shape": (
        finalized,
        lambda rst: rst.apply_masks(OTHER_SHAPES),
        ValueError,
        r"first.weight has shape \(8, 6\) here, and shape \(8, 7\) in the given",
    ),
    "step-schedule": (about_to_fail, lambda rst: rst.step(), ValueError, "must return a finite float"),
    "load-none": (underway, lambda rst: rst.load_state_dict(None), ValueError, FOREIGN + "NoneType"),
    "load-empty": (underway, lambda rst: rst.load_state_dict({}), ValueError, FOREIGN + r"\[\]"),
    "load-a-models": (
        underway,
        lambda rst: rst.load_state_dict(STATE_OF_A_MODEL),
        ValueError,
        FOREIGN + r"\['body.0.bias'",
    ),
    "load-version": (
        underway,
        lambda rst: rst.load_state_dict({**STATE, "version": 99}),
        ValueError,
        "a state of version 99; this release reads version 1",
    ),
    "load-ticks": (underway, lambda rst: rst.load_state_dict({**STATE, "ticks": -1}), ValueError, DAMAGED + "ticks=-1"),
    "load-phase": (
        underway,
        lambda rst: rst.load_state_dict({**STATE, "phase": "rest"}),
        ValueError,
        DAMAGED + ".*phase='rest'",
    ),
    "load-masks": (
        underway,
        lambda rst: rst.load_state_dict({**STATE, "masks": [1]}),
        ValueError,
        DAMAGED + r"masks=\[1\]",
    ),
    "load-report": (
        underway,
        lambda rst: rst.load_state_dict({**STATE, "report": [["first.weight", 1]]}),
        ValueError,
        DAMAGED + r"report=\[\['first.weight', 1\]\]",
    ),
    "load-report-of-text": (
        underway,
        lambda rst: rst.load_state_dict({**STATE, "report": [["first.weight", "1", 2, 0.0, 1.0]]}),
        ValueError,
        DAMAGED + "report=",
    ),
    "load-seed": (
        lambda: underway(seed=1),
        lambda rst: rst.load_state_dict(STATE),
        ValueError,
        r"first.weight differs \(the seeds differ: 1 here, 0 in the state\)",
    ),
    "load-given-seed": (
        lambda: begin(seed=1),
        lambda rst: rst.load_state_dict(STATE),
        ValueError,
        NOT_MINE.format("first.weight differs"),
    ),
    "load-sparsity": (
        lambda: underway(sparsity={"head": 0.6, "*": 0.5}),
        lambda rst: rst.load_state_dict(STATE),
        ValueError,
        NOT_MINE.format("head.weight differs"),
    ),
    "load-fewer-layers": (
        underway,
        lambda rst: rst.load_state_dict(OTHER_LAYERS),
        ValueError,
        NOT_MINE.format("body.0.weight is only here"),
    ),
    "load-more-layers": (
        lambda: underway(exclude=["head"]),
        lambda rst: rst.load_state_dict(STATE),
        ValueError,
        NOT_MINE.format("head.weight is only there"),
    ),
    "load-finalized-foreign": (
        lambda: finalized(seed=1),
        lambda rst: rst.load_state_dict(STATE),
        ValueError,
        NOT_MINE.format("first.weight differs"),
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_method_refuses_and_changes_nothing(case):
    life, call, error, message = CALLS[case]
    model, rst = life()
    before, state = snapshot(model), (rst.state_dict(), repr(rst), rst.penalty, rst.residual())

    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        call(rst)

    assert snapshot(model) == before
    assert (rst.state_dict(), repr(rst), rst.penalty, rst.residual()) == state


def test_apply_masks_leaves_a_model_that_does_not_fit_as_it_was():
    _, rst = finalized()
    model = plain()
    model.head = nn.Linear(9, 4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head\.weight has shape"):
        rst.apply_masks(model)
    assert snapshot(model) == before

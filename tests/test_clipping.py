"""Gradient clipping: the penalty comes after it, and masked weights do not weigh in it once they are zero."""

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, cnn, loss_of, mlp, transformer, wide
from torch import nn

CLIPPINGS = {
    "by-norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05),
    "by-norm-foreach": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05, foreach=True),
    "by-largest": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.01, norm_type=float("inf")),
    "by-value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.003),
}


@pytest.mark.parametrize("build", [mlp, wide, cnn, transformer], ids=lambda build: build.__name__)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_clipping(clipping, build):
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[build]).backward()
            side.after_backward()
            CLIPPINGS[clipping](list(model.parameters()))
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train, build)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("when", ["from the start", "later"])
@pytest.mark.filterwarnings("ignore:Profiler", "ignore:`torch.jit", "ignore::DeprecationWarning:torch")
def test_clipping_in_a_hook_of_the_optimizer(when, compiled):
    """The penalty comes after it here too, although torch runs hooks for all optimizers before those of one."""

    def train(model, side):
        def clip(*_):
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        torch.compiler.reset()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for index in updates(side):
            if index == (0 if when == "from the start" else 3) and not side.by_hand:
                optimizer.register_step_pre_hook(clip)
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.after_backward()
            if side.by_hand and (index >= 3 or when == "from the start"):
                clip()
            side.before_update()
            step()
            side.after_update()

    assert_same_life(train)


def test_clipping_before_the_first_step_of_a_finalised_model():
    """No hook of an optimizer has run yet; that of the parameter has."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for index in updates(side, count=21, middle=20):
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_the_norm_that_is_reported():
    """It is that of the weights that are left."""
    norms = {True: [], False: []}

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.after_backward()
            norms[side.by_hand].append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)
    torch.testing.assert_close(torch.stack(norms[False]), torch.stack(norms[True]), rtol=1e-12, atol=0.0)

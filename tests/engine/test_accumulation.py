"""Several backward passes for one update: the penalty comes once, whatever became of the gradients in between."""

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, loss_of, mlp, transformer
from torch import nn

PARTS = 4


@pytest.mark.parametrize("placement", ["each-update", "each-backward"])
@pytest.mark.parametrize("build", [mlp, transformer], ids=lambda build: build.__name__)
def test_accumulation(build, placement):
    """A scheduler step without an update does not count, so that ``rst.step()`` may stand in the inner loop."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for index in updates(side):
            optimizer.zero_grad()
            for part in range(PARTS):
                (loss_of(model, PARTS * index + part, INPUT_SHAPES[build]) / PARTS).backward()
                if not side.is_explicit and placement == "each-backward" and part < PARTS - 1:
                    side.scheduler_step()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train, build)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_gradients_that_are_zeroed_in_place(kind):
    """``zero_grad(set_to_none=False)``: it is the same gradient that gets its penalty again, once an update."""

    def train(model, side):
        optimizer = kind(model.parameters(), lr=0.02)
        for index in updates(side):
            optimizer.zero_grad(set_to_none=False)
            for part in range(PARTS):
                loss_of(model, PARTS * index + part, INPUT_SHAPES[mlp]).backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_gradients_that_are_never_zeroed():
    """What an update got as its penalty is then a part of the next one's gradient, as in the explicit loop."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
        for index in updates(side):
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_gradients_that_are_written_past_autograd():
    """Through ``.data``, which leaves no trace on the gradient."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for index in updates(side):
            loss = loss_of(model, index, INPUT_SHAPES[mlp])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad.data.copy_(gradient)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_two_optimizers_that_update_from_one_gradient():
    """A gradient gets its penalty once: the second update of the scheduler step finds it there."""

    def train(model, side):
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.02), torch.optim.Adam(model.parameters(), lr=1e-3)]
        for index in updates(side):
            model.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.before_update()
            for optimizer in optimizers:
                optimizer.step()
                side.updated()
            side.scheduler_step()

    assert_same_life(train)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_backward_through_the_gradient():
    """``create_graph=True``, for a penalty on the gradient's norm: the gradients themselves have a history."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for index in updates(side):
            optimizer.zero_grad()
            x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(index)).requires_grad_()
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            loss = loss_of(model, index, INPUT_SHAPES[mlp]) + 0.01 * slope.square().mean()
            loss.backward(create_graph=index % 2 == 1)
            side.before_update()
            optimizer.step()
            optimizer.zero_grad()
            side.after_update()

    assert_same_life(train)


def test_finalize_in_the_middle_of_an_accumulation():
    """The gradient so far is masked, and so are the parts that follow."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for index in range(30):
            optimizer.zero_grad()
            for part in range(PARTS):
                if (index, part) == (15, 2):
                    side.finalize()
                loss_of(model, PARTS * index + part, INPUT_SHAPES[mlp]).backward()
            side.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_finalize_between_backward_and_update():
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for index in range(30):
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            if index == 15:
                side.finalize()
            side.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)

"""Updates that compute their own gradients: ``optimizer.step(closure)``."""

import functools
import inspect

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, loss_of, mlp
from torch import nn

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]


def closure_of(model, side, optimizer, index):
    """What people write, with the calls of the explicit loop in it."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, index, SHAPE)
        loss.backward()
        side.before_update()
        return loss

    return closure


def positional(optimizer, closure):
    return optimizer.step(closure)


def keyword(optimizer, closure):
    return optimizer.step(closure=closure)


def callable_object(optimizer, closure):
    """It has no ``__name__``."""
    return optimizer.step(functools.partial(closure))


@pytest.mark.parametrize("call", [positional, keyword, callable_object], ids=lambda call: call.__name__)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_a_step_with_a_closure(call, kind):
    """Nothing is in ``.grad`` when the step begins: the penalty is added when the closure has filled it."""

    def train(model, side):
        optimizer = kind(model.parameters(), lr=1e-2)
        for index in updates(side):
            closure = closure_of(model, side, optimizer, index)
            with torch.no_grad():
                expected = loss_of(model, index, SHAPE)
            assert torch.equal(call(optimizer, closure), expected)  # the loss is passed on as it is
            side.after_update()

    assert_same_life(train)


def test_the_closure_of_an_optimizer_that_holds_nothing_is_passed_on_as_it_is():
    class Asks(torch.optim.SGD):
        def step(self, closure):
            return closure

    RSTScheduler(mlp(), sparsity=0.5)
    assert Asks(mlp().parameters()).step(len) is len


def test_one_closure_for_the_whole_training():
    """It is wrapped anew for each step, and not once more on top of the last wrapping."""
    depths = {True: set(), False: set()}

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        indices = updates(side)
        coming = [next(indices)]

        def closure():
            depths[side.is_explicit].add(len(inspect.stack()))
            return closure_of(model, side, optimizer, coming[0])()

        while coming:
            optimizer.step(closure)
            side.after_update()
            coming = [index for index in [next(indices, None)] if index is not None]

    assert_same_life(train)
    assert len(depths[False]) == 1


def test_a_closure_that_accumulates_and_clips():
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index in updates(side):

            def closure(index=index):
                optimizer.zero_grad()
                losses = [loss_of(model, 3 * index + part, SHAPE) for part in range(3)]
                for loss in losses:
                    loss.backward()
                side.after_backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                side.before_update()
                return sum(losses)

            optimizer.step(closure)
            side.after_update()

    assert_same_life(train)


def test_a_closure_that_returns_nothing():
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index in updates(side):

            def closure(index=index):
                closure_of(model, side, optimizer, index)()

            assert optimizer.step(closure) is None
            side.after_update()

    assert_same_life(train)


class Halving(torch.optim.SGD):
    """Changes what the closure has computed, and hands the whole down to the step that it inherits."""

    def change(self, parameter):
        parameter.grad.mul_(0.5)

    def step(self, closure):
        def changed():
            loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.change(parameter)
            return loss

        return super().step(changed)


class Replacing(Halving):
    def change(self, parameter):
        parameter.grad = parameter.grad.sign() * 0.01 + parameter.grad


@pytest.mark.parametrize("scheduler_steps", ["each", "every-third"])
@pytest.mark.parametrize("kind", [Halving, Replacing], ids=lambda kind: kind.__name__)
def test_a_subclass_that_hands_down_its_own_closure(kind, scheduler_steps):
    """One update and one penalty, though the hooks fire at each level and see gradients that are not the same."""
    torch.optim.SGD([torch.zeros(1)])  # from here on, the inherited steps fire their own hooks
    Halving([torch.zeros(1)])

    def train(model, side):
        optimizer = kind(model.parameters(), lr=0.05)
        for index in updates(side):
            optimizer.step(closure_of(model, side, optimizer, index))
            side.updated()
            if scheduler_steps == "each" or index % 3 == 2:
                side.scheduler_step()

    assert_same_life(train)


def test_one_of_two_optimizers_takes_a_closure():
    """What the other has applied since the last scheduler step still counts after it: nothing warns that it did not."""

    def train(model, side):
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.05) for part in (model[:2], model[2:])]

        def closure(optimizer, index):
            model.zero_grad()
            loss = loss_of(model, index, SHAPE)
            loss.backward(inputs=optimizer.param_groups[0]["params"])
            side.before_update()
            return loss

        for index in updates(side):
            closure(optimizers[0], index)
            optimizers[0].step()
            optimizers[1].step(functools.partial(closure, optimizers[1], index))
            side.after_update()

    assert_same_life(train)


class Recomputing(torch.optim.SGD):
    """Hands a closure down that it was not given itself; the gradients that it finds are those of the last update."""

    def step(self):
        return super().step(self.closure)


class ComputingAlone(torch.optim.SGD):
    """Finds no gradients, and makes them before the step that it inherits."""

    def step(self):
        self.closure()
        return super().step()


@pytest.mark.parametrize("kind", [Recomputing, ComputingAlone], ids=lambda kind: kind.__name__)
def test_a_subclass_that_makes_the_gradients_itself(kind):
    torch.optim.SGD([torch.zeros(1)])  # from here on, the inherited steps fire their own hooks

    def train(model, side):
        optimizer = kind(model.parameters(), lr=0.05)
        for index in updates(side):
            optimizer.closure = closure_of(model, side, optimizer, index)
            if kind is ComputingAlone:
                optimizer.zero_grad()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


class Scaled(torch.optim.SGD):
    """Its step takes something else than a closure."""

    def step(self, share):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(share)
        return super().step()


def test_a_step_with_another_argument():
    def train(model, side):
        optimizer = Scaled(model.parameters(), lr=0.05)
        for index in updates(side):
            closure_of(model, side, optimizer, index)()
            optimizer.step(0.5 + index % 2)
            side.after_update()

    assert_same_life(train)


class Uncalled(nn.Module):
    """Uses the weights of layers that it does not call."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x):
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, self.inner.weight)), self.outer.weight)


class Rewrapping(torch.optim.LBFGS):
    """Hands its own closure down to the step that it inherits, which fires the hooks again."""

    def step(self, closure):
        return super().step(lambda: closure())


LINE_SEARCHES = {"fixed": None, "strong-wolfe": "strong_wolfe"}


@pytest.mark.parametrize("build", [mlp, Uncalled], ids=lambda build: build.__name__)
@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Rewrapping], ids=lambda kind: kind.__name__)
def test_lbfgs(line_search, kind, build):
    """It compares losses along a line: the loss that it sees has the term whose gradient the penalty is.

    Where a layer's own forward never runs, what the line search has moved is zero again before the closure.
    """
    torch.optim.LBFGS([torch.zeros(1)])  # from here on, the step that a subclass inherits fires its own hooks
    evaluations = {True: 0, False: 0}

    def train(model, side):
        optimizer = kind(
            model.parameters(), lr=0.5, max_iter=4, history_size=5, line_search_fn=LINE_SEARCHES[line_search]
        )
        for index in updates(side, count=12, middle=6):

            def closure(index=index):
                evaluations[side.is_explicit] += 1
                optimizer.zero_grad()
                if side.is_explicit and side.finalized:
                    side.updated()  # the line search has moved masked weights
                loss = loss_of(model, index, SHAPE)
                loss.backward()
                side.before_update()
                return loss + side.penalty_of_loss()

            optimizer.step(closure)
            side.after_update()

    assert_same_life(train, build, steps=4, max_penalty=0.3)
    assert evaluations[True] == evaluations[False] > 24

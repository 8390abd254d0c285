"""Optimizers made of other optimizers: SAM, Lookahead, one for each parameter in the backward pass."""

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, loss_of, mlp
from plain_loop import UninitializedWrapper
from torch import nn

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization: the gradient of a neighbor uphill, applied here by the optimizer inside."""

    def __init__(self, parameters, before_update, radius=0.05, keep=lambda inner: inner):
        super().__init__(parameters, {"lr": 0.05})
        inner = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.inner, self.inner_step = keep(inner), inner.step
        self.param_groups = inner.param_groups
        self.before_update, self.radius = before_update, radius

    @property
    def parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def climb(self):
        norm = torch.stack([parameter.grad.norm() for parameter in self.parameters]).norm()
        for parameter in self.parameters:
            self.state[parameter]["here"] = parameter.detach().clone()
            parameter.add_(parameter.grad, alpha=float(self.radius / norm))
        self.zero_grad()

    @torch.no_grad()
    def descend(self):
        for parameter in self.parameters:
            parameter.data = self.state[parameter]["here"]
        self.before_update()
        self.inner_step()

    def step(self, closure):
        self.climb()
        with torch.enable_grad():
            closure()
        self.descend()


@pytest.mark.parametrize("scheduler_steps", ["each", "every-third"])
@pytest.mark.parametrize("call", ["two-calls", "closure"])
@pytest.mark.parametrize(
    "keep",
    [lambda inner: inner, lambda inner: [inner], lambda inner: {"base": inner}],
    ids=["attribute", "list", "dict"],
)
def test_sam(keep, call, scheduler_steps):
    """The penalty is that of the weights that are updated, not of their neighbor; once, on the final gradient."""

    def train(model, side):
        optimizer = SAM(model.parameters(), side.before_update, keep=keep)
        for index in updates(side):

            def closure(index=index):
                loss_of(model, index, SHAPE).backward()
                side.after_backward()

            optimizer.zero_grad()
            closure()
            if call == "closure":
                optimizer.step(closure)
            else:
                optimizer.climb()
                closure()
                optimizer.descend()
            side.updated()
            if scheduler_steps == "each" or index % 3 == 2:
                side.scheduler_step()

    assert_same_life(train)


class Lookahead:
    """Slow weights that follow the fast ones of the optimizer inside, every third update."""

    def __init__(self, inner):
        self.inner, self.updates = inner, 0
        self.slow = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self):
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.updates += 1
        if self.updates % 3 == 0:
            with torch.no_grad():
                for slow, parameter in zip(self.slow, self._parameters(), strict=True):
                    slow.lerp_(parameter, 0.5)
                    parameter.copy_(slow)
        return loss


class LookaheadOptimizer(Lookahead, torch.optim.Optimizer):
    """The same, as an optimizer."""

    def __init__(self, inner):
        torch.optim.Optimizer.__init__(self, inner.param_groups, {})
        Lookahead.__init__(self, inner)
        self.param_groups = inner.param_groups


@pytest.mark.parametrize("kind", [Lookahead, LookaheadOptimizer], ids=lambda kind: kind.__name__)
def test_lookahead(kind):
    """The slow weights bring back what was zeroed; where the wrapper is not an optimizer, until the next forward."""

    def train(model, side):
        optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.05))
        for index in updates(side):
            model.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            optimizer.step()
            side.after_update()
        loss_of(model, 0, SHAPE)

    assert_same_life(train)


def test_one_optimizer_for_each_parameter_stepping_in_the_backward_pass():
    """Their hooks run before ours, which are registered later: the gradient is masked when their step begins."""

    def prepare(model):
        optimizers = {parameter: torch.optim.Adafactor([parameter], lr=0.05) for parameter in model.parameters()}
        moments = []

        def update(parameter):
            moments[0]()
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        return moments, [parameter.register_post_accumulate_grad_hook(update) for parameter in model.parameters()]

    def train(model, side, prepared):
        moments, handles = prepared
        moments.append(side.before_update)
        for index in updates(side):
            loss_of(model, index, SHAPE).backward()
            side.after_update()
        for handle in handles:  # the parameter has the hook, which has the parameter: no collector sees that cycle
            handle.remove()

    assert_same_life(train, prepare=prepare)


def wrapped(model):
    return UninitializedWrapper(torch.optim.SGD(model.parameters(), lr=0.05))


def sharpness_aware(model):
    return SAM(model.parameters(), lambda: None)


def test_the_given_optimizer_is_gone():
    """Then no update applies the penalty; the others are none of the scheduler's business, and go on."""
    model = nn.Linear(4, 4)
    rst = RSTScheduler(model, sparsity=0.5, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    gradient = model.weight.grad.clone()
    other.step()
    assert torch.equal(model.weight.grad, gradient)
    assert not rst.state_dict()["update_pending"]


@pytest.mark.parametrize("make", [wrapped, sharpness_aware], ids=lambda make: make.__name__)
def test_a_composed_optimizer_given_to_the_scheduler(make):
    """What is inside it applies the penalty, and another optimizer does not."""
    model = nn.Linear(4, 4)
    optimizer, other = make(model), torch.optim.SGD(model.parameters(), lr=0.0)
    rst = RSTScheduler(model, sparsity=0.5, optimizer=optimizer)

    def closure():
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()

    for stepping, scheduler_steps in ((other, 0), (optimizer, 1)):
        closure()
        stepping.step(closure)
        rst.step()
        assert rst.state_dict()["ticks"] == scheduler_steps

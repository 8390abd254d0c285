"""Which optimizer has which parameters since when: groups, several optimizers, subclasses, wrappers, replacements."""

import copy

import pytest
import torch
from lives import assert_same_life, training_with, updates
from models import INPUT_SHAPES, loss_of, mlp
from plain_loop import UninitializedWrapper
from torch import nn

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]


def backward(model, index):
    model.zero_grad()
    loss_of(model, index, SHAPE).backward()


def test_several_groups():
    """Each with its own settings; one is maximized, which turns its penalty alone around."""

    def train(model, side):
        groups = [
            {"params": model[0].parameters(), "lr": 1e-2, "weight_decay": 1e-2},
            {"params": [model[2].weight], "lr": 3e-2},
            {"params": [model[2].bias, *model[4].parameters()]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=2e-2)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_a_maximized_group():
    def train(model, side):
        groups = [{"params": model[0].parameters(), "maximize": True}, {"params": model[2:].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=1e-2)
        for index in updates(side):
            backward(model, index)
            for times in range(2):  # in the explicit loop, the penalty is added to the negative gradient of that group
                for parameter in model[0].parameters():
                    parameter.grad.neg_()
                if times == 0:
                    side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_a_group_added_later():
    def train(model, side):
        optimizer = torch.optim.Adam(model[:4].parameters(), lr=1e-2)
        for index in updates(side):
            if index == 5:
                optimizer.add_param_group({"params": model[4].parameters(), "lr": 1e-3})
            model[4].requires_grad_(index >= 5)
            backward(model, index)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_a_group_replaced_by_one_with_another_sign():
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for index in updates(side):
            sign = -1.0 if index >= 5 else 1.0
            if index == 5:
                optimizer.param_groups[0] = {**optimizer.param_groups[0], "maximize": True}
            backward(model, index)
            for parameter in model.parameters():
                parameter.grad.mul_(sign)
            side.before_update(sign)
            optimizer.step()
            side.after_update()

    assert_same_life(train)


@pytest.mark.parametrize("exchange", ["parameters", "groups", "appended"])
def test_parameters_put_into_an_optimizer(exchange):
    """It was made for another copy of the model; its parameters are exchanged or added to in place, or all groups."""

    def train(model, side):
        elsewhere = copy.deepcopy(model)
        optimizer = torch.optim.SGD(elsewhere.parameters(), lr=1e-2)
        optimizer.step()  # has nothing of the model yet
        parameters = list(model.parameters())
        if exchange == "parameters":
            optimizer.param_groups[0]["params"][:] = parameters
        elif exchange == "appended":
            optimizer.param_groups[0]["params"][:] = parameters[:2]
            optimizer.step()
            optimizer.param_groups[0]["params"] += parameters[2:]
        else:
            optimizer.param_groups = [{**optimizer.param_groups[0], "params": parameters}]
        for index in updates(side):
            backward(model, index)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_a_parameter_that_the_optimizer_has_before_the_model():
    """Put into the layer after several updates; the explicit loop copies its values into the old one."""

    def train(model, side):
        first, old, later = model[0], model[2].weight, nn.Parameter(0.5 * model[2].weight.detach())
        optimizer = torch.optim.SGD([*first.parameters(), old if side.is_explicit else later], lr=0.05, momentum=0.9)
        for index in updates(side):
            if index == 5 and side.is_explicit:
                old.data.copy_(later)
            elif index == 5:
                model[2].weight = later
            backward(model, index)
            if index < 5:
                model[2].weight.grad = None
            side.before_update()
            optimizer.step()
            side.after_update()

    def first_two_layers():
        return nn.Sequential(*mlp()[:4], nn.Linear(16, 5, bias=False).requires_grad_(False))

    assert_same_life(train, first_two_layers, exclude=["4"])


def test_a_parameter_exchanged_in_the_model_alone():
    """What the optimizer goes on updating is in the model no more: it gets no penalty, and no scheduler step counts."""
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rst = RSTScheduler(model, 0.5, steps=8, seed=0)

    def make_updates(count):
        for index in range(count):
            backward(model, index)
            optimizer.step()
            rst.step()

    make_updates(2)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    make_updates(2)
    assert rst.progress == 2 / 8


def test_an_optimizer_restored_midway():
    """``load_state_dict`` makes new groups."""

    def train(model, side):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for index in updates(side):
            if index in (7, 33):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            backward(model, index)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_a_new_optimizer_for_finetuning():
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        for index in updates(side, middle=20):
            if index == 20:
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            backward(model, index)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_a_learning_rate_schedule():
    """``LRScheduler`` puts its own ``step`` on the optimizer object."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        for index in updates(side):
            backward(model, index)
            side.before_update()
            optimizer.step()
            schedule.step()
            side.after_update()

    assert_same_life(train)


def test_optimizers_made_before_and_after_the_scheduler():
    """Three over one model, of three kinds: two made before the scheduler, one after; one steps half as often."""

    def prepare(model):
        return [
            torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9),
            torch.optim.Adam(model[2].parameters(), lr=1e-2),
        ]

    def train(model, side, early):
        optimizers = [*early, torch.optim.RMSprop(model[4].parameters(), lr=1e-3)]
        for index in updates(side):
            for number, optimizer in enumerate(optimizers):
                if number < 2 or index % 2:
                    optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            stepping = optimizers if index % 2 else optimizers[:2]
            if side.is_explicit:
                kept_aside = model[4].weight.grad
                if not index % 2:
                    model[4].weight.grad = None
                side.before_update()
                model[4].weight.grad = kept_aside
            for optimizer in stepping:
                optimizer.step()
            side.after_update()

    assert_same_life(train, prepare=prepare)


class Halved(torch.optim.SGD):
    """Changes the gradients in place before the step that it inherits."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        return super().step(closure)


class Replaced(torch.optim.SGD):
    """Replaces the gradients that it is given; two levels up, hooks fire again."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.sign() * 0.01 + parameter.grad
        return super().step(closure)


class ReplacedTwice(Replaced):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("scheduler_steps", ["each", "every-third"])
@pytest.mark.parametrize("kind", [Halved, Replaced, ReplacedTwice], ids=lambda kind: kind.__name__)
def test_a_subclass_that_calls_the_step_it_inherits(kind, scheduler_steps):
    """One update, though the hooks fire at each level; also for the second update of a scheduler step."""
    torch.optim.SGD([torch.zeros(1)])  # from here on, the inherited steps fire their own hooks
    Replaced([torch.zeros(1)])

    def train(model, side):
        optimizer = kind(model.parameters(), lr=0.05)
        for index in updates(side):
            backward(model, index)
            side.before_update()
            optimizer.step()
            side.updated()
            if scheduler_steps == "each" or index % 3 == 2:
                side.scheduler_step()

    assert_same_life(train)


def test_a_step_that_raised():
    """What was going on when a step raised is not taken for going on still."""

    class Fragile(torch.optim.SGD):
        broken = False

        def step(self, closure=None):
            if self.broken:
                raise ArithmeticError
            return super().step(closure)

    def train(model, side):
        optimizer = Fragile(model.parameters(), lr=0.05)
        for index in updates(side):
            if index % 4 == 2:
                backward(model, index)
                optimizer.broken = True
                with pytest.raises(ArithmeticError):
                    optimizer.step()
                optimizer.broken = False
            backward(model, index)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


class Wrapper:
    """Has an optimizer, and is not one: what libraries of mixed precision and of distribution return."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("kind", [Wrapper, UninitializedWrapper], ids=lambda kind: kind.__name__)
def test_a_wrapper(kind):
    assert_same_life(training_with(lambda model: kind(torch.optim.Adam(model.parameters(), lr=1e-2))))

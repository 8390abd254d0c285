"""Gradient clipping: the penalty comes after it, and masked weights do not weigh in it once they are zero."""

import copy
import pickle

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, batch, cnn, finalize_quietly, loss_of, make, mlp, transformer, wide
from torch import nn

from torch_dual_ticket import RSTScheduler

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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, of itself
def test_clipping_under_compiled_autograd():
    """The end of its backward pass cannot be waited for: each gradient is masked as it comes."""

    def train(model, side):
        torch.compiler.reset()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

        def backward(x, y):
            nn.functional.cross_entropy(model(x), y).backward()

        for index in updates(side):
            optimizer.zero_grad()
            with torch._dynamo.config.patch(compiled_autograd=True):
                torch.compile(backward, backend="eager")(*batch(index, INPUT_SHAPES[mlp]))
            side.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


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
            if index == (0 if when == "from the start" else 3) and not side.is_explicit:
                optimizer.register_step_pre_hook(clip)
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.after_backward()
            if side.is_explicit and (index >= 3 or when == "from the start"):
                clip()
            side.before_update()
            step()
            side.after_update()

    assert_same_life(train)


def hooked(count=3):
    """A model, its scheduler, and an optimizer with hooks that do nothing."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5, seed=0, steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.register_step_pre_hook(do_nothing)
        optimizer.register_step_post_hook(do_nothing)
    return model, rst, optimizer


def do_nothing(*_):
    return None


def update(model, rst, optimizer):
    optimizer.zero_grad()
    loss_of(model, 0, INPUT_SHAPES[mlp]).backward()
    optimizer.step()
    rst.step()


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_an_optimizer_that_come_and_go_while_they_run(register):
    model, rst, optimizer = hooked(0)
    calls = []

    def once(*_):
        calls.append("once")
        handle.remove()

    def adds_another(*_):
        if "adds" not in calls:
            getattr(optimizer, register)(lambda *_: calls.append("another"))
        calls.append("adds")

    handle = getattr(optimizer, register)(once)
    update(model, rst, optimizer)
    getattr(optimizer, register)(adds_another)
    for _ in range(2):
        update(model, rst, optimizer)
    assert calls[:2] == ["once", "adds"]
    assert calls[-2:] == ["adds", "another"]
    assert rst.progress == pytest.approx(3 / 20)


class PicklesEverything(torch.optim.SGD):
    def __getstate__(self):
        return self.__dict__.copy()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_the_hooks_of_a_copied_optimizer_are_its_own(copied):
    model, rst, _ = hooked()
    optimizer = PicklesEverything(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(do_nothing)
    optimizer.register_step_post_hook(do_nothing)
    update(model, rst, optimizer)
    other = copied(optimizer)
    assert list(other._optimizer_step_pre_hooks.values()) == [do_nothing]
    assert list(other._optimizer_step_post_hooks.values()) == [do_nothing]


def test_the_hooks_of_an_optimizer_that_has_no_target_are_left_alone():
    model, rst, optimizer = hooked()
    for _ in range(2):
        update(model, rst, optimizer)
    assert [hook is do_nothing for hook in optimizer._optimizer_step_pre_hooks.values()] == [True, True, False]
    assert [hook is do_nothing for hook in optimizer._optimizer_step_post_hooks.values()] == [False, True, True]
    rst.remove()
    update(model, rst, optimizer)
    assert all(hook is do_nothing for hook in optimizer._optimizer_step_pre_hooks.values())
    assert all(hook is do_nothing for hook in optimizer._optimizer_step_post_hooks.values())


def test_what_a_hook_of_the_optimizer_returns_counts():
    """Another closure, as torch lets it give; and anything but a pair is torch's to refuse."""
    model, rst, optimizer = hooked(0)
    seen = []

    def closure():
        seen.append("theirs")
        loss = loss_of(model, 0, INPUT_SHAPES[mlp])
        loss.backward()
        return loss

    handle = optimizer.register_step_pre_hook(lambda given, args, kwargs: ((given, closure), {}))
    optimizer.step()
    rst.step()
    assert seen == ["theirs"]
    assert rst.progress == pytest.approx(1 / 20)
    handle.remove()
    optimizer.register_step_pre_hook(lambda *_: 3)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), before, strict=True))


def test_clipping_leaves_the_hooks_on_gradients_where_they_are():
    """A gradient that was changed after its hook ran is masked again; the hook stays, as registering it is slow."""
    model, rst, optimizer = hooked(0)
    update(model, rst, optimizer)
    finalize_quietly(rst)
    hooks = [list(model.get_parameter(name)._post_accumulate_grad_hooks) for name in rst.masks]
    for index in range(3):
        optimizer.zero_grad()
        loss_of(model, index, INPUT_SHAPES[mlp]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with torch.no_grad():
            for name, mask in rst.masks.items():
                model.get_parameter(name).grad[~mask] = 1.0  # as noise does; it must not reach the update
        optimizer.step()
        assert all(int(model.get_parameter(name).grad[~mask].count_nonzero()) == 0 for name, mask in rst.masks.items())
    assert hooks == [list(model.get_parameter(name)._post_accumulate_grad_hooks) for name in rst.masks]


def test_clipping_before_the_first_step_of_a_finalized_model():
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
            norms[side.is_explicit].append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)
    torch.testing.assert_close(torch.stack(norms[False]), torch.stack(norms[True]), rtol=1e-12, atol=0.0)

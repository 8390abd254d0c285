"""Several schedulers, and the end of one: dropped, removed, interrupted, or in the way of torch.nn.utils.prune."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import tracemalloc
import warnings
import weakref
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from models import INPUT_SHAPES, assert_same, batch, finalize_quietly, loss_of, make, mlp, twins
from reference import ExplicitLoop
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torch_dual_ticket import RSTScheduler, random_unstructured, release
from torch_dual_ticket._engine import optimizer_hooks
from torch_dual_ticket._engine.parameter import ManagedParameter
from torch_dual_ticket.baselines import random_ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPE = INPUT_SHAPES[mlp]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    updates: range,
    *schedulers: RSTScheduler,
    explicit: tuple[ExplicitLoop, ...] = (),
) -> None:
    for index in updates:
        optimizer.zero_grad()
        loss_of(model, index, SHAPE).backward()
        for loop in explicit:
            loop.before_update()
        optimizer.step()
        for loop in explicit:
            loop.after_update()
        for rst in schedulers:
            rst.step()


def pre_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def gradient_hooks(model: nn.Module) -> int:
    return sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """The garbage collector looks at what these tests make, and not at the whole of torch each time."""
    RSTScheduler(make(mlp)).remove()  # has everything imported
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is freed in here is freed by reference counts."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def put_in_a_cycle(rst: RSTScheduler) -> None:
    """So that only the garbage collector finds it, as after an exception whose traceback holds it."""
    cycle: list[object] = [rst]
    cycle.append(cycle)


# -- several schedulers ------------------------------------------------------------------------------------------------


def test_two_schedulers_on_disjoint_parts_of_one_model():
    """Each has its own masks, λ and moment of finalize(); one optimizer updates both parts."""
    model, other = twins(mlp)
    first = RSTScheduler(model, sparsity=0.8, steps=5, seed=1, exclude=["2", "4"])
    second = RSTScheduler(model[2:], sparsity=0.6, steps=9, seed=2, max_penalty=0.5)
    assert set(first.masks) == {"0.weight"}
    assert set(second.masks) == {"2.weight", "4.weight"}
    loops = (
        ExplicitLoop(other, first.masks, steps=5),
        ExplicitLoop(other[2:], second.masks, steps=9, max_penalty=0.5),
    )
    mine, theirs = sgd(model), sgd(other)

    def both(updates: range) -> None:
        train(model, mine, updates, first, second)
        train(other, theirs, updates, explicit=loops)
        assert_same(model, other)

    both(range(6))
    finalize_quietly(first)
    loops[0].finalize()
    both(range(6, 12))
    assert (first.phase, second.phase) == ("finetune", "transform")
    finalize_quietly(second)
    loops[1].finalize()
    both(range(12, 20))


def test_the_removal_of_one_scheduler_leaves_the_other_alone():
    model, other = twins(mlp)
    first = RSTScheduler(model, sparsity=0.8, steps=5, seed=1, exclude=["2", "4"])
    second = RSTScheduler(model, sparsity=0.8, steps=5, seed=1, exclude=["0"])
    loops = ExplicitLoop(other, first.masks, steps=5), ExplicitLoop(other, second.masks, steps=5)
    mine, theirs = sgd(model), sgd(other)
    train(model, mine, range(3), first, second)
    train(other, theirs, range(3), explicit=loops)
    first.remove()
    train(model, mine, range(3, 6), first, second)
    train(other, theirs, range(3, 6), explicit=loops[1:])
    finalize_quietly(second)
    loops[1].finalize()
    train(model, mine, range(6, 9), first, second)
    train(other, theirs, range(6, 9), explicit=loops[1:])
    assert_same(model, other)


def test_a_scheduler_replaces_a_dropped_one_that_waits_for_the_collector():
    """As in a notebook, where the same cell is run again after an exception."""
    model = make(mlp)
    with no_garbage_collection():
        first = RSTScheduler(model, sparsity=0.5)
        put_in_a_cycle(first)
        del first
        second = RSTScheduler(model, sparsity=0.5)
    train(model, sgd(model), range(2), second)
    assert pre_hooks(model) == 3


def test_a_second_scheduler_on_the_same_weight_is_refused():
    model = make(mlp)
    first = RSTScheduler(model, sparsity=0.5)
    with pytest.raises(ValueError, match=r"0\.weight is managed by another RSTScheduler"):
        RSTScheduler(model, sparsity=0.5)
    assert pre_hooks(model) == 3
    first.remove()
    RSTScheduler(model, sparsity=0.5)


# -- del rst -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradients", [False, True], ids=["", "gradients pending"])
def test_a_scheduler_dropped_midway_stops_penalizing(with_gradients):
    """Its idle hooks may stay until another scheduler replaces them."""
    model, other = twins(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=10, seed=1)
    loop = ExplicitLoop(other, rst.masks, steps=10)
    mine, theirs = sgd(model), sgd(other)
    train(model, mine, range(4), rst)
    train(other, theirs, range(4), explicit=(loop,))
    if with_gradients:
        mine.zero_grad()
        loss_of(model, 4, SHAPE).backward()
    with no_garbage_collection():
        dropped = weakref.ref(rst)
        del rst
        assert dropped() is None
    if with_gradients:
        mine.step()
        train(other, theirs, range(4, 5))
    train(model, mine, range(5, 9))
    train(other, theirs, range(5, 9))
    assert_same(model, other)
    rst = RSTScheduler(model, sparsity=0.5)
    assert pre_hooks(model) == 3
    rst.remove()
    assert pre_hooks(model) == gradient_hooks(model) == 0


def test_a_dropped_scheduler_goes_on_enforcing_in_a_finalized_model():
    model, other = twins(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=4, seed=1)
    masks = dict(rst.masks)
    loop = ExplicitLoop(other, masks, steps=4)
    mine, theirs = sgd(model), sgd(other)
    train(model, mine, range(4), rst)
    train(other, theirs, range(4), explicit=(loop,))
    finalize_quietly(rst)
    loop.finalize()
    put_in_a_cycle(rst)
    del rst
    gc.collect()
    train(model, mine, range(4, 10))
    train(other, theirs, range(4, 10), explicit=(loop,))
    assert_same(model, other)
    assert all((model.get_parameter(name)[~kept] == 0).all() for name, kept in masks.items())
    assert prune.is_pruned(model)
    for layer in (model[0], model[2], model[4]):
        prune.remove(layer, "weight")
    assert pre_hooks(model) == gradient_hooks(model) == 0


AT_EXIT = """
import atexit

@atexit.register
def save():
    print(prune.is_pruned(model), sorted(rst.state_dict()["masks"]))

from torch import nn
from torch.nn.utils import prune
from torch_dual_ticket import RSTScheduler
model = nn.Sequential(nn.Linear(8, 8))
rst = RSTScheduler(model, sparsity=0.5)
"""


def test_what_a_program_saves_as_it_ends_is_still_managed():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", AT_EXIT], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n") == ["True ['0.weight']", ""]


def test_an_exception_that_keeps_the_scheduler_keeps_it_alive_and_no_longer():
    model = make(mlp)

    def run() -> None:
        rst = RSTScheduler(model, sparsity=0.5, steps=5)
        train(model, sgd(model), range(2), rst)
        raise KeyError("of the user")

    try:
        run()
    except KeyError as error:
        kept = error
    with pytest.raises(ValueError, match="managed by another RSTScheduler"):  # which the traceback holds
        RSTScheduler(model, sparsity=0.5)
    with no_garbage_collection():
        kept.__traceback__ = None
        RSTScheduler(model, sparsity=0.5)


class Collects:
    """A hook during whose copying the garbage collector runs."""

    def __call__(self, module: nn.Module, inputs: object) -> None: ...
    def __deepcopy__(self, memo: object) -> Collects:
        gc.collect()
        return Collects()


# -- release() ---------------------------------------------------------------------------------------------------------


def lives_as_a_plain_model(model: nn.Module, *handles: RSTScheduler) -> None:
    """It is trained as a model without any hook, whatever the handles that are left are told to do."""
    assert not prune.is_pruned(model)
    assert pre_hooks(model) == gradient_hooks(model) == 0
    plain = make(mlp)
    plain.load_state_dict(model.state_dict())
    train(model, sgd(model), range(4), *handles)
    train(plain, sgd(plain), range(4))
    assert_same(model, plain, 0)


@pytest.mark.parametrize("phase", ["transform", "finetune"])
@pytest.mark.parametrize("handle", ["lost", "kept"])
def test_release_takes_off_a_scheduler(phase, handle):
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=4, seed=1)
    train(model, sgd(model), range(4), rst)
    if phase == "finetune":
        finalize_quietly(rst)
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    handles = [rst] if handle == "kept" else []
    del rst
    release(model)
    assert all(torch.equal(value == 0, zeros[name]) for name, value in model.named_parameters())
    lives_as_a_plain_model(model, *handles)


@pytest.mark.filterwarnings("ignore:.*exactly zero before the first update")  # it has the zeros of the old one
@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_a_released_model_takes_a_new_scheduler_and_the_old_one_does_nothing(phase):
    model, other = twins(mlp)
    old = RSTScheduler(model, sparsity=0.8, steps=4, seed=1)
    train(model, sgd(model), range(4), old)
    if phase == "finetune":
        finalize_quietly(old)
    release(model)
    other.load_state_dict(model.state_dict())
    rst = RSTScheduler(model, sparsity=0.5, steps=4, seed=2)
    loop = ExplicitLoop(other, rst.masks, steps=4)
    mine, theirs = sgd(model), sgd(other)
    train(model, mine, range(4), old, rst)
    train(other, theirs, range(4), explicit=(loop,))
    old.remove()
    finalize_quietly(rst)
    loop.finalize()
    train(model, mine, range(4, 8), old, rst)
    train(other, theirs, range(4, 8), explicit=(loop,))
    assert_same(model, other)
    assert all(torch.equal(model.get_parameter(name) != 0, kept) for name, kept in rst.masks.items())


def test_release_takes_off_held_masks():
    model = make(mlp)
    random_ticket(model, 0.5, seed=0)
    release(model)
    lives_as_a_plain_model(model)


def test_release_of_a_copy_leaves_the_original_alone():
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=4, seed=1)
    train(model, sgd(model), range(4), rst)
    finalize_quietly(rst)
    duplicate = copy.deepcopy(model)
    release(duplicate)
    lives_as_a_plain_model(duplicate)
    train(model, sgd(model), range(4), rst)
    assert all((model.get_parameter(name)[~kept] == 0).all() for name, kept in rst.masks.items())


def test_release_leaves_a_model_alone_that_nothing_manages():
    model = make(mlp)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[2].register_forward_pre_hook(Collects())
    before = snapshot(model)
    release(model)
    release(model[4])
    assert [parts[2:] for parts in snapshot(model)] == [parts[2:] for parts in before]
    assert prune.is_pruned(model[0])


def test_release_of_a_part_releases_what_manages_it():
    """One scheduler has layers in that part, and leaves the whole model; the other one has none, and goes on."""
    model = make(mlp)
    first = RSTScheduler(model, sparsity=0.8, steps=4, seed=1, exclude=["4"])
    second = RSTScheduler(model[4], sparsity=0.5, steps=4, seed=1)
    train(model, sgd(model), range(4), first, second)
    release(model[2])
    assert pre_hooks(model) == pre_hooks(model[4]) == 1
    finalize_quietly(second)
    train(model, sgd(model), range(2), first, second)
    assert torch.equal(model[4].weight != 0, second.masks["weight"])
    assert (model[0].weight != 0).all()


def test_release_takes_a_module():
    with pytest.raises(TypeError, match=r"release\(\) takes a torch\.nn\.Module, got list"):
        release([nn.Linear(2, 2)])


# -- leaks -------------------------------------------------------------------------------------------------------------


def end_by_remove(rst: RSTScheduler) -> None:
    rst.remove()


def end_by_dropping(rst: RSTScheduler) -> None:
    """The caller's is the last reference."""


def end_by_remove_after_finalize(rst: RSTScheduler) -> None:
    finalize_quietly(rst)
    rst.remove()


def end_by_collection(rst: RSTScheduler) -> None:
    put_in_a_cycle(rst)


@pytest.mark.filterwarnings("ignore:.*exactly zero before the first update")  # with the zeros of those before
@pytest.mark.parametrize(
    "end", [end_by_remove, end_by_dropping, end_by_remove_after_finalize, end_by_collection], ids=lambda f: f.__name__
)
def test_constructions_and_removals_leak_nothing(end):
    """250 each way, on one model and one optimizer; each ticket applies a penalty once."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tickets_seen = []
    others = len(optimizer_hooks.tickets())
    dicts = [module._forward_pre_hooks for module in model.modules()]

    def live() -> None:
        rst = RSTScheduler(model, sparsity=0.5, seed=0)
        tickets_seen.append(weakref.ref(rst._ticket))
        optimizer.zero_grad()
        loss_of(model, 0, SHAPE).backward()
        optimizer.step()
        rst.step()
        end(rst)

    for _ in range(10):
        live()
    gc.collect()
    model(batch(0, SHAPE)[0])
    global_hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks), len(gc.callbacks)
    finalizers = len(weakref.finalize._registry)
    grown = []
    tracemalloc.start()
    try:
        while len(grown) < 3 and not (grown and grown[-1] < 64 * 1024):  # a leak grows each time, free lists do not
            before = tracemalloc.take_snapshot()
            for _ in range(250):
                live()
            tickets_seen.clear()
            optimizer.zero_grad()
            gc.collect()
            model(batch(0, SHAPE)[0])
            after = tracemalloc.take_snapshot()
            grown.append(sum(difference.size_diff for difference in after.compare_to(before, "filename")))
    finally:
        tracemalloc.stop()
    assert grown[-1] < 64 * 1024, f"{grown[-1] / 250:.0f} bytes for each life"
    assert pre_hooks(model) == (3 if end in (end_by_dropping, end_by_collection) else 0)  # idle ones
    assert gradient_hooks(model) == 0
    assert dicts == [module._forward_pre_hooks for module in model.modules()]
    assert all(type(hooks_of) is OrderedDict for hooks_of in dicts)
    assert len(weakref.finalize._registry) == finalizers
    assert len(optimizer_hooks._tickets) <= others + 2
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks), len(gc.callbacks)) == global_hooks


def test_a_thousand_tickets_are_gone():
    gc.collect()  # what earlier tests have left in cycles
    others = sum(ref() is not None for ref in optimizer_hooks._tickets)
    seen: list[weakref.ref[object]] = []
    model = make(mlp)
    for _ in range(1000):
        rst = RSTScheduler(model, sparsity=0.5, seed=0)
        ticket = rst._ticket
        seen += map(weakref.ref, [rst, ticket, ticket._gradient_hook, *ticket.parameters])
        del ticket
        rst.remove()
        del rst
    assert all(ref() is None for ref in seen)
    assert pre_hooks(model) == 0
    assert len(optimizer_hooks._tickets) <= others + 1


def test_a_finalized_model_keeps_no_other_whose_parameters_know_their_optimizer() -> None:
    """As torch's own optimizers in the backward pass have it: a cycle, but one that the collector can see."""
    teacher, weights = nn.Linear(4, 4), []
    held = random_ticket(teacher, 0.5, seed=0)
    for _ in range(3):
        student = nn.Linear(4, 4)
        for parameter in student.parameters():
            parameter._in_backward_optimizers = [torch.optim.SGD([parameter], lr=0.1)]  # type: ignore[attr-defined]
            parameter.grad = torch.ones_like(parameter)
            parameter._in_backward_optimizers[0].step()  # type: ignore[attr-defined]
        weights.append(weakref.ref(student.weight))
        del student, parameter
    gc.collect()
    assert [ref() for ref in weights] == [None] * 3
    held.remove()


@pytest.mark.parametrize("bystander", [False, True], ids=["alone", "another model's optimizer"])
@pytest.mark.parametrize("ending", ["transform", "finetune", "copy"])
def test_a_model_is_freed_by_reference_counting_alone(ending, bystander):
    """Also what was dropped before the optimizer of another model, which has asked its ticket for its parameters."""
    elsewhere = make(mlp, seed=3)
    other_optimizer = sgd(elsewhere)
    with no_garbage_collection():
        model = make(mlp)
        rst = RSTScheduler(model, sparsity=0.5, steps=3, seed=0)
        optimizer = sgd(model)
        train(model, optimizer, range(3), rst)
        if ending != "transform":
            finalize_quietly(rst)
            train(model, optimizer, range(2), rst)
        if ending == "copy":
            model = copy.deepcopy(model)
            optimizer = sgd(model)
            train(model, optimizer, range(2))
        if bystander:
            train(elsewhere, other_optimizer, range(1))
        watched = [weakref.ref(thing) for thing in (model, *model.modules(), *model.parameters(), rst, rst._ticket)]
        watched += [weakref.ref(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()]
        assert len(watched) == 1 + 6 + 6 + 2 + 3
        del model, rst, optimizer
        assert [ref() for ref in watched if ref() is not None] == []
    train(elsewhere, other_optimizer, range(1, 3))


# -- exceptions inside the update --------------------------------------------------------------------------------------


class Breaks(torch.optim.SGD):
    """An optimizer whose step fails when it is told to, before it has changed anything."""

    broken = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if self.broken:
            raise ArithmeticError("of the optimizer")
        return super().step(closure)


def breaks(model: nn.Module) -> Breaks:
    return Breaks(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


AFTER_A_FAILURE = ["the same step again", "new gradients", "gradients zeroed in place"]


@pytest.mark.parametrize("then", AFTER_A_FAILURE)
@pytest.mark.parametrize("way", ["optimizer", "a hook after ours"])
def test_a_step_that_raises_leaves_nothing_behind(way, then):
    """The next step is that of a loop in which the failed one never was: one penalty, and the same λ."""
    model, other = twins(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=8, seed=1)
    loop = ExplicitLoop(other, rst.masks, steps=8)
    mine, theirs = breaks(model), breaks(other)
    for index in range(16):
        if index == 9:
            finalize_quietly(rst)
            loop.finalize()
        mine.zero_grad()
        loss_of(model, index, SHAPE).backward()
        if index in (2, 3, 6, 12):
            handle = None
            if way == "optimizer":
                mine.broken = True
            else:
                handle = mine.register_step_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ArithmeticError):
                mine.step()
            mine.broken = False
            if handle is not None:
                handle.remove()
            for _ in range(2):
                rst.step()  # there was no update: no scheduler step either
            assert not rst.state_dict()["update_pending"]
            if then != "the same step again":
                mine.zero_grad(set_to_none=then == "new gradients")
                loss_of(model, index, SHAPE).backward()
        mine.step()
        rst.step()
        train(other, theirs, range(index, index + 1), explicit=(loop,))
        assert rst._steps == min(index + 1, 8)
    assert_same(model, other)


@pytest.mark.parametrize("then", ["step", "go back"])
def test_a_step_without_gradients_after_one_that_raised_is_not_an_update(then):
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=8, seed=1)
    optimizer, start = breaks(model), rst.state_dict()
    loss_of(model, 0, SHAPE).backward()
    optimizer.broken = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.broken = False
    if then == "step":
        rst.step()
    else:
        rst.load_state_dict(start)
    optimizer.zero_grad()
    optimizer.step()
    rst.step()
    assert rst.progress == 0


def test_a_closure_that_raises_leaves_nothing_behind():
    model, other = twins(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=8, seed=1)
    loop = ExplicitLoop(other, rst.masks, steps=8)
    mine, theirs = sgd(model), sgd(other)
    for index in range(16):
        if index == 9:
            finalize_quietly(rst)
            loop.finalize()

        def closure(index: int = index, fails: bool = False) -> float:
            mine.zero_grad()
            loss = loss_of(model, index, SHAPE)
            loss.backward()
            if fails:
                raise ArithmeticError("of the closure")
            return loss.item()

        if index % 3 == 0:
            with pytest.raises(ArithmeticError):
                mine.step(lambda closure=closure: closure(fails=True))
            rst.step()
        mine.step(closure)
        rst.step()
        train(other, theirs, range(index, index + 1), explicit=(loop,))
    assert_same(model, other)


# -- torch.nn.utils.prune on a managed layer ---------------------------------------------------------------------------

STOCK = {
    "identity": lambda layer: prune.identity(layer, "weight"),
    "random_unstructured": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    "l1_unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "ln_structured": lambda layer: prune.ln_structured(layer, "weight", 0.3, n=2, dim=0),
    "random_structured": lambda layer: prune.random_structured(layer, "weight", 0.3, dim=0),
    "custom_from_mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight)),
    "global_unstructured": lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=2),
    "our own": lambda layer: random_unstructured(layer, "weight", 0.3, seed=1),
}


def snapshot(model: nn.Module) -> list[object]:
    """Everything that a pruning function could change, with the order in which it stands there."""
    return [
        (
            list(module._parameters.items()),
            [(name, value.clone()) for name, value in module._buffers.items()],
            list(module._forward_pre_hooks.items()),
            sorted(module.__dict__),
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("function", STOCK)
@pytest.mark.parametrize("phase", ["transform", "finetune"])
@pytest.mark.parametrize("alone", [True, False], ids=["only hook", "among hooks"])
def test_stock_functions_refuse_a_managed_layer_and_leave_it_as_it_was(function, phase, alone):
    model, other = twins(mlp)
    layer = model[2]
    if not alone:
        layer.register_forward_pre_hook(Collects())
    rst = RSTScheduler(model, sparsity=0.8, steps=4, seed=1)
    if not alone:
        layer.register_forward_pre_hook(Collects())
        prune.l1_unstructured(layer, "bias", 2)  # another parameter of the layer may be pruned
        prune.l1_unstructured(other[2], "bias", 2)
        assert list(layer._parameters) == ["weight", "bias_orig"]
    loop = ExplicitLoop(other, rst.masks, steps=4)
    mine, theirs = sgd(model), sgd(other)
    train(model, mine, range(4), rst)
    train(other, theirs, range(4), explicit=(loop,))
    if phase == "finetune":
        finalize_quietly(rst)
        loop.finalize()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"2\.weight is managed by an RSTScheduler.*to_prune\(\)"):
        STOCK[function](layer)
    after = snapshot(model)
    for (parameters, buffers, layer_hooks, names), earlier in zip(after, before, strict=True):
        assert [(n, id(p)) for n, p in parameters] == [(n, id(p)) for n, p in earlier[0]]
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(buffers, earlier[1], strict=True))
        assert layer_hooks == earlier[2]
        assert names == earlier[3]
    train(model, mine, range(4, 8), rst)
    train(other, theirs, range(4, 8), explicit=(loop,))
    if phase == "transform":
        finalize_quietly(rst)
        loop.finalize()
    train(model, mine, range(8, 12), rst)
    train(other, theirs, range(8, 12), explicit=(loop,))
    assert_same(model, other)


@pytest.mark.parametrize("function", STOCK)
def test_stock_functions_stack_on_a_layer_after_to_prune(function):
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=3, seed=1)
    masks = dict(rst.masks)
    train(model, sgd(model), range(3), rst)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the masked weights still held")
        rst.finalize(layout="prune")
    STOCK[function](model[2])
    optimizer = sgd(model)
    train(model, optimizer, range(3, 6), rst)
    assert (model[2].weight[~masks["2.weight"]] == 0).all()
    assert pre_hooks(model) == 3
    prune.remove(model[2], "weight")
    assert (model[2].weight[~masks["2.weight"]] == 0).all()


def test_stock_functions_on_a_layer_that_the_scheduler_left_dense():
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=3, seed=1, exclude=["4"])
    prune.l1_unstructured(model[4], "weight", 0.5)
    train(model, sgd(model), range(3), rst)
    finalize_quietly(rst)
    assert int((model[4].weight == 0).sum()) == 40
    assert int((model[2].weight == 0).sum()) == 256


@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_a_hook_that_somebody_keeps_does_not_come_back(phase):
    """As in a program that lists the pruning methods of a model, and asks them later what they prune."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5, steps=2)
    train(model, sgd(model), range(2), rst)
    if phase == "finetune":
        finalize_quietly(rst)
    kept_hook = next(iter(model[0]._forward_pre_hooks.values()))
    mask, weight = rst.masks["0.weight"], torch.randn(20, 12, dtype=torch.float64)
    assert torch.equal(kept_hook.prune(weight), weight * mask)
    rst.remove()
    assert kept_hook._tensor_name == "weight"
    assert pre_hooks(model) == 0


def test_the_layer_of_a_hook_that_somebody_keeps_is_gone():
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5)
    kept_hook = next(iter(model[0]._forward_pre_hooks.values()))
    model[0] = nn.Linear(12, 20)
    assert kept_hook._tensor_name == "weight"
    rst.remove()
    assert pre_hooks(model) == 0


def test_remove_leaves_a_plain_model():
    model, other = twins(mlp)
    names = [sorted(module.__dict__) for module in model.modules()]
    rst = RSTScheduler(model, sparsity=0.8, steps=3, seed=1)
    train(model, sgd(model), range(3), rst)
    finalize_quietly(rst)
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    rst.remove()
    rst.remove()
    assert pre_hooks(model) == gradient_hooks(model) == 0
    assert names == [sorted(module.__dict__) for module in model.modules()]
    assert all(torch.equal(value == 0, zeros[name]) for name, value in model.named_parameters())
    other.load_state_dict(model.state_dict())
    train(model, sgd(model), range(3), rst)
    train(other, sgd(other), range(3))
    assert_same(model, other, 0)


def test_steps_after_remove_do_nothing():
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.8, steps=5, seed=1)
    train(model, sgd(model), range(3), rst)
    rst.remove()
    rst.step()
    assert (rst.penalty, rst.progress) == (0, 3 / 5)


def test_the_gradient_of_a_detached_layer_is_whole():
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5, steps=2, seed=0)
    optimizer = sgd(model)
    train(model, optimizer, range(2), rst)
    finalize_quietly(rst)
    train(model, optimizer, range(2, 4))
    kept = rst.masks["2.weight"]
    prune.remove(model[2], "weight")
    optimizer.zero_grad()
    loss_of(model, 4, SHAPE).backward()
    assert (model[2].weight.grad[~kept] != 0).all()
    assert torch.equal(model[0].weight.grad != 0, rst.masks["0.weight"])


def test_a_scheduler_of_another_model_costs_a_step_one_lookup(monkeypatch):
    """However many parameters it manages; and their tensors are neither read nor written."""
    model, elsewhere = make(mlp), nn.Sequential(*(nn.Linear(4, 4) for _ in range(50)))
    rst, other = RSTScheduler(model, sparsity=0.5), RSTScheduler(elsewhere, sparsity=0.5)
    optimizer = sgd(model)
    train(model, optimizer, range(1), rst)
    looked_up, tensor = [], ManagedParameter.tensor
    monkeypatch.setattr(ManagedParameter, "tensor", lambda managed: (looked_up.append(managed), tensor(managed))[1])
    train(model, optimizer, range(1, 2), rst)
    assert len([managed for managed in looked_up if managed in other._ticket.parameters]) <= 1
    assert looked_up


def test_stock_functions_on_a_layer_of_a_dropped_scheduler():
    model = make(mlp)
    RSTScheduler(model, sparsity=0.5)  # dropped at once
    with pytest.raises(RuntimeError, match=r"was dropped: torch_dual_ticket\.release\(model\)"):
        prune.l1_unstructured(model[2], "weight", 0.3)
    release(model)
    prune.l1_unstructured(model[2], "weight", 0.3)


def test_release_takes_off_what_stands_in_a_copy():
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5)
    duplicate = copy.deepcopy(model)
    release(duplicate)
    assert pre_hooks(duplicate) == 0
    assert pre_hooks(model) == len(rst.masks)

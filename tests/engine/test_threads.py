"""Two models in two threads, a scheduler each, while others come and go: all as if one came after the other."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import INPUT_SHAPES, assert_same, cnn, loss_of, make, mlp
from torch import nn

from torch_dual_ticket import RSTScheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIVES = [(mlp, 1), (cnn, 2)]

# For the whole file: filters that a thread sets and takes back for itself take back those of the others as well.
pytestmark = pytest.mark.filterwarnings("ignore:the masked weights still held")


@pytest.fixture
def _eager_switches() -> Iterator[None]:
    """Threads that take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def live(build: Callable[[], nn.Module], seed: int, model: nn.Module | None = None) -> nn.Module:
    """A whole life of a ticket; the scheduler is dropped at its end.

    In a thread, give the model: what is drawn from torch's global generator there depends on the others.
    """
    model = make(build, seed) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    rst = RSTScheduler(model, sparsity=0.7, steps=15, seed=seed)
    for index in range(40):
        if index == 20:
            rst.finalize()
        optimizer.zero_grad()
        loss_of(model, index, INPUT_SHAPES[build]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rst.step()
    for name, kept in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, kept)
    return model


def in_threads(*jobs: Callable[[], object]) -> list[object]:
    """Run all at once; raises what any of them raised."""
    results: list[object] = [None] * len(jobs)

    def run(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.usefixtures("_eager_switches")
def test_two_threads_with_a_scheduler_each_equal_the_sequential_result():
    expected = [live(build, seed) for build, seed in LIVES]
    models = [make(build, seed) for build, seed in LIVES]
    lives = zip(LIVES, models, strict=True)
    trained = in_threads(*(lambda life=life, model=model: live(*life, model) for life, model in lives))
    for model, other in zip(trained, expected, strict=True):
        assert_same(model, other, 0)


@pytest.mark.usefixtures("_eager_switches")
def test_schedulers_and_copies_come_and_go_in_other_threads():
    expected = live(mlp, 1)
    finalized = live(mlp, 5)
    begun = make(mlp, 1)
    over = threading.Event()

    def come_and_go() -> int:
        count = 0
        while not over.is_set():
            model = make(mlp, count)
            rst = RSTScheduler(model, sparsity=0.5, seed=count)
            if count % 2:
                rst.remove()
            count += 1
        return count

    def copying() -> int:
        count = 0
        while not over.is_set():
            duplicate = copy.deepcopy(finalized)
            duplicate(torch.randn(2, 12, dtype=torch.float64))
            count += 1
        return count

    def training() -> nn.Module:
        try:
            return live(mlp, 1, begun)
        finally:
            over.set()

    model, constructions, copies = in_threads(training, come_and_go, copying)
    assert_same(model, expected, 0)
    assert constructions
    assert copies


def test_a_removal_while_another_thread_collects_garbage():
    """Its hooks go at once: no other code of this thread iterates over them."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5)
    hooks_left = []

    def remove_elsewhere(phase: str, info: object) -> None:
        if phase == "start" and not hooks_left:
            in_threads(rst.remove)
            hooks_left.append(sum(len(layer._forward_pre_hooks) for layer in model))

    gc.callbacks.append(remove_elsewhere)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(remove_elsewhere)
    assert hooks_left == [0]


def test_an_update_while_a_copy_is_in_the_making():
    """Another thread's optimizer asks all tickets for their parameters, also that of a half-made copy."""
    finalized, elsewhere = live(mlp, 5), make(mlp)
    optimizer = torch.optim.SGD(elsewhere.parameters(), lr=0.1)
    updates = []

    class StepsWhenCopied:
        def __deepcopy__(self, memo: object) -> StepsWhenCopied:
            loss_of(elsewhere, 0, INPUT_SHAPES[mlp]).backward()
            optimizer.step()
            updates.append(1)
            return StepsWhenCopied()

        def __call__(self, module: nn.Module, inputs: object) -> None: ...

    for layer in finalized:
        layer.register_forward_pre_hook(StepsWhenCopied())  # copied just after our hook, when the layer is empty
    duplicate = copy.deepcopy(finalized)
    assert len(updates) == 5
    optimizer = torch.optim.SGD(duplicate.parameters(), lr=0.1, weight_decay=0.1)
    loss_of(duplicate, 0, INPUT_SHAPES[mlp]).backward()
    optimizer.step()
    for name, value in finalized.named_parameters():
        if name.endswith("weight"):
            assert torch.equal(duplicate.get_parameter(name) == 0, value == 0)


def test_a_closure_in_one_thread_takes_nothing_from_another():
    """The closure of one step is running at every moment at which the other begins or ends one."""

    def life() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(20, 20, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(20, 20, generator=generator))
            layer.bias.zero_()
        x = torch.randn(64, 20, generator=generator, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=5)
        rst = RSTScheduler(layer, 0.5, steps=10, seed=0, max_penalty=5)
        for _ in range(10):
            optimizer.step(closure(layer, optimizer, x, 0.002))
            rst.step()
        return layer.weight.detach().clone()

    def closure(layer: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, pause: float) -> Callable[[], Any]:
        def evaluate() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (layer(x) - 1).square().mean()
            loss.backward()
            time.sleep(pause)
            return loss

        return evaluate

    def others() -> None:
        layer = nn.Linear(5, 5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        rst = RSTScheduler(layer, 0.5, steps=10**6, seed=1)
        while not stop.is_set():
            optimizer.step(closure(layer, optimizer, torch.ones(2, 5), 0.003))
            rst.step()

    alone = life()
    stop = threading.Event()
    thread = threading.Thread(target=others)
    thread.start()
    try:
        beside = life()
    finally:
        stop.set()
        thread.join()
    assert torch.equal(alone, beside)

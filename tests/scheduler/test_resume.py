"""Restarts: from any checkpoint, in any order of loading, the rest of the run is that of a run without restart."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import signal
from typing import Any

import pytest
import resumed_run
import torch
from models import INPUT_SHAPES, assert_same, batch, finalize_quietly, loss_of, make, mlp
from torch import nn

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]


# -- killed at random moments ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """New processes that need not import torch again: each is a child of one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    return context


def run(processes: multiprocessing.context.ForkServerContext, *arguments: Any) -> int | None:
    process = processes.Process(target=resumed_run.main, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    """Bit by bit, through dictionaries and sequences."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            assert_identical(value, b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, value in enumerate(a):
            assert_identical(value, b[index], f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("kind", resumed_run.SETTINGS)
def test_killed_at_ten_random_moments_it_ends_as_if_undisturbed(processes, kind, tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    assert run(processes, undisturbed, kind) == 0
    calls = json.loads((undisturbed / "calls.json").read_text())
    expected = torch.load(undisturbed / "end.pt")
    assert expected["rst"]["phase"] == "finetune"

    moments = random.Random(kind)
    # Eight of them after a tenth of the training or so: most of it in all, and never the whole.
    kills = [("start", moments.uniform(0.3, 0.9)) for _ in range(2)]
    kills += [("training", moments.uniform(0.06, 0.12)) for _ in range(8)]
    moments.shuffle(kills)
    phases = []
    for part, share in kills:
        assert run(processes, disturbed, kind, part, int(share * calls[part])) == -signal.SIGKILL
        assert not (disturbed / "end.pt").exists()
        saved = disturbed / "checkpoint.pt"
        phases.append(torch.load(saved)["rst"]["phase"] if saved.exists() else "nothing saved")
    assert {"transform", "finetune"} <= set(phases), phases
    assert run(processes, disturbed, kind) == 0
    assert_identical(torch.load(disturbed / "end.pt"), expected)


# -- in any order, at any moment ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """With a target whose own forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


BUILDS = {"mlp": mlp, "attention": Attention}
SETTINGS: dict[str, Any] = {"sparsity": 0.7, "steps": 6, "hold": 2, "targets": [nn.Linear]}


class Run:
    """A run in this process, at some update."""

    def __init__(self, build: Any, model_seed: int = 0, **settings: Any) -> None:
        self.model = make(build, model_seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        self.rst = RSTScheduler(self.model, **(SETTINGS | settings))
        self.update = 0

    def go_on(self, until: int, stop_before_scheduler_step: bool = False) -> Run:
        while self.update < until:
            if self.rst.done and self.rst.phase == "transform":
                finalize_quietly(self.rst)
            self.optimizer.zero_grad()
            loss_of(self.model, self.update, SHAPE).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)
            self.optimizer.step()
            self.update += 1
            if not (stop_before_scheduler_step and self.update == until):
                self.rst.step()
        return self

    def states(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "rst": self.rst}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, states: dict[str, Any], order: list[str], update: int, **how: Any) -> Run:
        for name in order:
            states_of = copy.deepcopy(states[name])
            if name == "model":
                self.model.load_state_dict(states_of, **how)
            else:
                getattr(self, name).load_state_dict(states_of)
        self.update = update
        return self


ORDERS = [["model", "optimizer", "rst"], ["rst", "optimizer", "model"], ["optimizer", "rst", "model"]]
END = 16


@pytest.mark.parametrize("cycles", [1, 2])
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
@pytest.mark.parametrize("build", BUILDS)
def test_a_restart_at_any_update_in_any_order_of_loading(build, order, cycles):
    settings = {"cycles": cycles, "steps": 4, "hold": 2} if cycles > 1 else {}
    length = cycles * (4 + 2) if cycles > 1 else 6 + 2
    torch.manual_seed(3)
    whole = Run(BUILDS[build], **settings).go_on(END)
    expected = whole.states()
    for moment in range(END):
        torch.manual_seed(3)
        states = Run(BUILDS[build], **settings).go_on(moment).states()
        torch.manual_seed(4)
        resumed = Run(BUILDS[build], model_seed=9, **settings).load(states, order, moment)
        assert resumed.rst.phase == ("finetune" if moment > length else "transform")
        assert_identical(resumed.go_on(END).states(), expected)


@pytest.mark.parametrize("moment", [1, 5, 8])
def test_a_restart_between_the_update_and_its_scheduler_step(moment):
    torch.manual_seed(3)
    expected = Run(mlp).go_on(END).states()
    torch.manual_seed(3)
    states = Run(mlp).go_on(moment, stop_before_scheduler_step=True).states()
    assert states["rst"]["update_pending"]
    resumed = Run(mlp, model_seed=9).load(states, ORDERS[0], moment)
    resumed.rst.step()
    assert_identical(resumed.go_on(END).states(), expected)


def test_a_restart_before_the_first_scheduler_step_may_finalize():
    states = Run(mlp, seed=1).go_on(1, stop_before_scheduler_step=True).states()
    resumed = Run(mlp, seed=1).load(states, ORDERS[0], 1)
    finalize_quietly(resumed.rst)
    assert resumed.rst.phase == "finetune"


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
@pytest.mark.parametrize("moment", [3, 12])
def test_a_restart_with_assigned_parameters(moment, order):
    """``load_state_dict(assign=True)`` replaces the parameters that the scheduler saw."""
    expected = Run(mlp, seed=1).go_on(END).states()
    states = Run(mlp, seed=1).go_on(moment).states()
    resumed = Run(mlp, model_seed=9, seed=1)
    resumed.load(states, order, moment, assign=True)
    resumed.optimizer = torch.optim.SGD(resumed.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    resumed.optimizer.load_state_dict(copy.deepcopy(states["optimizer"]))
    assert_identical(resumed.go_on(END).states(), expected)


class Borrowing(nn.Module):
    """It uses the weight of a child that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.lender = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.lender.weight, self.lender.bias)


def test_an_assigned_parameter_of_a_layer_that_is_never_called_is_found_at_the_next_step():
    """Nothing happens before that at which it could be: of that one update, clipping sees the whole gradient."""
    states = Run(Borrowing, seed=1).go_on(12).states()
    resumed = Run(Borrowing, seed=1).load(states, ORDERS[1], 12, assign=True)
    resumed.optimizer = torch.optim.SGD(resumed.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    weight, kept = resumed.model.lender.weight, resumed.rst.masks["lender.weight"]
    for update, gradient_is_masked in ((12, False), (13, True), (14, True)):
        resumed.optimizer.zero_grad()
        loss_of(resumed.model, update, SHAPE).backward()
        assert bool((weight.grad[~kept] == 0).all()) is gradient_is_masked
        resumed.optimizer.step()
        assert torch.equal(weight != 0, kept)


@pytest.mark.parametrize("back_from", [5, 10, 14])
@pytest.mark.parametrize("back_to", [0, 3, 12])
def test_going_back_to_an_earlier_checkpoint_in_the_same_process(back_to, back_from):
    """Also from finetuning to the transformation: what was held at zero is penalized again."""
    expected = Run(mlp, seed=1).go_on(END).states()
    states = Run(mlp, seed=1).go_on(back_to).states()
    run = Run(mlp, seed=1).go_on(back_from, stop_before_scheduler_step=True)
    run.load(states, ORDERS[0], back_to)
    assert run.rst.phase == ("finetune" if back_to > 8 else "transform")
    assert_identical(run.go_on(END).states(), expected)


def test_a_finalized_model_that_resumes_into_dense_weights_masks_them():
    """Weights that come from elsewhere, such as an average begun before finalize(), are masked at the next forward."""
    states = Run(mlp, seed=1).go_on(12).states()
    resumed = Run(mlp, seed=1).load(states, ORDERS[0], 12)
    dense = make(mlp, seed=5)
    resumed.model.load_state_dict(dense.state_dict())
    resumed.rst.apply_masks(dense)
    x, _ = batch(0, SHAPE)
    assert torch.equal(resumed.model(x), dense(x))
    assert_same(resumed.model, dense, 0)


def test_the_state_is_read_without_running_code(tmp_path):
    """``torch.load`` with ``weights_only=True``, its default."""
    state = Run(mlp, seed=1).go_on(12).states()["rst"]
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state

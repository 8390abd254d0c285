"""torch.compile around a ticket's life: no graph break, at most one recompile, and finalize() is not missed."""

from __future__ import annotations

import copy
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from models import INPUT_SHAPES, SmallTransformer, assert_same, batch, finalize_quietly, loss_of, make, mlp, twins
from reference import ExplicitLoop
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import random_ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FINALIZE_AT, END = 5, 10


class SmallNetwork(nn.Module):
    """Sequential is not compiled in place by torch itself; a custom module is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = SmallNetwork(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    SmallNetwork: (3, 6, 6),
    WithHead: (3, 6, 6),
    SmallTransformer: (4, 8),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend() -> CompileCounterWithBackend:
    """Counts the graphs; differentiates them ahead of time, as the default backend does."""
    return CompileCounterWithBackend("aot_eager")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


class Lives:
    """A compiled model with a scheduler, beside a plain one in the explicit loop."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.shape = SHAPES[build]
        self.model, self.other = twins(build)
        self.update = 0

    def schedule(self, model: nn.Module) -> None:
        self.rst = RSTScheduler(model, sparsity=0.8, steps=4, seed=3)
        self.explicit = ExplicitLoop(self.other, self.rst.masks, steps=4)
        self.optimizer, self.other_optimizer = sgd(self.model), sgd(self.other)

    def go_on(self, compiled: nn.Module, until: int) -> None:
        while self.update < until:
            if self.update == FINALIZE_AT:
                finalize_quietly(self.rst)
                self.explicit.finalize()
            self.optimizer.zero_grad()
            loss_of(compiled, self.update, self.shape).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
            self.optimizer.step()
            self.rst.step()

            self.other_optimizer.zero_grad()
            loss_of(self.other, self.update, self.shape).backward()
            if self.explicit.finalized:
                self.explicit.before_update()
            nn.utils.clip_grad_norm_(self.other.parameters(), 0.05)
            if not self.explicit.finalized:
                self.explicit.before_update()
            self.other_optimizer.step()
            self.explicit.after_update()
            self.update += 1

    def assert_same(self) -> None:
        assert_same(self.model, self.other)
        for name, kept in self.rst.masks.items():
            assert torch.equal(self.model.get_parameter(name) != 0, kept)


WHEN = [
    "before construction",
    "and called before construction",
    "after construction",
    "after construction and a plain call",
]


@pytest.mark.parametrize(
    ("build", "when", "in_place"),
    [
        *((SmallNetwork, when, in_place) for when in WHEN for in_place in (False, True)),
        (SmallTransformer, WHEN[0], False),
        (SmallTransformer, WHEN[2], True),
    ],
    ids=lambda value: {True: "model.compile", False: "torch.compile"}.get(value) or getattr(value, "__name__", value),
)
def test_a_compiled_model_agrees_with_the_explicit_loop(build, when, in_place, backend):
    """Whole graphs, one compilation and at most one more, when finalize() changes what the hooks are."""
    lives = Lives(build)
    compiled = lives.model

    def compile_it() -> nn.Module:
        if not in_place:
            return torch.compile(lives.model, backend=backend, fullgraph=True)
        lives.model.compile(backend=backend, fullgraph=True)
        return lives.model

    x, _ = batch(0, lives.shape)
    if "before" in when:
        compiled = compile_it()
    if "called" in when:
        compiled(x).sum().backward()
        lives.model.zero_grad()
        lives.other(x)  # BatchNorm counts
    lives.schedule(compiled)
    if "plain call" in when:
        compiled(x)
        lives.other(x)
    if "after" in when:
        compiled = compile_it()
    lives.go_on(compiled, FINALIZE_AT)
    assert backend.frame_count == 1, "none because of λ, whose value no graph may know"
    lives.go_on(compiled, END)
    lives.assert_same()
    assert backend.frame_count <= 2
    assert not counters["graph_break"]


def test_cycles_of_masks_recompile_nothing(backend):
    model = make(SmallNetwork)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    rst = RSTScheduler(model, sparsity=0.8, steps=2, cycles=3, seed=3)
    optimizer = sgd(model)
    for index in range(6):
        optimizer.zero_grad()
        loss_of(compiled, index, SHAPES[SmallNetwork]).backward()
        optimizer.step()
        rst.step()
    assert rst.done
    assert backend.frame_count == 1


def test_code_compiled_before_finalize_computes_with_the_zeros(backend):
    """Nothing else happens in between: the weights that a compiled graph reads are those that finalize() changes."""
    lives = Lives(SmallNetwork)
    compiled = torch.compile(lives.model, backend=backend, fullgraph=True)
    lives.schedule(lives.model)
    lives.go_on(compiled, FINALIZE_AT)
    compiled.eval()
    lives.other.eval()
    x, _ = batch(9, lives.shape)
    compiled(x)
    finalize_quietly(lives.rst)
    lives.explicit.finalize()
    assert torch.allclose(compiled(x), lives.other(x), rtol=1e-12)


def test_a_part_of_the_model_is_compiled(backend):
    lives = Lives(WithHead)
    lives.schedule(lives.model)
    lives.model.body.compile(backend=backend, fullgraph=True)
    lives.go_on(lives.model, END)
    lives.assert_same()
    assert backend.frame_count <= 2


def test_a_compiled_model_is_removed_and_plain_again(backend):
    lives = Lives(SmallNetwork)
    compiled = torch.compile(lives.model, backend=backend, fullgraph=True)
    lives.schedule(lives.model)
    lives.go_on(compiled, 7)
    lives.rst.remove()
    plain = make(SmallNetwork)
    plain.load_state_dict(lives.model.state_dict())
    for model, callee in ((lives.model, compiled), (plain, plain)):
        optimizer = sgd(model)
        for index in range(3):
            optimizer.zero_grad()
            loss_of(callee, index, lives.shape).backward()
            optimizer.step()
    assert_same(lives.model, plain)


def test_a_copy_of_a_finalized_model_is_compiled(backend):
    """It holds its zeros without ever running the hooks of an eager forward; also under clipping at its first step."""
    lives = Lives(SmallTransformer)
    lives.schedule(lives.model)
    lives.go_on(lives.model, 7)
    lives.model = copy.deepcopy(lives.model)
    compiled = torch.compile(lives.model, backend=backend, fullgraph=True)
    lives.optimizer, lives.other_optimizer = sgd(lives.model), sgd(lives.other)
    lives.go_on(compiled, END)
    lives.assert_same()
    assert backend.frame_count == 1


def test_a_copy_made_during_the_transformation_is_compiled(backend):
    """What replaces a hook there is not a part of a graph, and breaks none."""
    lives = Lives(SmallNetwork)
    lives.schedule(lives.model)
    lives.go_on(lives.model, 2)
    duplicate = copy.deepcopy(lives.model)
    compiled = torch.compile(duplicate, backend=backend, fullgraph=True)
    optimizer = sgd(duplicate)
    for index in range(3):
        loss_of(compiled, index, lives.shape).backward()
        optimizer.step()
    duplicate.eval()
    x, _ = batch(0, lives.shape)
    assert torch.equal(duplicate(x), duplicate(x))
    assert backend.frame_count == 1
    assert not counters["graph_break"]


def test_what_no_optimizer_changed_is_zeroed_at_the_next_update_of_a_compiled_model(backend):
    """The safety net of the eager forward is not a part of a graph: compiled code sees such weights until then."""
    lives = Lives(SmallNetwork)
    compiled = torch.compile(lives.model, backend=backend, fullgraph=True)
    lives.schedule(lives.model)
    lives.go_on(compiled, 7)
    dense = make(SmallNetwork, seed=9)
    lives.model.load_state_dict(dense.state_dict())
    x, _ = batch(0, lives.shape)
    assert torch.allclose(compiled(x), dense(x), rtol=1e-12), "as loaded, and not masked"
    lives.go_on(compiled, 8)
    for name, kept in lives.rst.masks.items():
        assert torch.equal(lives.model.get_parameter(name) != 0, kept)

    lives.model.load_state_dict(dense.state_dict())
    lives.rst.apply_masks(lives.model)  # for those who cannot wait
    for name, kept in lives.rst.masks.items():
        assert torch.equal(lives.model.get_parameter(name) != 0, kept)


def test_parameters_assigned_to_a_compiled_model_are_found_at_the_next_update(backend):
    """No hook runs in the forward of compiled code: of that one update, clipping sees the whole gradient."""
    lives = Lives(SmallNetwork)
    compiled = torch.compile(lives.model, backend=backend, fullgraph=True)
    lives.schedule(lives.model)
    lives.go_on(compiled, 7)
    state = {name: value.clone() for name, value in lives.model.state_dict().items()}
    lives.model.load_state_dict(state, assign=True)
    optimizer = torch.optim.SGD(lives.model.parameters(), lr=0.05)
    for gradients_are_masked in (False, True):
        optimizer.zero_grad()
        compiled(batch(0, lives.shape)[0]).square().mean().backward()
        for name, kept in lives.rst.masks.items():
            grad = lives.model.get_parameter(name).grad
            assert bool((grad[~kept] == 0).all()) is gradients_are_masked, name
        optimizer.step()
        for name, kept in lives.rst.masks.items():
            assert torch.equal(lives.model.get_parameter(name) != 0, kept)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch's default backend needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore")  # torch's own, as it imports Inductor and writes its configuration
def test_the_default_backend():
    """Inductor, compiled to machine code: it may change the order of sums."""
    lives = Lives(SmallNetwork)
    lives.schedule(lives.model)
    lives.go_on(torch.compile(lives.model, fullgraph=True), 7)
    assert_same(lives.model, lives.other, 1e-10)
    for name, kept in lives.rst.masks.items():
        assert torch.equal(lives.model.get_parameter(name) != 0, kept)


# -- torch.export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("build", [SmallNetwork, SmallTransformer], ids=lambda build: build.__name__)
def test_export_of_a_finalized_model_is_that_of_a_plain_model_with_zeros(build, strict):
    lives = Lives(build)
    lives.schedule(lives.model)
    lives.go_on(lives.model, END)
    lives.model.eval()
    plain = make(build)
    plain.load_state_dict(lives.model.state_dict())
    plain.eval()
    x, _ = batch(0, lives.shape)
    program = torch.export.export(lives.model, (x,), strict=strict)
    expected = torch.export.export(plain, (x,), strict=strict)
    calls, expected_calls = ([n.target for n in p.graph.nodes if n.op == "call_function"] for p in (program, expected))
    assert calls == expected_calls
    assert program.state_dict.keys() == expected.state_dict.keys()
    for name, kept in lives.rst.masks.items():
        assert torch.equal(program.state_dict[name] != 0, kept)
    assert torch.allclose(program.module()(x), plain(x), rtol=1e-12)
    lives.go_on(lives.model.train(), END + 1)
    lives.assert_same()


def test_export_of_weights_loaded_since_the_last_forward():
    """The program has them as they are, unless a forward or a state_dict() has put the zeros back."""
    model = make(mlp)
    dense = copy.deepcopy(model.state_dict())
    held = random_ticket(model, 0.5, seed=0)
    model.load_state_dict(dense)
    x = (batch(0, INPUT_SHAPES[mlp])[0],)
    assert torch.equal(torch.export.export(model, x).state_dict["0.weight"], dense["0.weight"])
    model.state_dict()
    assert torch.equal(torch.export.export(model, x).state_dict["0.weight"] != 0, held.masks["0.weight"])


def test_export_during_the_transformation_is_that_of_the_dense_model():
    lives = Lives(SmallNetwork)
    lives.schedule(lives.model)
    lives.go_on(lives.model, 3)
    lives.model.eval()
    x, _ = batch(0, lives.shape)
    program = torch.export.export(lives.model, (x,))
    assert torch.allclose(program.module()(x), lives.model(x), rtol=1e-12)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_is_not_taken_for_the_first_forward_of_an_evaluation(strict):
    """That one is what masks weights that were exchanged through ``.data``."""
    lives = Lives(SmallNetwork)
    lives.schedule(lives.model)
    lives.go_on(lives.model, END)
    for parameter in lives.model.parameters():
        parameter.data.add_(1.0)
    lives.model.eval()
    x, _ = batch(0, lives.shape)
    torch.export.export(lives.model, (x,), strict=strict)
    lives.model(x)
    for name, kept in lives.rst.masks.items():
        assert int(lives.model.get_parameter(name)[~kept].count_nonzero()) == 0


def test_shapes_under_a_fake_mode():
    """A finalized model that runs on tensors without values, as memory planners do and torch.export on torch 2.6."""
    lives = Lives(SmallNetwork)
    lives.schedule(lives.model)
    lives.go_on(lives.model, 7)
    lives.model.eval()
    real = list(lives.model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in lives.model.modules():
            for name, value in module._parameters.items():
                module._parameters[name] = mode.from_tensor(value)
        assert all(isinstance(parameter, nn.Parameter) for parameter in lives.model.parameters())
        assert lives.model(torch.empty(2, *lives.shape, dtype=torch.float64)).shape == (2, 5)
    for module in lives.model.modules():
        for name in module._parameters:
            module._parameters[name] = real.pop(0)
    lives.assert_same()

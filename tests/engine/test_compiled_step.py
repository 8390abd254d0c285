"""Optimizer steps under ``torch.compile``: the update is compiled, the penalty and the zeros stay as they are.

The backend runs the graphs as they were captured: what may go wrong for a hook goes wrong at the capture.
"""

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, batch, loss_of, mlp

# what torch says about itself while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:Profiler", "ignore:`torch.jit", "ignore::DeprecationWarning:torch")


class Scaled(torch.optim.SGD):
    """Touches the gradients before the step that it inherits, and both fire the hooks."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        return super().step(closure)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam-capturable": (torch.optim.Adam, {"lr": 1e-2, "capturable": True}),  # on the CPU only when it is compiled
    "adamw-fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "subclass": (Scaled, {"lr": 0.1}),
}


def train_with(kind, settings, compiled):
    def train(model, side):
        torch.compiler.reset()
        optimizer = kind(model.parameters(), **settings)
        step = compiled(optimizer)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.before_update()
            step()
            side.after_update()

    return train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_step(name):
    torch.optim.SGD([torch.zeros(1)])  # from here on, the step that the subclass inherits fires its own hooks
    assert_same_life(train_with(*OPTIMIZERS[name], lambda optimizer: torch.compile(optimizer.step, backend="eager")))


CAPTURABLE = ["RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop", "AdamW"]


@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_capturable_step(name):
    """On the CPU, torch has these in compiled steps alone."""
    kind = getattr(torch.optim, name)
    settings = {"lr": 1e-3, "capturable": True}
    assert_same_life(train_with(kind, settings, lambda optimizer: torch.compile(optimizer.step, backend="eager")))


def test_a_step_within_a_compiled_function():
    def compiled(optimizer):
        @torch.compile(backend="eager")
        def update():
            optimizer.step()

        return update

    assert_same_life(train_with(*OPTIMIZERS["adam-capturable"], compiled))


def test_a_compiled_training_step():
    """Forward, backward and update in one compiled function; in the explicit loop, the same but for the compiler."""

    def train(model, side):
        torch.compiler.reset()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def step(x, y):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            if side.is_explicit:
                side.before_update()
            optimizer.step()

        step = step if side.is_explicit else torch.compile(step, backend="eager")
        for index in updates(side):
            step(*batch(index, INPUT_SHAPES[mlp]))
            side.after_update()

    assert_same_life(train)


def test_the_update_itself_is_compiled():
    """Our hooks do not push the update out of the graph."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    settings = {"lr": 1e-2, "capturable": True}
    assert_same_life(
        train_with(torch.optim.Adam, settings, lambda optimizer: torch.compile(optimizer.step, backend=backend))
    )
    assert len(captured) == 2  # one for each of the two models
    assert all(any("sqrt" in str(node.target) for node in graph.graph.nodes) for graph in captured)

"""KeptParameters with compiled models, compiled steps, and a whole compiled training step."""

import pytest
import torch
from models import assert_same, batch, cnn, loss_of, make, mlp
from torch import nn

from torch_dual_ticket.baselines import random_ticket
from torch_dual_ticket.kept import KeptParameters

# what torch says about itself while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:Profiler", "ignore:`torch.jit", "ignore::DeprecationWarning:torch")


def trained(is_kept, make_step, build=mlp):
    torch.compiler.reset()
    model = make(build)
    held = random_ticket(model, 0.6, seed=1)
    parameters = KeptParameters(held).parameters() if is_kept else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    step = make_step(model, optimizer)
    for index in range(5):
        step(index)
    return model


def plain(model, optimizer, shape=(12,)):
    def step(index):
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()

    return step


def test_a_compiled_model():
    def compiled(model, optimizer):
        return plain(torch.compile(model, backend="aot_eager"), optimizer, (3, 6, 6))

    assert_same(trained(True, compiled, cnn), trained(False, lambda *of: plain(*of, (3, 6, 6)), cnn))


def test_a_compiled_step_of_the_optimizer():
    def compiled(model, optimizer):
        update = torch.compile(optimizer.step, backend="eager")

        def step(index):
            optimizer.zero_grad()
            loss_of(model, index, (12,)).backward()
            update()

        return step

    assert_same(trained(True, compiled), trained(False, plain))


@pytest.mark.parametrize("of_model", [False, True])
def test_a_compiled_training_step(of_model):
    def compiled(model, optimizer):
        @torch.compile(backend="eager")
        def step(x, y):
            (model if of_model else optimizer).zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return lambda index: step(*batch(index, (12,)))

    assert_same(trained(True, compiled), trained(False, plain))

"""A ticket's whole life, with and without the library: transformation, finalize, finetuning."""

import pytest
import torch
from models import INPUT_SHAPES, assert_same, cnn, finalize_quietly, loss_of, mlp, transformer, twins
from reference import ExplicitLoop

from torch_dual_ticket import RSTScheduler

IMPLEMENTATIONS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 1e-1}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("build", [mlp, cnn, transformer], ids=lambda build: build.__name__)
def test_agrees_with_the_explicit_loop(build, optimizer_name, implementation):
    kind, settings = OPTIMIZERS[optimizer_name]
    settings = settings | IMPLEMENTATIONS[implementation]
    model, other = twins(build)
    shape = INPUT_SHAPES[build]
    rst = RSTScheduler(model, sparsity=0.8, steps=150, seed=3)
    explicit = ExplicitLoop(other, rst.masks, steps=150)
    optimizer, other_optimizer = kind(model.parameters(), **settings), kind(other.parameters(), **settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for index in range(400):
        if index == 200:
            assert_same(model, other)
            finalize_quietly(rst)
            explicit.finalize()
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()
        rst.step()

        other_optimizer.zero_grad()
        loss_of(other, index, shape).backward()
        explicit.before_update()
        other_optimizer.step()
        explicit.after_update()
    assert_same(model, other)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for name, kept in rst.masks.items():
        assert (model.get_parameter(name)[~kept] == 0).all()

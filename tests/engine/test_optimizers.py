"""Every optimizer of torch, in each of its implementations, against the explicit loop."""

import pytest
import torch
from lives import assert_same_life, training_with, updates
from models import INPUT_SHAPES, loss_of, mlp, wide

FOREACH = ({"foreach": False}, {"foreach": True})
FUSED = (*FOREACH, {"fused": True})
OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}, FUSED),
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-3, "amsgrad": True}, FUSED),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 1e-1}, FUSED),
    (torch.optim.Adagrad, {"lr": 1e-2}, FUSED),
    (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "centered": True}, FOREACH),
    (torch.optim.NAdam, {"lr": 1e-2, "decoupled_weight_decay": True, "weight_decay": 1e-2}, FOREACH),
    (torch.optim.RAdam, {"lr": 1e-2}, FOREACH),
    (torch.optim.Adafactor, {"lr": 1e-2}, FOREACH),
    (torch.optim.Adadelta, {"lr": 1.0}, FOREACH),
    (torch.optim.Adamax, {"lr": 1e-2}, FOREACH),
    (torch.optim.ASGD, {"lr": 1e-2}, FOREACH),
    (torch.optim.Rprop, {"lr": 1e-3}, FOREACH),
]


CASES = [(kind, settings | implementation) for kind, settings, options in OPTIMIZERS for implementation in options]
IDS = [f"{kind.__name__}-{'fused' if 'fused' in s else 'foreach' if s['foreach'] else 'plain'}" for kind, s in CASES]


@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_an_optimizer_of_torch(kind, settings, build):
    assert_same_life(training_with(lambda model: kind(model.parameters(), **settings), build), build)


@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_maximize(kind, settings, build):
    """The penalty goes against the direction of the gradient, or it would be maximized too."""

    def train(model, side):
        optimizer = kind(model.parameters(), maximize=True, **settings)
        for index in updates(side):
            optimizer.zero_grad()
            (-loss_of(model, index, INPUT_SHAPES[build])).backward()
            side.before_update(sign=-1.0)
            optimizer.step()
            side.after_update()

    rst = assert_same_life(train, build)
    assert rst.finalize().total.residual < 0.8**0.5  # about what it was before the first update


def test_a_tensor_as_the_learning_rate():
    def make(model):
        return torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-2, dtype=torch.float64), foreach=False)

    assert_same_life(training_with(make))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon():
    """It takes matrices alone, so that another optimizer has the biases."""

    def train(model, side):
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
        optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors, lr=1e-2)]
        for index in updates(side):
            model.zero_grad()
            loss_of(model, index, INPUT_SHAPES[mlp]).backward()
            side.before_update()
            for optimizer in optimizers:
                optimizer.step()
            side.after_update()

    assert_same_life(train)

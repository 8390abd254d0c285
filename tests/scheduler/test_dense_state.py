"""Weights of before finalize() that are put into the finalized model: the best checkpoint was dense."""

import copy

import pytest
import torch
from models import finalize_quietly
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._rst import loop_warnings
from torch_dual_ticket.baselines import GradualPruning

SAID = r"0\.weight was given weights with \d\d% of their norm where it is masked"


def batch():
    return torch.linspace(-1, 1, 16).reshape(2, 8)


def plain():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def trained(steps=3, max_penalty=1.0):
    """A finalized model, its scheduler, and its state of before finalize()."""
    torch.manual_seed(0)
    model = plain()
    rst = RSTScheduler(model, 0.5, steps=steps, max_penalty=max_penalty, seed=0)
    train(model, rst, steps)
    dense = copy.deepcopy(model.state_dict())
    finalize_quietly(rst)
    return model, rst, dense


def train(model, rst, updates):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(updates):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()
        rst.step()


def evaluate(model):
    model.eval()
    return model(batch())


def save(model):
    model.eval()
    model.state_dict()


@pytest.mark.parametrize("use", [evaluate, save])
def test_a_dense_checkpoint_is_named_once(use):
    model, rst, dense = trained()
    model.load_state_dict(dense)
    with pytest.warns(UserWarning, match=SAID):
        use(model)
    model.load_state_dict(dense)
    use(model)  # nothing more is said
    assert torch.equal(model[0].weight != 0, rst.masks["0.weight"])


def exchange(model, values):
    """As an average does for an evaluation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def test_an_average_that_was_begun_before_is_named_and_what_is_said_helps():
    average = plain()
    model, rst, dense = trained()
    average.load_state_dict(dense)
    exchange(model, average.state_dict())
    with pytest.warns(UserWarning, match=SAID):
        evaluate(model)
    model, rst, _ = trained()
    rst.apply_masks(average)
    exchange(model, average.state_dict())
    evaluate(model)


def sparse_checkpoint(model, rst, dense):
    state = copy.deepcopy(model.state_dict())
    train(model, rst, 2)
    model.load_state_dict(state)
    evaluate(model)


def weights_to_train_on_from(model, rst, dense):
    model.load_state_dict(dense)
    train(model, rst, 2)
    evaluate(model)


def another_model(model, rst, dense):
    other = plain()
    other.load_state_dict(dense)
    evaluate(other)


def other_kept_weights(model, rst, dense):
    with torch.no_grad():
        model[0].weight.mul_(3)
    evaluate(model)


def weights_elsewhere(model, rst, dense):
    """As accelerate's offload has them, or a computation of shapes alone."""
    model.to("meta").eval()
    assert model(batch().to("meta")).is_meta


@pytest.mark.parametrize(
    "use",
    [sparse_checkpoint, weights_to_train_on_from, another_model, other_kept_weights, weights_elsewhere],
    ids=lambda use: use.__name__,
)
def test_nothing_is_said_where_nothing_is_lost(use):
    use(*trained())


def test_nothing_is_said_of_weights_that_the_penalty_has_emptied():
    model, _, nearly_sparse = trained(steps=60, max_penalty=5.0)
    model.load_state_dict(nearly_sparse)
    evaluate(model)


def test_no_weight_is_read_while_a_graph_is_captured(monkeypatch):
    model, _, dense = trained()
    model.load_state_dict(dense)
    monkeypatch.setattr(loop_warnings, "is_capturing", lambda: True)
    evaluate(model)


def test_nothing_is_said_during_the_transformation():
    model = plain()
    rst = RSTScheduler(model, 0.5, steps=9, seed=0)
    state = copy.deepcopy(model.state_dict())
    train(model, rst, 3)
    model.load_state_dict(state)
    evaluate(model)


def test_nothing_is_said_before_finalize_of_masks_that_grow_in_force():
    """An average lags behind them, and the message would speak of a finalize() that is still to come."""
    model = plain()
    pruning = GradualPruning(model, 0.9, steps=4, max_penalty=0.0, intervals=2)
    dense = copy.deepcopy(model.state_dict())
    train(model, pruning, 4)
    assert pruning.phase == "finetune"
    assert pruning.sparsity > 0.8
    exchange(model, dense)
    evaluate(model)
    pruning.finalize()
    exchange(model, dense)
    with pytest.warns(UserWarning, match=SAID):
        evaluate(model)

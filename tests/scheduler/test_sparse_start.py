"""A transformation on weights that are sparse already: nothing dissolves a ticket without a word."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors.async_scalar import AsyncScalar
from torch_dual_ticket.baselines import magnitude_masks

SETTINGS = {"steps": 40, "max_penalty": 9.0}


def dense():
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


def trained(model, rst, updates=3, manual=False):
    """What is said of zeros in these updates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(updates):
            optimizer.zero_grad()
            model(torch.randn(8, 20)).square().sum().backward()
            if manual:
                rst.apply_penalty()
            optimizer.step()
            rst.step()
    said = [(str(warning.message), warning.filename) for warning in found if "exactly zero" in str(warning.message)]
    assert all(filename == __file__ for _, filename in said)
    return [message for message, _ in said]


def finished(seed=0, sparsity=0.9):
    """The state of a finalized model, and of its scheduler."""
    model = dense()
    rst = RSTScheduler(model, sparsity, seed=seed, **SETTINGS)
    assert trained(model, rst) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rst.finalize()
    return model.state_dict(), rst.state_dict()


def magnitude_pruned():
    model = dense()
    with torch.no_grad():
        for name, mask in magnitude_masks(model, 0.5).items():
            model.get_parameter(name).mul_(mask)
    return model.state_dict()


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("loads_first", [False, True])
def test_a_ticket_that_is_resumed_without_its_scheduler(loads_first, manual):
    model = dense()
    if loads_first:
        model.load_state_dict(finished()[0])
    rst = RSTScheduler(model, 0.9, seed=1, **SETTINGS)
    if not loads_first:
        model.load_state_dict(finished()[0])
    [message] = trained(model, rst, manual=manual)
    assert message.startswith("90.00 % of the weights to prune were exactly zero before the first update")
    assert "rst.load_state_dict(state)" in message
    assert "hold(model)" in message
    assert "its own ticket" not in message


def test_a_ticket_that_is_resumed_with_its_seed_alone():
    model = dense()
    model.load_state_dict(finished()[0])
    [message] = trained(model, RSTScheduler(model, 0.9, seed=0, **SETTINGS))
    assert "it is its own ticket" in message


def test_a_model_that_something_else_has_pruned():
    model = dense()
    model.load_state_dict(magnitude_pruned())
    [message] = trained(model, RSTScheduler(model, 0.75, seed=0, **SETTINGS))
    assert message.startswith("50.00 % of the weights")


def test_one_layer_of_a_model_that_was_pruned_before():
    model = dense()
    model[0].load_state_dict({name[2:]: value for name, value in finished()[0].items() if name.startswith("0.")})
    [message] = trained(model, RSTScheduler(model, 0.9, seed=0, **SETTINGS))
    assert message.startswith("72.00 % of the weights")


def test_a_ticket_that_is_resumed_with_all_its_states():
    state, saved = finished()
    model = dense()
    rst = RSTScheduler(model, 0.9, **SETTINGS)
    model.load_state_dict(state)
    rst.load_state_dict(saved)
    assert trained(model, rst) == []
    assert int((model[0].weight == 0).sum()) == 720


def test_a_transformation_that_is_resumed():
    model = dense()
    rst = RSTScheduler(model, 0.9, seed=0, **SETTINGS)
    trained(model, rst)
    state = rst.state_dict()
    rst.remove()
    model.load_state_dict(magnitude_pruned())
    rst = RSTScheduler(model, 0.75, seed=0, **SETTINGS)
    with pytest.raises(ValueError, match="other masks"):
        rst.load_state_dict(state)
    rst.remove()
    rst = RSTScheduler(model, 0.9, seed=0, **SETTINGS)
    rst.load_state_dict(state)
    assert trained(model, rst) == []


def few_zeros(model):
    """As many as the coarsest of quantized weights have."""
    model[0].weight[torch.rand(40, 20) < 0.25] = 0


def one_layer_begins_at_zero(model):
    """As the last one of a residual block, or half of LoRA's."""
    model[0].weight.zero_()


def layers_begin_as_the_identity(model):
    """As in recurrent and residual networks, and so that the first layer alone would be enough for a warning."""
    nn.init.eye_(model[0].weight).mul_(0.3)
    nn.init.eye_(model[2].weight)


@pytest.mark.parametrize("edit", [few_zeros, one_layer_begins_at_zero, layers_begin_as_the_identity])
def test_zeros_that_are_no_ticket(edit):
    model = dense()
    with torch.no_grad():
        edit(model)
    assert trained(model, RSTScheduler(model, 0.9, seed=0, **SETTINGS)) == []


def test_never_waits_for_the_counts(monkeypatch):
    """It speaks when they have arrived, once."""
    arrived = []
    monkeypatch.setattr(AsyncScalar, "has_arrived", lambda self: bool(arrived))
    model = dense()
    model.load_state_dict(magnitude_pruned())
    rst = RSTScheduler(model, 0.75, seed=0, **SETTINGS)
    assert trained(model, rst) == []
    for duplicate in (copy.deepcopy, lambda rst: pickle.loads(pickle.dumps(rst))):
        assert duplicate(rst).progress == rst.progress
    arrived.append(True)
    assert len(trained(model, rst)) == 1
    assert trained(model, rst) == []

"""Parameters that are pruned, but that no update has penalized: finalize() names them, with what helps."""

import copy
import warnings

import pytest
import torch
from torch import nn

from torch_dual_ticket import RSTScheduler

CUT = "got no penalty in any update"


class Pair(nn.Module):
    """An online network with a copy that follows it, as in SAC and BYOL."""

    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.target = copy.deepcopy(self.online)

    def loss(self, x):
        with torch.no_grad():
            y = self.target(x)
        return (self.online(x) - y).square().mean() + self.online(x).square().mean()

    def follow(self):
        for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            target.data.lerp_(online.data, 0.05)


class TwoHeads(nn.Module):
    """Of which the loss uses one, and now and then the other."""

    def __init__(self, uses_second=()):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.calls, self.uses_second = 0, uses_second

    def loss(self, x):
        self.calls += 1
        loss = self.first(self.body(x)).square().mean()
        return loss + self.second(self.body(x)).square().mean() if self.calls in self.uses_second else loss

    def follow(self): ...


def finalized(model, scheduled=None, parameters=None, *, updates=60, restart=None, **options):
    """What finalize() warns of after a training, and the scheduler."""
    settings = {"steps": updates, "max_penalty": 9.0, "seed": 0, **options}
    rst = RSTScheduler(scheduled or model, 0.5, **settings)
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.2)
    for index in range(updates):
        optimizer.zero_grad()
        model.loss(torch.randn(16, 8)).backward()
        optimizer.step()
        model.follow()
        rst.step()
        if index == restart:
            state = rst.state_dict()
            rst.remove()
            rst = RSTScheduler(scheduled or model, 0.5, **settings)
            rst.load_state_dict(state)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        rst.finalize()
    assert all(warning.filename == __file__ for warning in found)
    return [str(warning.message) for warning in found], rst


def test_a_target_network_is_named_with_both_ways_out():
    """And the advice for the others is not that of a transformation that was too short."""
    model = Pair()
    [message], _ = finalized(model, parameters=model.online.parameters())
    assert message.startswith(f"target.0.weight, target.2.weight {CUT}")
    assert "exclude=['target']" in message
    assert "rst.apply_masks(copy)" in message


def test_the_ways_out_help():
    model = Pair()
    messages, rst = finalized(model, parameters=model.online.parameters(), exclude=["target"])
    assert messages == []
    rst.remove()
    model = Pair()
    messages, rst = finalized(model, scheduled=model.online, parameters=model.online.parameters())
    assert messages == []
    rst.apply_masks(model.target)
    model.follow()
    for name, kept in rst.masks.items():
        assert torch.equal(model.target.get_parameter(name) != 0, kept)


def test_a_head_that_the_loss_does_not_use():
    [message], _ = finalized(TwoHeads())
    assert message.startswith(f"second.weight {CUT}")
    assert "exclude=['second']" in message


def test_layers_that_the_optimizer_was_not_given():
    model = Pair()
    [message], _ = finalized(model, parameters=model.online[0].parameters(), exclude=["target"])
    assert message.startswith(f"online.2.weight {CUT}")
    assert "exclude=['online.2']" in message


@pytest.mark.parametrize("options", [{}, {"cycles": 2, "steps": 30}, {"max_penalty": 0.0}], ids=str)
def test_a_head_that_was_used_once_is_penalized(options):
    messages, _ = finalized(TwoHeads(uses_second=(7,)), **options)
    assert not any(CUT in message for message in messages)


def test_right_after_a_restart_it_is_not_known():
    messages, _ = finalized(TwoHeads(), restart=59)
    assert not any(CUT in message for message in messages)


def test_a_while_after_a_restart_it_shows():
    """Not of a head whose penalty has done its work before it."""
    [message], _ = finalized(TwoHeads(), restart=30)
    assert message.startswith(f"second.weight {CUT} since the scheduler's state was loaded")
    assert "If they had none before it, either, leave them dense" in message
    messages, _ = finalized(TwoHeads(uses_second=range(50)), restart=50)
    assert messages == []


def test_what_is_zero_anyway_is_not_cut():
    model = TwoHeads()
    nn.init.zeros_(model.second.weight)
    assert finalized(model)[0] == []


def test_a_warning_that_is_an_error_leaves_the_transformation():
    model = TwoHeads()
    rst = RSTScheduler(model, 0.5, steps=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model.loss(torch.ones(4, 8)).backward()
    optimizer.step()
    rst.step()
    with pytest.raises(UserWarning, match=CUT):
        rst.finalize()
    assert rst.phase == "transform"
    assert (model.second.weight != 0).all()

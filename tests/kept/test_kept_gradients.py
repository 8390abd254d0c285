"""The gradients of the model while its kept weights are trained alone: whoever works on them works on the kept ones."""

import copy
import pickle

import pytest
import torch
from models import cnn, make
from test_kept_parameters import ADAMW, MOMENTUM, Training, both
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from torch_dual_ticket.baselines import hold, random_ticket
from torch_dual_ticket.kept import KeptParameters


@pytest.mark.parametrize("clip", ["norm", "norm_foreach", "value", "data", "norm_inf"])
def test_clipping_over_the_model(clip):
    """As Accelerate and the Trainer of Hugging Face do, and older loops with ``.grad.data``."""

    def live(training):
        for index in range(6):
            training.optimizer.zero_grad()
            for micro in range(2):
                training.backward(10 * index + micro)
            parameters = list(training.model.parameters())
            if clip == "value":
                clip_grad_value_(parameters, 0.01)
            elif clip == "data":
                norm = torch.stack([parameter.grad.data.norm() for parameter in parameters]).norm()
                for parameter in parameters:
                    parameter.grad.data.mul_(0.05 / norm)
            else:
                norm_type = torch.inf if clip == "norm_inf" else 2.0
                clip_grad_norm_(parameters, 0.05, norm_type, foreach=True if clip == "norm_foreach" else None)
            training.optimizer.step()

    both(MOMENTUM, live)


def test_what_is_read_is_the_gradient_of_the_dense_loop():
    dense, kept = Training(MOMENTUM, kept=False), Training(MOMENTUM, kept=True)
    for training in (dense, kept):
        training.backward(0)
    theirs, mine = dense.model[0].weight.grad, kept.model[0].weight.grad
    mask = kept.held.masks["0.weight"]
    assert torch.equal(mine.clone(), theirs)
    assert torch.equal(mine + 0, theirs)
    assert torch.equal(mine.abs().max(), theirs.abs().max())
    assert repr(mine) == repr(theirs)
    copied = mine.float()
    mine.mul_(2)
    copied.add_(1)
    assert torch.equal(copied.clone(), torch.where(mask, theirs.float() + 1, 0))
    assert torch.equal(mine.clone(), 2 * theirs)
    mine[mask] = 3.0
    assert torch.equal(next(kept.kept.parameters()).grad, torch.full((96,), 3.0, dtype=torch.float64))
    assert torch.equal(torch.zeros_like(theirs).copy_(mine), 3.0 * mask)
    torch.mul(theirs, 2, out=mine)
    assert torch.equal(mine.clone(), 2 * theirs)


def test_views_are_refused():
    """What is written to one would be lost."""
    training = Training(MOMENTUM, kept=True)
    training.backward(0)
    with pytest.raises(RuntimeError, match=r"needs the memory of the gradient of 0\.weight.*of kept\.parameters\(\)"):
        training.model[0].weight.grad.view(-1)


@pytest.mark.parametrize("convert", ["dtype", "channels_last", "data", "swap", "overwrite"])
def test_conversions_in_the_middle_of_an_accumulation(convert):
    def live(training):
        training.updates(0)
        training.optimizer.zero_grad()
        training.backward(1)
        if convert == "dtype":
            training.model.float()
            training.model.double()
        elif convert == "swap":
            torch.__future__.set_swap_module_params_on_conversion(True)
            training.model.float().double()
            torch.__future__.set_swap_module_params_on_conversion(False)
        elif convert == "overwrite":
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            training.model.float().double()
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            state = training.optimizer.state_dict()
            training.optimizer = MOMENTUM(training.parameters())
            training.optimizer.load_state_dict(state)
        elif convert == "channels_last":
            training.model.to(memory_format=torch.channels_last)
        else:
            for parameter, theirs in zip(training.model.parameters(), make(cnn, seed=5).parameters(), strict=True):
                parameter.data = theirs.data
        clip_grad_norm_(training.parameters(), 0.05)
        training.backward(2)
        training.optimizer.step()
        training.updates(3)

    both(MOMENTUM, live, build=cnn)


def test_what_is_added_to_the_gradient():
    def live(training):
        training.backward(0)
        for name, parameter in training.model.named_parameters():
            if name in training.held.masks:
                parameter.grad.add_(1.0)
                parameter.grad.add_(parameter.grad)
                parameter.grad.add_(torch.ones(1, dtype=torch.float64)).mul_(training.held.masks[name])
        training.optimizer.step()

    both(MOMENTUM, live)


def test_a_gradient_that_is_assigned_replaces_the_one_that_was_there():
    def live(training):
        training.backward(0)
        for name, parameter in training.model.named_parameters():
            mask = training.held.masks.get(name, torch.ones_like(parameter))
            parameter.grad = torch.full_like(parameter, 0.1) * mask
        training.optimizer.step()

    both(MOMENTUM, live)


def test_a_layer_that_is_not_used_after_the_model_was_zeroed():
    """Its last gradient takes no part in the norm."""

    def live(training):
        training.updates(0)
        training.model.zero_grad()
        training.model[0](torch.ones(2, 12, dtype=torch.float64)).square().mean().backward()
        clip_grad_norm_(training.parameters(), 0.05)
        training.optimizer.step()

    both(ADAMW, live)


def test_an_exception_in_backward():
    def live(training):
        training.updates(0)
        training.optimizer.zero_grad()
        handle = training.model[0].weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training.backward(1)
        handle.remove()
        training.backward(2)
        training.optimizer.step()

    both(MOMENTUM, live)


def test_a_gradient_is_copied_and_saved_as_a_whole():
    training = Training(MOMENTUM, kept=True)
    training.backward(0)
    grad = training.model[0].weight.grad
    for copied in (copy.deepcopy(grad), pickle.loads(pickle.dumps(grad))):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, grad.clone())
    training.model.share_memory()  # torch reads an address that is not there
    training.optimizer.step()


def test_a_copy_of_the_model_in_the_middle_of_an_accumulation():
    training = Training(MOMENTUM, kept=True)
    training.backward(0)
    twin = copy.deepcopy(training.model)
    assert all(parameter.grad is None for parameter in twin.parameters())


def test_a_layer_that_is_not_used_after_the_optimizer_has_zeroed_has_no_gradient():
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    kept = KeptParameters(random_ticket(model, 0.5, seed=1))
    optimizer = ADAMW(kept.parameters())
    for layer in model:
        layer(torch.ones(2, 8)).sum().backward()
    optimizer.zero_grad()
    model[0](torch.ones(2, 8)).sum().backward()
    assert model[1].weight.grad is None
    assert torch.equal(model[0].weight.grad.clone(), 2.0 * kept._values.weights["0.weight"].source.tensor().ne(0))


def test_one_number_may_be_added_to_the_gradient_of_a_vector():
    """It is broadcast, and not taken for the gradient that backward() adds."""
    layer = nn.Linear(3, 6)
    kept = KeptParameters(hold(layer, {"bias": torch.arange(6) % 2}))
    layer(torch.ones(1, 3)).sum().backward()
    layer.bias.grad.add_(torch.ones(1))
    assert torch.equal(layer.bias.grad.clone(), 2.0 * (torch.arange(6) % 2))
    assert [parameter.numel() for parameter in kept.parameters()] == [18, 3]

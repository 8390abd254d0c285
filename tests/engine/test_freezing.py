"""Parameters that are frozen and unfrozen midway."""

import pytest
import torch
from lives import assert_same_life, is_plus_zero, updates
from models import INPUT_SHAPES, finalize_quietly, loss_of, make, mlp
from torch import nn

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]
PERIODS = {
    "in-transformation": range(5, 9),
    "over-finalize": range(15, 25),
    "in-finetuning": range(25, 29),
    "at-finalize-alone": range(20, 21),
}


@pytest.mark.parametrize("zeroing", ["to-none", "in-place"])
@pytest.mark.parametrize("period", PERIODS)
def test_a_layer_frozen_for_a_while(period, zeroing):
    """Without a gradient it gets no penalty and no update, and its masked weights become zero with the others'.

    The first gradient after that is clipped like any other.
    """

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        for index in range(40):
            model[2].requires_grad_(index not in PERIODS[period])
            if index == 20:
                side.finalize()
            optimizer.zero_grad(set_to_none=zeroing == "to-none")
            loss_of(model, index, SHAPE).backward()
            side.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_one_layer_after_the_other():
    """Gradual unfreezing, from the head down, with groups added to the optimizer as it goes."""

    def train(model, side):
        model[:4].requires_grad_(False)
        optimizer = torch.optim.Adam(model[4].parameters(), lr=1e-2)
        for index in updates(side):
            if index in (6, 12):
                layer = model[2] if index == 6 else model[0]
                layer.requires_grad_(True)
                optimizer.add_param_group({"params": layer.parameters()})
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_everything_frozen_after_finalize():
    """An evaluation of a finalized model needs no gradients, and the weights are what they are."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rst = RSTScheduler(model, sparsity=0.5, steps=1)
    loss_of(model, 0, SHAPE).backward()
    optimizer.step()
    model.requires_grad_(False)
    finalize_quietly(rst)
    before = [parameter.clone() for parameter in model.parameters()]
    loss_of(model, 1, SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(is_plus_zero(model.get_parameter(name)[~kept]) for name, kept in rst.masks.items())


def test_a_target_that_is_frozen_from_the_start_is_refused():
    model = make(mlp)
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"2\.weight is frozen .* exclude=\['2'\]"):
        RSTScheduler(model, sparsity=0.5)
    RSTScheduler(model, sparsity=0.5, exclude=["2"])

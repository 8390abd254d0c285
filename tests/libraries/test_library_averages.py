"""Averages of the weights that ema-pytorch and torch-ema keep, where they are installed."""

import pytest
import torch
from models import INPUT_SHAPES, finalize_quietly, loss_of, make, mlp
from plain_loop import assert_holds_zeros

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]


def train(begin, update, make_average, max_penalty=10.0):
    """40 updates, ``finalize()`` after 20; the average is begun after ``begin``."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rst = RSTScheduler(model, 0.8, steps=15, max_penalty=max_penalty, seed=3)
    average = None
    for index in range(40):
        if index == begin:
            average = make_average(model)
        optimizer.zero_grad()
        loss_of(model, index, SHAPE).backward()
        optimizer.step()
        if average is not None:
            update(average)
        rst.step()
        if index == 19:
            residual = rst.residual()
            finalize_quietly(rst)
    return model, rst, average, residual


@pytest.mark.parametrize("begin", [0, 25], ids=["begun before", "begun after"])
def test_ema_pytorch(begin):
    library = pytest.importorskip("ema_pytorch")

    def make_average(model):
        return library.EMA(model, beta=0.9, update_after_step=2, update_every=1)

    model, rst, average, residual = train(begin, lambda average: average.update(), make_average)
    if begin < 20:
        assert (average.ema_model[0].weight[~rst.masks["0.weight"]] != 0).all(), "it remembers what was before"
    rst.apply_masks(average.ema_model)
    assert_holds_zeros(average.ema_model, rst)
    average.update()  # zeros averaged with zeros
    assert_holds_zeros(average.ema_model, rst)
    average.update_model_with_ema()  # as update_model_with_ema_every= does, through .data
    assert_holds_zeros(model, rst)
    assert residual < train(99, None, make_average, max_penalty=0.0)[-1]


def test_torch_ema():
    """``store``, ``copy_to``, ``restore``: what is from before ``finalize()`` is masked when it is tried."""
    library = pytest.importorskip("torch_ema")

    def make_average(model):
        return library.ExponentialMovingAverage(model.parameters(), decay=0.9)

    model, rst, average, residual = train(0, lambda average: average.update(), make_average)
    trained = model[0].weight.detach().clone()
    with average.average_parameters():
        model.eval()
        loss_of(model, 0, SHAPE)
        assert_holds_zeros(model, rst)
        assert not torch.equal(model[0].weight, trained)
    assert torch.equal(model[0].weight, trained)
    assert residual < train(99, None, make_average, max_penalty=0.0)[-1]

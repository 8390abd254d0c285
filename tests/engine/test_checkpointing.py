"""Activation checkpointing: the forward of a part of the model runs again within the backward pass."""

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, batch, mlp, transformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

KINDS = {"reentrant": True, "non-reentrant": False}


def train_with(forward, build):
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for index in updates(side):
            optimizer.zero_grad()
            x, y = batch(index, INPUT_SHAPES[build])
            x.requires_grad_()  # the reentrant kind has no gradients otherwise
            nn.functional.cross_entropy(forward(model, x), y).backward()
            side.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            side.before_update()
            optimizer.step()
            side.after_update()

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind):
    def forward(model, x):
        return model.head(checkpoint(model.encoder, x, use_reentrant=KINDS[kind]).mean(1))

    assert_same_life(train_with(forward, transformer), transformer)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_sequential(kind):
    def forward(model, x):
        return checkpoint_sequential(model, 2, x, use_reentrant=KINDS[kind])

    assert_same_life(train_with(forward, mlp))


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT")
@pytest.mark.parametrize("when", ["before-the-scheduler", "after-the-scheduler"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_in_the_model(kind, when):
    """Names are those of the model without it."""
    implementation = CheckpointImpl.REENTRANT if KINDS[kind] else CheckpointImpl.NO_REENTRANT
    wrapped = []

    def wrap(model):
        if not wrapped:  # and leave the model for the explicit loop as it is
            wrapped.append(model)
            model[2] = checkpoint_wrapper(model[2], checkpoint_impl=implementation)

    def train(model, side, *prepared):
        wrap(model)
        train_with(lambda model, x: model(x), mlp)(model, side)
        if not side.is_explicit:
            assert isinstance(model[2], CheckpointWrapper)
            model[2] = model[2]._checkpoint_wrapped_module

    rst = assert_same_life(train, prepare=wrap if when == "before-the-scheduler" else None)
    assert list(rst.masks) == ["0.weight", "2.weight", "4.weight"]

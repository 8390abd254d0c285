"""Averages of the weights: what they hold when begun before finalize() and after it, and how to prune them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from models import INPUT_SHAPES, assert_same, batch, cnn, finalize_quietly, loss_of, make, mlp, twins
from reference import ExplicitLoop
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from torch_dual_ticket import RSTScheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

DECAY = 0.8
AVERAGES = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    "ema one by one": {"avg_fn": lambda mean, new, count: DECAY * mean + (1 - DECAY) * new},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "swa by default": {},
}


def lives(
    build: Callable[[], nn.Module], kind: str, begin: int
) -> tuple[nn.Module, RSTScheduler, AveragedModel, AveragedModel]:
    """A life with the library, an explicit one, and torch's average of each, begun before or after finalize()."""
    model, other = twins(build)
    shape = INPUT_SHAPES[build]
    rst = RSTScheduler(model, sparsity=0.7, steps=8, seed=1)
    explicit = ExplicitLoop(other, rst.masks, steps=8)
    mine = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    theirs = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    average = reference = None
    for index in range(20):
        if index == 10:
            finalize_quietly(rst)
            explicit.finalize()
        if index == begin:
            average, reference = (AveragedModel(averaged, **AVERAGES[kind]) for averaged in (model, other))
        mine.zero_grad()
        loss_of(model, index, shape).backward()
        mine.step()
        rst.step()
        theirs.zero_grad()
        loss_of(other, index, shape).backward()
        explicit.before_update()
        theirs.step()
        explicit.after_update()
        if average is not None:
            average.update_parameters(model)
            reference.update_parameters(other)
    assert_same(model, other)
    return model, rst, average, reference


def apply_explicitly(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, kept in masks.items():
            model.get_parameter(name).mul_(kept)
    return model


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_begun_before_finalize_is_plain_and_apply_masks_prunes_it(kind):
    model, rst, average, reference = lives(mlp, kind, begin=4)
    assert not prune.is_pruned(average)
    assert_same(average, reference)
    for name, kept in rst.masks.items():
        assert (average.module.get_parameter(name)[~kept] != 0).any(), "it remembers the weights of before finalize()"

    rst.apply_masks(average)
    apply_explicitly(reference.module, rst.masks)
    assert_same(average, reference)
    x, _ = batch(0, INPUT_SHAPES[mlp])
    assert torch.allclose(average(x), reference(x), rtol=1e-12)

    average.update_parameters(model)  # zeros averaged with zeros: it needs no further pruning
    for name, kept in rst.masks.items():
        assert torch.equal(average.module.get_parameter(name) != 0, kept)


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_begun_after_finalize_holds_the_zeros(kind):
    _, rst, average, reference = lives(mlp, kind, begin=12)
    assert prune.is_pruned(average)
    assert_same(average, reference)
    for name, kept in rst.masks.items():
        assert torch.equal(average.module.get_parameter(name) != 0, kept)
    x, _ = batch(0, INPUT_SHAPES[mlp])
    assert torch.allclose(average(x), reference(x), rtol=1e-12)
    assert_same(average, reference)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("ignore:Profiler", "ignore:`torch.jit", "ignore::DeprecationWarning:torch")
def test_an_average_that_a_hook_of_the_optimizer_updates_never_sees_masked_weights(compiled):
    """torch runs the hooks of one optimizer before those for all."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.7, steps=2, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    torch.compiler.reset()
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    seen = []
    for index in range(8):
        if index == 3:
            finalize_quietly(rst)
            optimizer.register_step_post_hook(
                lambda *_: seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            )
        optimizer.zero_grad()
        loss_of(model, index, INPUT_SHAPES[mlp]).backward()
        step()
        rst.step()
    assert len(seen) == 5
    for weights in seen:
        for name, kept in rst.masks.items():
            assert torch.equal(weights[name] != 0, kept)


def test_the_model_lives_as_it_does_without_an_average():
    assert_same(lives(mlp, "ema", begin=0)[0], lives(mlp, "ema", begin=99)[0], 0)


def test_an_average_with_buffers_and_batch_norm_statistics():
    model, rst, average, reference = lives(cnn, "swa", begin=4)
    rst.apply_masks(average)
    apply_explicitly(reference.module, rst.masks)
    loader = [batch(index, INPUT_SHAPES[cnn])[0] for index in range(3)]
    update_bn(loader, average)
    update_bn(loader, reference)
    assert_same(average, reference)

    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert_same(average.module, model)


def test_an_average_kept_in_a_dictionary_is_masked_when_it_is_tried_on_the_finalized_model():
    """store, copy_to, restore: as libraries do that keep a moving average as tensors without a model."""
    model, rst, _, reference = lives(mlp, "ema", begin=4)
    stored = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(reference.module.get_parameter(name))
    apply_explicitly(reference.module, rst.masks)
    x, _ = batch(0, INPUT_SHAPES[mlp])
    assert torch.allclose(model(x), reference(x), rtol=1e-12)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(stored[name])
    model(x)
    for name, value in model.named_parameters():
        assert torch.equal(value, stored[name])


def test_an_average_that_is_written_past_the_version_counter_needs_apply_masks():
    """torch_ema's copy_to() writes to ``.data``: no forward can tell that anything has changed."""
    model, rst, _, reference = lives(mlp, "ema", begin=4)
    for name, value in model.named_parameters():
        value.data.copy_(reference.module.get_parameter(name).data)
    rst.apply_masks(model)
    apply_explicitly(reference.module, rst.masks)
    assert_same(model, reference.module)


def test_an_average_of_a_compiled_model_has_the_names_of_the_model_inside():
    _, rst, _, _ = lives(mlp, "ema", begin=4)
    dense = make(mlp, seed=8)
    average = AveragedModel(torch.compile(dense, backend="eager"))
    rst.apply_masks(average)
    for name, kept in rst.masks.items():
        assert torch.equal(average.module._orig_mod.get_parameter(name) != 0, kept)
        assert (dense.get_parameter(name) != 0).all()

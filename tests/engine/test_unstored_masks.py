"""Masks of which only the seed is kept, and that are computed part by part where they are used."""

import copy
import gc
from unittest import mock

import pytest
import torch
from halves import STEPS, InOneProcess, live_alike, shard
from models import assert_same, finalize_quietly, loss_of, make, twins, wide
from ranks import needs_fsdp2, on_two_ranks
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors import kernels, mask_cache
from torch_dual_ticket.masks.seeded import SeededMask

SHAPE = (12,)


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, 40, 3), nn.Flatten(), nn.Linear(40, 5)).to(memory_format=torch.channels_last)


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(700, 8, sparse=True), nn.Flatten(), nn.Linear(8 * 12, 5))


def long_rows() -> nn.Module:
    """Longer than a part of a mask."""
    return nn.Sequential(nn.Linear(12, 900), nn.Tanh(), nn.Linear(900, 5))


def loss_on(model: nn.Module, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    if isinstance(model[0], nn.Embedding):
        x = torch.randint(700, (8, 12), generator=generator)
    else:
        x = torch.randn(8, 12, 3, 3, generator=generator, dtype=torch.float64)
        x = x.mean((2, 3)) if isinstance(model[0], nn.Linear) else x
    return nn.functional.cross_entropy(model(x), torch.randint(5, (8,), generator=generator))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(mask_cache, "PART", 500)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (wide, {"sparsity": 0.8}),
        (long_rows, {"sparsity": 0.8}),
        (wide, {"pattern": "2:4"}),
        (wide, {"sparsity": 0.5, "cycles": 2}),
        (images, {"sparsity": 0.8}),
        (images, {"sparsity": 0.5, "pattern": "filter"}),
        (words, {"sparsity": 0.8, "targets": (nn.Embedding,)}),
    ],
    ids=["wide", "long_rows", "2:4", "cycles", "channels_last", "filter", "sparse"],
)
@pytest.mark.filterwarnings("ignore:pattern='filter' masks 2 of the 5 outputs")
def test_trains_as_with_stored_masks(build, options):
    models = twins(build)
    if options.get("pattern") == "2:4":
        options = options | {"exclude": ["2"]}
    schedulers = [
        RSTScheduler(model, steps=10, seed=3, store_masks=stored, **options)
        for model, stored in zip(models, (True, False), strict=True)
    ]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for index in range(30):
        for model, rst, optimizer in zip(models, schedulers, optimizers, strict=True):
            if index == 20:
                report = finalize_quietly(rst)
            optimizer.zero_grad()
            loss_on(model, index).backward()
            if build is not words:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            rst.step()
        assert schedulers[1].residual() == pytest.approx(schedulers[0].residual(), rel=1e-12)
    assert_same(*models, tolerance=0.0)
    assert report.total.residual > 0
    for name, kept in schedulers[1].masks.items():
        assert (models[1].get_parameter(name)[~kept] == 0).all()


def test_no_mask_stays_and_none_is_drawn_whole():
    model = make(wide)
    rst = RSTScheduler(model, sparsity=0.8, steps=10, seed=3, store_masks=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch.object(SeededMask, "draw", autospec=True, side_effect=SeededMask.draw) as draw:
        for index in range(6):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            optimizer.step()
            rst.step()
            if index == 3:
                finalize_quietly(rst)
            held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (360, 12)]
            assert [t.dtype for t in held if t.dtype in (torch.uint8, torch.bool)] == []
        sizes = [call.kwargs["size"] for call in draw.call_args_list if call.args[0].name == "0.weight"]
    assert {size[1] for size in sizes} == {12}
    assert max(size[0] for size in sizes) == 500 // 12
    assert len(sizes) >= 6 * 360 // (500 // 12)


def test_no_mask_stays_where_a_sparse_gradient_has_asked_for_rows():
    model = make(words)
    rst = RSTScheduler(model, sparsity=0.8, steps=10, seed=3, store_masks=False, targets=(nn.Embedding,))
    loss_on(model, 0).backward()
    torch.optim.SparseAdam(model[0].parameters()).step()
    held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (700, 8)]
    assert [t.dtype for t in held if t.dtype in (torch.uint8, torch.bool)] == []
    assert rst.state_dict()["update_pending"]


def test_a_copy_does_not_store_masks_either():
    model = make(wide)
    rst = RSTScheduler(model, sparsity=0.8, steps=10, seed=3, store_masks=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0, SHAPE).backward()
    optimizer.step()
    finalize_quietly(rst)
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1, weight_decay=0.1)
    with mock.patch.object(SeededMask, "draw", autospec=True, side_effect=SeededMask.draw) as draw:
        loss_of(copied, 1, SHAPE).backward()
        optimizer.step()
        sizes = {call.kwargs["size"] for call in draw.call_args_list if call.args[0].name == "0.weight"}
    assert (360, 12) not in sizes
    assert (500 // 12, 12) in sizes
    assert (copied[0].weight[~rst.masks["0.weight"]] == 0).all()


def test_a_weight_of_another_shape_is_refused():
    model = make(wide)
    rst = RSTScheduler(model, sparsity=0.8, steps=10, seed=3, store_masks=False)
    model[0].weight = nn.Parameter(torch.randn(361, 12, dtype=torch.float64))
    model[2].weight = nn.Parameter(torch.randn(5, 361, dtype=torch.float64))
    model[0].bias = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0, SHAPE).backward()
    with pytest.raises(RuntimeError, match=r"weight has shape \(.*361.*\), but had \(.*360.*\) when"):
        optimizer.step()
    del rst


@needs_fsdp2
@on_two_ranks
def test_shards():
    with mock.patch.object(mask_cache, "PART", 500), mock.patch.object(kernels, "SMALL", 100):
        model = shard(make(rows_that_do_not_divide))
        rst = RSTScheduler(model, sparsity=0.6, steps=STEPS, store_masks=False)
        live_alike(model, rst, InOneProcess(make(rows_that_do_not_divide), rst.masks))


def rows_that_do_not_divide() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 75), nn.Tanh(), nn.Linear(75, 5))

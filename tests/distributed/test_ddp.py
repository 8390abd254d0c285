"""DistributedDataParallel and ZeroRedundancyOptimizer: every rank has the whole ticket, and the same one."""

import warnings

import pytest
import torch
from halves import (
    SHAPE,
    STEPS,
    InOneProcess,
    assert_replicated,
    live_alike,
    uneven_mlp,
)
from models import batch, finalize_quietly, make
from ranks import everywhere, on_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_dual_ticket import RSTScheduler

OPTIONS = {
    "plain": {},
    "bucket_views": {"gradient_as_bucket_view": True},
    "many_buckets": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "static_graph_bucket_views": {"static_graph": True, "gradient_as_bucket_view": True},
    "find_unused": {"find_unused_parameters": True},
    "find_unused_bucket_views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("wrapped", ["before", "after"])
@pytest.mark.parametrize("options", OPTIONS)
@on_two_ranks
def test_agrees_with_one_process(options, wrapped):
    inner = make(uneven_mlp)
    if wrapped == "before":
        model = DistributedDataParallel(inner, **OPTIONS[options])
        rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    else:
        rst = RSTScheduler(inner, sparsity=0.6, steps=STEPS)
        model = DistributedDataParallel(inner, **OPTIONS[options])
    live_alike(model, rst, InOneProcess(inner, rst.masks))
    assert_replicated(model)


@pytest.mark.parametrize("options", ["plain", "bucket_views"])
@on_two_ranks
def test_no_sync_accumulates_gradients_but_not_the_penalty(options):
    inner = make(uneven_mlp)
    model = DistributedDataParallel(inner, **OPTIONS[options])
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    live_alike(model, rst, InOneProcess(inner, rst.masks), micro_batches=3)
    assert_replicated(model)


class Detour(nn.Module):
    """One layer is used in every other batch, and then by the second half of it only; one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, detour: bool) -> torch.Tensor:
        x = self.always(x).tanh()
        return self.head(self.sometimes(x).tanh() if detour else x)


def detour_loss(model: nn.Module, index: int, half: int) -> torch.Tensor:
    x, y = batch(index, SHAPE)
    logits = model(x.chunk(2)[half], detour=half == 1 and index % 2 == 0)
    return nn.functional.cross_entropy(logits, y.chunk(2)[half])


@pytest.mark.parametrize("options", ["find_unused", "find_unused_bucket_views"])
@on_two_ranks
def test_a_layer_that_one_rank_uses_and_a_layer_that_none_does(options):
    warnings.filterwarnings("ignore", message=r"never\.weight got no penalty in any update")
    inner = make(Detour)
    model = DistributedDataParallel(inner, **OPTIONS[options])
    rst = RSTScheduler(model, sparsity=0.5, steps=STEPS)
    live_alike(model, rst, InOneProcess(inner, rst.masks, loss=detour_loss))
    assert_replicated(model)


@pytest.mark.parametrize("bucket_views", [False, True], ids=["plain", "bucket_views"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@on_two_ranks
def test_zero_redundancy_optimizer(kind, bucket_views):
    """Its step contains the step of a second optimizer, which has only this rank's parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    settings = {"lr": 0.02, "weight_decay": 1e-2}
    inner = make(uneven_mlp)
    model = DistributedDataParallel(inner, gradient_as_bucket_view=bucket_views)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(inner, rst.masks, make_optimizer=lambda parameters: kind(parameters, **settings))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=kind, parameters_as_bucket_view=bucket_views, **settings
    )
    assert 0 < len(optimizer.optim.param_groups[0]["params"]) < len(optimizer.param_groups[0]["params"])
    live_alike(model, rst, reference, optimizer)
    assert_replicated(model)


@on_two_ranks
def test_what_ddp_broadcasts_and_saves_stays_as_it_was():
    inner = make(uneven_mlp)
    model = DistributedDataParallel(inner)
    names = list(model.state_dict())
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    live_alike(model, rst, InOneProcess(inner, rst.masks))
    assert list(model.state_dict()) == names
    assert not list(model.buffers())
    assert list(rst.masks) == [name for name, _ in inner.named_parameters() if name.endswith("weight")]


@on_two_ranks
def test_report_and_residual_are_those_of_one_process():
    inner = make(uneven_mlp)
    model = DistributedDataParallel(inner)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(inner, rst.masks)
    live_alike(model, rst, reference, updates=range(5))
    assert rst.residual() == pytest.approx(reference.residual(), rel=1e-12)
    report = finalize_quietly(rst)
    assert report.total.residual == pytest.approx(reference.residual(), rel=1e-12)
    assert everywhere(report)[0] == everywhere(report)[1]

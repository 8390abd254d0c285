"""Ticket files of sharded models (FSDP2, DTensor): rank 0 writes what one process would; every rank reads its part."""

import copy
import os

import pytest
import torch
from models import finalize_quietly, make
from ranks import everywhere, needs_fsdp2, on_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.export import load_ticket, read_ticket, save_ticket


def uneven():
    """Seven and three rows do not divide by two."""
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0])
    return fully_shard(model)


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model[0] = nn.Linear(6, 8).double()  # its unit of distribution is a whole number of rows
    model[3] = nn.Linear(8, 4).double()
    model[2] = nn.Identity()
    mesh = init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


def finalized(model):
    rst = RSTScheduler(model, 0.5, steps=1, seed=7)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    rst.step()
    finalize_quietly(rst)
    return rst


def look_at(model):
    """A forward without gradients: it leaves the root of FSDP2 unsharded."""
    with torch.no_grad():
        model(torch.ones(1, 6, dtype=torch.float64))


def gathered(model):
    whole = {}
    for name, tensor in model.state_dict().items():
        whole[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def assert_equal(mine, theirs):
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@needs_fsdp2
@on_two_ranks
def test_a_finetuning_state_reaches_the_shards_after_an_evaluation():
    model, other = (fsdp2(make(uneven)) for _ in range(2))
    state = finalized(other).state_dict()
    rst = RSTScheduler(model, 0.5, steps=1, seed=7)
    look_at(model)
    rst.load_state_dict(state)
    weights = gathered(model)
    for name, kept in rst.masks.items():
        assert torch.equal(weights[name] != 0, kept)


@needs_fsdp2
@on_two_ranks
def test_each_stage_of_a_pipeline_writes_its_own_ticket(tmp_path):
    """The first rank of its mesh does, which need not be rank 0."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()
    meshes = [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1])]
    stage = fully_shard(make(uneven), mesh=meshes[rank])
    rst = finalized(stage)
    save_ticket(rst, tmp_path / f"stage{rank}")
    everywhere(None)
    assert sorted(os.listdir(tmp_path)) == ["stage0", "stage1"]
    assert_equal(read_ticket(tmp_path / f"stage{rank}"), gathered(stage))


@needs_fsdp2
@pytest.mark.parametrize("shard", [fsdp2, tensor_parallel], ids=lambda shard: shard.__name__)
@on_two_ranks
def test_sharded_models_write_and_read_the_files_of_whole_ones(shard, tmp_path):
    model = shard(make(uneven))
    rst = finalized(model)
    look_at(model)
    save_ticket(rst, tmp_path / ("ticket" if torch.distributed.get_rank() == 0 else "never written"))
    everywhere(None)
    assert sorted(os.listdir(tmp_path)) == ["ticket"]
    expected = gathered(model)
    assert_equal(read_ticket(tmp_path / "ticket"), expected)

    other = shard(make(uneven, seed=1))
    look_at(other)
    resumed = RSTScheduler(other, 0.5, steps=1)
    resumed.load_state_dict(load_ticket(tmp_path / "ticket", other))
    assert_equal(gathered(other), expected)

    whole = make(uneven, seed=2)
    if shard is fsdp2:
        scheduler_state = load_ticket(tmp_path / "ticket", whole)
        assert_equal(whole.state_dict(), expected)
        again = RSTScheduler(whole, 0.5, steps=1)
        again.load_state_dict(scheduler_state)
        path = tmp_path / f"again{torch.distributed.get_rank()}"
        save_ticket(again, path)
        assert path.read_bytes() == (tmp_path / "ticket").read_bytes()

    before = copy.deepcopy(gathered(other))
    with pytest.raises(ValueError, match=r"0\.weight has shape \((7|8), 6\) in the file, \(2, 6\) here"):
        load_ticket(tmp_path / "ticket", fsdp2(make(lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2)))))
    assert_equal(gathered(other), before)


@on_two_ranks
def test_under_ddp_one_rank_saves(tmp_path):
    model = DistributedDataParallel(make(uneven))
    rst = finalized(model)
    if torch.distributed.get_rank() == 1:
        save_ticket(rst, tmp_path / "ticket")
    everywhere(None)
    other = DistributedDataParallel(make(uneven, seed=1))
    load_ticket(tmp_path / "ticket", other)
    assert_equal(other.module.state_dict(), model.module.state_dict())

"""Checkpoints of torch.distributed.checkpoint: saved by two ranks and finished by one process, or the other way.

The whole is compared with a life that was never interrupted, to rounding: what is summed where differs.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from halves import (
    CLIP,
    FINALIZE_AT,
    STEPS,
    UPDATES,
    InOneProcess,
    assert_agrees,
    half_loss,
    live_alike,
    sgd,
    uneven_mlp,
)
from models import finalize_quietly, make
from ranks import on_two_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from torch_dual_ticket import RSTScheduler

MOMENTS = {"transformation": 6, "finetuning": FINALIZE_AT + 5}


def state_of(model, optimizer, rst):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "rst": rst.state_dict()}


def restore(folder, model, optimizer, rst, **options):
    state = state_of(model, optimizer, rst)
    dcp.load(state, checkpoint_id=folder, **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    rst.load_state_dict(state["rst"])


def sharded():
    from torch.distributed.fsdp import fully_shard

    return fully_shard(make(uneven_mlp))


def go_on(model, optimizer, rst, updates):
    """What the two ranks do, in one process."""
    for update in updates:
        if update == FINALIZE_AT:
            finalize_quietly(rst)
        optimizer.zero_grad()
        for half in range(2):
            (half_loss(model, update, half) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rst.step()


def uninterrupted(masks):
    reference = InOneProcess(make(uneven_mlp), masks)
    for update in range(UPDATES):
        if update == FINALIZE_AT:
            reference.ticket.finalize()
        reference.update([update])
    return reference


@on_two_ranks
def train_and_save(folder: str, updates: int) -> None:
    model = sharded()
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS, seed=11)
    optimizer = live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks), updates=range(updates))
    dcp.save(state_of(model, optimizer, rst), checkpoint_id=folder)


@on_two_ranks
def load_and_finish(folder: str, updates: int) -> None:
    model = sharded()
    optimizer = sgd(model.parameters())
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    restore(folder, model, optimizer, rst)
    for update in range(updates, UPDATES):
        if update == FINALIZE_AT:
            finalize_quietly(rst)
        optimizer.zero_grad()
        half_loss(model, update, torch.distributed.get_rank()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rst.step()
    assert_agrees(model, uninterrupted(rst.masks))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_saved_by_two_ranks_and_finished_by_one_process(moment: str, tmp_path: Path):
    train_and_save(folder=str(tmp_path), updates=MOMENTS[moment])
    model = make(uneven_mlp, seed=5)
    optimizer = sgd(model.parameters())
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)  # adopts the seed
    restore(str(tmp_path), model, optimizer, rst, no_dist=True)
    assert rst.seed == 11
    assert rst.phase == ("transform" if moment == "transformation" else "finetune")
    go_on(model, optimizer, rst, range(MOMENTS[moment], UPDATES))
    assert_agrees(model, uninterrupted(rst.masks))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_saved_by_one_process_and_finished_by_two_ranks(moment: str, tmp_path: Path):
    model = make(uneven_mlp)
    optimizer = sgd(model.parameters())
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS, seed=11)
    go_on(model, optimizer, rst, range(MOMENTS[moment]))
    dcp.save(state_of(model, optimizer, rst), checkpoint_id=str(tmp_path), no_dist=True)
    load_and_finish(folder=str(tmp_path), updates=MOMENTS[moment])

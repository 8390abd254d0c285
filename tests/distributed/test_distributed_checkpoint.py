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
from models import assert_same, finalize_quietly, make
from ranks import needs_fsdp2, on_two_ranks
from reference import ExplicitLoop
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


@needs_fsdp2
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_saved_by_two_ranks_and_finished_by_one_process(moment: str, tmp_path: Path):
    train_and_save(folder=str(tmp_path), updates=MOMENTS[moment])
    model = make(uneven_mlp, seed=5)
    optimizer = sgd(model.parameters())
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)  # adopts the seed
    restore(str(tmp_path), model, optimizer, rst)
    assert rst.seed == 11
    assert rst.phase == ("transform" if moment == "transformation" else "finetune")
    go_on(model, optimizer, rst, range(MOMENTS[moment], UPDATES))
    assert_agrees(model, uninterrupted(rst.masks))


@needs_fsdp2
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_saved_by_one_process_and_finished_by_two_ranks(moment: str, tmp_path: Path):
    model = make(uneven_mlp)
    optimizer = sgd(model.parameters())
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS, seed=11)
    go_on(model, optimizer, rst, range(MOMENTS[moment]))
    dcp.save(state_of(model, optimizer, rst), checkpoint_id=str(tmp_path))
    load_and_finish(folder=str(tmp_path), updates=MOMENTS[moment])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_the_step_that_gives_a_new_optimizer_its_state_applies_no_penalty(kind):
    """Or it would stay in the momentum, and count as an update."""
    model, other = make(uneven_mlp), make(uneven_mlp)
    settings = {"lr": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    optimizer, other_optimizer = (kind(m.parameters(), **settings) for m in (model, other))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS, seed=11)
    explicit = ExplicitLoop(other, rst.masks, steps=STEPS)
    before = rst.state_dict()
    for m, o in ((model, optimizer), (other, other_optimizer)):
        _, moments = get_state_dict(m, o)
        assert moments["state"]
    assert rst.state_dict() == before
    rst.step()  # a loop may have it before the optimizer's
    assert rst.state_dict() == before
    for update in range(UPDATES):
        for m, o in ((model, optimizer), (other, other_optimizer)):
            o.zero_grad()
            half_loss(m, update, 0).backward()
            if o is other_optimizer:
                explicit.before_update()
            o.step()
        explicit.after_update()
        rst.step()
    assert_same(model, other)


@needs_fsdp2
@on_two_ranks
def test_an_update_that_is_saved_before_its_scheduler_step(tmp_path):
    def begin():
        model = sharded()
        return model, sgd(model.parameters()), RSTScheduler(model, sparsity=0.6, steps=STEPS)

    model, optimizer, rst = begin()
    half_loss(model, 0, torch.distributed.get_rank()).backward()
    optimizer.step()
    dcp.save(state_of(model, optimizer, rst), checkpoint_id=tmp_path)
    model, optimizer, rst = begin()
    restore(tmp_path, model, optimizer, rst)
    rst.step()
    assert rst.progress == 1 / STEPS


@needs_fsdp2
@on_two_ranks
def test_other_masks_are_refused_on_all_ranks(tmp_path):
    """Here the scheduler itself is given to the checkpoint, which calls its state_dict() and load_state_dict()."""
    dcp.save({"rst": RSTScheduler(sharded(), sparsity=0.6, seed=1)}, checkpoint_id=tmp_path)
    same = RSTScheduler(sharded(), sparsity=0.6)
    dcp.load({"rst": same}, checkpoint_id=tmp_path)
    assert same.seed == 1
    for settings, message in [
        ({"sparsity": 0.6, "seed": 2}, r"0\.weight differs \(the seeds differ: 2 here, 1 in the state\)"),
        ({"sparsity": {"2": 0.7, "*": 0.6}, "seed": 1}, r"2\.weight differs"),
    ]:
        other = RSTScheduler(sharded(), **settings)
        before = other.state_dict()
        with pytest.raises(ValueError, match=message):
            dcp.load({"rst": other}, checkpoint_id=tmp_path)
        assert other.state_dict() == before

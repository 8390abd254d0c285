"""Masks that somebody chose, on ranks: every rank is given the full ones, keeps its part, and all are the same."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from halves import STEPS, InOneProcess, full_loss, half_loss, live_alike, shard, uneven_mlp, whole_state
from models import finalize_quietly, make
from ranks import everywhere, needs_fsdp2, on_two_ranks
from test_seed_agreement import refused
from test_tensor_parallel import TOLERANCE, mesh, parallelize
from test_tensor_parallel import mlp as parallel_mlp
from torch.nn.parallel import DistributedDataParallel

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import GradualPruning, hold, magnitude_masks, random_ticket
from torch_dual_ticket.export import load_ticket, save_ticket
from torch_dual_ticket.masks.explicit import ExplicitMask


def masks_of(model, seed=0, density=0.6):
    """For parameters in the order of the unwrapped model; a layer of few weights keeps some."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            masks[name.removeprefix("module.")] = torch.rand(parameter.shape, generator=generator) < density
            masks[name.removeprefix("module.")].view(-1)[0] = True
    return masks


def wrapped(kind):
    """A model on two ranks, and the same in one process."""
    if kind == "tensor parallel":
        return parallelize(make(parallel_mlp), mesh(2)), make(parallel_mlp), full_loss
    model = make(uneven_mlp)
    return (shard(model) if kind == "fsdp2" else DistributedDataParallel(model)), make(uneven_mlp), half_loss


KINDS = ["ddp", pytest.param("fsdp2", marks=needs_fsdp2), "tensor parallel"]


@pytest.mark.parametrize("kind", KINDS)
@on_two_ranks
def test_explicit_masks_agree_with_one_process(kind):
    """They are exchanged on the way; each rank looks at its own part alone."""
    model, plain, loss = wrapped(kind)
    first, last = masks_of(plain), masks_of(plain, seed=1)
    rst = RSTScheduler(model, masks=first, steps=STEPS)
    reference = InOneProcess(plain, first, loss=loss)
    optimizer = live_alike(model, rst, reference, updates=range(6), tolerance=TOLERANCE)
    rst.set_masks(last)
    named = dict(reference.model.named_parameters())
    reference.ticket.targets = [(named[name], mask) for name, mask in last.items()]
    with mock.patch.object(ExplicitMask, "draw", autospec=True, side_effect=ExplicitMask.draw) as draw:
        live_alike(model, rst, reference, optimizer, updates=range(6, 12), tolerance=TOLERANCE)
        drawn = sum(torch.Size(call.kwargs["size"]).numel() for call in draw.call_args_list)
    total = sum(mask.numel() for mask in last.values())
    assert sum(everywhere(drawn)) == (2 * total if kind == "ddp" else total)
    live_alike(model, rst, reference, optimizer, updates=range(12, 24), tolerance=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@on_two_ranks
def test_held_masks_are_exchanged_on_every_rank(
    kind,
):
    model, plain, loss = wrapped(kind)
    masks = masks_of(plain)
    held = hold(model, masks)
    other = hold(plain, masks)
    optimizers = [torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9) for trained in (model, plain)]
    for index in range(9):
        if index in (3, 6):
            masks = masks_of(plain, seed=index)
            held.set_masks(masks)
            other.set_masks(masks)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model, index, dist.get_rank()).backward()
        for half in range(2):
            (loss(plain, index, half) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    found = whole_state(model)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=TOLERANCE, atol=TOLERANCE)
    assert not any(found[name][~mask].any() for name, mask in masks.items())
    again = held.state_dict()
    held.set_masks({name: torch.ones_like(mask) for name, mask in masks.items()})
    held.load_state_dict(again)
    assert all(torch.equal(held.masks[name], mask) for name, mask in masks.items())


@on_two_ranks
def test_ranks_with_other_masks_are_told_which_parameter():
    rank = dist.get_rank()

    def masks(model, changed=rank):
        masks = masks_of(model)
        masks["2.weight"] = masks["2.weight"].roll(changed, 1)  # as many weights, but others
        return masks

    fewer = lambda model: {n: m for n, m in masks_of(model).items() if n != "4.weight" or rank}  # noqa: E731
    refused(lambda model: RSTScheduler(model, masks=masks(model)), "rank 0 prunes", "of 2.weight", "the same masks")
    refused(lambda model: RSTScheduler(model, masks=fewer(model)), "of 4.weight", "nothing")
    refused(lambda model: RSTScheduler(model, masks=masks(model, 0), steps=5 + rank), "different values of steps")
    refused(lambda model: hold(model, masks(model)), "rank 0 prunes", "of 2.weight")
    refused(lambda model: RSTScheduler(model, masks=masks(model)) if rank else RSTScheduler(model, 0.5), "of 0.weight")
    for build in (
        lambda model: RSTScheduler(model, masks=masks(model, 0)),
        lambda model: hold(model, masks(model, 0)),
        lambda model: random_ticket(model, 0.5),
    ):
        model = make(uneven_mlp)
        managed = build(model)
        before = dict(managed.masks)
        weights = copy.deepcopy(model.state_dict())
        before_all = masks(model)
        with pytest.raises(RuntimeError, match=r"of 2\.weight, rank 1 prunes"):
            managed.set_masks({name: before_all[name] for name in before})
        assert all(torch.equal(managed.masks[name], mask) for name, mask in before.items())
        assert all(map(torch.equal, model.state_dict().values(), weights.values()))


@needs_fsdp2
@pytest.mark.parametrize("max_penalty", [1.0, 0.0])
@on_two_ranks
def test_gradual_pruning_of_a_sharded_model_is_that_of_the_whole_one(max_penalty):
    model, plain = shard(make(uneven_mlp)), make(uneven_mlp)
    options = {"intervals": 3, "max_penalty": max_penalty, "distribution": "global"}
    prunings = [GradualPruning(trained, 0.6, 8, **options) for trained in (model, plain)]
    optimizers = [torch.optim.SGD(trained.parameters(), lr=0.1) for trained in (model, plain)]
    for index in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        half_loss(model, index, dist.get_rank()).backward()
        for half in range(2):
            (half_loss(plain, index, half) / 2).backward()
        for optimizer, pruning in zip(optimizers, prunings, strict=True):
            optimizer.step()
            pruning.step()
        assert all(torch.equal(prunings[0].masks[name], mask) for name, mask in prunings[1].masks.items())
    for pruning in prunings:
        finalize_quietly(pruning)
    found = whole_state(model)
    assert prunings[0].sparsity == pytest.approx(0.6, abs=0.01)
    assert all(torch.equal(found[name] != 0, mask) for name, mask in prunings[0].masks.items())


@needs_fsdp2
@on_two_ranks
def test_the_zeros_of_a_sharded_model_and_its_file(tmp_path):
    plain = make(uneven_mlp)
    with torch.no_grad():
        for name, mask in masks_of(plain).items():
            plain.get_parameter(name).mul_(mask)
    expected = copy.deepcopy(plain.state_dict())
    model = shard(plain)
    held = hold(model)
    assert all(torch.equal(mask, expected[name] != 0) for name, mask in held.masks.items())
    assert set(masks_of(model)) - set(held.masks) == {name for name in masks_of(model) if (expected[name] != 0).all()}
    save_ticket(held, tmp_path / "ticket")
    dist.barrier()
    other = shard(make(uneven_mlp, seed=1))
    state = load_ticket(tmp_path / "ticket", other)
    again = hold(other)
    again.load_state_dict(state)
    found = whole_state(other)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@needs_fsdp2
@on_two_ranks
def test_masks_and_scores_may_be_sharded_themselves():
    """As computations on sharded weights give them."""
    plain = make(uneven_mlp)
    expected = magnitude_masks(plain, 0.5, scores={name: p.detach() for name, p in plain.named_parameters()})
    model = shard(plain)
    masks = magnitude_masks(model, 0.5, scores=dict(model.named_parameters()))
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    positive = {name: model.get_parameter(name) > 0 for name in masks}
    rst = RSTScheduler(model, masks=positive)
    assert all(torch.equal(rst.masks[name], mask.full_tensor()) for name, mask in positive.items())

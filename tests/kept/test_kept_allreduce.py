"""The kept weights under DistributedDataParallel: what is sent, and that the weights are those of sending all."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from halves import SHAPE, sgd, uneven_mlp
from models import assert_same, batch, finalize_quietly, make
from ranks import everywhere, needs_fsdp2, on_four_ranks, on_two_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._engine.enforcement import Enforcement
from torch_dual_ticket.baselines import random_ticket
from torch_dual_ticket.kept import KeptParameters, kept_allreduce_hook

OPTIONS = {
    "plain": {},
    "bucket_views": {"gradient_as_bucket_view": True},
    "many_buckets": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "static_graph_bucket_views": {"static_graph": True, "gradient_as_bucket_view": True},
    "find_unused": {"find_unused_parameters": True},
    "find_unused_bucket_views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}
WAYS = {"optimizer": (True, False), "hook": (False, True), "both": (True, True)}
every_way = pytest.mark.parametrize("way", WAYS)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


class Training:
    """One of two replicas of a random ticket; with all weights or the kept ones in its optimizer and its messages."""

    def __init__(self, options, kept=False, hook=False, build=uneven_mlp, optimizer=adamw, **ticket):
        self.model = DistributedDataParallel(make(build), **OPTIONS[options])
        self.held = random_ticket(self.model, ticket.pop("sparsity", 0.6), **{"seed": 1, **ticket})
        if hook:
            self.model.register_comm_hook(self.held, kept_allreduce_hook)
        self.kept = KeptParameters(self.held) if kept else None
        self.optimizer = optimizer(self.parameters())

    def parameters(self):
        return list((self.kept or self.model).parameters())

    def backward(self, index):
        x, y = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch(index, SHAPE))
        nn.functional.cross_entropy(self.model(x), y).backward()

    def updates(self, *indices, micro_batches=1, clip=None, syncs_all=False):
        for index in indices:
            self.optimizer.zero_grad()
            for micro in range(micro_batches):
                syncs = syncs_all or micro == micro_batches - 1
                with contextlib.nullcontext() if syncs else self.model.no_sync():
                    self.backward(10 * index + micro)
            if clip:
                clip_grad_norm_(self.parameters(), clip)
            self.optimizer.step()


def alike(way, options, live, **settings):
    """The same life with all weights in optimizer and messages ends with the same model, on all ranks."""
    dense, sparse = Training(options, **settings), Training(options, *WAYS[way], **settings)
    live(dense)
    live(sparse)
    assert_same(sparse.model, dense.model)
    states = everywhere({name: value.clone() for name, value in sparse.model.state_dict().items()})
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in state)
    return sparse


@every_way
@pytest.mark.parametrize("options", OPTIONS)
@on_two_ranks
def test_updates_are_those_of_plain_ddp(options, way):
    alike(way, options, lambda training: training.updates(*range(6), clip=0.05))


@every_way
@on_four_ranks
def test_four_ranks(way):
    alike(way, "plain", lambda training: training.updates(*range(6), clip=0.05))


@every_way
@pytest.mark.parametrize("options", ["plain", "bucket_views"])
@on_two_ranks
def test_no_sync(options, way):
    alike(way, options, lambda training: training.updates(*range(5), micro_batches=3, clip=0.05))


@every_way
@pytest.mark.parametrize("options", ["plain", "bucket_views"])
@on_two_ranks
def test_clipping_over_the_model(options, way):
    def live(training):
        for index in range(5):
            training.optimizer.zero_grad()
            training.backward(index)
            clip_grad_norm_(training.model.parameters(), 0.05)
            training.optimizer.step()

    alike(way, options, live, optimizer=sgd)


@on_two_ranks
def test_messages_with_the_gradients_of_the_model():
    """Those of the model have no memory to send; those of the kept values have."""
    training = Training("plain", kept=True)
    training.backward(0)
    with pytest.raises(RuntimeError, match=r"allreduce_\S* needs the memory of the gradient of .*kept\.parameters"):
        dist.all_reduce(next(training.model.parameters()).grad)
    dist.all_reduce(training.parameters()[0].grad)


@pytest.mark.parametrize("options", ["plain", "bucket_views"])
@on_two_ranks
def test_gradients_that_are_zeroed_in_place_after_a_step_that_was_skipped(options):
    def live(training):
        for index in range(5):
            training.optimizer.zero_grad(set_to_none=False)
            training.backward(index)
            if index % 2:
                training.optimizer.step()

    alike("both", options, live)


@on_two_ranks
def test_a_second_update_of_the_same_gradients():
    def live(training):
        training.updates(0)
        training.optimizer.step()
        training.updates(1)

    alike("optimizer", "plain", live)


@every_way
@pytest.mark.parametrize("options", ["plain", "bucket_views"])
@pytest.mark.parametrize("of_model", [False, True])
@on_two_ranks
def test_gradients_that_are_zeroed_without_an_update(options, way, of_model):
    def live(training):
        zeroed = training.model if of_model else training.optimizer
        for index in range(6):
            zeroed.zero_grad()
            training.backward(index)
            if index % 3 != 1:
                training.optimizer.step()

    alike(way, options, live)


class Detour(nn.Module):
    """One layer is used in every other batch, and then by one rank alone; one layer is never used."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.batches = 0

    def forward(self, x):
        self.batches += 1
        x = self.always(x).tanh()
        return self.head(self.sometimes(x).tanh() if dist.get_rank() and self.batches % 2 else x)


@every_way
@pytest.mark.parametrize("micro_batches", [{}, {"micro_batches": 3}, {"micro_batches": 3, "syncs_all": True}])
@pytest.mark.parametrize("options", ["find_unused", "find_unused_bucket_views"])
@on_two_ranks
def test_layers_that_a_rank_does_not_use(options, micro_batches, way):
    alike(way, options, lambda training: training.updates(*range(6), **micro_batches), build=Detour)


@every_way
@on_two_ranks
def test_channels_last(way):
    def build():
        return nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 8, 2, padding=1), nn.Flatten(), nn.Linear(72, 5)
        ).to(memory_format=torch.channels_last)

    alike(way, "plain", lambda training: training.updates(*range(4)), build=build)


@pytest.mark.parametrize("bucket_views", [False, True])
@on_two_ranks
def test_zero_redundancy_optimizer(bucket_views):
    """Each rank has the state of a part of the kept weights."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def optimizer(parameters):
        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2, parameters_as_bucket_view=bucket_views)

    alike("both", "plain", lambda training: training.updates(*range(5)), optimizer=optimizer)


class Messages:
    """Counts the bytes that this rank gives to all_reduce in Python, where communication hooks call it."""

    def __init__(self, monkeypatch):
        self.bytes, self.largest, all_reduce = 0, 0, dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.bytes += tensor.nbytes
            return all_reduce(tensor, *args, **kwargs)

        monkeypatch.setattr(dist, "all_reduce", counted)


def wide_mlp():
    return nn.Sequential(nn.Linear(12, 200, bias=False), nn.Tanh(), nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 5))


@on_two_ranks
def test_what_is_sent():
    """All gradients in the transformation, then the kept ones, without a word from the user."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        model, messages = DistributedDataParallel(make(wide_mlp)), Messages(monkeypatch)
        rst = RSTScheduler(model, 0.9, steps=3, seed=1)
        model.register_comm_hook(rst, kept_allreduce_hook)
        optimizer, sent = adamw(model.parameters()), []
        for index in range(8):
            if index == 4:
                finalize_quietly(rst)
                optimizer = adamw(KeptParameters(rst).parameters())
            if index == 7:
                rst.remove()
                optimizer = adamw(model.parameters())
            messages.bytes = 0
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch(index, SHAPE)[0]), batch(index, SHAPE)[1]).backward()
            optimizer.step()
            rst.step()
            sent.append(messages.bytes)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert sent[:4] == [dense] * 4
    assert len(set(sent[4:7])) == 1
    assert sent[4] <= 0.11 * dense
    assert sent[7] == dense


@on_two_ranks
def test_a_transformation_and_then_a_sparse_network():
    models = []
    for kept in (False, True):
        model = DistributedDataParallel(make(uneven_mlp))
        rst = RSTScheduler(model, 0.6, steps=4, seed=1)
        if kept:
            model.register_comm_hook(rst, kept_allreduce_hook)
        optimizer = sgd(model.parameters())
        for index in range(9):
            if index == 5:
                finalize_quietly(rst)
                optimizer = sgd((KeptParameters(rst) if kept else model).parameters())
            optimizer.zero_grad()
            x, y = (part.chunk(2)[dist.get_rank()] for part in batch(index, SHAPE))
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            rst.step()
        models.append(model)
    assert_same(*models)


@on_two_ranks
def test_masks_that_change():
    def live(training):
        training.updates(0, 1)
        ticket = training.held._ticket
        ticket.hold_zeros(random_ticket(make(uneven_mlp), 0.8, seed=2)._ticket.stage.masks)
        training.updates(2, 3)

    alike("hook", "plain", live)


@on_two_ranks
def test_another_hook_around_it():
    """torch's compression to bfloat16, which it registers by name where NCCL is; here all messages fit that."""

    def compressed(state, bucket):
        return bf16_compress_wrapper(kept_allreduce_hook)(state, bucket)

    gradients = []
    for hook in (None, compressed):
        model = DistributedDataParallel(make(uneven_mlp))
        held = random_ticket(model, 0.6, seed=1)
        if hook:
            model.register_comm_hook(held, hook)
        x, y = (part.chunk(2)[dist.get_rank()] for part in batch(0, SHAPE))
        nn.functional.cross_entropy(model(x), y).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-2, atol=1e-4)
        assert not torch.equal(theirs, mine)
    assert torch.equal(gradients[0][0] == 0, gradients[1][0] == 0)


@on_two_ranks
def test_masks_that_differ_between_ranks():
    model = DistributedDataParallel(make(uneven_mlp))
    held = random_ticket(model, 0.6, seed=1)
    other = random_ticket(make(uneven_mlp), {"2": 0.7, "*": 0.6}, seed=1)._ticket.stage.masks
    if dist.get_rank():
        held._ticket.hold_zeros(other)
    model.register_comm_hook(held, kept_allreduce_hook)
    with pytest.raises(RuntimeError, match=r"rank 0 prunes 84 weights .* of 2\.weight, rank 1 .*the same masks"):
        model(batch(0, SHAPE)[0]).sum().backward()


@on_two_ranks
def test_a_copy_trains_as_a_whole():
    training = Training("plain", kept=True)
    training.updates(0)
    twin = DistributedDataParallel(copy.deepcopy(training.model.module))
    optimizer = adamw(twin.parameters())
    twin(batch(0, SHAPE)[0]).sum().backward()
    optimizer.step()
    assert torch.equal(twin.module[0].weight == 0, training.model.module[0].weight == 0)


@needs_fsdp2
@on_two_ranks
def test_sharded_weights_are_refused():
    from torch.distributed.fsdp import fully_shard

    model = make(uneven_mlp)
    held = random_ticket(fully_shard(model), 0.6, seed=1)
    with pytest.raises(RuntimeError, match=r"0\.weight is a DTensor.*FSDP2 and tensor parallelism"):
        KeptParameters(held)
    assert type(held._ticket.enforcement) is Enforcement
    model = make(uneven_mlp)
    optimizer = adamw(KeptParameters(random_ticket(model, 0.6, seed=1)).parameters())
    fully_shard(model)
    with pytest.raises(RuntimeError, match=r"0\.weight is a DTensor"):
        optimizer.step()

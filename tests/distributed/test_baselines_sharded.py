"""Baselines on parameters that FSDP2 has sharded over two processes: the same masks and zeros as on whole ones."""

import copy

import torch
from models import batch, mlp
from ranks import needs_fsdp2, on_two_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_dual_ticket.baselines import LotteryTicket


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index in range(5):
        x, _ = batch(index, (12,), dtype=torch.float32)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@needs_fsdp2
@on_two_ranks
def test_a_lottery_ticket_of_a_sharded_model_is_that_of_the_whole_one():
    torch.manual_seed(0)
    whole = mlp()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*sharded[::2], sharded):
        fully_shard(layer, mesh=mesh)
    tickets = [LotteryTicket(model, 0.7, rounds=2, distribution="global") for model in (whole, sharded)]
    for model, ticket in zip((whole, sharded), tickets, strict=True):
        while not ticket.done:
            train(model)
            ticket.prune_and_rewind()
        train(model)
    expected, found = (dict(ticket.masks) for ticket in tickets)
    for (name, weight), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(weight.full_tensor(), other.data, rtol=1e-4, atol=1e-6)
        if name in expected:
            assert torch.equal(found[name], expected[name]), name
            assert torch.equal(weight.full_tensor() == 0, ~expected[name]), name

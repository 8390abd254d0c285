"""Several processes that train one model in shared memory (Hogwild), with a scheduler each."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from torch_dual_ticket import RSTScheduler

UPDATES = 40


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def train(worker: int, model: nn.Module, masks: Any, barrier: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rst = RSTScheduler(model, sparsity=0.6, steps=UPDATES, max_penalty=10.0, seed=3)
    masks.put({name: mask.numpy() for name, mask in rst.masks.items()})
    barrier.wait()  # neither begins with what the other has made
    generator = torch.Generator().manual_seed(worker)
    for update in range(UPDATES + 10 * worker):  # they are done at different times
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=generator)
        nn.functional.mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()
        rst.step()
        if update + 1 == UPDATES:
            if worker == 1:
                barrier.wait()  # the first has set the weights to zero, and this one trains them on
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rst.finalize()
            if worker == 0:
                barrier.wait()


def test_processes_that_share_a_model() -> None:
    model = make().share_memory()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    context = mp.get_context("spawn")
    masks, barrier = context.SimpleQueue(), context.Barrier(2)
    workers = [context.Process(target=train, args=(worker, model, masks, barrier)) for worker in (0, 1)]
    for worker in workers:
        worker.start()
    found = [masks.get() for _ in workers]
    for worker in workers:
        worker.join(timeout=100)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for name, mask in found[0].items():
        assert (mask == found[1][name]).all()
        assert torch.equal(model.get_parameter(name) != 0, torch.from_numpy(mask))
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))

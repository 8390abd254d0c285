"""How the cost of one update grows with the weights, the layers, the sparsity, the ranks, and with what is not pruned.

Each row is the time that the library adds to a bare update with SGD, in milliseconds and relative to that update. Times
in milliseconds depend on the machine; their growth from row to row is what to look at. For comparison, what torch takes
to call hooks that do nothing: one before each layer's forward, and one on each gradient.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep
import torch.multiprocessing
from measuring import arguments, as_if_alone, machine, table
from torch import nn
from torch.distributed.fsdp import fully_shard

from torch_dual_ticket import RSTScheduler

CASES = [  # label, layers, width, sparsity, further modules that are no targets
    ("10 layers of 100,000 weights", 10, 316, 0.9, 0),
    ("10 layers of 1M weights", 10, 1000, 0.9, 0),
    ("10 layers of 4M weights", 10, 2000, 0.9, 0),
    ("10 layers of 1M weights, half the sparsity", 10, 1000, 0.45, 0),
    ("10 layers of 1M weights, 10,000 further modules", 10, 1000, 0.9, 10_000),
    ("10 layers of 4 weights", 10, 2, 0.5, 0),
    ("100 layers of 4 weights", 100, 2, 0.5, 0),
    ("161 layers of 4 weights", 161, 2, 0.5, 0),
    ("1,000 layers of 4 weights", 1000, 2, 0.5, 0),
]


ON_RANKS = [  # label, wrapper, ranks
    ("10 layers of 1M weights, DDP", "ddp", 1),
    ("10 layers of 1M weights, DDP", "ddp", 2),
    ("10 layers of 1M weights, FSDP2", "fsdp2", 1),
    ("10 layers of 1M weights, FSDP2", "fsdp2", 2),
]
PHASES = ("plain", "transformation", "finetuning", "empty hooks")


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for label, layers, width, sparsity, others in CASES:
        rows.append(row(label, measure(options.rounds, options.device, layers, width, sparsity, others)))
    if options.device == "cpu":
        for label, wrapper, ranks in ON_RANKS:
            rows.append(row(f"{label}, {ranks} rank{'s' * (ranks > 1)}", on_ranks(ranks, wrapper, options.rounds)))
    print(table(["model", "transformation adds", "finetuning adds", "empty hooks add", "plain step"], rows))
    print(f"\n{machine(options)}; ranks have one thread each, and talk through gloo")


def row(label, medians):
    base, *phases = medians
    return [label, *(f"{1000 * (mine - base):.3f} ms ({mine / base:.2f})" for mine in phases), f"{1000 * base:.3f} ms"]


def measure(rounds, device, layers, width, sparsity, others=0, wrapper=None):
    """The median time of a step in each phase, in seconds."""
    steps = [make_step(phase, layers, width, sparsity, others, device, wrapper) for phase in PHASES]
    times = {step: [] for step in steps}
    for _ in range(rounds + 1):
        for step, taken in times.items():
            start = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times.values()]


def on_ranks(ranks, wrapper, rounds):
    """The medians of the slowest rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_on_rank, (ranks, f"{folder}/store", wrapper, rounds, f"{folder}/times"), ranks)
        return torch.load(f"{folder}/times").max(0).values.tolist()


def _on_rank(rank, ranks, store, wrapper, rounds, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    medians = torch.tensor(measure(rounds, "cpu", layers=10, width=1000, sparsity=0.9, wrapper=wrapper))
    gathered = [torch.empty_like(medians) for _ in range(ranks)]
    dist.all_gather(gathered, medians)
    if rank == 0:
        torch.save(torch.stack(gathered), path)
    gc.collect()  # wrapped models keep the group, and its threads, alive
    dist.barrier()
    dist.destroy_process_group()


def make_step(phase, layers, width, sparsity, others, device, wrapper):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)]).to(device)
    model.append(nn.Sequential(*[nn.Identity() for _ in range(others)]))
    if wrapper == "fsdp2":
        for layer in model[:-1]:
            fully_shard(layer)
        fully_shard(model)
    forward = nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(1, width, device=device)  # a single example: little else to do than moving weights and gradients
    rst = RSTScheduler(model, sparsity, seed=0) if phase in ("transformation", "finetuning") else None
    if phase == "empty hooks":
        for layer in model[:-1]:
            layer.register_forward_pre_hook(lambda module, inputs: None)
            layer.weight.register_post_accumulate_grad_hook(lambda weight: None)

    def step():
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()
        if rst is not None:
            rst.step()

    if phase == "finetuning":
        step()
        with warnings.catch_warnings():  # nothing was squeezed out in one update
            warnings.simplefilter("ignore")
            rst.finalize()
    return as_if_alone(step, rst)


if __name__ == "__main__":
    main()

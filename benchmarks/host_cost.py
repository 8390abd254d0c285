"""What a step costs the host: Python, and torch's way from a call to its kernel. With small batches a GPU waits for it.

The weights are so small that kernels take no time; only ResNet-20 is as it is. Ways: dense; this library in the
transformation and in finetuning; ``torch.nn.utils.prune`` with the same masks; for comparison, hooks that do nothing:
one before the forward of each masked layer, and one on its gradient. Microseconds are for one masked layer and one
step: what the dense step takes, and what each other way adds to it, in all and in each phase. Clipping is counted as a
part of ``optimizer.step()``. On a CPU the time is that of the thread, which stands while other processes have the core.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
import warnings
from itertools import pairwise
from unittest import mock

import networks
import torch
from measuring import arguments, as_if_alone, machine, spread, table, without_collector
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors import kernels

STOCK = "torch.nn.utils.prune"
WAYS = ["dense", "transformation", "finetuning", STOCK, "empty hooks"]
PHASES = ["forward", "backward", "optimizer.step()", "rst.step()"]
NETWORKS = {  # how it is built, the shape of its input, what is masked
    "ResNet-50, tiny": (
        lambda: networks.resnet(networks.Bottleneck, [2] * 4, [3, 4, 6, 3], 2, 4),
        (2, 3, 8, 8),
        {"sparsity": 0.5},
    ),
    "Transformer-12, tiny": (
        lambda: networks.Transformer(width=4, heads=2, feedforward=4),
        (2, 3, 4),
        # Without out_proj, on which torch.nn.utils.prune fails: its own forward never runs.
        {"sparsity": 0.5, "targets": (nn.Linear, (nn.MultiheadAttention, "in_proj_weight")), "exclude": ["*.out_proj"]},
    ),
    "161 layers of 4 weights": (
        lambda: nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(161)]),
        (1, 2),
        {"sparsity": 0.5},
    ),
    "ResNet-20, batch 2": (networks.NETWORKS["ResNet-20"][0], (2, 3, 32, 32), {"sparsity": 0.9}),
}
OPTIMIZERS = {
    "SGD foreach": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, foreach=True),
    "AdamW fused, clipped": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
}
WARM_UP = 5  # rounds


def main() -> None:
    large = "the path that large tensors take on an accelerator, for tensors of any size on any device"
    options = arguments(__doc__, rounds=100, threads=1, **{"large-path": large})
    rows = []
    with large_path() if options.large_path else contextlib.nullcontext():
        for network, (build, _, masked) in NETWORKS.items():
            masks = dict(RSTScheduler(build(), seed=0, **masked).masks)
            for optimizer in OPTIMIZERS:
                steps = {way: make_step(way, network, optimizer, masks, options.device) for way in WAYS}
                label = f"{network}, {len(masks)} masked layers, {optimizer}"
                rows += [[label, *row] for row in compare(measure(steps, options.rounds), len(masks))]
    print(table(["step", "way", "relative to dense", "µs per layer", *PHASES, f"of what {STOCK} adds"], rows))
    path = "as on an accelerator, the path for large tensors" if options.large_path else "the path for small tensors"
    print(f"\n{machine(options)}; {path}; medians, with quartiles in brackets")


@contextlib.contextmanager
def large_path():
    """The engine takes every tensor for a large one on an accelerator."""
    with contextlib.ExitStack() as patches:
        for name, module in sorted(sys.modules.items()):
            if name.startswith(kernels.__package__) and hasattr(module, "SMALL"):  # kernels, and who imports it
                patches.enter_context(mock.patch.object(module, "SMALL", 0))
        patches.enter_context(mock.patch.object(kernels, "_on_cpu", return_value=False))
        yield


def make_step(way, network, optimizer_name, masks, device):
    """One step, which gives the seconds that its phases take."""
    build, shape, masked = NETWORKS[network]
    torch.manual_seed(0)
    model = build().to(device)
    x = torch.randn(shape, device=device)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    rst = None
    if way in ("transformation", "finetuning"):
        rst = RSTScheduler(model, seed=0, steps=10**6, **masked)
    elif way != "dense":
        for name, kept in masks.items():
            layer, weight = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if way == STOCK:
                prune.custom_from_mask(layer, weight, kept.to(device))
            else:
                layer.register_forward_pre_hook(lambda module, inputs: None)
                getattr(layer, weight).register_post_accumulate_grad_hook(lambda weight: None)
    # Elsewhere the backward pass runs in its own thread.
    clock = time.thread_time if device == "cpu" else time.perf_counter

    def step():
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times = [clock()]
        optimizer.zero_grad()
        loss = model(x).square().mean()
        times.append(clock())
        loss.backward()
        times.append(clock())
        if optimizer_name.endswith("clipped"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(clock())
        if rst is not None:
            rst.step()
        times.append(clock())
        return [end - start for start, end in pairwise(times)]

    if way == "finetuning":
        step()
        with warnings.catch_warnings():  # nothing was squeezed out in one update
            warnings.simplefilter("ignore")
            rst.finalize()
    return as_if_alone(step, rst)


def measure(steps, rounds):
    """The seconds that each way's phases take: a tensor of one row for each round."""
    times = {way: [] for way in steps}
    with without_collector():
        for _ in range(WARM_UP + rounds):
            for way, step in steps.items():
                times[way].append(step())
    return {way: torch.tensor(taken[WARM_UP:], dtype=torch.float64) for way, taken in times.items()}


def compare(times, layers):
    """The rows of the table: ratios to the dense step of the same round, and differences from it."""
    dense = times["dense"]
    stock_adds = median_cost(times[STOCK] - dense)[0]
    rows = []
    for way, taken in times.items():
        low, middle, high = statistics.quantiles((taken.sum(1) / dense.sum(1)).tolist(), n=4)
        cost = median_cost(taken if way == "dense" else taken - dense)
        share = "" if way == "dense" else f"{cost[0] / stock_adds:.2f}"
        rows.append([way, spread((middle, low, high)), *(f"{1e6 * part / layers:.1f}" for part in cost), share])
    return rows


def median_cost(seconds):
    """Of the whole step, then of its phases."""
    return torch.cat([seconds.sum(1, keepdim=True), seconds], 1).quantile(0.5, dim=0)


if __name__ == "__main__":
    main()

"""A whole training step, in time and peak memory, relative to the dense step.

Ways: dense; this library in the transformation and in finetuning; ``torch.nn.utils.prune`` with the same masks; the
penalty as a term of the loss. All are interleaved in one process for the times. For the memory each runs in its own
process, once for each network, and what is given is the peak of its memory over that of the dense step.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from measuring import (
    arguments,
    as_if_alone,
    in_a_new_process,
    machine,
    peak_memory,
    ratios,
    spread,
    table,
)
from networks import FOR_GPUS, NETWORKS
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler

WAYS = ["dense", "transformation", "finetuning", "torch.nn.utils.prune", "term of the loss"]
SEED_ALONE = ["transformation, masks not stored", "finetuning, masks not stored"]
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
}
CASES = [  # network, batch, optimizer, compiled
    ("ResNet-20", 8, "SGD", False),
    ("ResNet-50", 8, "SGD", False),
    ("ResNet-50", 32, "SGD", False),
    ("ResNet-50", 8, "AdamW", False),
    ("Transformer-12", 8, "AdamW", False),
]
WITH_SEED_ALONE = CASES[1]
COMPILED = [
    ("ResNet-20", 8, "SGD", True),
    ("ResNet-50", 8, "SGD", True),
    ("Transformer-12", 8, "AdamW", True),
]


def main() -> None:
    options = arguments(__doc__, rounds=2, compiled="compiled models instead, which takes a compiler and its time")
    rows, measured = [], set()
    for case in COMPILED if options.compiled else CASES:
        network, batch, optimizer, compiled = case
        ways = WAYS + SEED_ALONE if case == WITH_SEED_ALONE else WAYS
        steps = {way: make_step(way, *case, options.device) for way in ways}
        for _ in range(2):  # optimizer state, compilation
            for step in steps.values():
                step()
        result = ratios(steps, "dense", options.rounds, options.device)
        del steps
        peaks = {}
        alone = options.device != "cpu" or not compiled  # on CPUs the peak of a compiled step is the compiler's
        if alone and (compiled or network not in measured):
            peaks = {way: in_a_new_process(memory_of, way, *case, options) for way in ways}
            measured.add(network)
        for way in ways[1:]:
            mode = "compiled" if compiled else "eager"
            extra = f"{(peaks[way] - peaks['dense']) / 2**20:+.0f} MB" if peaks else ""
            rows.append([f"{network}, batch {batch}, {optimizer}, {mode}", way, spread(result[way]), extra])
    print(table(["step", "way", "time relative to dense", "peak memory"], rows))
    print(f"\n{machine(options)}; 90 % of the weights masked; float32. In layers with masks: {weights_of_networks()}")


def weights_of_networks():
    counts = {}
    for name, (build, _) in NETWORKS.items():
        rst = RSTScheduler(build(), sparsity=0.9, seed=0, exclude=excluded(name))
        counts[name] = sum(mask.numel() for mask in rst.masks.values())
    return ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items()) + "."


def excluded(network):
    """The stock way fails on MultiheadAttention.out_proj, whose own forward never runs; so no way takes it."""
    return ["*.out_proj"] if network.startswith("Transformer") else []


def make_step(way, network, batch, optimizer_name, compiled, device, autocast=None):
    """One step; with a dtype for autocast also in channels_last, in which convolutions of that dtype are fastest."""
    build, shape = (NETWORKS | FOR_GPUS)[network]
    torch.manual_seed(0)
    model = build().to(device)
    x, y = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
    if autocast and x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    rst, penalized = None, []
    if way != "dense":
        stored = way not in SEED_ALONE
        rst = RSTScheduler(model, sparsity=0.9, seed=0, exclude=excluded(network), store_masks=stored)
    if way == "torch.nn.utils.prune":
        masks = masks_as_weights_lie(model, rst)
        rst.remove()
        for name, kept in masks.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            prune.custom_from_mask(layer, "weight", kept)
            next(iter(layer._forward_pre_hooks.values())).mask = None  # a copy that other methods do not keep
        rst = None
    elif way == "term of the loss":
        penalized = [
            (model.get_parameter(name), (~kept).to(torch.float32))
            for name, kept in masks_as_weights_lie(model, rst).items()
        ]
        rst.remove()
        rst = None
    forward = torch.compile(model) if compiled else model

    def step():
        optimizer.zero_grad()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(forward(x), y)
        if penalized:
            loss = loss + 0.5e-4 * sum((weight * mask).square().sum() for weight, mask in penalized)
        loss.backward()
        optimizer.step()
        if rst is not None:
            rst.step()

    if way.startswith("finetuning"):
        step()
        with warnings.catch_warnings():  # nothing was squeezed out in one update
            warnings.simplefilter("ignore")
            rst.finalize()
    return as_if_alone(step, rst)


def masks_as_weights_lie(model, rst):
    """In the same order in memory, which is the fastest for all."""
    weights = {name: model.get_parameter(name) for name in rst.masks}
    return {name: torch.empty_like(weights[name], dtype=torch.bool).copy_(kept) for name, kept in rst.masks.items()}


def memory_of(way, network, batch, optimizer, compiled, options, autocast=None):
    torch.set_num_threads(options.threads)
    step = make_step(way, network, batch, optimizer, compiled, options.device, autocast)
    for _ in range(2):  # the second has the optimizer's state
        step()
    return peak_memory(options.device)


if __name__ == "__main__":
    main()

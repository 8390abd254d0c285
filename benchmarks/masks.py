"""Drawing masks, relative to ``torch.randperm`` on the same number of weights.

Against ``torch.nn.utils.prune.RandomUnstructured``. The temporaries are the peak of the process's resident memory while
a mask is drawn, less the mask itself. Last, what it takes to build a scheduler for the shapes of a language model with
a billion weights: its masks are drawn layer by layer, at the first update.
"""

from __future__ import annotations

import time

import torch
from measuring import arguments, in_a_new_process, machine, peak_memory, ratios, spread, table
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.masks.seeded import SeededMask

SIZES = {"1M": 1_000_000, "25M": 25_000_000}
LARGEST = 200_000_000
BASE = "torch.randperm"


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for label, size in SIZES.items():
        result = ratios(ways(size, options.device), BASE, min(options.rounds, 5), options.device)
        rows += [[label, name, spread(value)] for name, value in result.items()]
    print(table(["weights", "way", f"time relative to {BASE}"], rows))
    if not options.device.startswith("cuda"):
        megabytes = (in_a_new_process(_draw_here, LARGEST) - LARGEST) / 2**20
        print(f"\nTemporaries while a mask of 200M weights is drawn: {megabytes:.0f} MB")
    started = time.perf_counter()
    weights = _billion_weights()
    print(f"A scheduler for {weights / 1e9:.2f}G weights on the meta device: {time.perf_counter() - started:.1f} s")
    print(f"\n{machine(options)}; 90 % masked.")


def ways(size, device):
    weight = torch.empty(size, device=device)
    ones = torch.ones(size, device=device)
    pruned = round(0.9 * size)
    return {
        BASE: lambda: torch.randperm(size, device=device),
        "this library": lambda: SeededMask(0, "weight", (size,), pruned).draw(device=device),
        "this library, 2:4": lambda: SeededMask(0, "weight", (size // 4, 4), size // 2, "2:4").draw(device=device),
        "torch.nn.utils.prune": lambda: prune.RandomUnstructured(0.9).compute_mask(weight, ones),
    }


def _draw_here(size):
    SeededMask(0, "warm-up", (100_000,), 90_000).draw()
    before = peak_memory("cpu")
    SeededMask(0, "weight", (size,), round(0.9 * size)).draw()
    return peak_memory("cpu") - before


def _billion_weights():
    """22 decoder layers of width 2,048 with gated feed-forwards of 5,632: the shapes of a small LLaMA."""
    with torch.device("meta"):
        layers = [
            nn.ModuleDict(
                {
                    "attention": nn.ModuleList([nn.Linear(2048, n, bias=False) for n in (2048, 256, 256, 2048)]),
                    "gate": nn.Linear(2048, 5632, bias=False),
                    "up": nn.Linear(2048, 5632, bias=False),
                    "down": nn.Linear(5632, 2048, bias=False),
                }
            )
            for _ in range(22)
        ]
        model = nn.ModuleList(layers)
    RSTScheduler(model, sparsity=0.9, seed=0)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()

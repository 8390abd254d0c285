"""Inference with finished tickets, in time relative to the dense model: where it is faster, and where it is not.

Three ways: very sparse ``Linear`` layers as CSR matrices (CPU); filter tickets as smaller layers; 2:4 tickets as
semi-structured weights (CUDA). Everything is float32, but the last, which is float16.
"""

from __future__ import annotations

import copy
import statistics
from functools import partial

import torch
from measuring import arguments, machine, ratios, seconds, spread, table
from networks import NETWORKS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torch_dual_ticket.baselines import random_ticket
from torch_dual_ticket.deploy import CSRLinear, shrink, to_csr, to_semi_structured

LEAST_SECONDS = 2e-3  # of one turn: short calls are repeated
SIZES, ROWS = (256, 512, 1024, 4096), (1, 16, 64, 256)
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SHRUNK = [  # network, targets, batches
    ("ResNet-20", ["*.body.0", "*.body.3"], (1, 64)),
    ("ResNet-50", ["*.body.0", "*.body.3", "*.body.6"], (1, 8)),
    ("Transformer-12", ["*.linear1"], (1, 8)),
]


def main() -> None:
    options = arguments(__doc__)
    if options.device == "cpu":
        csr(options)
    else:
        semi_structured(options)
    shrunk(options)
    print(f"{machine(options)}.")


def csr(options):
    rows, widths = [], []
    for size in SIZES:
        rounds = options.rounds if size < 4096 else max(3, options.rounds // 3)
        for batch in ROWS:
            cells = []
            for sparsity in SPARSITIES:
                layer = nn.Linear(size, size)
                random_ticket(layer, sparsity, seed=0).remove()
                x = torch.randn(batch, size)
                candidates = alike({"dense": layer, "csr": CSRLinear(layer)}, x)
                middle, low, high = ratios(candidates, "dense", rounds)["csr"]
                widths.append((high - low) / middle)
                cells.append(f"**{middle:.2f}**" if converts(layer) else f"{middle:.2f}")
            rows.append([f"{size} × {size}", str(batch), *cells])
    print("Linear layers as CSR, time relative to dense. In bold what to_csr() converts.\n")
    print(table(["layer", "rows", *(f"{sparsity:.1%} zeros" for sparsity in SPARSITIES)], rows))
    print(f"\nInterquartile range: {statistics.median(widths):.0%} of the ratio (median of all cells).\n")


def converts(layer):
    try:
        return isinstance(to_csr(layer), CSRLinear)
    except ValueError:
        return False


def semi_structured(options):
    rows = []
    for outputs, inputs in ((1024, 1024), (4096, 1024), (4096, 4096), (8192, 8192)):
        layer, fast = two_to_four(inputs, outputs, options.device)
        for batch in (1, 64, 1024, 8192):
            x = torch.randn(batch, inputs, dtype=torch.half, device=options.device)
            candidates = alike({"dense": layer, "2:4": fast}, x)
            result = ratios(candidates, "dense", options.rounds, options.device)
            rows.append([f"{inputs} -> {outputs}", str(batch), spread(result["2:4"])])
    print("Linear layers of 2:4 tickets as semi-structured weights, float16.\n")
    print(table(["layer", "rows", "time relative to dense"], rows), end="\n\n")


def two_to_four(inputs, outputs, device):
    """The layer of a 2:4 ticket, and the same with semi-structured weights."""
    layer = nn.Linear(inputs, outputs).half().to(device)
    random_ticket(layer, pattern="2:4", seed=0).remove()
    return layer, to_semi_structured(layer)


def shrunk(options):
    rows = []
    for network, targets, batches in SHRUNK:
        build, shape = NETWORKS[network]
        rounds = options.rounds if network == "ResNet-20" else max(3, options.rounds // 3)
        for sparsity in (0.5, 0.75, 0.9):
            torch.manual_seed(0)
            dense = build().eval()
            for module in dense.modules():
                if isinstance(module, nn.BatchNorm2d):  # as after a training: about half of the constants outlive ReLU
                    nn.init.normal_(module.bias, std=0.2)
            dense.to(options.device)
            masked = copy.deepcopy(dense)
            random_ticket(masked, dict.fromkeys(targets, sparsity), pattern="filter", seed=0)
            example = torch.randn(2, *shape, device=options.device)
            small = shrink(masked, example)
            sizes = [
                f"{parameters(small) / parameters(dense):.2f}",
                f"{flops(small, example) / flops(dense, example):.2f}",
            ]
            for batch in batches:
                x = torch.randn(batch, *shape, device=options.device)
                candidates = alike({"dense": dense, "masked": masked, "small": small}, x)
                result = ratios(candidates, "dense", rounds, options.device)
                times = [spread(result[name]) for name in ("masked", "small")]
                rows.append([network, f"{sparsity:.0%}", *sizes, str(batch), *times])
    print("Filter tickets, relative to dense. Masked are the residual branches, or the first halves of the MLPs.\n")
    header = ["network", "masked", "parameters", "FLOPs", "batch", "time, masked alone", "time after shrink()"]
    print(table(header, rows), end="\n\n")


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model, x):
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:  # without gradients encoders take a way unseen
        model(x)
    return counter.get_total_flops()


def alike(models, x):
    """Calls of each, repeated until a turn of the dense one is long enough to be timed."""

    def turn(model, times):
        with torch.inference_mode():
            for _ in range(times):
                model(x)

    twice = partial(turn, models["dense"], 2)
    twice()
    times = max(1, round(2 * LEAST_SECONDS / seconds(twice, str(x.device))))
    return {name: partial(turn, model, times) for name, model in models.items()}


if __name__ == "__main__":
    main()

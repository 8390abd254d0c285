"""Keeping the zeros for one update, relative to ``weight.add_(grad)``.

This library clears the gradients as they arrive, and the weights after the update. ``torch.nn.utils.prune`` multiplies
weight and mask in each forward, keeps the product for the backward, and multiplies the gradient there.
"""

from __future__ import annotations

import torch
from measuring import arguments, machine, ratios, spread, table

from torch_dual_ticket._tensors.kernels import clear_
from torch_dual_ticket.masks.seeded import SeededMask

SIZES = {"1M": 1_000_000, "25M": 25_000_000, "200M": 200_000_000}
BASE = "weight.add_(grad)"


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for label, size in SIZES.items():
        small = size < 100_000_000  # the stock way takes too much memory on the largest size
        rounds = options.rounds if small else max(3, options.rounds // 3)
        result = ratios(ways(size, options.device, stock=small), BASE, rounds, options.device)
        rows += [[label, name, spread(value)] for name, value in result.items()]
    print(table(["weights", "way", f"time relative to {BASE}"], rows))
    print(f"\n{machine(options)}; 90 % of the weights masked; float32.")


def ways(size, device, *, stock):
    weight, grad = torch.randn(size, device=device), torch.randn(size, device=device)
    kept = SeededMask(0, "weight", (size,), round(0.9 * size)).draw(device=device)
    narrow = kept.to(torch.uint8)
    candidates = {
        BASE: lambda: weight.add_(grad, alpha=1e-6),
        "this library": lambda: clear_([(grad, narrow), (weight, narrow)]),
        "this library, weights only": lambda: clear_([(weight, narrow)]),
    }
    if stock:
        mask, orig = kept.to(weight.dtype), weight.clone().requires_grad_()

        def multiply():
            (mask.to(dtype=orig.dtype) * orig).backward(grad)
            orig.grad = None

        candidates["torch.nn.utils.prune"] = multiply
    return candidates


if __name__ == "__main__":
    main()

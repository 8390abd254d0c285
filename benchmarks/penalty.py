"""One update's penalty, λ·w added to the gradients of the masked weights, relative to ``grad.add_(weight)``.

The base moves the least memory that an in-place update of the gradients from the weights must move. Against it:

- this library: a uint8 mask, in chunks;
- a mask in the weight's dtype (four times the memory of ours), with foreach;
- a bool mask;
- the penalty as a term of the loss, λ/2 · ‖masked weights‖², forward and backward;
- a table of one λ for each weight, incremented at the masked indices in each update, times the weights, as in the
  method's first implementation.
"""

from __future__ import annotations

import torch
from measuring import arguments, machine, ratios, spread, table

from torch_dual_ticket._tensors.kernels import add_scaled_
from torch_dual_ticket.masks.seeded import SeededMask

SIZES = {"1M": 1_000_000, "25M": 25_000_000, "200M": 200_000_000}
BASE = "grad.add_(weight)"
PENALTY = 1e-4


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for label, size in SIZES.items():
        small = size < 100_000_000  # the wasteful ways take too much time and memory on the largest size
        rounds = options.rounds if small else max(3, options.rounds // 3)
        result = ratios(ways(size, options.device, all_of_them=small), BASE, rounds, options.device)
        rows += [[label, name, spread(value)] for name, value in result.items()]
    print(table(["weights", "way", f"time relative to {BASE}"], rows))
    print(f"\n{machine(options)}; 90 % of the weights masked; float32.")


def ways(size, device, *, all_of_them, dtype=torch.float32):
    weight, grad = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    pruned = SeededMask(0, "weight", (size,), round(0.9 * size)).draw(device=device).logical_not_()
    narrow = pruned.to(torch.uint8)
    candidates = {
        BASE: lambda: grad.add_(weight, alpha=PENALTY),
        "this library": lambda: add_scaled_([(grad, weight, narrow)], PENALTY),
        "bool mask": lambda: grad.add_(weight * pruned, alpha=PENALTY),
    }
    if not all_of_them:
        return candidates
    wide = pruned.to(weight.dtype)
    leaf = weight.clone().requires_grad_()
    leaf.grad = grad
    rates = torch.zeros(size, device=device)
    indices = pruned.nonzero().squeeze(1)

    def table_of_rates():
        rates[indices] += PENALTY
        grad.add_(rates * weight)

    return candidates | {
        "float mask, foreach": lambda: torch._foreach_addcmul_([grad], [weight], [wide], value=PENALTY),
        "term of the loss": lambda: (0.5 * PENALTY * (leaf * wide).square().sum()).backward(),
        "table of λ per weight": table_of_rates,
    }


if __name__ == "__main__":
    main()

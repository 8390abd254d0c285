"""How the cost of one update grows with the weights, the layers, the sparsity, and with what is not pruned.

Each row is the time that the library adds to a bare update with SGD, in milliseconds and relative to that update. Times
in milliseconds depend on the machine; their growth from row to row is what to look at.
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from measuring import arguments, machine, table
from torch import nn

from torch_dual_ticket import RSTScheduler

CASES = [  # label, layers, width, sparsity, further modules that are no targets
    ("10 layers of 100,000 weights", 10, 316, 0.9, 0),
    ("10 layers of 1M weights", 10, 1000, 0.9, 0),
    ("10 layers of 4M weights", 10, 2000, 0.9, 0),
    ("10 layers of 1M weights, half the sparsity", 10, 1000, 0.45, 0),
    ("10 layers of 1M weights, 10,000 further modules", 10, 1000, 0.9, 10_000),
    ("10 layers of 4 weights", 10, 2, 0.5, 0),
    ("100 layers of 4 weights", 100, 2, 0.5, 0),
    ("1,000 layers of 4 weights", 1000, 2, 0.5, 0),
]


def main() -> None:
    options = arguments(__doc__)
    rows = []
    for label, layers, width, sparsity, others in CASES:
        plain, transformation, finetuning = (
            make_step(phase, layers, width, sparsity, others, options.device)
            for phase in ("plain", "transformation", "finetuning")
        )
        times = {step: [] for step in (plain, transformation, finetuning)}
        for _ in range(options.rounds + 1):
            for step, taken in times.items():
                start = time.perf_counter()
                step()
                if options.device.startswith("cuda"):
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
        base, first, second = (statistics.median(taken[1:]) for taken in times.values())
        rows.append(
            [label]
            + [f"{1000 * (mine - base):.3f} ms ({mine / base:.2f})" for mine in (first, second)]
            + [f"{1000 * base:.3f} ms"]
        )
    print(table(["model", "transformation adds", "finetuning adds", "plain step"], rows))
    print(f"\n{machine(options)}")


def make_step(phase, layers, width, sparsity, others, device):
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)]).to(device)
    model.append(nn.Sequential(*[nn.Identity() for _ in range(others)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    grads = [torch.randn_like(parameter) for parameter in model.parameters()]
    rst = None if phase == "plain" else RSTScheduler(model, sparsity, seed=0)

    def step():
        # Gradients that have just arrived; in finetuning the hooks that mask them are part of the cost.
        loss = sum(torch.dot(p.flatten(), g.flatten()) for p, g in zip(model.parameters(), grads, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rst is not None:
            rst.step()

    if phase == "finetuning":
        step()
        with warnings.catch_warnings():  # nothing was squeezed out in one update
            warnings.simplefilter("ignore")
            rst.finalize()
    return step


if __name__ == "__main__":
    main()

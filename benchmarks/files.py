"""The size of ticket files, beside what ``torch.save`` writes for the same finalized model."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from measuring import table
from networks import NETWORKS

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.export import save_ticket

SIZED = ["ResNet-20", "ResNet-50", "Transformer-12"]
SPARSITIES = (0.5, 0.8, 0.9, 0.98)


def main() -> None:
    rows = []
    for name in SIZED:
        for sparsity in SPARSITIES:
            state, ticket, kept = sizes(name, sparsity)
            megabytes = [f"{size / 1e6:.2f} MB" for size in (state, ticket)]
            rows.append([name, f"{sparsity:.0%}", *megabytes, f"{ticket / state:.2f}", f"{kept:.2f}"])
    print(table(["network", "masked", "torch.save", "save_ticket", "ratio", "kept, of all parameters"], rows))
    print(f"\ntorch {torch.__version__}; float32; all linear and convolutional layers masked.")


def sizes(name: str, sparsity: float) -> tuple[int, int, float]:
    """Of the two files in bytes; and the share of all parameters that is kept."""
    model = NETWORKS[name][0]()
    rst = RSTScheduler(model, sparsity, steps=1, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    rst.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing was transformed, and the sizes do not depend on it
        pruned = rst.finalize().total.pruned
    size = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        state, ticket = Path(folder, "state.pt"), Path(folder, "ticket.safetensors")
        torch.save(model.state_dict(), state)
        save_ticket(rst, ticket)
        return state.stat().st_size, ticket.stat().st_size, 1 - pruned / size


if __name__ == "__main__":
    main()

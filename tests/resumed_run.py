"""A training program that saves checkpoints and goes on from the last one; test_resume.py kills it.

It imports no more than it needs: it is started many times.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo  # which the first optimizer loads: the calls of an import are not those of the training
from models import INPUT_SHAPES, finalize_quietly, loss_of, make, mlp
from torch import nn

from torch_dual_ticket import RSTScheduler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UPDATES = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "one shot": {"sparsity": 0.8, "steps": 20, "hold": 5},
    "two cycles": {"sparsity": 0.8, "steps": 10, "hold": 5, "cycles": 2},
}


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "one shot":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def main(folder: Path, kind: str, part: str = "training", kill_after: int | None = None) -> None:
    """Train to the end, or until so many function calls have been made in a part, whatever is being done then."""
    torch.set_num_threads(1)
    calls = {"start": 0, "training": 0}
    now = "start"

    def count(*_: object) -> None:
        calls[now] += 1
        if now == part and calls[now] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def at_start() -> None:
        nonlocal now
        now = "training"

    sys.setprofile(count)
    train(folder, kind, at_start)
    sys.setprofile(None)
    (folder / "calls.json").write_text(json.dumps(calls))


def train(folder: Path, kind: str, at_start: Callable[[], object]) -> None:
    path = folder / "checkpoint.pt"
    checkpoint = torch.load(path) if path.exists() else None
    # Another seed after a restart: that of the masks is in the scheduler's state.
    torch.manual_seed(7 if checkpoint is None else os.getpid())
    model = make(mlp)
    optimizer = optimizer_of(kind, model)
    rst = RSTScheduler(model, **SETTINGS[kind])
    update, is_made = 0, False  # where we are in the data, and whether that update is made, but not its scheduler step
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        rst.load_state_dict(checkpoint["rst"])
        update, is_made = checkpoint["position"]

    def save(name: str = "checkpoint.pt") -> None:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rst": rst.state_dict()}
        torch.save({**states, "position": (update, is_made)}, folder / "unfinished")
        os.replace(folder / "unfinished", folder / name)

    at_start()
    while update < UPDATES:
        if rst.done and rst.phase == "transform":
            finalize_quietly(rst)
        if not is_made:
            optimizer.zero_grad()
            loss_of(model, update, INPUT_SHAPES[mlp]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            is_made = True
            if update % 5 == 1:
                save()
        rst.step()
        update, is_made = update + 1, False
        if update % 5 == 4:
            save()
    save("end.pt")

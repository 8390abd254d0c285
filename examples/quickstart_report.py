"""What the quickstart shows at its end: a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from comparison.colors import COLORS
from matplotlib.figure import Figure
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

METHODS = {"dense": "dense", "random scratch": "scratch", "random RST": "RST"}  # and their names in the comparison


@dataclass
class Run:
    """One training run: a part of a line in the table and of a line in the picture."""

    method: str
    sparsity: float
    seed: int
    updates: int = 0
    zeros: float = 0.0
    residual: float = float("nan")
    accuracy: float = float("nan")
    curve: list[dict[str, float]] = field(default_factory=list)


def print_table(console: Console, runs: list[Run]) -> None:
    table = Table("method")
    for column in ("sparsity", "test accuracy, %", "residual", "updates"):
        table.add_column(column, justify="right")
    for method, sparsity in dict.fromkeys((run.method, run.sparsity) for run in runs):
        group = [run for run in runs if (run.method, run.sparsity) == (method, sparsity)]
        accuracy = np.array([run.accuracy for run in group])
        spread = f" ± {accuracy.std(ddof=1):.2f}" if len(group) > 1 else ""
        residual = f"{np.mean([run.residual for run in group]):.2%}" if method == "random RST" else "–"
        zeros = f"{np.mean([run.zeros for run in group]):.2%}"
        updates = "/".join(sorted({str(run.updates) for run in group}))
        table.add_row(method, zeros, f"{accuracy.mean():.2f}{spread}", residual, updates)
    console.print(table)
    console.print(
        f"accuracy: mean ± standard deviation, {len({run.seed for run in runs})} seeds\n"
        "sparsity: zeros in the layers that are pruned\n"
        "residual: share of the norm that the masked weights still held at finalize()"
    )


def draw(runs: list[Run], sparsities: list[float], finalized: int, path: Path, subject: str) -> None:
    figure = Figure(figsize=(1 + 4.5 * len(sparsities), 8), layout="constrained")
    figure.suptitle(subject, fontsize=10)
    rows = figure.subplots(3, len(sparsities), sharex=True, sharey="row", squeeze=False)
    for (top, middle, bottom), sparsity in zip(rows.T, sparsities, strict=True):
        for method, name in METHODS.items():
            color = COLORS[name]
            curves = [run.curve for run in runs if run.method == method and run.sparsity in (sparsity, 0.0)]
            lines = {key: np.array([[point[key] for point in curve] for curve in curves]) for key in curves[0][0]}
            updates = lines["update"][0]
            if method == "random RST":
                top.plot(updates, lines["penalty"][0], color=color)
                middle.plot(updates, lines["kept"].mean(0), color=color, label="kept weights")
                middle.plot(updates, lines["masked"].mean(0), color="tab:red", label="masked weights")
            accuracy = lines["accuracy"]
            bottom.plot(updates, accuracy.mean(0), color=color, label=method)
            bottom.fill_between(updates, accuracy.min(0), accuracy.max(0), color=color, alpha=0.2, linewidth=0)
        for axes in (top, middle, bottom):
            axes.axvline(finalized, color="0.7", linestyle=":", linewidth=1)
            axes.grid(alpha=0.3)
        top.set_title(f"tickets: {100 * sparsity:.4g} % of the weights masked")
        bottom.set_xlabel("updates (dotted: finalize)")
    for axes, label in zip(
        rows[:, 0], ("penalty λ, RST", "norm of weights, RST", "validation accuracy, %"), strict=True
    ):
        axes.set_ylabel(label)
    rows[1, 0].legend()
    rows[2, 0].legend(title="mean and range over seeds")
    rows[2, 0].set_ylim(max(0, min(80, *(run.curve[-1]["accuracy"] - 10 for run in runs))), 100.5)
    figure.savefig(path, dpi=120)

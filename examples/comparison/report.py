"""What the comparison ends with: a Markdown table, a CSV file, and a picture."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from scipy.stats import t as student

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .cells import Cell

BASELINES = ("scratch", "scratch-scaled", "scratch-short", "L1", "GMP", "LTH", "LTH-iter", "random-after-dense")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its 95 % interval by Student's t; None for a single seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half is None else f"{self.mean:.2f} ± {self.half:.2f}"

    @property
    def signed(self) -> str:
        return f"+{self}" if self.mean >= 0 else f"−{Estimate(-self.mean, self.half)}"


def estimate(values: Sequence[float]) -> Estimate:
    """
    >>> str(estimate([90.0, 91.0, 92.0])), str(estimate([90.0]))
    ('91.00 ± 2.48', '90.00')
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2 or not math.isfinite(mean):  # a run may have diverged
        return Estimate(mean, None)
    return Estimate(mean, float(student.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count))


class Row:
    """All seeds of one method at one sparsity."""

    def __init__(self, runs: dict[Cell, dict[str, Any]]) -> None:
        self.runs = {cell.seed: result for cell, result in runs.items()}
        self.cell, self.first = next(iter(runs.items()))
        self.label = self.cell.method
        self.test = self.over_seeds("test")

    @property
    def diverged(self) -> bool:
        """Whether the penalty was too strong for the learning rate in some run."""
        return any(result["residual"] is not None and math.isnan(result["residual"]) for result in self.runs.values())

    def over_seeds(self, name: str) -> Estimate:
        return estimate([result[name] for result in self.runs.values()])

    def minus(self, other: Row | None) -> Estimate | None:
        """The mean difference in test accuracy between runs of one seed."""
        if other is None or other is self:
            return None
        seeds = self.runs.keys() & other.runs.keys()
        return estimate([self.runs[seed]["test"] - other.runs[seed]["test"] for seed in sorted(seeds)])


class Report:
    """Rows in the order of the cells, sparsity by sparsity."""

    def __init__(self, results: dict[Cell, dict[str, Any]]) -> None:
        groups: dict[tuple[float, str, str], dict[Cell, dict[str, Any]]] = defaultdict(dict)
        for cell, result in results.items():
            groups[cell.sparsity, cell.method, cell.variant][cell] = result
        self.rows = [Row(groups[key]) for key in sorted(groups, key=lambda key: key[0])]
        if len({row.cell.variant for row in self.rows if row.cell.variant}) > 1:
            for row in self.rows:
                row.label += f" ({row.cell.variant})" if row.cell.variant else ""
        self.dense = next((row for row in self.rows if row.cell.method == "dense"), None)

    def baseline(self, row: Row, method: str) -> Row | None:
        return next((r for r in self.rows if r.cell.sparsity == row.cell.sparsity and r.cell.method == method), None)

    def markdown(self) -> str:
        baselines = [baseline for baseline in BASELINES if any(row.cell.method == baseline for row in self.rows)]
        header = ["sparsity", "method", "just masked, %", "test accuracy, %"]
        header += [f"− {baseline}" for baseline in baselines] + [
            "updates: dense + sparse",
            "training FLOPs",
            "residual",
            "rate",
        ]
        lines = [
            "| " + " | ".join(header) + " |",
            "|---:|---|---:|---:|" + "---:|" * len(baselines) + "---:|---:|---:|---:|",
        ]
        for row in self.rows:
            differences = [row.minus(self.baseline(row, baseline)) for baseline in baselines]
            flops = row.first["training_flops"]
            residual = "" if row.first["residual"] is None else f"{row.over_seeds('residual').mean:.2%}"
            relative = f" ({flops / self.dense.first['training_flops']:.2f}×)" if self.dense else ""
            cells = [
                f"{100 * row.first['achieved_sparsity']:.4g} %",
                row.label,
                "" if row.first.get("masked") is None else str(row.over_seeds("masked")),
                str(row.test),
                *("" if difference is None else difference.signed for difference in differences),
                f"{row.first['dense_updates']:,} + {row.first['sparse_updates']:,}",
                f"{flops:.2e}{relative}",
                residual,
                f"{row.cell.rate:g}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = ["test", "validation", *(f"minus_{baseline}" for baseline in BASELINES)]
            writer.writerow(
                ["data", "model", "method", "sparsity", "achieved_sparsity", "seeds"]
                + [column for name in names for column in (f"{name}_mean", f"{name}_half_95")]
                + ["dense_updates", "sparse_updates", "training_flops", "residual", "dense_rate", "rate"]
            )
            for row in self.rows:
                cell, first = row.cell, row.first
                estimates = [
                    row.test,
                    row.over_seeds("validation"),
                    *(row.minus(self.baseline(row, r)) for r in BASELINES),
                ]
                residual = None if first["residual"] is None else row.over_seeds("residual").mean
                writer.writerow(
                    [cell.data, cell.model, row.label, cell.sparsity, first["achieved_sparsity"], len(row.runs)]
                    + [value for e in estimates for value in ((e.mean, e.half) if e else (None, None))]
                    + [first["dense_updates"], first["sparse_updates"], first["training_flops"], residual]
                    + [cell.dense_rate, cell.rate]
                )

    def draw(self, path: Path) -> None:
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        sparse = [row for row in self.rows if row is not self.dense]
        sparsities = sorted({row.cell.sparsity for row in sparse})
        labels = list(dict.fromkeys(row.label for row in sparse))
        for index, label in enumerate(labels):
            rows = [row for row in sparse if row.label == label and not row.diverged]
            shift = 0.7 * ((index + 0.5) / len(labels) - 0.5)  # side by side: error bars must not hide one another
            axes.errorbar(
                [sparsities.index(row.cell.sparsity) + shift for row in rows],
                [row.test.mean for row in rows],
                [row.test.half or 0.0 for row in rows],
                label=label if rows else f"{label}: diverged",
                marker="os^vDPX*<>hpd"[index % 13],
                color=f"C{index % 10}",
                linestyle="none",
                capsize=3,
            )
        if self.dense:
            mean, half = self.dense.test.mean, self.dense.test.half or 0.0
            axes.axhline(mean, color="0.4", linewidth=1, label="dense")
            axes.axhspan(mean - half, mean + half, color="0.4", alpha=0.15, linewidth=0)
        for border in range(len(sparsities) - 1):
            axes.axvline(border + 0.5, color="0.85", linewidth=1)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 0), min(top, 100))
        axes.set_xticks(range(len(sparsities)), [f"{100 * sparsity:.4g} %" for sparsity in sparsities])
        axes.set_xlim(-0.5, len(sparsities) - 0.5)
        axes.set_xlabel("weights removed from the layers that are pruned")
        axes.set_ylabel("test accuracy, %")
        axes.grid(axis="y", alpha=0.3)
        cell, seeds = self.rows[0].cell, len(self.rows[0].runs)
        intervals = f"mean and 95 % interval of {seeds} seeds" if seeds > 1 else "one seed"
        axes.set_title(
            f"{cell.model} on {cell.data}, {cell.updates:,} updates for every method: {intervals}", fontsize=10
        )
        figure.legend(loc="outside right center")
        figure.savefig(path, dpi=130)

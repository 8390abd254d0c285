"""What the comparison ends with: a Markdown table, a CSV file, and a picture."""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from scipy.stats import t as student

from .colors import COLORS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .cells import Cell

PAGE = 100  # letters in a line of a table
TEXTS = {"method", "anneal", "scores", "growth"}  # columns that begin on the left
BASELINES = ("scratch", "scratch-scaled", "scratch-short", "L1", "GMP", "GMP-early", "LTH", "LTH-iter")
BASELINES += ("random-after-dense",)


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


def tables(*groups: list[dict[str, str]], keys: tuple[str, ...] = ("sparsity", "method")) -> str:
    """Markdown tables of rows by title, one for each group, or more: no line is longer than a page is wide.

    >>> print(tables([{"sparsity": "90 %", "method": "RST", "rate": "0.1"}]))
    | sparsity | method | rate |
    | -------: | ------ | ---: |
    |     90 % | RST    |  0.1 |
    <BLANKLINE>
    """
    texts = []
    for rows in filter(None, groups):
        sizes = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
        parts: list[list[str]] = []
        for title in (title for title in sizes if title not in keys):
            if not parts or sum(sizes[name] + 3 for name in (*keys, *parts[-1], title)) >= PAGE:
                parts.append([])
            parts[-1].append(title)
        for part in parts:
            titles = [*keys, *part]
            left = {title for title in titles if title in TEXTS}
            rule = {title: "-" * (sizes[title] - (title not in left)) + ":" * (title not in left) for title in titles}
            lines = [
                " | ".join(row[t].ljust(sizes[t]) if t in left else row[t].rjust(sizes[t]) for t in titles)
                for row in ({title: title for title in titles}, rule, *rows)
            ]
            texts.append("".join(f"| {line} |\n" for line in lines))
    return "\n".join(texts)


class Report:
    """Rows in the order of the cells, sparsity by sparsity. A notebook shows its tables."""

    def __init__(self, results: dict[Cell, dict[str, Any]], subject: str = "") -> None:
        self.subject = subject  # the network and the data, with their sizes
        groups: dict[tuple[float, str, str], dict[Cell, dict[str, Any]]] = defaultdict(dict)
        for cell, result in results.items():
            groups[cell.sparsity, cell.method, cell.variant][cell] = result
        self.rows = [Row(groups[key]) for key in sorted(groups, key=lambda key: key[0])]
        if len({row.cell.variant for row in self.rows if row.cell.variant}) > 1:
            for row in self.rows:
                row.label += f" ({row.cell.variant})" if row.cell.variant else ""
        self.dense = next((row for row in self.rows if row.cell.method == "dense"), None)

    def __repr__(self) -> str:
        return self.markdown()

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def baseline(self, row: Row, method: str) -> Row | None:
        return next((r for r in self.rows if r.cell.sparsity == row.cell.sparsity and r.cell.method == method), None)

    @property
    def knows_masked(self) -> bool:
        """Whether runs say what was left just after the mask; those of earlier versions do not."""
        return any(row.first.get("masked") is not None for row in self.rows)

    def markdown(self) -> str:
        """Accuracies; differences, where there are any; and what the runs took."""
        baselines = [baseline for baseline in BASELINES if any(row.cell.method == baseline for row in self.rows)]
        accuracies, differences, costs = [], [], []
        for row in self.rows:
            key = {"sparsity": f"{100 * row.first['achieved_sparsity']:.4g} %", "method": row.label}
            masked = "" if row.first.get("masked") is None else str(row.over_seeds("masked"))
            residual = "" if row.first["residual"] is None else f"{row.over_seeds('residual').mean:.2%}"
            accuracies.append(
                {
                    **key,
                    **({"just masked, %": masked} if self.knows_masked else {}),
                    "test accuracy, %": str(row.test),
                    "residual": residual,
                    "rate": f"{row.cell.rate:g}",
                }
            )
            minus = {baseline: row.minus(self.baseline(row, baseline)) for baseline in baselines}
            if any(minus.values()):
                differences.append({**key, **{f"− {name}": e.signed if e else "" for name, e in minus.items()}})
            flops = row.first["training_flops"]
            dense = self.dense.first["training_flops"] if self.dense else 0
            updates = f"{row.first['dense_updates']:,} + {row.first['sparse_updates']:,}"
            relative = f" ({flops / dense:.2f}×)" if dense else ""
            costs.append({**key, "updates: dense + sparse": updates, "training FLOPs": f"{flops:.2e}{relative}"})
        return tables(accuracies, differences, costs)

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
        variants = Counter((row.cell.sparsity, row.cell.method) for row in sparse)
        several = {method for (_, method), count in variants.items() if count > 1}
        curves: dict[str, list[Row]] = {}
        for row in sparse:  # of a method that has one row at each sparsity, the rows belong together
            curves.setdefault(row.label if row.cell.method in several else row.cell.method, []).append(row)
        for index, (label, rows) in enumerate(curves.items()):
            shift = 0.7 * ((index + 0.5) / len(curves) - 0.5)  # side by side: error bars must not hide one another
            finished = [row for row in rows if not row.diverged]
            axes.errorbar(
                [sparsities.index(row.cell.sparsity) + shift for row in finished],
                [row.test.mean for row in finished],
                [row.test.half or 0.0 for row in finished],
                label=label if finished else f"{label}: diverged",
                marker="os^vDPX*<>hpd"[index % 13],
                color=COLORS[rows[0].cell.method],
                linestyle="none",
                capsize=3,
            )
        if self.dense:
            mean, half = self.dense.test.mean, self.dense.test.half or 0.0
            axes.axhline(mean, color=COLORS["dense"], linewidth=1, label="dense")
            axes.axhspan(mean - half, mean + half, color=COLORS["dense"], alpha=0.15, linewidth=0)
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
        spread = f"mean and 95 % interval of {seeds} seeds" if seeds > 1 else "one seed"
        budget = f"budget: {cell.updates:,} updates of batch {cell.batch}; {spread}"
        axes.set_title(f"{self.subject or f'{cell.model} on {cell.data}'}\n{budget}", fontsize=10, loc="left")
        figure.legend(loc="outside right center")
        figure.savefig(path, dpi=130)

"""What a user sees of a ticket."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .shards import sum_over_shards

if TYPE_CHECKING:
    from .tickets import Ticket

_MAX_RESIDUAL = 0.01


@dataclass(frozen=True)
class LayerReport:
    """One parameter, or the total over all: what was masked, and how much of the norm it still held.

    Attributes:
        name: parameter name in the unwrapped model.
        pruned: masked weights.
        size: all weights.
        residual: ‖masked weights‖ / ‖all weights‖ just before they were set to zero; 0 where nothing is lost.
    """

    name: str
    pruned: int
    size: int
    residual: float

    @property
    def sparsity(self) -> float:
        return self.pruned / self.size if self.size else 0.0


@dataclass(frozen=True)
class Report:
    """What ``finalize()`` did, layer by layer; ``str()`` gives a table.

    >>> layer = LayerReport("fc.weight", pruned=90, size=100, residual=0.004)
    >>> print(Report((layer,), LayerReport("total", 90, 100, 0.004)))
    parameter  pruned  size  sparsity  residual
    fc.weight      90   100   90.00 %    0.0040
    total          90   100   90.00 %    0.0040
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport

    def __str__(self) -> str:
        rows = [("parameter", "pruned", "size", "sparsity", "residual")]
        rows += [
            (
                row.name,
                f"{row.pruned:,}",
                f"{row.size:,}",
                f"{row.sparsity:.2%}".replace("%", " %"),
                f"{row.residual:.4f}",
            )
            for row in (*self.layers, self.total)
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        )


def measure(ticket: Ticket) -> Report:
    """The report on a ticket as it is now; reads every target weight. Collective where they are sharded."""
    ticket.reshard()
    layers = []
    masked_sum = total_sum = 0.0
    for hold in ticket.primary_holds:
        parameter = hold.parameter()
        masked = total = 0.0
        if parameter is not None and not parameter.is_meta:
            sums = torch.stack(hold.squared_norms(parameter))
            masked, total = sum_over_shards(sums, parameter).tolist()
        masked_sum, total_sum = masked_sum + masked, total_sum + total
        layers.append(
            LayerReport(hold.name, hold.mask.pruned_weights, math.prod(hold.mask.shape), _ratio(masked, total))
        )
    pruned, size = sum(layer.pruned for layer in layers), sum(layer.size for layer in layers)
    return Report(tuple(layers), LayerReport("total", pruned, size, _ratio(masked_sum, total_sum)))


def warn_of_residual(report: Report, penalty: float) -> None:
    """Warn, on behalf of ``finalize()``, where the masks are about to take away what the network still uses."""
    if report.total.residual > _MAX_RESIDUAL:
        warnings.warn(
            f"the masked weights still held {report.total.residual:.1%} of the norm when they were set to zero (λ had"
            f" reached {penalty:.3g}): transform for longer (steps, hold), or with a higher max_penalty or lr",
            stacklevel=3,
        )


def warn_of_outstanding(cycle: int, cycles: int) -> None:
    """Warn, on behalf of ``finalize()``, where it comes before the last cycle."""
    if cycle < cycles:
        warnings.warn(
            f"finalize() in cycle {cycle} of {cycles}: what later cycles would have masked was not penalised",
            stacklevel=3,
        )


def _ratio(masked: float, total: float) -> float:
    return math.sqrt(masked / total) if total else 0.0

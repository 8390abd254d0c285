"""How much of the norm the masked weights hold: measured, reported, warned of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from .._engine.optimizer_hooks import held_by
from .._engine.parameter import ManagedParameter
from .._engine.ticket import Ticket
from .._tables import Table, TableInNotebooks, as_text, percent, terminal_width
from .._tensors.dtensor import local, placement, sum_over_shards
from .._tensors.kernels import squared_norms
from ..masks.mask import Mask
from .schedule import Timeline

MAX_RESIDUAL = 0.01  # above which finalize() warns
ADAM_AT_FULL_SPEED = "Adam moves a weight by about lr in an update, whatever the penalty: raise steps, hold or lr"
_MORE = "Transform for longer, or with a higher max_penalty or lr"


@dataclass(frozen=True)
class LayerReport:
    """One parameter, or the total over all: what was masked, and how much of the norm it still held.

    Attributes:
        name: parameter name in the unwrapped model.
        pruned: masked weights.
        size: all weights.
        residual: ‖masked weights‖ / ‖all weights‖ at that moment (for ``finalize()``: just before they were set to
            zero); 0 where nothing is lost.
        norm: ‖all weights‖ at that moment.
    """

    name: str
    pruned: int
    size: int
    residual: float
    norm: float

    @property
    def sparsity(self) -> float:
        return self.pruned / self.size if self.size else 0.0

    @property
    def masked_norm(self) -> float:
        """‖masked weights‖"""
        return self.residual * self.norm

    @property
    def kept_norm(self) -> float:
        """‖kept weights‖"""
        return math.sqrt(max(0.0, 1 - self.residual**2)) * self.norm


@dataclass(frozen=True)
class Report(TableInNotebooks):
    """What ``finalize()`` did, layer by layer; ``str()`` gives a table that fits the terminal.

    >>> layer = LayerReport("fc.weight", pruned=90, size=100, residual=0.004, norm=2.5)
    >>> print(Report((layer,), LayerReport("total", 90, 100, 0.004, 2.5)))
    parameter  pruned  size  sparsity  residual
    fc.weight      90   100   90.00 %    0.0040
    total          90   100   90.00 %    0.0040
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport

    @classmethod
    def of(cls, layers: Sequence[LayerReport]) -> Report:
        """The report on these layers, with their total."""
        masked = math.hypot(*(layer.masked_norm for layer in layers))
        norm = math.hypot(*(layer.norm for layer in layers))
        pruned, size = sum(layer.pruned for layer in layers), sum(layer.size for layer in layers)
        return cls(tuple(layers), LayerReport("total", pruned, size, masked / norm if norm else 0.0, norm))

    def as_rows(self) -> list[list[Any]]:
        """The fields of each layer, plain enough to be saved anywhere."""
        return [list(astuple(layer)) for layer in self.layers]

    def __str__(self) -> str:
        width = terminal_width()
        return as_text(self._table(width), width)

    def _table(self, width: int) -> Table:
        rows = [
            (row.name, f"{row.pruned:,}", f"{row.size:,}", percent(row.sparsity), f"{row.residual:.4f}")
            for row in (*self.layers, self.total)
        ]
        header = ("parameter", "pruned", "size", "sparsity", "residual")
        return Table(header, tuple(rows[:-1]), tuple(rows[-1:]))


@dataclass(frozen=True)
class Measurement:
    """The norms of a ticket's layers at one moment. The numbers stay where they were computed until they are read."""

    counts: tuple[tuple[str, int, int], ...]  # name, masked weights, all weights
    parts: tuple[tuple[tuple[int, ...], Tensor], ...]  # layers, and their sums of squares: masked and all, (layers, 2)

    def read(self) -> Report:
        """Waits for the device, if the numbers are on one."""
        squares = dict.fromkeys(range(len(self.counts)), (0.0, 0.0))  # without memory, on the meta device
        for indices, sums in self.parts:
            squares.update(zip(indices, sums.tolist(), strict=True))
        layers = [
            LayerReport(name, pruned, size, math.sqrt(masked / total) if total else 0.0, math.sqrt(total))
            for (name, pruned, size), (masked, total) in zip(self.counts, squares.values(), strict=True)
        ]
        return Report.of(layers)


@torch.no_grad()
def take_measurement(ticket: Ticket, masks: Mapping[str, Mask] | None = None) -> Measurement:
    """Measure a ticket as it is now; reads every target weight, without waiting for the device.

    Collective where the weights are sharded.
    """
    ticket.reshard()
    counts: list[tuple[str, int, int]] = []
    alike: dict[Any, tuple[Tensor, list[int], list[Tensor]]] = {}  # by device and placement: added up together
    for index, managed in enumerate(ticket.parameters):
        mask = (masks or ticket.stage.masks)[managed.name]
        counts.append((managed.name, mask.pruned_weights, math.prod(mask.shape)))
        parameter = managed.tensor()
        if parameter is not None and not parameter.is_meta:
            managed.check_kind(parameter)
            group = alike.setdefault((parameter.device, *placement(parameter)), (parameter, [], []))
            group[1].append(index)
            group[2].append(managed.squared_norms(mask, parameter, holds=ticket.holds))
    parts = [(tuple(indices), sum_over_shards(torch.stack(sums), like)) for like, indices, sums in alike.values()]
    return Measurement(tuple(counts), tuple(parts))


def measure(ticket: Ticket, masks: Mapping[str, Mask] | None = None) -> Report:
    """The report on a ticket as it is now; reads every target weight. Collective where they are sharded."""
    return take_measurement(ticket, masks).read()


def warn_of_unpenalized(ticket: Ticket, report: Report) -> Report:
    """Warn, on behalf of finalize(), of parameters that no update has penalized; returns a report on the others."""
    missed = {managed.name: managed.penalized_at for managed in ticket.parameters if managed.penalized_at <= 0}
    others = [layer for layer in report.layers if layer.name not in missed]
    cut = [layer.name for layer in report.layers if layer.name in missed and layer.residual > MAX_RESIDUAL]
    if not (cut and others):  # right after a restart it is not known
        return report
    since, leave = "", "Leave"
    if missed[cut[0]] == 0:
        since, leave = " since the scheduler's state was loaded", "If they had none before it, either, leave"
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in cut))
    tops = list(dict.fromkeys(name.partition(".")[0] for name in modules))
    if not {layer.name.partition(".")[0] for layer in others}.intersection(tops):
        modules = tops
    shown = [", ".join(names[:3]) + (", …" if names[3:] else "") for names in (cut, list(map(repr, modules)))]
    warnings.warn(
        f"{shown[0]} got no penalty in any update{since}, and what the masked weights knew is cut."
        f" No optimizer has them, they were frozen, or the loss has not used them. {leave} them dense with"
        f" exclude=[{shown[1]}]; or, if they are an average or a copy of another part (a target network), build the"
        " scheduler on that part, and after finalize() mask the copy with rst.apply_masks(copy).",
        stacklevel=3,
    )
    return Report.of(others)


def warn_of_residual(report: Report, steps: int, timeline: Timeline, ticket: Ticket) -> None:
    """Warn, on behalf of ``finalize()``, where the masks are about to take away what the network still uses."""
    if report.total.residual <= MAX_RESIDUAL:
        return
    if not math.isfinite(report.total.residual):
        advice = "Weights are not finite any more: the training has diverged. Lower max_penalty or lr"
    elif steps == 0:
        advice = "rst.step() was never called: call it after each optimizer.step()"
    elif steps < timeline.total:
        advice = (
            f"finalize() came after {steps:,} of {timeline.total:,} steps, with λ at"
            f" {timeline.penalty(steps - 1):.3g}: choose steps and hold that fit your loop, or go on until rst.done"
        )
    elif timeline.max_penalty == 0:
        advice = "There was no penalty, as max_penalty is 0"
    else:
        advice = f"λ had reached {timeline.max_penalty:g}. {_lever(ticket)}"
    warnings.warn(
        f"the masked weights still held {report.total.residual:.1%} of the norm when they were set to zero. {advice}",
        stacklevel=3,
    )


@torch.no_grad()
def _lever(ticket: Ticket) -> str:
    """What to change, by what the optimizers look like. It may wait for the device."""
    levers = []
    for optimizer, held in held_by(ticket):
        lr, highest = float(held.groups[0].get("lr", 0.0)), highest_rate(held.groups[0])
        if lr < highest / 2:
            levers.append(f"The lr was at {lr:g} of {highest:g}: transform for longer, or while lr is high")
        if type(optimizer) is SGD and not levers:
            group, updates = held.groups[0], max(ticket.updates.serial, ticket.stage.steps)
            limit, product = sgd_limit(group), lr * ticket.stage.penalty
            change = _MORE if product < limit else "Lower max_penalty or lr"
            if product < limit and _is_limited_by_momentum(group, product, updates):
                least = math.sqrt(group["momentum"])
                change = f"Transform for longer: an update leaves {least:.3g} of a weight, whatever the penalty"
            levers.append(f"{change} (lr times max_penalty must stay below {limit:g} with this SGD)")
        if type(optimizer) in (Adam, AdamW):
            moves = sizes = 0.0
            for (managed, parameter), group in zip(held, held.groups, strict=True):
                if state := optimizer.state.get(parameter):
                    moves += float(sums(ticket, managed, parameter, state["exp_avg"])[0])
                    size = sums(ticket, managed, parameter, state["exp_avg_sq"], lambda squares: squares)[0]
                    sizes += float(size) / (1 - group["betas"][1] ** max(1.0, float(state["step"])))
            if moves < sizes / 4:  # no two updates went the same way
                levers.append("The loss's gradients were larger than the penalty: raise max_penalty")
            elif not levers:
                levers.append(ADAM_AT_FULL_SPEED)
    return ". ".join(dict.fromkeys(levers)) or _MORE


def _is_limited_by_momentum(group: Mapping[str, Any], product: float, updates: int) -> bool:
    """Whether no penalty could have emptied the weights in so many updates of SGD, and a higher one would not help.

    An update leaves at least √momentum of a weight. It leaves no more than that once lr·λ, damped, has reached
    (1 - √momentum)²; a ramp that ends at ten times as much is beyond it for most of its time. There weights oscillate,
    and a higher penalty still helps in their first half period, which it shortens.
    """
    least, damped = math.sqrt(group["momentum"]), product * (1 - group["dampening"])
    if group["nesterov"] or least**updates <= MAX_RESIDUAL:
        return False
    return damped > 10 * (1 - least) ** 2 and math.sqrt(damped) * updates > math.pi


def sgd_limit(group: Mapping[str, Any]) -> float:
    """What lr·λ must stay below: there the update's characteristic polynomial has a root of -1."""
    momentum = group["momentum"]
    damped = 1 - group["dampening"] if momentum else 1.0
    return float(2 * (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else damped or math.inf))


def highest_rate(group: Mapping[str, Any]) -> float:
    """The learning rate now, or the highest that a schedule of torch names in the group."""
    rates = (group.get(name) for name in ("lr", "initial_lr", "max_lr"))
    return max((float(rate) for rate in rates if isinstance(rate, (int, float)) and math.isfinite(rate)), default=0.0)


def sums(
    ticket: Ticket,
    managed: ManagedParameter,
    parameter: Tensor,
    values: Tensor,
    change: Callable[[Tensor], Tensor] = Tensor.square_,
) -> Tensor:
    """Sums over values, one for each weight of this process's shard, by default of squares: the masked ones, and all.

    ``change`` is given their magnitudes, a part at a time.
    """
    weight, mask = local(parameter), ticket.mask(managed)
    values = local(values).to(weight.device)  # the optimizer's state stays behind where a model is moved to be saved
    pieces: Any = managed.cache.pieces(mask, parameter, values, holds=False)
    return squared_norms(pieces, 1, weight.device, change)


def warn_of_outstanding(cycle: int, cycles: int) -> None:
    """Warn, on behalf of ``finalize()``, where it comes before the last cycle."""
    if cycle < cycles:
        warnings.warn(
            f"finalize() in cycle {cycle} of {cycles}: what later cycles would have masked was not penalized",
            stacklevel=3,
        )

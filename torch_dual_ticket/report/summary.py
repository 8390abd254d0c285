"""The layers of a model, masked or not, as a table for the terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._engine.layer_hook import layer_hooks
from .._engine.parameter import is_converted
from .._engine.stage import Phase
from .._engine.ticket import Ticket
from .._model.coverage import why_dense
from .._model.layout import input_dim_of
from .._model.names import unwrapped_modules
from .._rst.residual import measure, total_of
from .._tables import Table, TableInNotebooks, as_best_text, as_renderable, percent, terminal_width
from .._tensors.dtensor import local, reshard, sum_over_shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .._engine.parameter import ManagedParameter
    from .._rst.residual import LayerReport
    from ..masks.mask import Mask


class HasMasks(Protocol):
    """What manages a model: an ``RSTScheduler``, or what ``baselines.hold()`` returns."""

    @property
    def masks(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class LayerSummary:
    """One parameter.

    Attributes:
        name: in the unwrapped model.
        shape: full, also where the parameter is sharded.
        kept: weights that stay: those that the mask keeps, or, where there is none, those that are not zero.
        pattern: of the mask: "unstructured", "2:4" …; "explicit" for one that was given weight by weight; "prune" for
            one of ``torch.nn.utils.prune``; "" where there is no mask.
        residual: ‖masked weights‖ / ‖all weights‖ now; None where the layer is not managed.
        penalty: λ of the next update; None after ``finalize()``, or where the layer is not managed.
        dead: outputs whose inputs are all masked, so that their biases are all that they are; None where the layer is
            not managed, or where it is not known which dimension of its weight holds the outputs.
        dense: why the layer is not managed, where others are: "excluded", "embedding", "tied to an embedding" or "not a
            target type".
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int
    pattern: str
    residual: float | None = None
    penalty: float | None = None
    dead: int | None = None
    dense: str = ""

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.size if self.size else 0.0


@dataclass(frozen=True, repr=False)
class Summary(TableInNotebooks):
    """The layers of a model; ``print`` shows them as a table that fits the terminal.

    Attributes:
        layers: the managed parameters, and all others of two or more dimensions.
        others: the sizes of the remaining parameters: biases, norms, …
        residual: ‖masked weights‖ / ‖all weights‖ over the managed layers; None if there is none.
    """

    layers: tuple[LayerSummary, ...]
    others: tuple[int, ...]
    residual: float | None

    @property
    def phases(self) -> tuple[str, ...]:
        """``"transform"``, ``"finetune"``, both where several schedulers manage the model, or none."""
        managed = [layer for layer in self.layers if layer.residual is not None]
        return tuple(dict.fromkeys("finetune" if layer.penalty is None else "transform" for layer in managed))

    @property
    def size(self) -> int:
        """Of the whole model."""
        return sum(layer.size for layer in self.layers) + sum(self.others)

    @property
    def kept(self) -> int:
        """Of the whole model."""
        return sum(layer.kept for layer in self.layers) + sum(self.others)

    @property
    def sparsity(self) -> float:
        """The fraction of the whole model that is masked, or zero where there is no mask."""
        return 1 - self.kept / self.size if self.size else 0.0

    def __str__(self) -> str:
        width = terminal_width()
        return as_best_text(self._table(width), width)

    __repr__ = __str__

    def _left_dense(self) -> str:
        sizes: dict[str, int] = {}
        for layer in self.layers:
            if layer.dense:
                sizes[layer.dense] = sizes.get(layer.dense, 0) + layer.size
        sizes["1-D"] = sum(self.others)
        return ", ".join(f"{size:,} {reason}" for reason, size in sizes.items() if size) or "nothing"

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield as_renderable(self._table(options.max_width), options.max_width)

    def _table(self, width: int) -> Table:
        """All columns, if they fit; else without those that are equal in all layers, which a note gives once."""
        masked = [layer for layer in self.layers if layer.pattern]
        managed = [layer for layer in masked if layer.residual is not None]
        rows = [_cells(layer) for layer in self.layers]
        if self.others:
            rows.append(_row(layer=f"{len(self.others)} others", sparsity="dense", kept=f"{sum(self.others):,}"))
        footer = []
        if managed:
            kept, size = sum(layer.kept for layer in managed), sum(layer.size for layer in managed)
            footer.append(_total("managed layers", kept, size, f"{self.residual:.4f}"))
        footer.append(_total("whole model", self.kept, self.size, ""))
        notes = [_MEANING[phase] for phase in self.phases or ("",)]
        if managed:
            notes.append(f"left dense: {self._left_dense()}")
        empty = {column for column in _OPTIONAL if all(row[column] in ("", _NOTHING) for row in rows)}
        if _DEAD not in empty:
            notes.append("dead: outputs whose inputs are all masked")
        table = _without(empty, rows, footer, notes)
        if table.width <= width:
            return table
        for column in sorted({_PATTERN, _PENALTY} - empty):
            values = {_cells(layer)[column] for layer in managed or masked}
            if len(values) == 1:
                empty.add(column)
                notes.append(f"{_HEADER[column]} of every {'managed' if managed else 'masked'} layer: {values.pop()}")
        return _without(empty, rows, footer, notes)


def summary(model_or_rst: nn.Module | HasMasks) -> Summary:
    """A table of the layers of a model: shape, pattern, sparsity, kept weights, residual, λ; print what it returns.

    Call it at any time; it reads every weight. Of a model that is managed, by an ``RSTScheduler``, by masks of
    :mod:`torch_dual_ticket.baselines` or as a finalized copy, it shows the masks. Of any other (loaded from a file,
    after ``remove()``, pruned by ``torch.nn.utils.prune``) it counts the zeros. Collective where parameters are sharded
    (FSDP2, DTensor): call it on every rank, and print on one.

    Of a managed model it also says how many weights are left dense, and why; and where a layer has dead units, outputs
    whose inputs are all masked, how many.

    rich draws the table where it is installed, and ``rich.print`` adds colors.

    Args:
        model_or_rst: a module, wrapped or not, or what manages one: then that model.

    Raises:
        TypeError: it is neither.

    Example:
        >>> from torch_dual_ticket import RSTScheduler
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> rst = RSTScheduler(model, sparsity=0.9, exclude=["2"])
        >>> table = summary(model)  # or summary(rst)
        >>> [(layer.name, layer.pattern, layer.kept, layer.size) for layer in table.layers]
        [('0.weight', 'unstructured', 819, 8192), ('2.weight', '', 1280, 1280)]
        >>> print(f"{table.sparsity:.2%} of {table.size:,}")
        76.72% of 9,610
    """
    model = _model_of(model_or_rst)
    reshard(model)
    modules = list(unwrapped_modules(model))
    managed = _managed(model)
    reasons = why_dense(model, managed) if managed else {}
    layers, others, reports = [], [], []
    known: set[int] = set()
    for prefix, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in known:
                continue
            known.add(id(parameter))
            name = f"{prefix}.{key}" if prefix else key
            if id(parameter) in managed:
                layer, report = managed[id(parameter)]
                layers.append(replace(layer, name=name))
                reports.append(report)
            elif is_lazy(parameter) or parameter.dim() < 2:
                others.append(0 if is_lazy(parameter) else parameter.numel())
            else:
                layer = _count_zeros(name, module, key, parameter)
                layers.append(replace(layer, dense=reasons.get(id(parameter), "")))
    return Summary(tuple(layers), tuple(others), total_of(reports).residual if reports else None)


def _model_of(given: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    ticket = getattr(given, "_ticket", None)
    if not isinstance(ticket, Ticket):
        raise TypeError(
            f"summary() takes a torch.nn.Module, or the RSTScheduler or held masks on one; got {type(given).__name__}"
        )
    model = ticket.model()
    if model is None:
        raise RuntimeError(f"the model of this {type(given).__name__} does not exist any more")
    return model


def _managed(model: nn.Module) -> dict[int, tuple[LayerSummary, LayerReport]]:
    """The managed parameters of the model, by id."""
    hooks = [hook for hook in layer_hooks(model) if hook.ticket.phase is not Phase.IDLE]
    tickets = {id(hook.ticket): hook.ticket for hook in hooks}
    for key, ticket in list(tickets.items()):
        if any(is_converted(tensor) for _, tensor in ticket.managed()):  # it cannot be measured any more
            del tickets[key]
    reports = {(key, report.name): report for key, ticket in tickets.items() for report in measure(ticket).layers}
    found = {}
    for hook in hooks:
        if id(hook.ticket) not in tickets:
            continue
        ticket, mask = hook.ticket, hook.ticket.mask(hook.managed)
        report = reports[id(ticket), hook.managed.name]
        kept, pattern = report.size - report.pruned, getattr(mask, "pattern", "explicit")
        penalty = None if ticket.holds else ticket.stage.penalty
        tensor, dead = hook.managed.tensor(), _count_dead(mask, hook.managed)
        layer = LayerSummary(hook.managed.name, mask.shape, report.size, kept, pattern, report.residual, penalty, dead)
        found[id(tensor)] = layer, report
    return found


def _count_dead(mask: Mask, managed: ManagedParameter) -> int | None:
    layer, tensor = managed.layer(), managed.tensor()
    inputs = None if layer is None else input_dim_of(layer)
    if inputs is None or len(mask.shape) < 2:
        return None
    kept = mask.draw(device=None if tensor is None or tensor.is_meta else tensor.device)
    outputs = kept.movedim(int(inputs == 0), 0).flatten(1)
    return int((~outputs.any(1)).sum())


def _count_zeros(name: str, module: nn.Module, key: str, parameter: Tensor) -> LayerSummary:
    """Of a parameter that is not managed, or of its mask of torch.nn.utils.prune."""
    mask = module._buffers.get(f"{key.removesuffix('_orig')}_mask") if key.endswith("_orig") else None
    name = name if mask is None else name.removesuffix("_orig")
    size = parameter.numel()
    kept = size if parameter.is_meta else _count_nonzero(parameter if mask is None else mask)
    return LayerSummary(name, tuple(parameter.shape), size, kept, "" if mask is None else "prune")


@torch.no_grad()
def _count_nonzero(tensor: Tensor) -> int:
    part = local(tensor)
    if type(part).dequantize is not Tensor.dequantize:  # of a type that quantization makes
        part = part.dequantize()
    if part.layout is not torch.strided or is_traceable_wrapper_subclass(part):  # sparse, semi-structured …
        part = part.to_dense()
    return int(sum_over_shards(part.count_nonzero(), tensor))


# -- the table ---------------------------------------------------------------------------------------------------------

_HEADER = ("layer", "shape", "pattern", "sparsity", "kept", "dead", "residual", "λ")
_PATTERN, _DEAD, _RESIDUAL, _PENALTY = _OPTIONAL = tuple(map(_HEADER.index, ("pattern", "dead", "residual", "λ")))
_NOTHING = "–"
_MEANING = {  # of the sparsity, by phase
    "transform": "transformation: finalize() would give this sparsity, and cut off this residual",
    "finetune": "finetuning: masked weights are kept at zero",
    "": "not managed: sparsity of zeros, or of torch.nn.utils.prune",
}


def _cells(layer: LayerSummary) -> tuple[str, ...]:
    return (
        layer.name.removesuffix(".weight"),
        "×".join(map(str, layer.shape)),
        layer.pattern or _NOTHING,
        "dense" if not layer.pattern and percent(layer.sparsity) == percent(0) else percent(layer.sparsity),
        f"{layer.kept:,}",
        f"{layer.dead:,}" if layer.dead else _NOTHING,
        _NOTHING if layer.residual is None else f"{layer.residual:.4f}",
        _NOTHING if layer.penalty is None else f"{layer.penalty:.3g}",
    )


def _total(name: str, kept: int, size: int, residual: str) -> tuple[str, ...]:
    sparsity = percent(1 - kept / max(1, size))
    return _row(layer=name, shape=f"{size:,}", sparsity=sparsity, kept=f"{kept:,}", residual=residual)


def _row(**cells: str) -> tuple[str, ...]:
    """By the names of the columns; the others are empty."""
    return tuple(cells.get(column, "") for column in _HEADER)


def _without(
    columns: set[int], rows: Sequence[tuple[str, ...]], footer: Sequence[tuple[str, ...]], notes: Sequence[str]
) -> Table:
    header, *lines = [
        tuple(cell for column, cell in enumerate(row) if column not in columns) for row in (_HEADER, *rows, *footer)
    ]
    return Table(header, tuple(lines[: len(rows)]), tuple(lines[len(rows) :]), tuple(notes))

"""The layers of a model, masked or not, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._engine.layer_hook import layer_hooks
from .._engine.parameter import is_converted
from .._engine.stage import Phase
from .._model.coverage import why_dense
from .._model.layout import input_dim_of
from .._model.names import unwrapped_modules
from .._rst.managed import ManagedMasks
from .._rst.residual import LayerReport, Report, measure
from .._tables import Table, TableInNotebooks, as_best_text, as_renderable, percent, terminal_width
from .._tensors.dtensor import local, reshard, sum_over_shards
from ..masks.mask import Mask


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
            rows.append({"layer": f"{len(self.others)} others", "sparsity": "dense", "kept": f"{sum(self.others):,}"})
        footer = []
        if managed:
            kept, size = sum(layer.kept for layer in managed), sum(layer.size for layer in managed)
            footer.append(_total("managed layers", kept, size, f"{self.residual:.4f}"))
        footer.append(_total("whole model", self.kept, self.size, ""))
        notes = [_MEANING[phase] for phase in self.phases or ("",)]
        if managed:
            notes.append(f"left dense: {self._left_dense()}")
        empty = {column for column in _OPTIONAL if all(row.get(column, _NOTHING) == _NOTHING for row in rows)}
        if "dead" not in empty:
            notes.append("dead: outputs whose inputs are all masked")
        table = _without(empty, rows, footer, notes)
        if table.width <= width:
            return table
        for column in ("pattern", "λ"):
            values = {_cells(layer)[column] for layer in managed or masked}
            if column not in empty and len(values) == 1:
                empty.add(column)
                notes.append(f"{column} of every {'managed' if managed else 'masked'} layer: {values.pop()}")
        return _without(empty, rows, footer, notes)


def summary(model_or_rst: nn.Module | ManagedMasks) -> Summary:
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
    model = model_or_rst._model if isinstance(model_or_rst, ManagedMasks) else model_or_rst
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"summary() takes a torch.nn.Module, or the RSTScheduler or held masks on one; got {type(model).__name__}"
        )
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
    return Summary(tuple(layers), tuple(others), Report.of(reports).total.residual if reports else None)


def _managed(model: nn.Module) -> dict[int, tuple[LayerSummary, LayerReport]]:
    """The managed parameters of the model, by id."""
    found = {}
    for ticket in dict.fromkeys(hook.ticket for hook in layer_hooks(model)):
        if ticket.phase is Phase.IDLE or any(is_converted(tensor) for _, tensor in ticket.managed()):
            continue  # it cannot be measured any more
        reports = {report.name: report for report in measure(ticket).layers}
        for managed, tensor in ticket.managed():
            mask, report = ticket.mask(managed), reports[managed.name]
            layer = LayerSummary(
                managed.name,
                mask.shape,
                report.size,
                kept=report.size - report.pruned,
                pattern=getattr(mask, "pattern", "explicit"),
                residual=report.residual,
                penalty=None if ticket.holds else ticket.stage.penalty,
                dead=_count_dead(mask, managed.layer(), tensor),
            )
            found[id(tensor)] = layer, report
    return found


def _count_dead(mask: Mask, layer: nn.Module | None, parameter: Tensor) -> int | None:
    inputs = None if layer is None else input_dim_of(layer)
    if inputs is None or len(mask.shape) < 2:
        return None
    outputs = mask.draw(device=None if parameter.is_meta else parameter.device).movedim(int(inputs == 0), 0)
    return int((~outputs.flatten(1).any(1)).sum())


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

_COLUMNS = ("layer", "shape", "pattern", "sparsity", "kept", "dead", "residual", "λ")
_OPTIONAL = ("pattern", "dead", "residual", "λ")
_NOTHING = "–"
_MEANING = {  # of the sparsity, by phase
    "transform": "transformation: finalize() would give this sparsity, and cut off this residual",
    "finetune": "finetuning: masked weights are kept at zero",
    "": "not managed: sparsity of zeros, or of torch.nn.utils.prune",
}


def _cells(layer: LayerSummary) -> dict[str, str]:
    """The row of a layer, by columns; where there is none, the cell is empty."""
    return {
        "layer": layer.name.removesuffix(".weight"),
        "shape": "×".join(map(str, layer.shape)),
        "pattern": layer.pattern or _NOTHING,
        "sparsity": "dense" if not layer.pattern and percent(layer.sparsity) == percent(0) else percent(layer.sparsity),
        "kept": f"{layer.kept:,}",
        "dead": f"{layer.dead:,}" if layer.dead else _NOTHING,
        "residual": _NOTHING if layer.residual is None else f"{layer.residual:.4f}",
        "λ": _NOTHING if layer.penalty is None else f"{layer.penalty:.3g}",
    }


def _total(name: str, kept: int, size: int, residual: str) -> dict[str, str]:
    sparsity = percent(1 - kept / max(1, size))
    return {"layer": name, "shape": f"{size:,}", "sparsity": sparsity, "kept": f"{kept:,}", "residual": residual}


def _without(
    columns: set[str], rows: Sequence[dict[str, str]], footer: Sequence[dict[str, str]], notes: Sequence[str]
) -> Table:
    shown = tuple(column for column in _COLUMNS if column not in columns)
    lines, totals = (tuple(tuple(row.get(column, "") for column in shown) for row in some) for some in (rows, footer))
    return Table(shown, lines, totals, tuple(notes))

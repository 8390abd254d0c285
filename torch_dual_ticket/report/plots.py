"""Plots of a ticket, made with matplotlib's own objects: nothing is shown, and pyplot is not used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .._rst.managed import ManagedMasks
from .._rst.residual import MAX_RESIDUAL
from .._tables import shortened
from .history import History, Record
from .summary import summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _RED, _ORANGE, _GRAY = "tab:blue", "tab:red", "tab:orange", "0.6"
_LONGEST_NAME = 60
_FEW = 30  # fewer records are shown with markers: a line through a single one would be invisible
_LETTER = 5.2  # width of a letter of small text, in points


def plot(history: History) -> Figure:
    """λ, the residual and the norms over the updates.

    The residual is drawn for each layer (thin; the largest with its name) and for all together (bold), on a logarithmic
    scale. A dashed line is the residual above which ``finalize()`` warns, a dotted one where it was called.

    Args:
        history: with at least one record.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window: ``figure.savefig(path)``, or the last line of a
        notebook cell after ``%matplotlib inline``.

    Raises:
        TypeError: ``history`` is not a :class:`~torch_dual_ticket.report.History`.
        ImportError: matplotlib is not installed.
        ValueError: nothing was recorded.

    Example:
        >>> from torch import nn
        >>> from torch_dual_ticket import RSTScheduler
        >>> from torch_dual_ticket.report import History, plot
        >>> rst = RSTScheduler(nn.Linear(16, 4), sparsity=0.5)
        >>> history = History(rst)
        >>> history.record()  # in the loop, after rst.step()
        >>> [axes.get_ylabel() for axes in plot(history).axes]
        ['penalty λ', 'residual: share of the norm\\nin masked weights', 'norm']
    """
    if not isinstance(history, History):
        raise TypeError(f"plot() takes a History of a scheduler, got {type(history).__name__}: plot(History(rst))")
    figure = _new_figure("plot()")
    records = history.records
    if not records:
        raise ValueError("nothing to plot: call history.record() in the training loop, once per update")
    figure.set_size_inches(7.5, 7.5)
    penalty, residual, norms = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1.8, 1.2])
    steps = [record.step for record in records]
    marker = "." if len(records) < _FEW else ""

    penalty.plot(steps, [record.penalty for record in records], color=_BLUE, marker=marker)
    penalty.set_ylabel("penalty λ")
    _draw_residuals(residual, records, marker)
    totals = [record.report.total for record in records]
    norms.plot(steps, [total.kept_norm for total in totals], color=_BLUE, marker=marker, label="kept weights")
    norms.plot(steps, [total.masked_norm for total in totals], color=_RED, marker=marker, label="masked weights")
    norms.set_ylabel("norm")
    norms.set_ylim(bottom=0)
    norms.legend(fontsize="small")
    norms.set_xlabel("updates")
    finalized = next((record.step for record in records if record.phase == "finetune"), None)
    for axes in (penalty, residual, norms):
        axes.grid(alpha=0.3)
        if finalized is not None:
            axes.axvline(finalized, color="0.3", linestyle=":", linewidth=1)
    if finalized is not None:
        above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
        penalty.annotate("finalize()", (finalized, 1), (0, 3), fontsize="small", **above)
    return figure


def plot_sparsity(model_or_rst: nn.Module | ManagedMasks) -> Figure:
    """The sparsity of each layer as a bar, with the number of weights that are kept.

    Args:
        model_or_rst: what :func:`~torch_dual_ticket.report.summary` takes. Collective where parameters are sharded.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window; its height grows with the number of layers.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: neither a module nor what manages one.

    Example:
        >>> from torch import nn
        >>> from torch_dual_ticket import RSTScheduler
        >>> from torch_dual_ticket.report import plot_sparsity
        >>> rst = RSTScheduler(nn.Linear(16, 4), sparsity=0.5)
        >>> plot_sparsity(rst).axes[0].get_xlabel()
        'sparsity, % (of the whole model: 47.06 %)'
    """
    figure = _new_figure("plot_sparsity()")
    table = summary(model_or_rst)
    names = [_short_name(layer.name) for layer in table.layers]
    kept = [f"{layer.kept:,} of {layer.size:,}" for layer in table.layers]
    letters = max(map(len, names), default=0) + max(map(len, kept), default=0)
    figure.set_size_inches(5 + _LETTER * letters / 72, 0.9 + 0.21 * (len(names) + 1))
    axes = figure.subplots()
    axes.barh(range(len(names)), [100 * layer.sparsity for layer in table.layers], color=_BLUE, height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -1.5)  # the first layer at the top, below a line for the title
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"sparsity, % (of the whole model: {table.sparsity:.2%})".replace("%)", " %)"))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    aside: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "ha": "right",
        "fontsize": "small",
    }
    edge = _LETTER * max(map(len, kept), default=0) + 6
    for row, text in enumerate(["kept weights", *kept], start=-1):
        axes.annotate(text, (1, row), (edge, 0), va="center", annotation_clip=False, **aside)
    return figure


def _draw_residuals(axes: Axes, records: Sequence[Record], marker: str) -> None:
    layers: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for layer in record.report.layers:
            layers.setdefault(layer.name, []).append((record.step, layer.residual))
    shown = {name: _positive(points) for name, points in layers.items()}
    for index, points in enumerate(shown.values()):
        axes.plot(*points, color=_GRAY, linewidth=0.8, marker=marker, label=None if index else "each layer")
    if len(shown) > 1:
        slowest = max(shown, key=lambda name: shown[name][1][-1])
        label = f"slowest layer: {_short_name(slowest)}"
        axes.plot(*shown[slowest], color=_ORANGE, linewidth=1, marker=marker, label=label)
    whole = [(record.step, record.residual) for record in records]
    axes.plot(*_positive(whole), color=_BLUE, linewidth=2, marker=marker, label="all together")
    if any(value > 0 for _, value in whole):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(MAX_RESIDUAL, color=_RED, linestyle="--", linewidth=1, label="finalize() warns above this")
    axes.legend(fontsize="small")
    axes.set_ylabel("residual: share of the norm\nin masked weights")


def _positive(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """What a logarithmic scale can show; the residual is exactly 0 after ``finalize()``."""
    shown = [point for point in points if point[1] > 0] or points
    return [step for step, _ in shown], [value for _, value in shown]


def _new_figure(function: str) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{function} needs matplotlib: pip install matplotlib") from error
    return Figure(layout="constrained")


def _short_name(parameter: str) -> str:
    return shortened(parameter.removesuffix(".weight"), _LONGEST_NAME)

"""The plots: they show the numbers, nothing overlaps or is cut off, and pyplot is not used."""

import itertools
import subprocess
import sys

import pytest
import torch
from models import make, mlp
from test_history import Loop
from test_summary import long_names
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.report import History, plot, plot_sparsity, summary

FigureCanvasAgg = pytest.importorskip("matplotlib.backends.backend_agg", reason="needs matplotlib").FigureCanvasAgg


def recorded(updates=12, finalize_at=10, every=1, **arguments):
    loop = Loop(make(mlp), **arguments)
    history = History(loop.rst, every=every)
    loop.run(updates, history, finalize_at=finalize_at)
    return history


def labeled(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def texts(figure):
    """All text that is drawn, and where. A warning of matplotlib would be an error."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = []
    for axes in figure.axes:
        drawn = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()]
        drawn += [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
        drawn += [] if axes.get_legend() is None else axes.get_legend().get_texts()
        found += [text for text in drawn if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found]


def assert_readable(figure):
    """No text is cut off, and no two overlap."""
    found = texts(figure)
    assert len(found) > 5
    for text, box in found:
        inside = [box.x0 >= 0, box.x1 <= figure.bbox.x1, box.y0 >= 0, box.y1 <= figure.bbox.y1]
        assert all(inside), f"{text!r} is cut off"
    for (a, box_a), (b, box_b) in itertools.combinations(found, 2):
        assert not box_a.overlaps(box_b), f"{a!r} overlaps {b!r}"


# ---------------------------------------------------------------------- the history


def test_the_curves_are_the_records():
    history = recorded(exclude=["4"])
    figure = plot(history)
    penalty, residual, norms = figure.axes
    records = history.records
    assert penalty.lines[0].get_xydata().tolist() == [[record.step, record.penalty] for record in records]
    before = [record for record in records if record.phase == "transform"]
    curves = labeled(residual)
    whole = curves["all together"]
    assert whole.get_xydata().tolist() == [[record.step, record.residual] for record in before]
    assert whole.get_linewidth() > curves["each layer"].get_linewidth()
    layers = [[line.get_ydata()[-1] for line in residual.lines if len(line.get_xdata()) == len(before)]]
    last = {layer.name: layer.residual for layer in before[-1].report.layers}
    assert set(layers[0]) == {*last.values(), before[-1].residual}
    slowest = max(last, key=last.get)
    assert curves[f"slowest layer: {slowest.removesuffix('.weight')}"].get_ydata()[-1] == last[slowest]
    assert residual.get_yscale() == "log"
    assert curves["finalize() warns above this"].get_ydata()[0] == 0.01
    curves = labeled(norms)
    totals = [record.report.total for record in records]
    assert curves["kept weights"].get_ydata().tolist() == [total.kept_norm for total in totals]
    assert curves["masked weights"].get_ydata().tolist() == [total.masked_norm for total in totals]
    assert norms.get_ylim()[0] == 0
    for axes in figure.axes:  # where finalize() was called
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [10]
    assert_readable(figure)


@pytest.mark.parametrize(
    "arguments",
    [
        {"updates": 1, "finalize_at": None},
        {"updates": 12, "finalize_at": None},
        {"updates": 12, "finalize_at": 12},
        {"updates": 40, "finalize_at": 2},
        {"updates": 40, "finalize_at": 36, "steps": 10, "hold": 2, "cycles": 3, "distribution": "erk"},
        {"updates": 12, "finalize_at": 10, "exclude": ["2", "4"]},
        {"updates": 500, "finalize_at": 499, "max_penalty": 8.0, "steps": 400},
    ],
    ids=str,
)
def test_plots_are_readable(arguments):
    figure = plot(recorded(**arguments))
    assert_readable(figure)
    assert all(line.get_marker() == "." for line in figure.axes[0].lines[:1]) or arguments["updates"] >= 30


def test_a_history_of_finetuning_only():
    loop = Loop(make(mlp))
    loop.run(10, finalize_at=10)
    history = History(loop.rst, every=1)
    loop.run(5, history)
    figure = plot(history)
    assert labeled(figure.axes[1])["all together"].get_ydata().tolist() == [0] * 5
    assert_readable(figure)


def test_layers_with_long_names():
    model = long_names()
    rst = RSTScheduler(model, 0.9, steps=2)
    history = History(rst, every=1)
    history.record()
    figure = plot(history)
    slowest = next(label for label in labeled(figure.axes[1]) if label.startswith("slowest"))
    assert slowest.startswith("slowest layer: language_model.encoder.layers.")
    assert_readable(figure)


@pytest.mark.parametrize("given", [None, 3, nn.Linear(2, 2)])
def test_what_is_no_history_is_refused(given):
    with pytest.raises(TypeError, match=r"plot\(\) takes a History of a scheduler, got \w+: plot\(History\(rst\)\)"):
        plot(given)


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match=r"nothing to plot: call history\.record\(\)"):
        plot(History(Loop(make(mlp)).rst))


# ---------------------------------------------------------------------- sparsity


def test_a_bar_for_each_layer():
    model = make(mlp)
    rst = RSTScheduler(model, {"0": 0.5, "2": 0.9}, exclude=["4"])
    figure = plot_sparsity(rst)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([50, 90, 0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "4"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is on top
    shown = [text for text, _ in texts(figure)]
    assert {"kept weights", "120 of 240", "32 of 320", "80 of 80"} <= set(shown)
    assert f"{100 * summary(rst).sparsity:.2f} %" in axes.get_xlabel()
    assert [bar.get_width() for bar in plot_sparsity(model).axes[0].patches] == pytest.approx([50, 90, 0])
    assert_readable(figure)


def wide_resnet():
    """Large layers with short names."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Conv2d(2048, 2048, 3) for _ in range(60)))


def single():
    return nn.Linear(3, 3)


def longest():
    name = "_".join(["an_extraordinarily_long_name"] * 4)
    return nn.ModuleDict({name: nn.Linear(8, 8), "b": nn.Linear(3, 3)})


@pytest.mark.parametrize("build", [mlp, single, long_names, wide_resnet, longest])
def test_bars_are_readable(build):
    model = build()
    rst = RSTScheduler(model, 0.5)
    figure = plot_sparsity(rst)
    assert_readable(figure)
    assert len(figure.axes[0].patches) == len(summary(model).layers)
    width = figure.axes[0].get_position().width * figure.get_figwidth()
    assert width > 3  # inches: names leave room for the bars


# ---------------------------------------------------------------------- matplotlib


def test_pyplot_is_not_imported():
    code = """
import sys, torch, torch_dual_ticket
from torch_dual_ticket import report
assert "matplotlib" not in sys.modules
model = torch.nn.Linear(4, 4)
rst = torch_dual_ticket.RSTScheduler(model, 0.5)
history = report.History(rst)
history.record()
report.plot(history)
report.plot_sparsity(model)
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["plot", "plot_sparsity"])
def test_without_matplotlib(name, monkeypatch):
    history = recorded(2, None)
    for module in [module for module in sys.modules if module.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    call, argument = {"plot": (plot, history), "plot_sparsity": (plot_sparsity, make(mlp))}[name]
    with pytest.raises(ImportError, match=rf"{name}\(\) needs matplotlib: pip install matplotlib"):
        call(argument)

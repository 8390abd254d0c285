"""The table of a model's layers: its numbers, managed or not, and how it fits a terminal."""

import copy
import io
import math
import re
import sys

import pytest
import torch
from models import INPUT_SHAPES, cnn, finalize_quietly, loss_of, make, mlp, transformer
from ranks import everywhere, needs_fsdp2, on_two_ranks
from test_history import norms
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import hold, magnitude_masks, random_ticket
from torch_dual_ticket.report import LayerReport, Report, summary


def trained(model, updates=3, shape=INPUT_SHAPES[mlp], **arguments):
    rst = RSTScheduler(model, **{"seed": 0, "steps": 4, **arguments})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in range(updates):
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        optimizer.step()
        rst.step()
    return rst


def cells(table):
    return {layer.name: (layer.shape, layer.pattern, layer.kept, layer.size) for layer in table.layers}


# ---------------------------------------------------------------------- its numbers


def test_a_ticket_in_transformation():
    model = make(cnn)
    rst = trained(model, shape=INPUT_SHAPES[cnn], sparsity=0.7, exclude=["0"])
    table = summary(rst)
    assert cells(table) == {
        "0.weight": ((8, 3, 3, 3), "", 216, 216),
        "3.weight": ((8, 4, 3, 3), "unstructured", 288 - 202, 288),
        "8.weight": ((5, 32), "unstructured", 48, 160),
    }
    masks = dict(rst.masks)
    dense, *held = table.layers
    assert (dense.residual, dense.penalty, dense.sparsity) == (None, None, 0)
    for layer in held:
        masked, kept = norms(model, {layer.name: masks[layer.name]})
        assert layer.residual == pytest.approx(masked / math.hypot(masked, kept), rel=1e-9)
        assert layer.penalty == rst.penalty == 1.0
        assert layer.sparsity == pytest.approx(1 - float(masks[layer.name].double().mean()))
    assert table.residual == pytest.approx(rst.residual(), rel=1e-9)
    assert table.phases == ("transform",)
    # Biases, and both parameters of the norms.
    assert table.others == (8, 8, 8, 8, 8, 8, 5)
    assert table.size == sum(parameter.numel() for parameter in model.parameters())
    assert table.kept == table.size - 202 - 112
    assert table.sparsity == pytest.approx(1 - table.kept / table.size)


def test_a_managed_model_also_wrapped_and_within_another():
    model = make(mlp)
    rst = trained(model)
    expected = summary(rst)
    assert summary(model) == expected
    assert summary(torch.compile(model, backend="eager")) == expected
    assert summary(torch.optim.swa_utils.AveragedModel(model)).phases == ()  # a copy made during the transformation
    whole = summary(nn.ModuleDict({"body": model, "head": nn.Linear(5, 2)}))
    assert [layer.name for layer in whole.layers] == ["body.0.weight", "body.2.weight", "body.4.weight", "head.weight"]
    assert [layer.residual for layer in whole.layers] == [*(layer.residual for layer in expected.layers), None]


def test_a_finalized_ticket_and_its_copy():
    model = make(mlp)
    rst = trained(model)
    finalize_quietly(rst)
    for table in (summary(rst), summary(copy.deepcopy(model))):
        assert table.phases == ("finetune",)
        assert [(layer.residual, layer.penalty) for layer in table.layers] == [(0.0, None)] * 3
        assert table.residual == 0
        assert [layer.kept for layer in table.layers] == [24, 32, 8]
        assert "λ" not in str(table)


def test_zeros_of_a_model_that_is_not_managed():
    model = make(mlp)
    rst = trained(model, exclude=["4"])
    finalize_quietly(rst)
    rst.remove()
    table = summary(rst)
    assert table == summary(model)
    assert table.phases == ()
    assert cells(table) == {
        "0.weight": ((20, 12), "", 24, 240),
        "2.weight": ((16, 20), "", 32, 320),
        "4.weight": ((5, 16), "", 80, 80),
    }
    assert "residual" not in str(table)
    assert "not managed" in str(table)


def test_the_layout_of_torch_prune():
    model = make(mlp)
    rst = trained(model, exclude=["2", "4"])
    finalize_quietly(rst, layout="prune")
    prune.l1_unstructured(model[4], "weight", amount=30)
    with torch.no_grad():
        model[0].weight_orig.fill_(1.0)  # what is masked may be anything
    assert cells(summary(rst)) == {
        "0.weight": ((20, 12), "prune", 24, 240),
        "2.weight": ((16, 20), "", 320, 320),
        "4.weight": ((5, 16), "prune", 50, 80),
    }


def test_explicit_masks_and_two_managers_of_one_model():
    model = make(mlp)
    held = hold(model, {"0.weight": magnitude_masks(model, 0.5)["0.weight"]})
    rst = trained(model, exclude=["0"], pattern="block:5x2", sparsity={"4": 0.25, "2": 0.0})
    table = summary(held)
    assert table == summary(rst)
    assert set(table.phases) == {"transform", "finetune"}
    assert [(layer.name, layer.pattern, layer.kept, layer.penalty) for layer in table.layers] == [
        ("0.weight", "explicit", 120, None),
        ("2.weight", "", 320, None),
        ("4.weight", "block:5x2", 60, 1.0),
    ]


@pytest.mark.filterwarnings("ignore:Sparse CSR")  # torch says it once in a process
def test_unusual_parameters():
    """Tied, parametrized, used by a parent, lazy, without memory, sparse."""
    tied = nn.ModuleDict({"embedding": nn.Embedding(10, 8), "out": nn.Linear(8, 10, bias=False)})
    tied["out"].weight = tied["embedding"].weight
    targets = (nn.Linear,)
    RSTScheduler(tied, 0.5, targets=targets)  # dropped at once
    rst = RSTScheduler(tied, 0.5, targets=targets)
    assert cells(summary(rst)) == {"embedding.weight": ((10, 8), "unstructured", 40, 80)}

    normed = parametrizations.weight_norm(nn.Linear(8, 4))
    rst = RSTScheduler(normed, 0.5, seed=0)
    assert cells(summary(rst)) == {
        "parametrizations.weight.original0": ((4, 1), "", 4, 4),
        "parametrizations.weight.original1": ((4, 8), "unstructured", 16, 32),
    }

    model = make(transformer)
    rst = RSTScheduler(model, 0.5)
    assert cells(summary(model))["encoder.self_attn.out_proj.weight"] == ((8, 8), "unstructured", 32, 64)
    assert cells(summary(model))["encoder.self_attn.in_proj_weight"] == ((24, 8), "", 192, 192)

    assert summary(nn.LazyLinear(3)).size == 0
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    assert cells(summary(empty)) == {"weight": ((4, 4), "", 16, 16)}
    rst = RSTScheduler(empty, 0.5)
    assert cells(summary(rst)) == {"weight": ((4, 4), "unstructured", 8, 16)}
    csr = nn.Linear(3, 3, bias=False)
    csr.weight = nn.Parameter(torch.eye(3).to_sparse_csr())
    assert cells(summary(csr)) == {"weight": ((3, 3), "", 3, 9)}


class Transposed(nn.Module):
    """Of another type than torch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))


@pytest.mark.parametrize("manage", [RSTScheduler, random_ticket, hold])
def test_dead_units_are_counted(manage):
    layers = nn.Linear(64, 40), nn.Conv2d(3, 40, 3), nn.ConvTranspose2d(3, 40, 3), Transposed()
    model = nn.Sequential(*layers)
    targets = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Transposed)
    held = random_ticket(model, 0.97, seed=0, targets=targets)
    if manage is hold:
        masks = dict(held.masks)
        held.remove()
        held = hold(model, masks)
    elif manage is RSTScheduler:
        held.remove()
        held = RSTScheduler(model, 0.97, seed=0, targets=targets)
    masks = [mask.movedim(int(index == 2), 0).flatten(1) for index, mask in enumerate(held.masks.values())]
    expected = [sum(not any(row) for row in mask.tolist()) for mask in masks]
    assert all(expected)
    assert [layer.dead for layer in summary(held).layers] == [*expected[:3], None]


@needs_fsdp2
@on_two_ranks
def test_sharded_layers():
    from torch.distributed.fsdp import fully_shard

    model = make(mlp)
    alone = trained(copy.deepcopy(model), sparsity=0.6, exclude=["4"])
    rst = trained(model, sparsity=0.6, exclude=["4"])
    expected = summary(alone)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    with torch.no_grad():
        loss_of(model, 0, INPUT_SHAPES[mlp])  # leaves the root whole
    table = summary(rst)
    assert everywhere(cells(table)) == [cells(expected)] * 2
    assert [layer.residual for layer in table.layers] == pytest.approx([layer.residual for layer in expected.layers])
    finalize_quietly(rst)
    rst.remove()
    assert [layer.kept for layer in summary(model).layers] == [96, 128, 80]


@pytest.mark.parametrize("given", [None, 3, {"model": nn.Linear(2, 2)}])
def test_other_objects_than_models_are_refused(given):
    with pytest.raises(TypeError, match=f"takes a torch.nn.Module, or the RSTScheduler.*got {type(given).__name__}"):
        summary(given)


# ---------------------------------------------------------------------- how it looks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("query_projection", "output_projection")})
        self.intermediate_dense_layer = nn.Linear(32, 1024)


def long_names():
    """As transformers are called in libraries: 52 letters, and only the middle and the end differ."""
    blocks = nn.ModuleList(Block() for _ in range(11))
    return nn.ModuleDict({"language_model": nn.ModuleDict({"encoder": nn.ModuleDict({"layers": blocks})})})


@pytest.fixture(params=["rich", "plain"])
def drawn_by(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
    else:
        pytest.importorskip("rich", reason="rich draws the table only where it is installed")
    return request.param


def test_plain_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Linear(128, 10), nn.Linear(8, 8))
    RSTScheduler(model, 0.9)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    rst = RSTScheduler(model, {"1": 0.5, "2": 0.9375}, exclude=["0"], steps=4, seed=0)
    assert str(summary(rst)) == repr(summary(rst))
    assert str(summary(rst)).splitlines() == [
        "layer             shape       pattern  sparsity  kept  dead  residual     λ",
        "0               8×1×3×3             –     dense    72     –         –     –",
        "1                10×128  unstructured   50.00 %   640     –    0.7071  0.25",
        "2                   8×8  unstructured   93.75 %     4     4    0.9682  0.25",
        "3 others                                  dense    26",
        "managed layers    1,344                 52.08 %   644          0.7217",
        "whole model       1,442                 48.54 %   742",
        "transformation: finalize() would give this sparsity, and cut off this residual",
        "left dense: 72 excluded, 26 1-D",
        "dead: outputs whose inputs are all masked",
    ]


def test_rich_draws_the_same_cells(monkeypatch):
    rich = pytest.importorskip("rich.console", reason="rich draws the table only where it is installed")
    monkeypatch.setenv("COLUMNS", "80")
    model = make(cnn)
    rst = RSTScheduler(model, 0.9, exclude=["0"], seed=0)
    drawn = str(summary(rst))
    monkeypatch.setitem(sys.modules, "rich.console", None)
    plain = str(summary(rst))
    monkeypatch.undo()
    assert drawn != plain
    assert "─" * 60 in drawn
    assert [line.split() for line in drawn.splitlines() if line.strip(" ─")] == [
        line.split() for line in plain.splitlines()
    ]
    assert "\x1b" not in drawn
    page = io.StringIO()
    rich.Console(file=page, width=50, force_terminal=True, color_system="truecolor").print(summary(rst))
    assert "\x1b[1m" in page.getvalue()


@pytest.mark.parametrize("where", ["a notebook", "colors are forced"])
def test_text_is_plain_in_every_environment(where, monkeypatch):
    console = pytest.importorskip("rich.console")
    model = make(mlp)
    expected = str(summary(model))
    if where == "a notebook":
        monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    else:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLORTERM", "truecolor")
    assert str(summary(model)) == expected
    assert "\x1b" not in expected


@pytest.mark.parametrize("what", ["scheduler", "summary", "report"])
def test_notebooks_show_a_table(what, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # a page is wider than a terminal
    rst = trained(make(mlp), sparsity=0.75, exclude=["4"])
    shown = {"scheduler": rst, "summary": summary(rst), "report": finalize_quietly(rst)}[what]
    page = shown._repr_html_()
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    assert len({len(row) for row in rows}) == 1
    assert [row[0] for row in rows if row[0].startswith(("0", "2"))] == [
        name if what == "summary" else f"{name}.weight" for name in ("0", "2")
    ]
    assert sum("75.00 %" in row for row in rows) == 3  # both layers, and together
    assert ("RSTScheduler(" in page) == (what == "scheduler")
    assert ("pattern" in rows[0]) == (what == "summary")


def test_long_names_are_put_in_blocks(drawn_by):
    model = long_names()
    rst = RSTScheduler(model, 0.9, exclude=["*.0.attention"])
    lines = str(summary(rst)).splitlines()
    assert max(map(len, lines)) <= 80
    names = [line[: line.index("  ", 2)] if "  " in line[2:] else line for line in lines]
    start = names.index("language_model.encoder.layers.3")
    assert names[start : start + 5] == [
        "language_model.encoder.layers.3",
        "  attention.query_projection",
        "  attention.output_projection",
        "  intermediate_dense_layer",
        "language_model.encoder.layers.4",
    ]
    text = " ".join(lines)
    assert "pattern of every managed layer: unstructured" in text
    assert "λ of every managed layer: 0.0001" in text


@pytest.mark.parametrize("width", [1, 40, 70, 79, 80, 120, 200])
def test_every_layer_is_there_at_every_width(width, drawn_by, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    model = long_names()
    rst = RSTScheduler(model, {"*.0.*": 0.5, "*": 0.9}, exclude=["*.5.attention"])
    text = str(summary(rst))
    if width >= 70:
        assert max(map(len, text.splitlines())) <= width
    assert text.count("y_projection") == text.count("t_projection") == text.count("dense_layer") == 11
    assert text.count("3,277") == 10


def test_names_are_not_read_as_markup(drawn_by):
    model = nn.ModuleDict({"[bold]x[": nn.Linear(2, 2), ":smile:": nn.Linear(2, 2)})
    text = str(summary(model))
    assert "[bold]x[" in text
    assert ":smile:" in text


def test_the_report_of_finalize_fits_too(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"language_model.encoder.transformer.layers.{index}.attention.output.dense.weight" for index in range(3)]
    layers = tuple(LayerReport(name, 9_437_184, 10_485_760, 0.004, 1.0) for name in names)
    lines = str(Report(layers, LayerReport("total", 28_311_552, 31_457_280, 0.004, 1.0))).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1] == "…_model.encoder.transformer.layers.0"
    assert lines[2].split() == ["attention.output.dense.weight", "9,437,184", "10,485,760", "90.00", "%", "0.0040"]

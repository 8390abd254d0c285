"""The comparison on a custom model and data: from a file, and as a call."""

from __future__ import annotations

import re
import textwrap
from functools import partial
from pathlib import Path

import compare_tickets
import pytest
import torch
from comparison import training
from comparison.data import DATA, Tensors
from comparison.models import MODELS, OPTIMIZERS
from comparison.options import RECIPE as RECIPE_IN_HELP
from comparison.recipe import add_recipe
from comparison.records import Records
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
RECIPE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(encoding="utf-8"), re.DOTALL)[1]
OPTIONS = ("dense_layers", "optimizer", "rates")
pytestmark = pytest.mark.filterwarnings("ignore:the mask keeps no weight")


def write(folder, text=RECIPE, name="my_recipe.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def run(path, *arguments):
    fixed = ["--updates", "20", "--seeds", "1", "--sparsity", "0.8", "--cycles", "1", "--methods", "scratch", "RST"]
    compare_tickets.main(["--recipe", str(path), *fixed, "--out", str(path.parent / "out"), *arguments])
    return Records(path.parent / "out" / "records.jsonl").results


def random_data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = zip(("train", "validation", "test"), (40, 10, 10), strict=True)
    return {part: (torch.randn(count, 4, generator=generator), torch.arange(count) % 3) for part, count in parts}


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Twice(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x), x


def test_the_whole_command_on_the_documented_recipe(tmp_path, capsys):
    steps = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: steps.append(optimizer.defaults["weight_decay"]))
    try:
        records = run(write(tmp_path), "--seeds", "2")
    finally:
        handle.remove()
    assert steps == [5e-4] * 20 * (2 * 2 + 2 + 2 * 2)  # two rates for dense and both methods, and the two seeds
    assert {cell.rate for cell in records if cell.tuning} == {0.1, 0.3}
    table = (tmp_path / "out" / "table.md").read_text()
    for text in ("# my_recipe.py\n", "train 1,200, validation 250, test 347", "Layers that stay dense: 4", "0.1, 0.3"):
        assert text in table
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert {round(result["achieved_sparsity"], 3) for cell, result in records.items() if cell.method == "RST"} == {0.8}
    assert run(tmp_path / "my_recipe.py", "--seeds", "2") == records
    assert "0 updates to make" in capsys.readouterr().out


def test_the_recipe_in_the_help_text_can_be_used():
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    given = {name + part: value for part in ("", "_validation", "_test") for name, value in (("x", x), ("y", y))}
    recipe = {"nn": nn, "torch": torch, **given}
    exec(textwrap.dedent(RECIPE_IN_HELP.partition("\n")[2].rpartition("\n\n")[0]), recipe)
    name = add_recipe("help", recipe["model"], recipe["data"], **{key: recipe[key] for key in OPTIONS})
    assert MODELS[name].dense_layers == ("3",)
    assert MODELS[name].rates == OPTIMIZERS[MODELS[name].optimizer].rates == (0.03, 0.1)


def test_what_was_edited_is_run_anew(tmp_path, monkeypatch):
    """The recipe, its data, and the file beside it that a layer comes from."""
    layer = "from torch import nn\n\nSCALE = {}\n\n\nclass Layer(nn.Linear):\n    scale = SCALE\n"
    write(tmp_path, layer.format(1), "layers_of_recipe.py")
    recipe = RECIPE.replace("import torch\n", "import torch\nfrom layers_of_recipe import Layer\n").replace(
        "nn.Linear(100, 100)", "Layer(100, 100)"
    )
    arguments = ("--rates", "0.1")
    path = write(tmp_path, recipe)
    made = [len(run(path, *arguments))]
    write(tmp_path, recipe.replace("momentum=0.9", "momentum=0.8"))
    made.append(len(run(path, *arguments)))
    write(tmp_path, layer.format(2), "layers_of_recipe.py")
    monkeypatch.delitem(compare_tickets.sys.modules, "layers_of_recipe")
    made.append(len(run(path, *arguments)))
    assert made == [2, 4, 6]
    assert len(run(path, *arguments)) == 6
    assert add_data(0).checksum != add_data(1).checksum


def add_data(seed):
    return training.load.__wrapped__(add_recipe("recipe", small, lambda: random_data(seed)), None, torch.device("cpu"))


def test_processes_read_the_recipe_and_notice_what_changed(tmp_path, monkeypatch):
    path = write(tmp_path)
    for jobs in ("1", "2"):
        run(path, "--rates", "0.1", "--methods", "scratch", "--jobs", jobs, "--out", str(tmp_path / jobs))
    one, two = (Records(tmp_path / jobs / "records.jsonl").results for jobs in ("1", "2"))
    assert {cell: result["test"] for cell, result in one.items()} == {c: r["test"] for c, r in two.items()}
    cell = next(iter(one))
    monkeypatch.delitem(DATA, "my_recipe.py")  # as in a process that has not read it
    training.load.cache_clear()
    write(tmp_path, RECIPE.replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(RuntimeError, match="not what it was when the comparison began"):
        training.run_cell(cell, path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a Python file: write one with the functions model"),
        ("", "has no function model(): it returns a new torch.nn.Module at each call"),
        ("def model(): ...", "has no function data(): it returns {'train'"),
        ("model, data = int, dict", "model() returned a int: it returns a new torch.nn.Module"),
        ("M = small()\nmodel, data = lambda: M, dict", "returned the same module twice"),
        ("model, data, dense_layers = small, dict, 'fc'", "make it a list of names, ['fc']"),
        ("model, data, dense_layers = small, random_data, ['fc']", "matches no module"),
        ("model, data, optimizer = small, random_data, print", "needs rates"),
        ("model, data, rates = small, random_data, 0.1", "rates is 0.1: make it a list of learning rates"),
        ("model, data = small, list", "data() returned a list: it returns {'train': part"),
        ("model = small\ndef data(): return {'train': 1, 'test': 2}", "data() returned a dict with 'train', 'test'"),
        ("model, data = small, change(lambda x, y: x)", "'train' of data() is a Tensor: give a pair of tensors"),
        ("model, data = small, change(lambda x, y: (x, y[1:]))", "40 examples and 39 labels"),
        ("model, data = small, change(lambda x, y: (x, y / 2))", "got torch.float32"),
        ("model, data = small, change(lambda x, y: (x, y - 1))", "integers from 0; got torch.int64 from -1"),
        ("model, data = small, change(lambda x, y: (x, y + 1))", "knows 3 classes, but a label is 3"),
        (
            "model, data = Twice, random_data",
            "for one example the model gave a tuple",
        ),
        ("model, data = lambda: nn.Sequential(small(), nn.Flatten(0)), random_data", "of shape (1, classes)"),
    ],
)
def test_the_command_says_what_a_recipe_lacks(tmp_path, capsys, text, message):
    path = tmp_path / "my_recipe.py"
    if text is not None:
        path.write_text(
            "from test_recipes import Twice, nn, random_data, small\n"
            "def change(how): return lambda: {name: how(*part) for name, part in random_data().items()}\n" + text
        )
    with pytest.raises(SystemExit):
        run(path)
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "my_recipe.py" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "convnet"], "leave out --model"),
        (["--data-dir", "here"], "leave out --data-dir"),
        (["--pixels", "4"], "leave out --pixels"),
        (["--weight-decay", "0.1"], "give it to the optimizer in optimizer() of the recipe"),
    ],
)
def test_what_a_recipe_has_is_not_given_twice(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(write(tmp_path), *arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_data_sets_are_read_into_tensors():
    def data():
        return {name: TensorDataset(x, y) for name, (x, y) in random_data().items()}

    read, given = (
        training.load.__wrapped__(add_recipe("recipe", small, how), None, torch.device("cpu"))
        for how in (data, random_data)
    )
    assert read.sizes == {"train": 40, "validation": 10, "test": 10}
    assert read.checksum == given.checksum
    assert all(torch.equal(read.parts["test"][side], given.parts["test"][side]) for side in (0, 1))


def test_moving_the_data_of_a_recipe_leaves_what_others_have():
    name = add_recipe("recipe", small, random_data)
    here, there = (training.load.__wrapped__(name, None, torch.device(kind)) for kind in ("cpu", "meta"))
    assert {x.device.type for x, _ in there.parts.values()} == {"meta"}
    assert {x.device.type for x, _ in here.parts.values()} == {"cpu"}
    assert here.checksum == there.checksum


def test_batches_of_tensors_are_whole_and_shared_out_between_ranks():
    data = Tensors(random_data(), 3)
    whole, *ranks = (data.batches(16, 0, *who) for who in ((), (0, 2), (1, 2)))
    first = []
    for _ in range(4):
        x, y = next(whole)
        assert len(x) == len(y) == 16
        parts = [next(rank) for rank in ranks]
        assert torch.equal(torch.stack([part[0] for part in parts], 1).flatten(0, 1), x)
        first.append(x)
    assert len(torch.cat(first[:2]).unique(dim=0)) == 32  # no example twice in an epoch
    assert not torch.equal(first[0], first[2])


def test_a_call_returns_the_report_of_the_command(tmp_path):
    fixed = {"methods": ["scratch", "RST"], "sparsity": 0.8, "updates": 20, "seeds": 2, "rates": [0.1], "cycles": 1}
    report = compare_tickets.compare(small, random_data, dense_layers=["2"], **fixed)
    assert [(row.label, row.cell.sparsity, len(row.runs)) for row in report.rows] == [
        ("scratch", 0.8, 2),
        ("RST", 0.8, 2),
    ]
    assert report._repr_markdown_() == str(report) == report.markdown()
    assert report.subject == "small() (51 weights) (40 examples of 4)"
    text = "from test_recipes import random_data, small\nmodel, data, dense_layers = small, random_data, ['2']"
    records = run(write(tmp_path, text), "--rates", "0.1", "--seeds", "2")
    assert [row.runs for row in report.rows] != []
    for row in report.rows:
        for seed, result in row.runs.items():
            [recorded] = [r for c, r in records.items() if (c.method, c.seed) == (row.label, seed)]
            assert recorded["test"] == result["test"]


def test_calls_in_a_row_see_their_own_data_and_optimizer():
    used = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: used.append(type(optimizer)))
    call = partial(compare_tickets.compare, small, methods=["dense"], updates=20, seeds=1, rates=0.1, cycles=1)
    try:
        subjects = [
            call(random_data).subject,
            call(lambda: {n: (x[:9], y[:9]) for n, (x, y) in random_data().items()}).subject,
        ]
        call(random_data, optimizer=torch.optim.Adagrad)
        call(random_data, optimizer=None)
    finally:
        handle.remove()
    assert [re.findall(r"\d+ examples", subject) for subject in subjects] == [["40 examples"], ["9 examples"]]
    assert used == [torch.optim.SGD] * 40 + [torch.optim.Adagrad] * 20 + [torch.optim.SGD] * 20


def test_calls_in_a_row_train_their_own_model_and_repeat_its_dropout(monkeypatch):
    """The plain training that runs begin with is kept in memory within a call, and not beyond."""

    def network(activation):
        return nn.Sequential(nn.Linear(4, 6), activation, nn.Dropout(0.5), nn.Linear(6, 3))

    def tests_of(model):
        options = {"methods": ["L1", "random-after-dense"], "sparsity": 0.5, "updates": 40, "seeds": 2, "rates": 0.1}
        report = compare_tickets.compare(model, random_data, dense_layers=["3"], **options)
        return [(run["test"], run["validation"], run["masked"]) for row in report.rows for run in row.runs.values()]

    models = [partial(network, activation()) for activation in (nn.ReLU, nn.Sigmoid)]  # which have one name
    found = [tests_of(model) for model in models]
    monkeypatch.setattr(training, "REMEMBERED", 0)
    assert found == [tests_of(model) for model in models]
    assert found[0] != found[1]


def test_a_call_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match=r"compare\(\) has no jobs: use the command"):
        compare_tickets.compare(small, random_data, jobs=2)
    with pytest.raises(ValueError, match="argument --methods: invalid choice: 'magic'"):
        compare_tickets.compare(small, random_data, methods=["magic"])
    with pytest.raises(ValueError, match="unrecognized arguments: --epochs"):
        compare_tickets.compare(small, random_data, epochs=3)
    with pytest.raises(ValueError, match=r"small\(\): data\(\) returned a list"):
        compare_tickets.compare(small, list)


@pytest.mark.filterwarnings("ignore:only 37% of the weights will be pruned")
def test_layers_that_are_not_called_count_as_dense():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            x = x[:, None]
            return self.head(self.attention(x, x, x)[0][:, 0])

    report = compare_tickets.compare(
        Attention, random_data, methods=["RST"], updates=20, seeds=1, rates=[0.1], sparsity=0.5, cycles=1
    )
    assert report.rows[0].first["training_flops"] > 0

"""The examples run, end with what they promise, and give every method the same number of updates."""

import warnings
from collections import Counter

import numpy as np
import pytest
import quickstart
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def updates():
    """Updates made, by optimizer: one for dense and scratch each, two (transform and finetune) for RST."""
    made = Counter()
    kept = []  # an id would be used again otherwise

    def note(optimizer, args, kwargs):
        kept.append(optimizer)
        made[id(optimizer)] += 1

    handle = register_optimizer_step_post_hook(note)
    yield made
    handle.remove()


def run(*arguments):
    with warnings.catch_warnings():
        # A transformation as short as these leaves more than 1 % of the norm, and finalize() says so.
        warnings.filterwarnings("ignore", message="the masked weights still held")
        return quickstart.main([str(argument) for argument in arguments])


def test_quickstart_ends_with_table_and_picture(updates, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    runs = run("--epochs", 2, "--seeds", 2, "--sparsity", 0.5, 0.75, "--out", picture)

    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [
        ["dense", "0.00%"],
        ["random scratch", "50.00%"],
        ["random RST", "50.00%"],
        ["random scratch", "75.00%"],
        ["random RST", "75.00%"],
    ]
    assert all("±" in row[2] for row in rows)
    assert [row[3] != "–" for row in rows] == [False, False, True, False, True]

    each = 2 * 17  # 1,077 training images in batches of 64
    assert {row[4] for row in rows} == {str(each)}
    assert {run.updates for run in runs} == {each}
    assert sorted(updates.values()) == [each // 2] * 8 + [each] * 6
    assert all(0 < run.accuracy <= 100 for run in runs)


def test_quickstart_tickets_share_weights_batches_and_mask(tmp_path, monkeypatch):
    starts, zeros = {}, {}
    train = quickstart.Trainer.train

    def spy(trainer, run, model, batches, *arguments, **keywords):
        starts.setdefault(run.method, model[0].weight.detach().clone())
        batches = iter([*(first := [next(batches) for _ in range(3)]), *(next(batches) for _ in range(97))])
        starts.setdefault(f"{run.method} batches", first)
        train(trainer, run, model, batches, *arguments, **keywords)
        zeros[run.method] = model[0].weight == 0

    monkeypatch.setattr(quickstart.Trainer, "train", spy)
    run("--epochs", 2, "--seeds", 1, "--sparsity", 0.75, "--out", tmp_path / "picture.png")
    assert torch.equal(starts["random RST"], starts["dense"])
    assert torch.equal(starts["random scratch"], starts["dense"] * ~zeros["random RST"])
    for method in ("random scratch", "random RST"):
        torch.testing.assert_close(starts[f"{method} batches"], starts["dense batches"], rtol=0, atol=0)
    assert torch.equal(zeros["random scratch"], zeros["random RST"])
    assert int(zeros["random RST"].sum()) == round(0.75 * 300 * 64)


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_quickstart_reads_custom_data(tmp_path, suffix):
    generator = np.random.default_rng(0)
    y = np.repeat(["no", "yes"], 50)
    x = generator.normal(size=(100, 3)) + 4 * (y == "yes")[:, None]
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, X=x, y=y)
    else:
        lines = [",".join([*map(str, row), label]) for row, label in zip(x, y, strict=True)]
        path.write_text("\n".join(["a,b,c,label", *lines]))
    runs = run("--data", path, "--epochs", 20, "--seeds", 1, "--sparsity", 0.5, "--out", tmp_path / "p.png")
    assert runs[0].accuracy == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.csv"], "existing .npz or .csv"),
        (["--data", __file__], "existing .npz or .csv"),
        (["--sparsity", "1.5"], "between 0 and 1"),
        (["--device", "abacus"], "cannot use abacus"),
        (["--seeds", "0"], "less than 1"),
        (["--out", "nowhere/picture.png"], "no such folder"),
    ],
)
def test_quickstart_says_what_is_wrong_with_its_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    assert message in capsys.readouterr().err

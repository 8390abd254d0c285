"""The benchmarks run and print their tables; what they print is for people to read, and no time is asserted."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "penalty": {"SIZES": {"5K": 5_000}},
    "enforce": {"SIZES": {"5K": 5_000}},
    "masks": {
        "SIZES": {"5K": 5_000},
        "LARGEST": 100_000,
        "_billion_weights": lambda: 1,
        "in_a_process_of_its_own": lambda *_: 0,
    },
    "train_step": {
        "CASES": [("ResNet-20", 2, "SGD", False)],
        "WITH_SEED_ALONE": ("ResNet-20", 2, "SGD", False),
        "in_a_process_of_its_own": lambda *_: 0,
    },
    "scaling": {"CASES": [("3 layers", 3, 70, 0.9, 2)], "ON_RANKS": []},
}


@pytest.mark.parametrize("name", TINY)
def test_prints_a_table(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--threads", "1", "--rounds", "2"])
    benchmark = importlib.import_module(name)
    threads = torch.get_num_threads()
    try:
        for attribute, value in TINY[name].items():
            assert hasattr(benchmark, attribute)
            monkeypatch.setattr(benchmark, attribute, value)
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
        for module in ("measuring", "networks", name):
            sys.modules.pop(module, None)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    ways = {cell.strip() for row in rows[2:] for cell in row}
    assert {
        "penalty": {"this library", "term of the loss", "table of λ per weight"},
        "enforce": {"this library, weights only"},
        "masks": {"this library", "torch.nn.utils.prune", "torch.randperm"},
        "train_step": {"transformation", "finetuning", "finetuning, masks not stored", "torch.nn.utils.prune"},
        "scaling": {"3 layers"},
    }[name] <= ways
    assert any(line.startswith("torch ") for line in lines)  # versions and machine

"""The benchmarks run and print their tables; what they print is for people to read, and no time is asserted."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dual_ticket import RSTScheduler

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HOST_COST = {"NETWORKS": {"a layer": (lambda: torch.nn.Linear(2, 2), (1, 2), {"sparsity": 0.5})}, "WARM_UP": 1}
TINY = {
    "penalty": {"SIZES": {"5K": 5_000}},
    "enforce": {"SIZES": {"5K": 5_000}},
    "masks": {
        "SIZES": {"5K": 5_000},
        "LARGEST": 100_000,
        "_billion_weights": lambda: 1,
        "in_a_new_process": lambda *_: 0,
    },
    "train_step": {
        "CASES": [("ResNet-20", 2, "SGD", False)],
        "WITH_SEED_ALONE": ("ResNet-20", 2, "SGD", False),
        "in_a_new_process": lambda *_: 0,
    },
    "scaling": {"CASES": [("3 layers", 3, 70, 0.9, 2)], "ON_RANKS": []},
    "files": {"SIZED": ["ResNet-20"], "SPARSITIES": (0.9,)},
    "host_cost": HOST_COST,
    "host_cost --large-path": HOST_COST,
}


@pytest.mark.parametrize("command", TINY)
def test_prints_a_table(command, monkeypatch, capsys):
    name, *flags = command.split()
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--threads", "1", "--rounds", "2", *flags])
    benchmark = importlib.import_module(name)
    threads = torch.get_num_threads()
    try:
        for attribute, value in TINY[command].items():
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
        "files": {"ResNet-20", "90%", "0.13"},
        "host_cost": {"dense", "transformation", "finetuning", "torch.nn.utils.prune", "empty hooks"},
    }[name] <= ways
    assert any(line.startswith("torch ") for line in lines)  # versions and machine


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_of_a_penalized_update():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rst = RSTScheduler(model, sparsity=0.5, seed=0)
    model(torch.ones(1, 2)).sum().backward()
    with Operations() as operations:
        optimizer.step()
    rst.remove()
    return operations.names


def test_the_large_path_is_taken_while_host_cost_measures_it_and_no_longer(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    host_cost = importlib.import_module("host_cost")
    try:
        small = operations_of_a_penalized_update()
        with host_cost.large_path():
            assert operations_of_a_penalized_update() != small
        assert operations_of_a_penalized_update() == small
    finally:
        for module in ("measuring", "networks", "host_cost"):
            sys.modules.pop(module, None)

"""The benchmarks run and print their tables; what they print is for people to read, and no time is asserted."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dual_ticket import RSTScheduler

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLAGS = {"on_gpu": ["--device", "cpu", "--small"]}
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
    "kept": {
        "NETWORKS": {"a layer": (lambda: torch.nn.Linear(48, 10), (2, 48))},
        "SPARSITIES": [0.9],
        "on_two_ranks": lambda _: "",
    },
    "files": {"SIZED": ["ResNet-20"], "SPARSITIES": (0.9,)},
    "host_cost": HOST_COST,
    "host_cost --large-path": HOST_COST,
    "on_gpu": {
        "LIVES": {"SGD": (lambda model: torch.optim.SGD(model.parameters(), lr=0.05), 1e-9, {})},
        "RESULTS": None,  # nothing is written
        "rows_of": lambda name, options, _: sys.modules["on_gpu"].made_here(name, options),
    },
}


@pytest.mark.parametrize("command", TINY)
def test_prints_a_table(command, monkeypatch, capsys):
    name, *flags = command.split()
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--threads", "1", "--rounds", "2", *FLAGS.get(name, ()), *flags])
    benchmark = importlib.import_module(name)
    threads = torch.get_num_threads()
    try:
        for attribute, value in TINY[command].items():
            assert hasattr(benchmark, attribute)
            monkeypatch.setattr(benchmark, attribute, value)
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
        forget_benchmarks()
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
        "kept": {"dense, fused", "dense, foreach", "kept, fused", "kept, foreach"},
        "files": {"ResNet-20", "90%", "0.13"},
        "host_cost": {"dense", "transformation", "finetuning", "torch.nn.utils.prune", "empty hooks"},
        "on_gpu": {"golden masks", "SGD", "ResNet-20, 2, SGD, finetuning", "needs CUDA", "ok", "skipped"},
    }[name] <= ways
    assert any(line.startswith("torch ") for line in lines)  # versions and machine


def forget_benchmarks():
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def test_no_part_on_the_gpu_takes_the_others_along(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    on_gpu = importlib.import_module("on_gpu")
    try:
        options = SimpleNamespace(device="cpu", small=True, rounds=2, threads=1)
        assert [row.verdict for row in on_gpu.rows_of("graphs", options, 100)] == ["skipped", "skipped"]
        assert [row.value for row in on_gpu.rows_of("graphs", options, 0)] == ["no time was left after 0 s"]
        options.threads = None
        (row,) = on_gpu.rows_of("graphs", options, 100)
        assert (row.value, row.verdict) == ("the process ended with exit code 1", "FAILED")

        def life(*_):
            raise RuntimeError("weights\nor | gradients differ")

        monkeypatch.setattr(on_gpu, "life", life)
        assert {(row.value, row.verdict) for row in on_gpu.made_here("lives", options)} == {
            ("RuntimeError: weights or / gradients differ", "FAILED")
        }
        nan = float("nan")
        assert on_gpu.within(nan, 1.0)[0].verdict == "FAILED"
        assert on_gpu.within(1.0, 1.0)[0].verdict == "ok"
    finally:
        forget_benchmarks()


@pytest.mark.parametrize(("flags", "is_kept"), [([], True), (["--small"], False), (["--parts", "masks"], False)])
def test_the_table_is_kept_when_all_parts_ran_on_a_gpu(flags, is_kept, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    on_gpu = importlib.import_module("on_gpu")
    try:
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--threads", str(torch.get_num_threads()), *flags])
        monkeypatch.setattr(on_gpu, "RESULTS", tmp_path / "on_gpu.md")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fast 3000")
        for verdict, status in (("ok", 0), ("missed", 0), ("FAILED", 1)):
            monkeypatch.setattr(on_gpu, "rows_of", lambda *_, v=verdict: [on_gpu.Row("what", "3", "≤ 2", v)])
            assert on_gpu.main() == status
            assert on_gpu.RESULTS.exists() == is_kept
        printed = capsys.readouterr().out
        assert "Fast 3000" in printed
        assert not is_kept or on_gpu.RESULTS.read_text(encoding="utf-8").rpartition("```\n\n")[2] in printed
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="--device cpu --small"):
            on_gpu.main()
    finally:
        forget_benchmarks()


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
        forget_benchmarks()

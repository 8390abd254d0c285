"""The parts of ``benchmarks/on_gpu.py`` that check something, as far as the simulated device goes."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from .process import on_simulated_cuda

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@on_simulated_cuda
def test_masks_and_lives():
    rows = rows_of("masks") + rows_of("lives")
    assert len(rows) > 12
    assert [row for row in rows if row.verdict != "ok"] == []


@on_simulated_cuda
def test_another_life_is_seen():
    """As it would be if the device's updates were others."""
    on_gpu = benchmark()
    mine, other = (torch.nn.Linear(2, 2, bias=False, device=device) for device in ("cuda", "cpu"))
    other.weight.data = mine.weight.data.cpu()
    assert on_gpu.difference(mine, other) == 0
    mine.weight.data[0, 0] += other.weight.abs().max().item()
    assert 0.9 < on_gpu.difference(mine, other) < 1.1


def rows_of(part):
    return list(benchmark().made_here(part, SimpleNamespace(device="cuda", small=True, rounds=2)))


def benchmark():
    if BENCHMARKS not in sys.path:
        sys.path.insert(0, BENCHMARKS)
    return importlib.import_module("on_gpu")

"""How the benchmarks measure: candidates take turns in one process, and only ratios within a round are reported.

A machine that is busy, throttled or shared slows all candidates of a round alike; their ratio stays.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import platform
import statistics
import time
import warnings
import weakref
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torch_dual_ticket._engine import optimizer_hooks
from torch_dual_ticket.kept.values import values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch_dual_ticket import RSTScheduler

# glibc gives freed memory back at once, so that the peak is that of what is in use.
_EXACT_PEAK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
_OPTIMIZER_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
Result = TypeVar("Result")


def arguments(
    description: str | None,
    rounds: int = 15,
    threads: int | None = None,
    device: str = "cpu",
    parts: Sequence[str] = (),
    **flags: str,
) -> argparse.Namespace:
    """The options that all benchmarks have, the parts of one that has several, and further flags with their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device, help="where to run, such as cpu or cuda (default: %(default)s)")
    threads = threads or torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate (default: %(default)s)")
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="default: all")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "a transformation ended")  # what is measured ends midway
    return options


def machine(options: argparse.Namespace) -> str:
    """What the numbers were measured on."""
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{_cpu()}, {options.threads} thread(s)"
    return f"torch {torch.__version__}, Python {platform.python_version()}, {where}, {options.rounds} rounds"


def ratios(
    candidates: Mapping[str, Callable[[], object]], base: str, rounds: int, device: str = "cpu"
) -> dict[str, tuple[float, float, float]]:
    """Quartiles (median first) of each candidate's time relative to the base's in the same round, after a warm-up."""
    for candidate in candidates.values():
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with without_collector():
        for _ in range(rounds):
            for name, candidate in candidates.items():
                times[name].append(seconds(candidate, device))
    result = {}
    for name, mine in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, times[base], strict=True)], n=4)
        result[name] = (middle, low, high)
    return result


def peak_memory(device: str) -> int:
    """The most memory that this process has had so far, in bytes: of the GPU, or resident on the CPU (Linux)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as lines:  # getrusage() would count the parent's peak too
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def in_a_new_process(function: Callable[..., int], *arguments: object) -> int:
    """The function's result, with memory that nothing else has touched; forked from a server that has imported all."""
    with _environment(_EXACT_PEAK), multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(function, arguments)


def as_if_alone(step: Callable[[], Result], rst: RSTScheduler | None) -> Callable[[], Result]:
    """The step of a candidate, without what the library does for the other candidates of this process.

    Its hooks around each optimizer's step look for the parameters of all schedulers. A model without one runs as if
    the library had not been imported.
    """

    tickets = () if rst is None else (rst._ticket, values_of(rst._ticket))
    mine = tuple(weakref.ref(one) for one in tickets if one is not None)  # once: another tuple would be looked through

    def alone() -> Result:
        everybody, optimizer_hooks._tickets = optimizer_hooks._tickets, mine
        before = [dict(installed) for installed in _OPTIMIZER_HOOKS]
        if rst is None:
            for installed in _OPTIMIZER_HOOKS:
                installed.clear()
        try:
            return step()
        finally:
            optimizer_hooks._tickets = everybody
            for installed, kept in zip(_OPTIMIZER_HOOKS, before, strict=True):
                installed.update(kept)

    return alone


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector waits: it would slow down whoever is running when its turn comes."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def spread(value: tuple[float, float, float]) -> str:
    """Median and quartiles of a ratio."""
    middle, low, high = value
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def seconds(candidate: Callable[[], object], device: str) -> float:
    """How long one call takes, on the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    candidate()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

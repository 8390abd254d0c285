"""Where the runs are made: in this process, in several, under torchrun, or on a Ray cluster."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .training import run_cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .cells import Cell

    Results = Iterator[tuple[Cell, dict[str, Any]]]


def in_this_process(
    cells: Iterable[Cell], folder: Path | None, device: torch.device, advance: Callable[[int], None]
) -> Results:
    """One after the other. Under torchrun each is trained by all ranks together, and rank 0 tells the others how it
    went, so that all make the same choices afterwards."""
    for cell in cells:
        result = [run_cell(cell, folder, device, advance)]
        if dist.is_initialized():
            dist.broadcast_object_list(result, src=0)
        yield cell, result[0]


def in_processes(
    jobs: int, cells: Iterable[Cell], folder: Path | None, device: torch.device, advance: Callable[[int], None]
) -> Results:
    """Several at a time, with an equal share of the cores each. A cell is asked for when a process is free for it."""
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads,)) as pool:
        coming = iter(cells)
        waiting = {pool.submit(run_cell, cell, folder, device): cell for cell in itertools.islice(coming, jobs)}
        try:
            while waiting:
                finished = next(as_completed(waiting))
                cell, result = waiting.pop(finished), finished.result()
                waiting |= {pool.submit(run_cell, new, folder, device): new for new in itertools.islice(coming, 1)}
                advance(cell.updates)
                yield cell, result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run whose result nobody will hear of goes on for nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def on_ray(cells: Iterable[Cell], folder: Path | None, device: torch.device, advance: Callable[[int], None]) -> Results:
    """As many at a time as the Ray cluster has room for: one core each, or one GPU each.

    The machines need the same environment: this package, and the data under the same path.
    """
    import ray

    if not ray.is_initialized():
        ray.init(runtime_env={"py_modules": [str(Path(__file__).parent)]}, log_to_driver=False)
    remote = ray.remote(num_cpus=1, num_gpus=1 if device.type == "cuda" else 0)(_run_on_one_thread)
    waiting = {remote.remote(cell, folder, device): cell for cell in cells}
    while waiting:
        (finished, *_), _ = ray.wait(list(waiting), num_returns=1)
        cell, result = waiting.pop(finished), ray.get(finished)
        advance(cell.updates)
        yield cell, result


def _run_on_one_thread(cell: Cell, folder: Path | None, device: torch.device) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run_cell(cell, folder, device)


def choose(name: str, jobs: int) -> Callable[..., Results]:
    if name == "ray":
        return on_ray
    return in_this_process if jobs == 1 else partial(in_processes, jobs)

"""Tests that run on two processes, or four, with gloo between them.

The processes are started once, at the first test that needs them, and then do one test after the other, each in its
own process group: importing torch takes longer than any of the tests. A test that hangs costs new processes.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch does not run on CPUs"
)

_LIMIT = 120  # seconds that a test may take
_GRACE = 10  # seconds that the other ranks get when one has failed
_processes: list[tuple[Any, Connection]] = []


def on_two_ranks(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test function, with its arguments, on both ranks; it fails if it fails on one of them."""
    return _on_ranks(2, test)


def on_four_ranks(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test function, with its arguments, on four ranks; it fails if it fails on one of them."""
    return _on_ranks(4, test)


def _on_ranks(world: int, test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def on_all(**arguments: object) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            pytest.skip("this build of torch has no gloo")
        failures = _run(world, test.__module__, test.__name__, arguments)
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)

    return on_all


def everywhere(value: object) -> list[Any]:
    """What each rank gave, on all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _run(world: int, module: str, name: str, arguments: dict[str, object]) -> list[str]:
    if len(_processes) != world:
        _stop()
        _start(world)
    with tempfile.TemporaryDirectory() as folder:
        for _, connection in _processes:
            connection.send((module, name, arguments, os.path.join(folder, "store")))
        waiting = {connection: rank for rank, (_, connection) in enumerate(_processes)}
        failures = []
        has_ended = False
        deadline = time.monotonic() + _LIMIT
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures += [f"rank {rank} gave no answer" for rank in waiting.values()]
                _stop()
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    failure = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    failure = f"the process ended with exit code {_processes[rank][0].exitcode}"
                    has_ended = True
                if failure:
                    failures.append(f"rank {rank}: {failure}")
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if has_ended:
            _stop()
        return failures


def _start(world: int) -> None:
    context = multiprocessing.get_context("spawn")
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, theirs), daemon=True)
        process.start()
        theirs.close()
        _processes.append((process, ours))


def _stop() -> None:
    for process, connection in _processes:
        connection.close()
        process.kill()
        process.join()
    _processes.clear()


def _serve(rank: int, world: int, connection: Connection) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    while True:
        try:
            module, name, arguments, store = connection.recv()
        except EOFError:
            return
        try:
            test = getattr(importlib.import_module(module), name).__wrapped__
            _in_group(rank, world, store, functools.partial(test, **arguments))
        except BaseException:  # pytest.fail() raises no Exception
            connection.send(traceback.format_exc())
        else:
            connection.send(None)


def _in_group(rank: int, world: int, store: str, test: Callable[[], None]) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=_LIMIT / 2),
    )
    torch.manual_seed(rank)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Of torch about itself: torch.distributed.optim uses it; DTensors of torch 2.6 on CPUs.
            warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
            warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
            # As in pyproject.toml.
            warnings.filterwarnings("ignore", message="with lr=.*will leave|a transformation ended at")
            test()
        if dist.is_initialized():
            dist.barrier()  # or the slower rank would miss the faster one
    finally:
        gc.collect()  # models keep the group's threads running
        if torch.__version__ < "2.7":
            time.sleep(0.1)  # its gloo threads may still wait for the GIL, with which they are destroyed
        if dist.is_initialized():
            dist.destroy_process_group()  # and a rank that waits for one that has failed hears of it

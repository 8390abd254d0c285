"""Tests that run on two processes, or four, with gloo between them.

The processes are started once, at the first test that needs them, and then do one test after the other in the same
process group: importing torch takes longer than any of the tests, and gloo does not end groups without races (torch
2.13 has aborted in a later test). A test that fails costs new processes.
"""

from __future__ import annotations

import atexit
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
_folders: list[tempfile.TemporaryDirectory[str]] = []  # of the file in which the processes find each other


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
    for _, connection in _processes:
        connection.send((module, name, arguments))
    waiting = {connection: rank for rank, (_, connection) in enumerate(_processes)}
    failures = []
    deadline = time.monotonic() + _LIMIT
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures += [f"rank {rank} gave no answer" for rank in waiting.values()]
            break
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[arg-type]
            try:
                failure = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                process = _processes[rank][0]
                process.join()
                failure = f"the process ended with exit code {process.exitcode}"
            if failure:
                failures.append(f"rank {rank}: {failure}")
                deadline = min(deadline, time.monotonic() + _GRACE)
    if failures:
        _stop()  # the group is in the middle of something
    return failures


def _start(world: int) -> None:
    context = multiprocessing.get_context("spawn")
    _folders.append(tempfile.TemporaryDirectory())
    store = os.path.join(_folders[-1].name, "store")
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
        process.start()
        theirs.close()
        _processes.append((process, ours))


def _stop() -> None:
    for process, connection in _processes:
        connection.close()
        process.kill()
        process.join()
    _processes.clear()
    while _folders:
        _folders.pop().cleanup()


atexit.register(_stop)


def _serve(rank: int, world: int, store: str, connection: Connection) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=_LIMIT / 2),
    )
    while True:
        try:
            module, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            test = getattr(importlib.import_module(module), name).__wrapped__
            _do(rank, functools.partial(test, **arguments))
        except BaseException:  # pytest.fail() raises no Exception
            connection.send(traceback.format_exc())
        else:
            connection.send(None)


def _do(rank: int, test: Callable[[], None]) -> None:
    torch.manual_seed(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of torch about itself: torch.distributed.optim uses it; DTensors of torch 2.6 on CPUs.
        warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
        warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
        # As in pyproject.toml.
        warnings.filterwarnings("ignore", message="with lr=.*will leave|a transformation ended at")
        test()
    gc.collect()  # models go with their test, and what they send with them

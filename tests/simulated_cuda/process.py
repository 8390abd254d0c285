"""Runs tests in a process that has the simulated device: it must be loaded before torch, and pytest has torch already.

The process is started once, at the first test that needs it, and then does one test after the other.
"""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import signal
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from . import device

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

_LIMIT = 300  # seconds that a test may take; the first waits for the import of torch
_running: list[tuple[Any, Connection]] = []  # the process, if there is one


def on_simulated_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test function, with its arguments, where ``"cuda"`` is the simulated device."""

    @functools.wraps(test)
    def there(**arguments: object) -> None:
        from .build import build, why_not

        if reason := why_not():
            pytest.skip(reason)
        if not _running:
            _start(build())
        failure = _ask((test.__module__, test.__name__, arguments))
        if failure:
            pytest.fail(failure, pytrace=False)

    return there


def _ask(what: tuple[str, str, dict[str, object]]) -> str | None:
    process, connection = _running[0]
    try:
        connection.send(what)
        if connection.poll(_LIMIT):
            return connection.recv()  # type: ignore[no-any-return]
        failure = f"no answer after {_LIMIT} seconds"
    except (EOFError, OSError):
        process.join()
        failure = f"the process ended with exit code {process.exitcode}"
        if process.exitcode == -signal.SIGSEGV:
            failure += ": the host read the device's memory"
    _running.clear()
    connection.close()
    process.kill()
    process.join()
    return failure


def _start(library: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(library, theirs), daemon=True)
    process.start()
    theirs.close()
    _running.append((process, ours))


def _serve(library: Path, connection: Connection) -> None:
    device.load(library)
    import torch

    from torch_dual_ticket._tensors import kernels

    torch.set_num_threads(1)
    kernels.SMALL = 4096  # as in conftest.py, which this process has not run
    while True:
        try:
            module, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            test = getattr(importlib.import_module(module), name).__wrapped__
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # As in pyproject.toml.
                warnings.filterwarnings("ignore", message="with lr=.*will leave|a transformation ended at")
                test(**arguments)
        except BaseException:  # pytest.fail() raises no Exception
            connection.send(traceback.format_exc())
        else:
            connection.send(None)
        gc.collect()

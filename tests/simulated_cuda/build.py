"""Compiles the simulated device against the installed torch, once for each version of either."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")


def why_not() -> str | None:
    """The reason why the device cannot be built here; None where it can."""
    if sys.platform != "linux":
        return "the simulated CUDA device needs Linux"
    if torch.backends.cuda.is_built():
        return "the simulated CUDA device needs a build of torch that has no CUDA"
    if shutil.which("g++") is None:
        return "the simulated CUDA device needs g++"
    return None


def build() -> Path:
    """The compiled library. Takes some 20 seconds at the first call, and nothing while torch and source stay the same.

    Processes that need it at the same time wait for the first, which builds it.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    import fcntl  # Windows has none

    command = _command()
    key = hashlib.sha256(repr((torch.__version__, command, SOURCE.read_bytes())).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"torch_dual_ticket-simulated_cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{SOURCE.name} does not compile with torch {torch.__version__}:\n{result.stderr}")
            unfinished.rename(library)
    return library


def _command() -> list[str]:
    """The compiler with all of its arguments except the output's name."""
    root = Path(torch.__file__).parent
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return [
        "g++",
        "-std=c++20" if release >= (2, 12) else "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
        f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        str(SOURCE),
        f"-L{root / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]

"""Files with a checksum: tensors and a description of them, in the safetensors format.

The metadata of the file has one entry, a JSON text that begins with the SHA-256 of the whole file (computed with zeros
in the place of its 64 digits). It finds every change.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ENTRY = "torch_dual_ticket"  # one entry: safetensors writes several in an order that changes from run to run
# How the JSON text begins within the JSON of the header. The key "seal" is that of earlier files, in which more digits
# follow the 64: checksums of the tensors, which the SHA-256 covers like everything else.
_START = b'{\\"seal\\": \\"'
_DIGITS = 64


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write the file at once, or raise and leave what was there.

    Args:
        path: where to; an existing file is replaced.
        tensors: contiguous, on the CPU, none sharing memory with another.
        description: what ``json`` can hold.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a dtype that it cannot hold.
    """
    library = _safetensors()
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        try:
            library.load(library.save({"": torch.empty(0, dtype=dtype, device="cpu")}))
        except KeyError:
            name = next(name for name, tensor in tensors.items() if tensor.dtype is dtype)
            raise ValueError(f"{name} has dtype {dtype}, which safetensors cannot hold") from None
    text = json.dumps({"seal": "0" * _DIGITS, **description})
    data = bytearray(library.save(tensors, {_ENTRY: text}))
    first = data.index(_START) + len(_START)
    data[first : first + _DIGITS] = hashlib.sha256(data).hexdigest().encode()
    _put_in_place(path, data)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the description.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is not what :func:`write` has written.
    """
    library = _safetensors()
    data = Path(path).read_bytes()
    if data[:2] == b"PK":
        raise ValueError(f"{os.fspath(path)} is not a ticket, but looks like a file for torch.load()")
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        description: dict[str, Any] = json.loads(json.loads(data[8:end])["__metadata__"][_ENTRY])
    except KeyError:
        raise ValueError(f"{os.fspath(path)} is a safetensors file, but not a ticket of torch_dual_ticket") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a ticket, or its header is damaged or cut off ({len(data):,} bytes are there):"
            f" {error}"
        ) from None
    first = data.find(_START, 0, end) + len(_START)
    digest = hashlib.sha256(data[:first])
    digest.update(b"0" * _DIGITS)
    digest.update(memoryview(data)[first + _DIGITS :])
    if digest.hexdigest().encode() != data[first : first + _DIGITS]:
        raise ValueError(
            f"{os.fspath(path)} is damaged: its checksum is not that of the {len(data):,} bytes that are there. Copy or"
            " save it again."
        )
    try:
        return library.load(data), description
    except Exception as error:  # not a safetensors file, or one with dtypes of a later release
        raise ValueError(f"{os.fspath(path)} cannot be read by safetensors: {error!r}") from error


def _safetensors() -> Any:
    try:
        import numpy  # noqa: F401 - safetensors.torch writes with it, but does not require it
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"ticket files need safetensors and numpy ({error}): pip install numpy safetensors"
        ) from error
    return safetensors.torch


def _put_in_place(path: str | os.PathLike[str], data: bytearray) -> None:
    """Write under another name first: nobody sees a part of the file. It has the mode of a file that it replaces."""
    path = os.path.realpath(path)
    mode = os.stat(path).st_mode if os.path.exists(path) else None
    if mode is not None and not stat.S_ISREG(mode):  # a device or a pipe is not replaced
        with open(path, "wb") as file:
            file.write(data)
        return
    temporary = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise

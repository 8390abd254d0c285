"""A sealed file: tensors and a description of them, in the safetensors format, of which no bit may change unnoticed.

The metadata of the file has one entry, a JSON text that begins with the seal: the SHA-256 of the whole file (as it is
with zeros in the place of these 64 digits), then the CRC-32 of each tensor in the order of their names. The first finds
every change, the others say where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_ENTRY = "torch_dual_ticket"  # one entry: safetensors writes several in an order that changes from run to run
_SEAL = b'{\\"seal\\": \\"'  # how the JSON text begins within the JSON of the header
_DIGEST = 64  # hexadecimal digits of a SHA-256
_CRC = 8


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write a sealed file, or leave an earlier one in its place as it was.

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
    blank = "0" * (_DIGEST + _CRC * len(tensors))
    data = bytearray(library.save(tensors, {_ENTRY: json.dumps({"seal": blank, **description})}))
    start, header = _header(data)
    seal = data.index(_SEAL) + len(_SEAL)
    crcs = "".join(f"{zlib.crc32(content):08x}" for _, content in _contents(data, start, header))
    data[seal + _DIGEST : seal + len(blank)] = crcs.encode()
    data[seal : seal + _DIGEST] = hashlib.sha256(data).hexdigest().encode()
    _put_in_place(path, data)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the description.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is not what :func:`write` has written; says what differs.
    """
    library = _safetensors()
    data = Path(path).read_bytes()
    try:
        start, header = _header(data)
        text = header["__metadata__"][_ENTRY]
        description: dict[str, Any] = json.loads(text)
    except KeyError:
        raise ValueError(f"{os.fspath(path)} is a safetensors file, but no ticket of torch_dual_ticket") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)} is no ticket, or its header is damaged or cut off ({len(data):,} bytes are there):"
            f" {error}"
        ) from None
    seal = data.find(_SEAL, 0, start) + len(_SEAL)
    digest = hashlib.sha256(data[:seal])
    digest.update(b"0" * _DIGEST)
    digest.update(memoryview(data)[seal + _DIGEST :])
    if digest.hexdigest().encode() != data[seal : seal + _DIGEST]:
        raise ValueError(
            f"{os.fspath(path)} is not as it was saved: {_what_differs(data, start, header, description)}. Copy or save"
            " it again."
        )
    try:
        return library.load(data), description
    except Exception as error:  # sealed by somebody else: no safetensors file, or one with dtypes of a later release
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


def _header(data: bytes | bytearray) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what safetensors says about them."""
    start = 8 + int.from_bytes(data[:8], "little")
    if data[:2] == b"PK":
        raise ValueError("it looks like a file of torch.save(), which torch.load() reads")
    if len(data) < max(start, 8):
        raise ValueError(f"its header should end at byte {start:,}")
    header = json.loads(data[8:start])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return start, header


def _contents(data: bytes | bytearray, start: int, header: dict[str, Any]) -> list[tuple[str, memoryview]]:
    """The bytes of each tensor, in the order of their names."""
    names = sorted(name for name in header if name != "__metadata__")
    spans = [header[name]["data_offsets"] for name in names]
    return [(name, memoryview(data)[start + a : start + b]) for name, (a, b) in zip(names, spans, strict=True)]


def _what_differs(data: bytes, start: int, header: dict[str, Any], description: dict[str, Any]) -> str:
    with suppress(KeyError, ValueError, TypeError, AttributeError):
        contents = _contents(data, start, header)
        end = start + max((header[name]["data_offsets"][1] for name, _ in contents), default=0)
        if len(data) != end:
            return f"it has {len(data):,} bytes instead of {end:,}"
        crcs = description["seal"][_DIGEST:]
        changed = [
            name
            for index, (name, content) in enumerate(contents)
            if crcs[_CRC * index : _CRC * (index + 1)] != f"{zlib.crc32(content):08x}"
        ]
        if changed:
            return f"the values of {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''} have changed"
    return "its header has changed"


def _put_in_place(path: str | os.PathLike[str], data: bytearray) -> None:
    """Nobody sees a part of the file: it appears whole or not at all."""
    path = os.path.realpath(path)
    temporary = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise

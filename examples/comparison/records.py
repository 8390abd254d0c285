"""One line of JSON for every finished run: it is not run again, and an interruption loses nothing finished."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .cells import Cell

if TYPE_CHECKING:
    from pathlib import Path


class Records:
    """The results by cell, and the file that they are kept in."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.results: dict[Cell, dict[str, Any]] = {}
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = json.loads(line)
                self.results[Cell(**record["cell"])] = record["result"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number == len(lines):
                    continue  # the program was stopped while it wrote this line; the run is made again
                raise ValueError(f"{path}, line {number} is not a record of this program: {error}") from error

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep a result; it is on the disk when this returns. Of several ranks only one writes."""
        self.results[cell] = result
        if not self.writes:
            return
        with self.path.open("a+b") as file:
            if file.tell() and not _ends_line(file):
                file.truncate(_end_of_last_line(file))
            file.write(json.dumps({"cell": asdict(cell), "result": result}, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read() == b"\n")


def _end_of_last_line(file: Any) -> int:
    file.seek(0)
    return int(file.read().rfind(b"\n") + 1)

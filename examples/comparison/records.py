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
    """The results by cell, and the file that they are kept in, if any."""

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.results: dict[Cell, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = json.loads(line)
                if record["result"] is None:
                    print(f"{path}, line {number} has no result: that run is made again")
                    continue
                self.results[Cell(**record["cell"])] = record["result"]
            except (KeyError, TypeError, ValueError) as error:  # of letters that are cut in two, and of JSON, too
                if number == len(lines):
                    print(f"{path}: the last line is not whole, as the program was stopped; that run is made again")
                    continue
                raise ValueError(f"{path}, line {number} is not a record of this program: {error}") from error

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep a result; it is on the disk when this returns. Of several ranks only one writes."""
        self.results[cell] = result
        if self.path is None or not self.writes:
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

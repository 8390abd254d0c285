"""Tables of layers that fit a terminal: drawn by rich where it is installed, else plain text."""

from __future__ import annotations

import html
import io
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Cells = tuple[str, ...]

_GAP = "  "
_PAGE = 1000  # a page scrolls: wide enough for all columns
_SHORTEST_NAME = 20  # shorter names look alike: a line that is too long is better


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of each is a layer's name. A row of one cell is a heading over those below."""

    header: Cells
    rows: tuple[Cells, ...]
    footer: tuple[Cells, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def widths(self) -> list[int]:
        lines = [self.header, *self.rows, *self.footer]
        return [max(len(row[column]) for row in lines if column < len(row)) for column in range(len(self.header))]

    @property
    def width(self) -> int:
        return sum(self.widths) + len(_GAP) * (len(self.header) - 1)


def terminal_width() -> int:
    """In columns; 80 where there is no terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def percent(fraction: float) -> str:
    return f"{fraction:.2%}".replace("%", " %")


def fitted(table: Table, width: int) -> Table:
    """The table with names as short as the width requires: first in blocks, then with their beginnings cut off.

    >>> for row in fitted(Table(("layer", "size"), (("model.layers.0.attention.query", "64"),)), 24).rows:
    ...     print(row)
    ('model.layers.0',)
    ('  attention.query', '64')
    """
    if table.width <= width:
        return table
    table = replace(table, rows=_in_blocks(table.rows))
    room = max(_SHORTEST_NAME, width - (table.width - table.widths[0]))
    return replace(table, rows=tuple((shortened(row[0], room), *row[1:]) for row in table.rows))


def as_text(table: Table, width: int) -> str:
    """Plain lines of at most that width, unless the numbers need more."""
    table = fitted(table, width)
    width, widths = max(width, table.width), table.widths
    lines = [
        _GAP.join(
            [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=False))]
        ).rstrip()
        for row in (table.header, *table.rows, *table.footer)
    ]
    return "\n".join([*lines, *(line for note in table.notes for line in textwrap.wrap(note, width))])


def as_renderable(table: Table, width: int) -> Any:
    """The same for a console of rich."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    table = fitted(table, width)
    # Columns are as far apart as in plain text: a space of padding, and one of the box.
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for index, (title, size) in enumerate(zip(table.header, table.widths, strict=True)):
        drawn.add_column(Text(title), justify="right" if index else "left", width=size, no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(Text(cell, style="cyan" if len(row) == 1 else "") for cell in row))
    if table.footer:
        drawn.add_section()
    for row in table.footer:
        drawn.add_row(*(Text(cell, style="bold") for cell in row))
    return Group(drawn, *(Text(note, style="dim") for note in table.notes))


def as_best_text(table: Table, width: int) -> str:
    """Drawn by rich where it is installed, else plain; without colors in either case."""
    try:
        from rich.console import Console
    except ImportError:
        return as_text(table, width)
    page = io.StringIO()
    width = max(width, fitted(table, width).width)
    # Otherwise rich would display it in a notebook, and FORCE_COLOR would add color codes.
    plain: dict[str, Any] = {"force_jupyter": False, "force_terminal": False, "color_system": None}
    Console(file=page, width=width, legacy_windows=False, **plain).print(as_renderable(table, width))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def as_html(table: Table) -> str:
    """For notebooks.

    >>> print(as_html(Table(("layer", "kept"), (("a<b", "7"),), notes=("all of it",))))
    <table>
    <tr><th style="text-align: left">layer</th><th style="text-align: right">kept</th></tr>
    <tr><td style="text-align: left">a&lt;b</td><td style="text-align: right">7</td></tr>
    </table>
    <p>all of it</p>
    """

    def line(row: Cells, tag: str) -> str:
        sides = ["left", *["right"] * (len(row) - 1)]
        cells = [
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(row, sides, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    lines = [
        line(table.header, "th"),
        *(line(row, "td") for row in table.rows),
        *(line(row, "th") for row in table.footer),
    ]
    return "\n".join(["<table>", *lines, "</table>", *(f"<p>{html.escape(note)}</p>" for note in table.notes)])


class TableInNotebooks:
    """What Jupyter shows of an object that has a table, where it is the last line of a cell."""

    def _table(self, width: int) -> Table:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return as_html(self._table(_PAGE))


def _in_blocks(rows: Sequence[Cells]) -> tuple[Cells, ...]:
    """The rows below headings of what their names have in common, up to the last number: ``encoder.layer.0``."""
    made: list[Cells] = []
    last = ""
    for name, *cells in rows:
        parts = name.split(".")
        numbered = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
        block = ".".join(parts[: numbered[-1] + 1]) if numbered else ""
        if block not in ("", last):
            made.append((block,))
        made.append((f"  {name[len(block) + 1 :]}" if block else name, *cells))
        last = block
    return tuple(made)


def shortened(name: str, room: int) -> str:
    """The end of the name, which tells layers apart, in at most ``room`` letters."""
    indent = " " * (len(name) - len(name.lstrip(" ")))
    return name if len(name) <= room else f"{indent}…{name[len(name) - room + len(indent) + 1 :]}"

"""A bar over all updates that are to be made, with the time that is left, and a line for every finished run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

if TYPE_CHECKING:
    from .cells import Cell


class ProgressBar:
    """Runs that were made earlier shorten the bar and do not count for the speed."""

    def __init__(self, *, quiet: bool = False) -> None:
        in_notebook = Console().is_jupyter and not quiet
        self.console = Console(quiet=quiet, force_jupyter=False)
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self.console, disable=in_notebook)
        self._page: Any = None
        if in_notebook:  # where rich's bar needs ipywidgets
            from IPython.display import display

            self._page = display({"text/html": ""}, raw=True, display_id=True)
        self._task = self._bar.add_task("")
        self._total = self._done = 0
        self._started = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, updates: int) -> None:
        self._total = updates
        self._started = time.monotonic()
        self.advance(0)

    def skip(self, updates: int) -> None:
        self._total -= updates
        self.advance(0)

    def advance(self, updates: int) -> None:
        self._done += updates
        self._bar.update(self._task, completed=self._done, total=self._total, description=self._left())
        if self._page is not None:
            bar = f'<progress value="{self._done}" max="{self._total}"></progress> {self._left()}'
            self._page.update({"text/html": bar}, raw=True)

    def _left(self) -> str:
        if not self._done:
            return f"{self._total:,} updates to make"
        seconds = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        return f"{self._done:,} of {self._total:,} updates, {_clock(seconds)} left"

    def say(self, cell: Cell, result: dict[str, Any]) -> None:
        sparsity = f" at {100 * cell.sparsity:.4g} %" if cell.sparsity else ""
        purpose = f"trying rate {cell.rate:g}" if cell.tuning else f"seed {cell.seed}"
        accuracy = f"validation {result['validation']:.2f} %"
        variant = f" ({cell.variant})" if cell.variant else ""
        line = f"{cell.method}{variant}{sparsity}, {purpose}: {accuracy}, {_clock(result['seconds'])} ({self._left()})"
        self.console.print(line, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

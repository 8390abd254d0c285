"""The paper's comparison as one command: train sparse networks by several methods, on the same budget.

methods (names as in the tables):
  dense               nothing is pruned
  scratch             a random ticket, trained from initialization
  scratch-ERK         the same, with more weights kept in small layers (Erdős–Rényi-Kernel)
  scratch-scaled      scratch from larger weights, so that signals keep their size
  scratch-short       scratch with fewer updates than all others: those that RST has left after its search
  L1                  train, remove the smallest weights, finetune
  GMP                 gradual magnitude pruning: the same little by little, during the search
  GMP-early           GMP with its last mask as early as GMP-RST's: GMP-RST without its penalty
  LTH                 lottery ticket: train, remove the smallest weights, rewind to initialization, train
  LTH-iter            the same in several rounds
  random-after-dense  train, mask at random, finetune: RST without its penalty
  L1-RST              train plainly for --delay, then transform the mask of the largest weights, mask, finetune
  L1-RST-norm         the same with BatchNorm's weights behind masked filters (--pattern filter)
  GMP-RST             L1-RST with a mask that grows while it is transformed
  RST                 train under a growing penalty on the weights of a random mask, mask, finetune
  RST-ERK             the same, with more weights kept in small layers
  RST-iter            RST in several cycles, with nested masks

What is kept equal: the total number of updates (scratch-short alone has fewer), the initial weights and the order of
the batches of a seed, which layers stay dense, the optimizer, and how many learning rates a method may try. The rate of
the dense stretches is the best one for the dense network; the rate of the last stretch (with --rate-from delay, of all
that follows the plain training) is chosen for each method and sparsity. Both are chosen on the validation part, with
separate seeds. The test part is looked at once in a run, after its last update.

Every finished run is a line in OUT/records.jsonl. The same command again makes only the runs that are missing.
"""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from textwrap import fill
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep
from comparison.cells import Cell
from comparison.data import contents
from comparison.engines import choose
from comparison.methods import GMP_INTERVALS, PENALIZED, SEARCHES, with_its_own
from comparison.models import MODELS
from comparison.options import MAGNITUDES, TUNING_SEED, parse
from comparison.progress import ProgressBar
from comparison.recipe import add_recipe
from comparison.records import Records
from comparison.report import PAGE, Report
from comparison.training import load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence


DECAYS = {
    "cosine": "rise for 5 % and then fall along a cosine",
    "steps": "fall to a tenth after a half and after three quarters,",
}


class TimeIsUpError(Exception):
    """Runs are missing that no time is left for."""


@dataclass
class Comparison:
    """Which runs there are, and what is known of them."""

    options: argparse.Namespace
    records: Records
    progress: ProgressBar
    deadline: float = float("inf")  # on the monotonic clock; no run begins later

    def cells(self) -> list[Cell]:
        """One for each row of the table; learning rates and seeds come later."""
        o = self.options
        grid = itertools.product(o.sparsity, o.methods, o.schedules, o.max_penalties)
        rows = [
            Cell(
                data=o.data,
                model=o.model,
                method=method,
                seed=0,
                updates=o.updates,
                batch=o.batch,
                dense_rate=0.0,
                rate=0.0,
                sparsity=sparsity,
                search=o.search,
                cycles=o.cycles,
                magnitude=o.magnitude,
                schedule=schedule,
                max_penalty=ceiling,
                hold=o.hold,
                delay=o.delay,
                rate_from=o.rate_from,
                pattern=o.pattern,
                optimizer=o.optimizer or "",
                recalibrate=o.recalibrate,
                anneal=o.anneal,
                decay=o.decay,
                weight_decay=o.weight_decay,
                contents=contents(o.data, load(o.data, o.data_dir, torch.device("cpu"), o.pixels)),
                pixels=o.pixels,
                autocast=o.autocast,
                compile=o.compile,
                ranks=dist.get_world_size() if dist.is_initialized() else 1,
            )
            for sparsity, method, schedule, ceiling in grid
        ]
        rows.sort(key=lambda row: o.methods.index(row.method))  # and within a method by sparsity
        return list(dict.fromkeys(map(with_its_own, rows)))

    def run(self) -> dict[Cell, dict[str, Any]]:
        """Make what is missing; the results of all final runs."""
        rows = self.cells()
        dense = next((row for row in rows if row.method == "dense"), None)
        if dense is None and any(row.method in SEARCHES and row.anneal == "each" for row in rows):
            dense = with_its_own(replace(rows[0], method="dense"))
        others = [row for row in rows if row.method != "dense"]
        seeds, groups = self.options.seeds, self.candidates([*([dense] if dense else []), *others])
        trials = sum(len(group) for group in groups if len(group) > 1) * self.options.tuning_seeds
        runs = trials + (len(self.candidates(others)) + (dense in rows)) * seeds
        self.progress.start(runs * self.options.updates)

        chosen = self.choose([dense] if dense else [])
        if dense:
            best = chosen[dense].rate
            has_two = {row for row in others if row.method in SEARCHES and row.anneal == "each"}
            others = [replace(row, dense_rate=best if row in has_two else 0.0) for row in others]
        chosen = {row: chosen[row] for row in rows if row in chosen} | self.choose(others)
        return self.make(replace(cell, seed=seed) for cell in chosen.values() for seed in range(seeds))

    def candidates(self, rows: list[Cell]) -> list[list[Cell]]:
        """What is chosen from for each row of the table: learning rates, and ceilings if these are to be chosen."""
        groups: dict[Cell, list[Cell]] = {}
        for row in rows:
            same = replace(row, max_penalty=0.0) if self.options.choose_penalty else row
            rates = self.options.rates if row.method in PENALIZED else self.options.rates_without_penalty
            groups.setdefault(same, []).extend(replace(row, rate=rate) for rate in rates)
        return list(groups.values())

    def choose(self, rows: list[Cell]) -> dict[Cell, Cell]:
        """The rows that are kept, each with its learning rate: those with the best mean accuracy on validation data."""
        groups = self.candidates(rows)
        seeds = range(TUNING_SEED, TUNING_SEED + self.options.tuning_seeds)
        trials = {
            cell: [replace(cell, seed=seed, tuning=True) for seed in seeds]
            for group in groups
            for cell in group
            if len(group) > 1
        }
        results = self.make(cell for cells in trials.values() for cell in cells)

        def mean_accuracy(cell: Cell) -> float:
            return sum(results[trial]["validation"] for trial in trials[cell])

        best = [max(group, key=mean_accuracy) if len(group) > 1 else group[0] for group in groups]
        return {replace(cell, rate=0.0): cell for cell in best}

    def make(self, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
        """The results of these cells, of which only the missing ones are run."""
        cells = list(cells)
        missing = [cell for cell in cells if cell not in self.records.results]
        self.progress.skip((len(cells) - len(missing)) * self.options.updates)
        engine = choose(self.options.engine, self.options.jobs)
        if missing:
            in_time = itertools.takewhile(lambda _: time.monotonic() < self.deadline, missing)
            for cell, result in engine(in_time, self.options.data_dir, self.options.device, self.progress.advance):
                self.records.add(cell, result)
                self.progress.say(cell, result)
        if not all(cell in self.records.results for cell in cells):
            raise TimeIsUpError
        return {cell: self.records.results[cell] for cell in cells}


def subject(options: argparse.Namespace) -> str:
    """The network and the data, with their sizes."""
    data = load(options.data, options.data_dir, torch.device("cpu"), options.pixels)
    weights = sum(p.numel() for p in MODELS[options.model].build(data.example_shape, data.classes).parameters())
    shape = " × ".join(map(str, data.example_shape))
    on = "" if options.data == options.model else f" on {options.data}"
    return f"{options.model} ({weights:,} weights){on} ({data.sizes['train']:,} examples of {shape})"


def description(options: argparse.Namespace, command: list[str], report: Report) -> str:
    data = load(options.data, options.data_dir, torch.device("cpu"), options.pixels)
    sizes = ", ".join(f"{name} {size:,}" for name, size in data.sizes.items())
    rates, others = options.rates, options.rates_without_penalty
    trials, separate = ", ".join(f"{rate:g}" for rate in rates), options.tuning_seeds
    trials = f"learning rate {trials}" if len(rates) == 1 else f"the best of the learning rates {trials}"
    if others != rates:
        trials += f" (methods without a penalty: {', '.join(f'{rate:g}' for rate in others)})"
    if len(rates) > 1 or len(others) > 1:
        trials += f", tried with {separate} separate seed{'s' * (separate > 1)} on the validation part"
    pixels = f", averaged to {options.pixels} × {options.pixels} pixels" if options.pixels else ""
    again = (
        "once, over the search and the ticket together" if options.anneal == "once" else "in each stretch of training"
    )
    delayed = f", after the first {options.delay:.0%} of the search" if options.delay else ""
    early = f" (early: within the first {0.6 * (1 - options.hold):.0%} of what is left of it)"
    early *= "GMP-early" in options.methods
    decayed = "" if options.weight_decay is None else f", weight decay {options.weight_decay:g}"
    own = "the last stretch of training"
    if options.rate_from == "delay":
        own += ", and of the one before it, in which GMP prunes and RST penalizes"
    patterns = {"unstructured": "", "filter": ", whole filters"}
    pattern = patterns.get(options.pattern, f", {options.pattern} along the input dimension")
    anew = f" on {options.recalibrate} training batches" if options.recalibrate else ", not measured anew"
    ceilings = (", or " if options.choose_penalty else " and ").join(f"{p:g}" for p in options.max_penalties)
    if options.choose_penalty:
        ceilings += " (chosen with the learning rate, on the same data)"
    title = options.model if options.data == options.model else f"{options.model} on {options.data}"
    dense = ", ".join(MODELS[options.model].dense_layers) or "none"
    dense = f"\n- Layers that stay dense: {dense}." if options.data == options.model else ""
    masked = "\n- Just masked: validation accuracy between the mask and the training that follows it."
    texts = f"""
- Budget: {options.updates:,} updates of batch {options.batch} for every run; methods that search for a ticket spend
  {options.search:.0%} of them on that. Each method and sparsity: {trials}.
- Learning rates {DECAYS[options.decay]} {again}.
- Data: {sizes}{pixels}.{dense}
- Iterative methods: {options.cycles} rounds or cycles. {MAGNITUDES[options.magnitude]}.
- Optimizer: {options.optimizer or MODELS[options.model].optimizer}{decayed}. BatchNorm after a mask: statistics{anew}.
- GMP prunes {GMP_INTERVALS} times{delayed}{early}; until the search ends its weights count as dense.
- RST: penalty {" and ".join(options.schedules)}, up to {ceilings}, and
  at its ceiling for the last {options.hold:.0%} of a cycle{delayed}. Residual: the share of the norm that the masked
  weights still held when they were set to zero.
- Test accuracy: mean ± half the 95 % interval (Student's t) over {options.seeds} seeds. "− scratch" and so on are
  differences between runs of one seed at one sparsity, with the interval of their mean.
- Training FLOPs: three forward passes per update, where masked weights cost nothing while they are held at zero. In
  brackets: relative to dense training.{masked * report.knows_masked}
- Sparsity is that of the layers that are pruned{pattern}. Rate: learning rate of {own}.
- Python {platform.python_version()}, torch {torch.__version__}, {options.device.type}, autocast {options.autocast},
  compile {"on" if options.compile else "off"}.
"""
    bullets = [" ".join(bullet.split()) for bullet in texts.split("\n- ")[1:]]
    text = "\n".join(fill(f"- {bullet}", PAGE, subsequent_indent="  ", break_on_hyphens=False) for bullet in bullets)
    return f"# {title}\n\n    {shlex.join(command)}\n\n{text}\n\n"


NOT_IN_A_CALL = {"recipe", "data_dir", "pixels", "out", "jobs", "minutes", "engine"}


def compare(
    model: Callable[[], torch.nn.Module],
    data: Callable[[], Mapping[str, Any]],
    *,
    dense_layers: Sequence[str] = (),
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    **options: Any,
) -> Report:
    """The same comparison as a call, for a notebook: on your own model and data, in this process.

    It keeps no records: for what takes hours, put the functions into a file and use the command with ``--recipe``.

    Args:
        model: returns a new module at each call.
        data: returns ``{"train": (x, y), "validation": (x, y), "test": (x, y)}``: tensors as the model reads them, and
            numbers of classes; or ``torch.utils.data.Dataset`` of such pairs.
        dense_layers: names of layers that no method prunes.
        optimizer: a function of parameters and ``lr``; it needs ``rates``. None: as ``--optimizer``.
        options: those of the command: ``methods``, ``sparsity``, ``updates``, ``batch``, ``seeds``, ``rates`` …

    Returns:
        The report, which shows its tables in a notebook; ``draw(path)`` makes the picture, ``write_csv(path)`` a file.

    Raises:
        TypeError: an option that only the command has.
        ValueError: what the functions return, or an option, cannot be used.
    """
    if wrong := NOT_IN_A_CALL & set(options):
        raise TypeError(f"compare() has no {min(wrong)}: use the command for it, with the functions in a --recipe file")
    name = f"{getattr(model, '__name__', 'model')}()"
    given = {
        option: list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        for option, value in options.items()
        if value is not None and value is not False
    }
    add_recipe(name, model, data, dense_layers=dense_layers, optimizer=optimizer, rates=given.get("rates", []))
    argv: list[str] = []
    for option, values in given.items():
        argv += [f"--{option.replace('_', '-')}", *(str(value) for value in values if value is not True)]

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    chosen = parse("", argv, added=name, error=refuse)
    with ProgressBar() as progress:
        return Report(Comparison(chosen, Records(None), progress).run(), subject(chosen))


def main(argv: list[str] | None = None) -> None:
    options = parse(__doc__, argv)
    command = ["python", "examples/compare_tickets.py", *(sys.argv[1:] if argv is None else argv)]
    deadline = time.monotonic() + 60 * options.minutes
    is_distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_distributed:
        if options.device.type == "cuda":
            options.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(options.device)
        dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    is_first = not is_distributed or dist.get_rank() == 0
    options.out.mkdir(parents=True, exist_ok=True)
    records = Records(options.out / "records.jsonl", writes=is_first)
    if is_distributed:
        known = [records.results]
        dist.broadcast_object_list(known, src=0)
        records.results = known[0]
    with ProgressBar(quiet=not is_first) as progress:
        try:
            results = Comparison(options, records, progress, deadline).run()
        except TimeIsUpError:
            progress.console.print(f"{options.minutes:g} minutes are over; the same command makes the other runs")
            return
        if is_first:
            report = Report(results, subject(options))
            text = description(options, command, report) + report.markdown()
            (options.out / "table.md").write_text(text, encoding="utf-8")
            report.write_csv(options.out / "table.csv")
            report.draw(options.out / "picture.png")
            progress.console.print(report.markdown(), soft_wrap=True, highlight=False, markup=False)
            progress.console.print(f"table.md, table.csv, picture.png and records.jsonl are in {options.out}")
    if is_distributed:
        dist.barrier()  # a rank that ends while another still needs its connection can crash
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

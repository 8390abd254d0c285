"""Which settings make RST's transformation worth its updates? A grid of them, judged on the validation part alone.

Every setting of the grid is trained with every learning rate and seed, on the same total budget; its row has the rate
that is best on average. The test part is never looked at, and the seeds are those of ``compare_tickets.py``'s choices,
not of its results. Methods without a penalty (scratch, random-after-dense, L1, LTH) are rows to compare with.

Every finished run is a line in OUT/records.jsonl. The same command again makes only the runs that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import torch
from comparison.cells import Cell
from comparison.data import DATA, contents
from comparison.engines import choose
from comparison.methods import ANNEALED_ONCE, CURVES, DELAYED, METHODS, PENALIZED, SCORES, SEARCHES, with_its_own
from comparison.models import MODELS, OPTIMIZERS
from comparison.options import PATTERNS, TUNING_SEED, sparsities_of
from comparison.progress import ProgressBar
from comparison.records import Records
from comparison.report import PAGE, estimate, tables
from comparison.training import load

SETTINGS = ("scores", "growth", "search", "anneal", "penalty", "hold", "delay")
SETTINGS += ("optimizer at the mask", "BatchNorm", "rate")
GROWTHS = [f"{curve}-{part}" for curve in CURVES for part in (0.4, 0.6, 0.8, 1)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=DATA, default="digits")
    add("--data-dir", type=Path)
    add("--pixels", type=int, default=0, help="average images to this height and width")
    add("--model", choices=MODELS, default="lenet-300-100")
    add("--methods", nargs="+", choices=METHODS, default=["scratch", "RST"])
    add("--sparsity", nargs="+", type=float, help="default: 0.9 0.98, or what the pattern means")
    add("--pattern", choices=PATTERNS, default="unstructured", help="of the masks")
    add("--magnitudes", nargs="+", choices=SCORES, default=["uniform"], help="see compare_tickets.py")
    text = "of a mask: cubic-0.6 grows over 60 %% of the updates that GMP prunes in, or that λ rises in"
    add("--growths", nargs="+", choices=GROWTHS, default=[""], metavar="G", help=text)
    add("--updates", type=int, default=6000)
    add("--batch", type=int, default=64)
    add("--searches", nargs="+", type=float, default=[0.1, 0.25, 0.5], help="part of the updates before the mask")
    add("--anneals", nargs="+", choices=("each", "once"), default=["each", "once"], help="see compare_tickets.py")
    add("--schedules", nargs="+", choices=("linear", "quadratic", "cubic"), default=["linear", "cubic"])
    add("--max-penalties", nargs="+", type=float, default=[1.0])
    add("--holds", nargs="+", type=float, default=[0.2], help="part of a cycle at the ceiling")
    add("--delays", nargs="+", type=float, default=[0.0], help="part of the search before penalty or GMP begins")
    add("--rate-from", choices=("mask", "delay"), default="mask", help="see compare_tickets.py")
    add("--cycles", type=int, default=3)
    add("--optimizer", choices=OPTIMIZERS, help="default: sgd, and adamw for char-transformer")
    text = "of the optimizer where a stretch of training begins; default: new where its learning rate starts again"
    add("--optimizer-states", nargs="+", choices=("new", "kept"), default=[""], help=text)
    text = "batches that BatchNorm's statistics are measured anew on just after the mask"
    add("--recalibrations", nargs="+", type=int, default=[0], help=text)
    add("--rates", nargs="+", type=float, help="default: three, by optimizer")
    add("--dense-rate", type=float, help="of the search where rates fall in each stretch; default: the rate itself")
    add("--seeds", type=int, default=2)
    add("--jobs", type=int, default=1)
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--out", type=Path, default=Path("search-results"))
    return parser


def settings(options: argparse.Namespace) -> list[Cell]:
    """The grid without rates and seeds; a method varies only in what it has."""
    grid = itertools.product(
        *(options.sparsity, options.methods, options.searches, options.anneals),
        *(options.schedules, options.max_penalties, options.holds, options.delays),
        *(options.optimizer_states, options.recalibrations),
        *(options.magnitudes, options.growths),
    )
    rows = [
        Cell(
            data=options.data,
            model=options.model,
            method=method,
            seed=0,
            updates=options.updates,
            batch=options.batch,
            dense_rate=0.0,
            rate=0.0,
            sparsity=sparsity,
            search=search,
            cycles=options.cycles,
            magnitude=magnitude,
            growth=growth,
            schedule=schedule,
            max_penalty=ceiling,
            hold=hold,
            delay=delay,
            rate_from=options.rate_from,
            pattern=options.pattern,
            optimizer=options.optimizer or "",
            optimizer_state=state,
            recalibrate=recalibrate,
            anneal=anneal,
            contents=contents(options.data, load(options.data, options.data_dir, torch.device("cpu"), options.pixels)),
            pixels=options.pixels,
            tuning=True,
        )
        for sparsity, method, search, anneal, schedule, ceiling, hold, delay, *others in grid
        for state, recalibrate, magnitude, growth in [others]
    ]
    return list(dict.fromkeys(map(with_its_own, rows)))


def table(options: argparse.Namespace, rows: list[Cell], records: Records) -> str:
    def best(row: Cell) -> tuple[float, list[dict]]:
        runs = {rate: [records.results[cell] for cell in runs_of(options, row, rate)] for rate in options.rates}
        return max(runs.items(), key=lambda item: sum(result["validation"] for result in item[1]))

    found = [(row, *best(row)) for row in rows]
    first = {(row.method, row.sparsity): results for row, _, results in reversed(found)}
    found.sort(key=lambda item: (item[0].sparsity, -sum(result["validation"] for result in item[2])))
    lines = []
    several = len({row.variant for row in rows if row.variant}) > 1
    for row, rate, results in found:
        masked, residual = (
            "" if results[0][name] is None else f"{sum(r[name] for r in results) / len(results):.{digits}}"
            for name, digits in (("masked", "1f"), ("residual", "2%"))
        )
        goes_on = row.method in ANNEALED_ONCE
        usual = first[row.method, row.sparsity]
        ahead = [mine["validation"] - other["validation"] for mine, other in zip(results, usual, strict=True)]
        kept = row.optimizer_state or ("new" if row.anneal == "each" else "kept")
        lines.append(
            {
                "sparsity": f"{100 * row.sparsity:g} %",
                "method": f"{row.method} ({row.variant})" if several and row.variant else row.method,
                **({"scores": row.magnitude} if options.magnitudes != ["uniform"] else {}),
                **({"growth": row.growth} if options.growths != [""] else {}),
                "search": f"{100 * row.search:g} %" if row.search else "",
                "anneal": row.anneal if goes_on else "",
                "penalty": "" if several else row.variant,
                "hold": f"{row.hold:g}" if row.method in PENALIZED else "",
                "delay": f"{row.delay:g}" if row.method in DELAYED else "",
                **({"optimizer at the mask": kept if goes_on else ""} if options.optimizer_states != [""] else {}),
                **({"BatchNorm": f"{row.recalibrate}" if goes_on else ""} if options.recalibrations != [0] else {}),
                "rate": f"{rate:g}",
                "masked, %": masked,
                "residual": residual,
                "validation, %": str(estimate([result["validation"] for result in results])),
                "− first": "" if results is usual else estimate(ahead).signed,
            }
        )
    values = {name: {line[name] for line in lines} - {""} for name in SETTINGS if name in lines[0]}
    same = {name: found for name, found in values.items() if len(found) < 2}
    shared = [f"{name} {value}" for name, found in same.items() for value in found]
    lines = [{name: text for name, text in line.items() if name not in same} for line in lines]
    differences = "Differences are to the method's first setting in the command, between runs of one seed."
    text = fill(f"Everywhere, where a method has it: {'; '.join(shared)}. {differences}", PAGE)
    return f"{text}\n\n{tables(lines)}"


def runs_of(options: argparse.Namespace, row: Cell, rate: float) -> list[Cell]:
    dense_rate = (options.dense_rate or rate) if row.method in SEARCHES and row.anneal == "each" else 0.0
    seeds = range(TUNING_SEED, TUNING_SEED + options.seeds)
    return [replace(row, rate=rate, dense_rate=dense_rate, seed=seed) for seed in seeds]


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    options.rates = sorted(options.rates or OPTIMIZERS[options.optimizer or MODELS[options.model].optimizer].rates)
    options.sparsity = sparsities_of(parser, options, default=(0.9, 0.98))
    if ":" in options.pattern and options.growths != [""]:
        parser.error(f"--growths is not for --pattern {options.pattern}")
    options.out.mkdir(parents=True, exist_ok=True)
    records = Records(options.out / "records.jsonl")
    rows = settings(options)
    cells = [cell for row in rows for rate in options.rates for cell in runs_of(options, row, rate)]
    missing = [cell for cell in cells if cell not in records.results]
    with ProgressBar() as progress:
        progress.start(len(missing) * options.updates)
        engine = choose("local", options.jobs)
        for cell, result in engine(missing, options.data_dir, options.device, progress.advance):
            records.add(cell, result)
            progress.say(cell, result)
    text = f"    {shlex.join(['python', 'examples/search_transformation.py', *sys.argv[1:]])}\n\n"
    text += table(options, rows, records)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

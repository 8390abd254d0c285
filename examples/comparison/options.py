"""The options of ``compare_tickets.py``, and whether they go together."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from .data import DATA
from .methods import EXTRA, METHODS, PAPER, SCORES, WITH_PATTERN
from .models import MODELS, OPTIMIZERS
from .recipe import RecipeError, read_recipe
from .training import forget, load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TUNING_SEED = 1000  # the first seed of the runs that choose a learning rate; the results begin at 0
PATTERNS = {"unstructured": None, "2:4": 0.5, "1:4": 0.75, "filter": None}  # and what sparsity each means
MAGNITUDES = {
    "uniform": "Magnitudes are compared within each layer",
    "global": "Magnitudes are compared across all layers",
    "taylor": "|gradient × weight| on 10 training batches is compared within each layer",
    "taylor-global": "|gradient × weight| on 10 training batches is compared across all layers",
    "lamp": "LAMP's scores are compared across all layers",
}


RECIPE = """my_recipe.py, with what it may hold:
  def model():  # called anew for every run
      return nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

  def data():  # tensors as your model reads them, and numbers of classes; or torch.utils.data.Datasets of such pairs
      return {"train": (x, y), "validation": (x_validation, y_validation), "test": (x_test, y_test)}

  dense_layers = ["3"]  # names of layers that no method prunes, such as the first and the last; default: none
  rates = [0.03, 0.1]  # learning rates to choose from; default: those of --optimizer

  def optimizer(parameters, lr):  # in place of --optimizer and --weight-decay; needs rates
      return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)

Another model, another recipe or other data make other runs: results of one are never taken for those of another.
"""


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  the images of Debian's package dataset-fashion-mnist, two runs at a time\n"
        "    python examples/compare_tickets.py --data fashion-mnist --jobs 2 --out results\n"
        "  how RST's penalty should grow, and how far\n"
        "    python examples/compare_tickets.py --methods scratch LTH RST \\\n"
        "      --schedules linear quadratic cubic --max-penalties 0.1 1 10 --out ablation\n"
        "  two GPUs for each run, in mixed precision\n"
        "    torchrun --nproc-per-node 2 examples/compare_tickets.py --device cuda --autocast bfloat16 \\\n"
        "      --data cifar10 --data-dir data --model resnet32 --updates 60000 --batch 128 --out cifar\n"
        "  the usual recipe of ResNet-20, eight runs at a time on one GPU, and none begun after six minutes\n"
        "    python examples/compare_tickets.py --device cuda --jobs 8 --minutes 6 --data cifar10 --data-dir data \\\n"
        "      --model resnet20 --updates 64000 --batch 128 --rates 0.1 --decay steps --weight-decay 1e-4 --out cifar\n"
        "  your own classifier and data\n"
        "    python examples/compare_tickets.py --recipe my_recipe.py --updates 2000 --sparsity 0.9 --out mine\n"
        f"\n{RECIPE}",
    )
    what = parser.add_argument_group("what is compared").add_argument
    text = "a Python file with your own model() and data(), as shown below, in place of --model and --data"
    what("--recipe", type=Path, metavar="FILE", help=text)
    what("--data", choices=DATA, help="default: digits, which come with scikit-learn")
    text = "folder with the idx files (fashion-mnist) or with cifar-10-batches-bin (cifar10); for text, the file"
    what("--data-dir", type=Path, metavar="PATH", help=text)
    text = "average images to N × N pixels, for computers without a GPU; default: as they are"
    what("--pixels", type=at_least(1), default=0, metavar="N", help=text)
    what("--model", choices=MODELS, help="default: lenet-300-100")
    text = f"of those above; default: all but {', '.join(EXTRA)}"
    what("--methods", nargs="+", choices=METHODS, default=list(PAPER), metavar="M", help=text)
    text = "fractions of weights to remove; default: 0.9 0.95 0.98, or what the pattern means"
    what("--sparsity", nargs="+", type=between(0, 1), metavar="S", help=text)
    text = f"of the masks: {', '.join(PATTERNS)}; default: unstructured"
    what("--pattern", choices=PATTERNS, default="unstructured", metavar="P", help=text)
    what("--seeds", type=at_least(1), default=3, metavar="N", help="runs per method and sparsity; default: 3")

    budget = parser.add_argument_group("what every run may spend").add_argument
    budget("--updates", type=at_least(20), default=6000, metavar="N", help="in total, for every method; default: 6000")
    budget("--batch", type=at_least(1), default=64, metavar="N", help="examples per update; default: 64")
    text = "part of the updates that methods spend on the search for a ticket, before they train it; default: 0.5"
    budget("--search", type=between(0, 1), default=0.5, metavar="F", help=text)
    budget("--optimizer", choices=OPTIMIZERS, help="default: sgd, and adamw for char-transformer")
    text = "learning rates that each method may choose from; default: the recipe's, or three, by optimizer"
    budget("--rates", nargs="+", type=above_zero, metavar="R", help=text)
    text = "those of methods without a penalty: with --choose-penalty, as many as others have of both; default: --rates"
    budget("--rates-without-penalty", nargs="+", type=above_zero, metavar="R", help=text)
    text = (
        "each: the learning rate rises and falls in each stretch of training, with a new optimizer; once: over the"
        " search and the training of the ticket together, except for LTH, which starts again; default: each"
    )
    budget("--anneal", choices=("each", "once"), default="each", help=text)
    text = (
        "of the learning rate in a stretch: cosine, after a warm-up of 5 %%; or steps, without one, to a tenth after a"
        " half and after three quarters of the updates; default: cosine"
    )
    budget("--decay", choices=("cosine", "steps"), default="cosine", help=text)
    text = "of the optimizer; default: 5e-4 for sgd, 0.05 for adamw"
    budget("--weight-decay", type=at_least(0, float), metavar="D", help=text)
    text = "runs, with separate seeds, that try each learning rate; default: 1"
    budget("--tuning-seeds", type=at_least(1), default=1, metavar="N", help=text)

    how = parser.add_argument_group("how the methods work").add_argument
    text = "cycles of RST-iter and rounds of LTH-iter; default: 3"
    how("--cycles", type=at_least(1), default=3, metavar="N", help=text)
    text = "how L1, GMP and LTH compare magnitudes: within each layer, or across all; L1 and GMP also in place of"
    text += " them |gradient × weight|, or LAMP's scores; default: uniform"
    how("--magnitude", choices=MAGNITUDES, default="uniform", help=text)
    text = "growth of RST's penalty: linear, quadratic, cubic; several make a row each; default: linear"
    how("--schedules", nargs="+", choices=("linear", "quadratic", "cubic"), default=["linear"], metavar="S", help=text)
    text = "ceiling of RST's penalty; several make a row each; default: 1"
    how("--max-penalties", nargs="+", type=above_zero, default=[1.0], metavar="L", help=text)
    text = "choose among several ceilings as among learning rates, on validation data, in place of a row for each"
    how("--choose-penalty", action="store_true", help=text)
    text = "part of a cycle in which the penalty stays at its ceiling; default: 0.2"
    how("--hold", type=between(0, 1), default=0.2, metavar="F", help=text)
    text = "part of the search that GMP and all forms of RST train plainly before they begin; default: 0"
    how("--delay", type=between(0, 1), default=0.0, metavar="F", help=text)
    text = "where the rate that is chosen for each method begins: at the mask, or after the delay; default: mask"
    how("--rate-from", choices=("mask", "delay"), default="mask", help=text)
    text = "measure BatchNorm's statistics anew on N training batches just after a mask; default: 0, not at all"
    how("--recalibrate", type=at_least(0), default=0, metavar="N", help=text)

    where = parser.add_argument_group("where and how it runs").add_argument
    text = "folder for records, table and picture; default: comparison-results"
    where("--out", type=Path, default=Path("comparison-results"), metavar="DIR", help=text)
    where("--device", type=torch.device, default=torch.device("cpu"), help='such as "cuda"; default: cpu')
    where("--jobs", type=at_least(1), default=1, metavar="N", help="runs at a time, a process each; default: 1")
    text = "begin no further run after N minutes; the same command goes on with them; default: no limit"
    where("--minutes", type=above_zero, default=float("inf"), metavar="N", help=text)
    text = "local, or ray for the machines of a Ray cluster (pip install '.[ray]'); default: local"
    where("--engine", choices=("local", "ray"), default="local", help=text)
    text = "mixed precision: bfloat16, float16 or off; default: off"
    where("--autocast", choices=("off", "bfloat16", "float16"), default="off", help=text)
    where("--compile", action="store_true", help="run the model through torch.compile")
    return parser


def at_least(least: int, kind: type[float] = int) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not kind(text) >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return kind(text)

    return number


def between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not low < float(text) < high:
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low:g} and {high:g}")
        return float(text)

    return number


def above_zero(text: str) -> float:
    return between(0, float("inf"))(text)


def sparsities_of(
    parser: argparse.ArgumentParser, options: argparse.Namespace, default: Sequence[float] = (0.9, 0.95, 0.98)
) -> list[float]:
    """Those that were given, or follow from the pattern, where the methods have it."""
    without = [method for method in options.methods if method not in WITH_PATTERN]
    if options.pattern != "unstructured" and without:
        parser.error(f"--pattern {options.pattern} is not for {', '.join(without)}: name others with --methods")
    implied = PATTERNS[options.pattern]
    if implied is None:
        return options.sparsity or list(default)
    if any(sparsity != implied for sparsity in options.sparsity or ()):
        parser.error(f"--pattern {options.pattern} means a sparsity of {implied:g}: leave out --sparsity")
    return [implied]


def parse(
    description: str, argv: list[str] | None, *, added: str = "", error: Callable[[str], NoReturn] | None = None
) -> argparse.Namespace:
    """The options; ``added`` is the name of a recipe that is known already, ``error`` is called in place of an exit."""
    parser = make_parser(description)
    parser.error = error or parser.error  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    if options.recipe:
        try:
            added = read_recipe(options.recipe)
        except RecipeError as wrong:
            parser.error(f"--recipe {wrong}")
    if added:
        if given := [name for name in ("data", "data_dir", "model", "pixels") if getattr(options, name)]:
            parser.error(f"--recipe has model and data: leave out --{given[0].replace('_', '-')}")
        chosen = options.optimizer or MODELS[added].optimizer
        if options.weight_decay is not None and chosen.startswith("optimizer()"):
            parser.error("--weight-decay: give it to the optimizer in optimizer() of the recipe")
        options.data = options.model = added
        options.data_dir = options.recipe
        forget()
    options.data, options.model = options.data or "digits", options.model or "lenet-300-100"
    recipe = MODELS[options.model]
    optimizer = OPTIMIZERS[options.optimizer or recipe.optimizer]
    own_rates = () if options.optimizer else recipe.rates
    options.rates = sorted(set(options.rates or own_rates or optimizer.rates))
    options.rates_without_penalty = sorted(set(options.rates_without_penalty or options.rates))
    if options.weight_decay == optimizer.weight_decay:
        options.weight_decay = None  # or equal runs would count as different ones
    options.sparsity = sparsities_of(parser, options)
    for name in ("methods", "sparsity", "schedules", "max_penalties"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if (recipe.reads == "text") != (options.data == "text"):
        parser.error(f"--model {options.model} reads {recipe.reads}, --data {options.data} is something else")
    if options.pixels and options.data == "text":
        parser.error("--pixels is for images")
    if ranks > 1 and (options.jobs > 1 or options.engine != "local"):
        parser.error("under torchrun all ranks train one model together: leave out --jobs and --engine")
    if options.minutes < float("inf") and (ranks > 1 or options.engine != "local"):
        parser.error("--minutes is for runs in processes of one machine: leave out torchrun and --engine")
    if options.engine == "ray" and importlib.util.find_spec("ray") is None:
        parser.error("--engine ray needs Ray: pip install '.[ray]'")
    if options.batch % ranks:
        parser.error(f"--batch {options.batch} cannot be shared equally by {ranks} ranks")
    if options.rate_from == "delay" and (not options.delay or options.anneal == "once"):
        parser.error("--rate-from delay needs a --delay, and --anneal each")
    scores, distribution = SCORES[options.magnitude]
    if options.pattern != "unstructured" and distribution == "global":
        parser.error(f"--magnitude {options.magnitude} is for --pattern unstructured")
    if scores and (lotteries := [method for method in options.methods if method.startswith("LTH")]):
        parser.error(f"--magnitude {options.magnitude} is not for {lotteries[0]}: name others with --methods")
    search = round(options.search * options.updates)
    if search < 5 * options.cycles or round(search * (1 - options.delay)) < 2 * options.cycles:
        parser.error(f"--updates {options.updates} leave too few for a search in {options.cycles} cycles")
    try:
        torch.empty(0, device=options.device)
        load(options.data, options.data_dir, torch.device("cpu"), options.pixels)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error))
    return options

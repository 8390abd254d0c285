"""The methods that are compared. Each makes the same number of updates: some to search for a ticket, the rest on it.

A method is a function of a :class:`comparison.training.Job`. What it holds at zero is held by the same mechanism in
each, and what it trains is trained by the same loop.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import GradualPruning, LotteryTicket, hold, magnitude_masks, random_ticket

from .models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .cells import Cell
    from .training import Job


GMP_INTERVALS = 20
CURVES = {"linear": 1, "quadratic": 2, "cubic": 3}  # of a mask's growth
SCORED_BATCHES = 10


def dense(job: Job) -> None:
    job.train(job.cell.updates, job.cell.rate)


def scratch(job: Job, distribution: str = "uniform") -> None:
    """A random ticket, trained from initialization."""
    job.ticket = random_ticket(job.model, job.cell.sparsity, distribution=distribution, **job.same_mask)
    job.train(job.cell.updates, job.cell.rate)


def scratch_erk(job: Job) -> None:
    scratch(job, "erk")


def scratch_scaled(job: Job) -> None:
    """The random ticket, with larger weights where it is sparser: signals keep the size they have in the dense network.

    Each output sums over fewer inputs: its variance, and that of the gradients, falls with the weights that are left.
    """
    job.ticket = random_ticket(job.model, job.cell.sparsity, **job.same_mask)
    parameters = dict(job.model.named_parameters())
    with torch.no_grad():
        for name, mask in job.masks.items():
            parameters[name].mul_((mask.numel() / int(mask.sum())) ** 0.5)
    job.train(job.cell.updates, job.cell.rate)


def scratch_short(job: Job) -> None:
    """The random ticket from initialization, with no more updates than RST has left for it after its search."""
    job.ticket = random_ticket(job.model, job.cell.sparsity, **job.same_mask)
    job.forgone = job.search
    job.train(job.left, job.cell.rate)


def magnitude(job: Job) -> None:
    """Train, remove the smallest weights, finetune."""
    job.train(job.search, job.cell.dense_rate)
    hold_largest(job, job.cell.sparsity, pattern=job.cell.pattern)
    job.look_at_masked()
    job.train(job.left, job.cell.rate)


def hold_largest(job: Job, sparsity: float, **options: Any) -> None:
    masks = largest(job, sparsity, **options)
    if job.ticket is not None:
        job.ticket.remove()
    job.ticket = hold(job.model, masks)


def largest(job: Job, sparsity: float, **options: Any) -> dict[str, torch.Tensor]:
    scores, distribution = SCORES[job.cell.magnitude]
    chosen = {"scores": scores and scores(job), "distribution": distribution, "exclude": job.recipe.dense_layers}
    return magnitude_masks(job.model, sparsity, **chosen, **options)


def taylor(job: Job) -> dict[str, torch.Tensor]:
    """|gradient × weight|, to first order what the loss would change by; summed over training batches."""
    scores: dict[str, torch.Tensor] = {}
    parameters = dict(job.model.named_parameters())
    job.model.eval()  # BatchNorm's statistics stay
    for x, y in itertools.islice(job.data.batches(job.cell.batch, job.cell.seed), SCORED_BATCHES):
        loss = F.cross_entropy(job.model(x).flatten(0, -2), y.flatten())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            scores[name] = scores.get(name, 0) + (gradient * parameter.detach()).abs()
    job.model.train()
    return scores


def lamp(job: Job) -> dict[str, torch.Tensor]:
    """A weight's square as a share of those in its layer that are no smaller (Lee et al., arXiv 2010.07611)."""
    scores = {}
    for name, parameter in job.model.named_parameters():
        squares, order = parameter.detach().square().flatten().sort(stable=True)
        shares = squares / squares.flip(0).cumsum(0).flip(0)
        scores[name] = torch.empty_like(shares).scatter_(0, order, shares).view_as(parameter)
    return scores


# How weights are compared: by which scores in place of their magnitudes, and within which layers.
SCORES: dict[str, tuple[Callable[[Job], Mapping[str, torch.Tensor]] | None, str]] = {
    "uniform": (None, "uniform"),
    "global": (None, "global"),
    "taylor": (taylor, "uniform"),
    "taylor-global": (taylor, "global"),
    "lamp": (lamp, "global"),
}


def gradual(job: Job) -> None:
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): more and more of the smallest weights go.

    The sparsity grows as 1 - (1 - progress)³, in equal intervals; between them the masks stay.
    """
    job.train_delay()
    length = job.search - sum(job.done.values())
    shares = growth(job.cell.growth or "cubic-1", length)
    update = itertools.count(1)

    def prune() -> None:
        if share := shares.get(next(update)):
            hold_largest(job, job.cell.sparsity * share, within=job.masks, pattern=job.cell.pattern)

    if job.cell.pattern == "unstructured" or job.cell.growth:
        job.train(length, job.search_rate, after_update=prune)
    else:  # the library's, which grows over 0.6 of its steps; its counts are rounded otherwise than in earlier tables
        prune_gradually(job, length, steps=int(length / 0.6))
    job.look_at_masked()
    job.train(job.left, job.cell.rate)


def gradual_early(job: Job) -> None:
    """GMP-RST without its penalty: masks that are in force at once, and complete as early."""
    job.train_delay()
    length = job.search - sum(job.done.values())
    prune_gradually(job, length, **steps_and_hold(job, length))
    job.look_at_masked()
    job.train(job.left, job.cell.rate)


def prune_gradually(job: Job, length: int, **schedule: int) -> None:
    pruning = gradually(job, **schedule, intervals=GMP_INTERVALS, max_penalty=0)
    job.train(length, job.search_rate, after_update=pruning.step)
    pruning.finalize()
    job.ticket = pruning


def growth(text: str, updates: int) -> dict[int, float]:
    """After which updates a mask grows, and which share of it there is from then on; "cubic-0.6": over 60 % of them."""
    curve, _, part = text.partition("-")
    length = round(float(part) * updates)
    ends = (length * number // GMP_INTERVALS for number in range(1, GMP_INTERVALS + 1))
    return {end: 1 - (1 - end / length) ** CURVES[curve] for end in ends}


def lottery(job: Job, rounds: int = 1) -> None:
    """Train, remove the smallest weights, rewind the others to initialization, train again."""
    job.ticket = ticket = LotteryTicket(
        job.model,
        job.cell.sparsity,
        rounds=rounds,
        distribution=job.cell.magnitude,
        exclude=job.recipe.dense_layers,
    )
    for number in range(rounds):
        job.train(job.search * (number + 1) // rounds - job.search * number // rounds, job.cell.dense_rate)
        ticket.prune_and_rewind()
    job.train(job.left, job.cell.rate)


def lottery_iterative(job: Job) -> None:
    lottery(job, job.cell.cycles)


def random_after_dense(job: Job) -> None:
    """RST without its penalty: train, mask at random, finetune."""
    job.train(job.search, job.cell.dense_rate)
    job.ticket = random_ticket(job.model, job.cell.sparsity, **job.same_mask)
    job.look_at_masked()
    job.train(job.left, job.cell.rate)


def rst(job: Job, cycles: int = 1, distribution: str = "uniform") -> None:
    """A random mask, transformed."""
    job.train_delay()
    sparsity, others = job.cell.sparsity, {"cycles": cycles, "distribution": distribution, **job.same_mask}
    transform(job, lambda **schedule: RSTScheduler(job.model, sparsity, **schedule, **others), cycles)


def magnitude_rst(job: Job) -> None:
    """The mask of the largest weights that the plain training has made, transformed."""
    job.train_delay()
    masks = largest(job, job.cell.sparsity, pattern=job.cell.pattern)
    transform(job, lambda **schedule: RSTScheduler(job.model, masks=masks, **schedule))


def magnitude_rst_norm(job: Job) -> None:
    """The same with BatchNorm's weight and bias behind each masked filter, for it scales up again what shrinks."""
    job.train_delay()
    masks = largest(job, job.cell.sparsity, pattern=job.cell.pattern)
    for (name, _), (after, norm) in itertools.pairwise(job.model.named_modules()):
        mask = masks.get(f"{name}.weight")
        if isinstance(norm, nn.BatchNorm2d) and mask is not None and not (kept := mask.flatten(1).any(1)).all():
            masks |= {f"{after}.weight": kept, f"{after}.bias": kept}
    transform(job, lambda **schedule: RSTScheduler(job.model, masks=masks, **schedule))


def gradual_rst(job: Job) -> None:
    """A mask that takes more and more of the smallest weights, transformed while it grows."""
    job.train_delay()
    grown = Growing if job.cell.growth else gradually
    transform(job, lambda **schedule: grown(job, **schedule))


def gradually(job: Job, **schedule: Any) -> GradualPruning:
    scores, distribution = SCORES[job.cell.magnitude]
    others = {"distribution": distribution, "pattern": job.cell.pattern, "exclude": job.recipe.dense_layers}
    return GradualPruning(job.model, job.cell.sparsity, scores=scores and (lambda _: scores(job)), **schedule, **others)


class Growing(RSTScheduler):
    """What GradualPruning does, with another growth of the mask."""

    def __init__(self, job: Job, *, steps: int, **schedule: Any) -> None:
        dense = {name: torch.ones_like(mask) for name, mask in largest(job, job.cell.sparsity).items()}
        super().__init__(job.model, masks=dense, steps=steps, **schedule)
        self.job, self.shares, self.update = job, growth(job.cell.growth, steps), itertools.count(1)

    def step(self) -> None:
        super().step()
        if share := self.shares.get(next(self.update)):
            cell = self.job.cell
            self.set_masks(largest(self.job, cell.sparsity * share, within=self.masks, pattern=cell.pattern))


def transform(job: Job, build: Callable[..., RSTScheduler], cycles: int = 1) -> None:
    """Train under the growing penalty, mask, finetune."""
    cell = job.cell
    updates = job.search - sum(job.done.values())
    schedule = steps_and_hold(job, updates // cycles)
    job.ticket = rst = build(**schedule, max_penalty=cell.max_penalty, schedule=cell.schedule)
    with warnings.catch_warnings():  # the table says how much was left
        warnings.filterwarnings("ignore", message="with lr=|the masked weights (still held|come to rest)")
        job.train(updates, job.search_rate, after_update=rst.step)
        job.residual = rst.residual()
        rst.finalize()
    job.look_at_masked()
    job.train(job.left, cell.rate)


def steps_and_hold(job: Job, length: int) -> dict[str, int]:
    held = min(length - 1, round(job.cell.hold * length))
    return {"steps": length - held, "hold": held}


def rst_erk(job: Job) -> None:
    rst(job, distribution="erk")


def rst_iterative(job: Job) -> None:
    rst(job, job.cell.cycles)


METHODS: dict[str, Callable[[Job], None]] = {
    "dense": dense,
    "scratch": scratch,
    "scratch-ERK": scratch_erk,
    "scratch-scaled": scratch_scaled,
    "scratch-short": scratch_short,
    "L1": magnitude,
    "GMP": gradual,
    "GMP-early": gradual_early,
    "LTH": lottery,
    "LTH-iter": lottery_iterative,
    "random-after-dense": random_after_dense,
    "L1-RST": magnitude_rst,
    "L1-RST-norm": magnitude_rst_norm,
    "GMP-RST": gradual_rst,
    "RST": rst,
    "RST-ERK": rst_erk,
    "RST-iter": rst_iterative,
}
EXTRA = (
    "scratch-scaled",
    "scratch-short",
    "GMP",
    "GMP-early",
    "L1-RST",
    "L1-RST-norm",
    "GMP-RST",
    "RST-ERK",
)  # compared with when they are asked for
PAPER = [method for method in METHODS if method not in EXTRA]
BY_MAGNITUDE = {"L1", "GMP", "GMP-early", "LTH", "LTH-iter", "L1-RST", "L1-RST-norm", "GMP-RST"}
PENALIZED = {"L1-RST", "L1-RST-norm", "GMP-RST", "RST", "RST-ERK", "RST-iter"}
SEARCHES = BY_MAGNITUDE | PENALIZED | {"random-after-dense"}
ITERATIVE = {"LTH-iter", "RST-iter"}
ANNEALED_ONCE = SEARCHES - {"LTH", "LTH-iter"}  # where nothing is rewound
DELAYED = {*PENALIZED, "GMP", "GMP-early"}
GROWING = {"GMP", "GMP-RST"}
WITH_PATTERN = {"dense", "scratch", "random-after-dense", "RST", *BY_MAGNITUDE} - {"LTH", "LTH-iter"}


def with_its_own(cell: Cell) -> Cell:
    """The cell, with nothing set that its method does not have: or equal runs would count as different ones."""
    method, unused = cell.method, {}
    if method == "dense":
        unused |= {"sparsity": 0.0}
    if method not in SEARCHES and method != "scratch-short":
        unused |= {"search": 0.0}
    if method not in ITERATIVE:
        unused |= {"cycles": 1}
    if method not in BY_MAGNITUDE:
        unused |= {"magnitude": ""}
    if method not in ANNEALED_ONCE:
        unused |= {"anneal": "each", "optimizer_state": "", "recalibrate": 0}
    elif cell.optimizer_state == ("new" if cell.anneal == "each" else "kept"):
        unused |= {"optimizer_state": ""}
    if method not in PENALIZED:
        unused |= {"schedule": "", "max_penalty": 0.0}
    if method not in PENALIZED | {"GMP-early"}:
        unused |= {"hold": 0.0}
    if method not in GROWING:
        unused |= {"growth": ""}
    if method not in DELAYED:
        unused |= {"delay": 0.0, "rate_from": "mask"}
    if method == "dense":
        unused |= {"pattern": "unstructured"}
    if cell.optimizer == MODELS[cell.model].optimizer:
        unused |= {"optimizer": ""}
    return replace(cell, **unused)

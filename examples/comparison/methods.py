"""The methods that are compared. Each makes the same number of updates: some to search for a ticket, the rest on it.

A method is a function of a :class:`comparison.training.Job`. What it holds at zero is held by the same mechanism in
each, and what it trains is trained by the same loop.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import LotteryTicket, hold, magnitude_masks, random_ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cells import Cell
    from .training import Job


def dense(job: Job) -> None:
    job.train(job.cell.updates, job.cell.rate)


def scratch(job: Job, distribution: str = "uniform") -> None:
    """A random ticket, trained from initialisation."""
    job.ticket = random_ticket(job.model, job.cell.sparsity, distribution=distribution, **job.same_mask)
    job.train(job.cell.updates, job.cell.rate)


def scratch_erk(job: Job) -> None:
    scratch(job, "erk")


def magnitude(job: Job) -> None:
    """Train, remove the smallest weights, finetune."""
    job.train(job.search, job.cell.dense_rate)
    masks = magnitude_masks(
        job.model, job.cell.sparsity, distribution=job.cell.magnitude, exclude=job.recipe.dense_layers
    )
    job.ticket = hold(job.model, masks)
    job.look_at_masked()
    job.train(job.left, job.cell.rate)


def lottery(job: Job, rounds: int = 1) -> None:
    """Train, remove the smallest weights, rewind the others to initialisation, train again."""
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


def rst(job: Job, cycles: int = 1) -> None:
    """Train under the growing penalty, mask, finetune."""
    cell = job.cell
    delay = round(cell.delay * job.search)
    if delay:
        job.train(delay, cell.dense_rate)
    length = (job.search - delay) // cycles
    held = min(length - 1, round(cell.hold * length))
    job.ticket = rst = RSTScheduler(
        job.model,
        cell.sparsity,
        steps=length - held,
        hold=held,
        max_penalty=cell.max_penalty,
        schedule=cell.schedule,
        cycles=cycles,
        **job.same_mask,
    )
    with warnings.catch_warnings():  # the table says how much was left
        warnings.filterwarnings("ignore", message="with lr=|the masked weights still held")
        job.train(job.search - delay, cell.dense_rate, after_update=rst.step)
        job.residual = rst.residual()
        rst.finalize()
    job.look_at_masked()
    job.train(job.left, cell.rate)


def rst_iterative(job: Job) -> None:
    rst(job, job.cell.cycles)


METHODS: dict[str, Callable[[Job], None]] = {
    "dense": dense,
    "scratch": scratch,
    "scratch-ERK": scratch_erk,
    "L1": magnitude,
    "LTH": lottery,
    "LTH-iter": lottery_iterative,
    "random-after-dense": random_after_dense,
    "RST": rst,
    "RST-iter": rst_iterative,
}
SEARCHES = {"L1", "LTH", "LTH-iter", "random-after-dense", "RST", "RST-iter"}
BY_MAGNITUDE = {"L1", "LTH", "LTH-iter"}
ITERATIVE = {"LTH-iter", "RST-iter"}
ANNEALED_ONCE = {"L1", "random-after-dense", "RST", "RST-iter"}  # where nothing is rewound
PENALISED = {"RST", "RST-iter"}


def with_its_own(cell: Cell) -> Cell:
    """The cell, with nothing set that its method does not have: or equal runs would count as different ones."""
    method, unused = cell.method, {}
    if method == "dense":
        unused |= {"sparsity": 0.0}
    if method not in SEARCHES:
        unused |= {"search": 0.0}
    if method not in ITERATIVE:
        unused |= {"cycles": 1}
    if method not in BY_MAGNITUDE:
        unused |= {"magnitude": ""}
    if method not in ANNEALED_ONCE:
        unused |= {"anneal": "each"}
    if method not in PENALISED:
        unused |= {"schedule": "", "max_penalty": 0.0, "hold": 0.0, "delay": 0.0}
    return replace(cell, **unused)

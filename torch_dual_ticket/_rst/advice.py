"""Early warnings of a penalty that cannot do its work; what is not certain then, finalize() says: ``residual.py``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW

from .._engine.batch import Batch
from .._engine.optimizer_hooks import held_by
from .._engine.ticket import Ticket
from .._tensors.async_scalar import AsyncScalar
from .residual import ADAM_AT_FULL_SPEED, MAX_RESIDUAL, highest_rate, sgd_limit, sums
from .schedule import Timeline

_DIVERGED = math.log(1e6)  # growth since the weights were smallest: the loss's gradients keep them from vanishing


class Advice:
    """What ``step()`` says of SGD or Adam, once, after a tenth of the schedule: on GPUs, or in a warm-up, later."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._time = timeline, max(2, min(timeline.total // 10, timeline.per_cycle // 2))
        self._rates: list[Any] = []  # of each parameter, at the first scheduler step after a start
        self._message, self._squares = "", list[AsyncScalar]()  # of each parameter: what will be left, what is kept

    def __getstate__(self) -> dict[str, Any]:
        return Advice(self._timeline).__dict__  # numbers on their way from a device cannot be copied

    def look(self, ticket: Ticket, before: int, after: int) -> None:
        """Call it at each scheduler step, with their number before and after, while the ticket knows the updates."""
        if before == after or after > self._time or (self._rates and after < self._time):
            return
        updates = ticket.updates.count_by_optimizer
        found = [(one, held, made) for one, held in held_by(ticket) if (made := updates[id(one)])]
        first, groups = self._rates, [group for _, held, _ in found for group in held.groups]
        self._rates = first or [group.get("lr") for group in groups]
        if after < self._time or len(found) != 1 or not len(ticket.parameters) == len(groups) == len(first):
            return
        # In a warm-up a scheduler of torch says how far lr will rise.
        has_risen = not _are_within(groups, first)
        if not has_risen or _are_within(groups, [highest_rate({**group, "lr": None}) for group in groups]):
            self._foresee(ticket, *found[0])
            # While lr rises more is certain later: look again then. At 0 there is no further look.
            self._time *= 2 if has_risen and 4 * after <= self._timeline.total else 0

    @torch.no_grad()
    def _foresee(self, ticket: Ticket, optimizer: Any, held: Batch, made: int) -> None:
        """SGD shrinks a weight in each update by a factor that is known; Adam moves it by no more than lr."""
        try:
            penalties = [self._timeline.penalty(step) for step in range(self._timeline.per_cycle)]
        except Exception:  # of a custom schedule: step() raises it when it comes to that point
            return
        group, updates = max(held.groups, key=highest_rate), made * (self._timeline.total - self._time)
        would_wait = any(parameter.device.type not in ("cpu", "cuda") for _, parameter in held)
        if max(penalties) <= 0 or not updates or would_wait:
            return
        lr = highest_rate(group)
        exponent, reach = lr * group.get("weight_decay", 0.0) * updates, 0.0
        start = f"with lr={lr:g}, {updates:,} more updates will leave the masked weights at least {{:.0%}} of the norm,"
        start += " and finalize() will remove that."
        if type(optimizer) in (Adam, AdamW):  # a subclass may update in another way
            reach, self._message = lr * updates, f"{start} {ADAM_AT_FULL_SPEED}"
        elif type(optimizer) is SGD and group["momentum"] < 1:
            bound = f"lr times max_penalty must stay below {sgd_limit(group):g} with this SGD"
            shrinkage = [_logarithms(group, lr * (penalty + group["weight_decay"]))[0] for penalty in penalties]
            exponent = made * (sum(shrinkage) * self._timeline.cycles - sum(shrinkage[: self._time]))
            self._message = f"{start} Raise steps, hold, max_penalty or lr; {bound}"
            certain = penalties[: self._time] if "initial_lr" in group else penalties  # a scheduler may lower lr later
            growth = 0.0
            for penalty in certain:
                growth = max(0.0, growth + made * _logarithms(group, group["lr"] * penalty)[1])
            if growth > _DIVERGED and [group["lr"] for group in held.groups] == self._rates:
                peak = group["lr"] * max(penalties)
                self._message = f"the masked weights will diverge, unless lr falls in time: {bound}, and is {peak:g}"
                return
        else:
            return
        shrunk, self._squares = math.exp(min(0.0, -exponent)), []
        for managed, parameter in held:
            left = sums(ticket, managed, parameter, parameter, lambda sizes: (sizes * shrunk - reach).clamp(min=0) ** 2)
            most = sums(ticket, managed, parameter, parameter, lambda sizes: (2 * sizes + reach) ** 2)
            self._squares.append(AsyncScalar(torch.stack([left[0], most[1] - most[0]])))

    def speak(self) -> None:
        """Warn of what was seen. Call it at the end of the scheduler step: a warning may be an error."""
        if self._message and all(found.has_arrived() for found in self._squares):
            # There are none where SGD diverges: that is said whatever is left.
            squares = [found.values.tolist() for found in self._squares] or [[1.0, 0.0]]
            left, kept = map(sum, zip(*squares, strict=True))
            message, self._message, self._squares = self._message, "", []
            if left > MAX_RESIDUAL**2 * (left + kept):
                self._time = 0  # once
                warnings.warn(message.format(math.sqrt(left / (left + kept))), stacklevel=3)


def _are_within(groups: Sequence[Mapping[str, Any]], ceilings: Sequence[float]) -> bool:
    """Whether each lr is a positive number up to its ceiling; to read one that is a tensor might wait."""
    pairs = ((group.get("lr"), ceiling) for group, ceiling in zip(groups, ceilings, strict=True))
    return all(isinstance(lr, float) and 0 < lr <= ceiling for lr, ceiling in pairs)


def _logarithms(group: Mapping[str, Any], step: float) -> tuple[float, float]:
    """By which SGD shrinks a weight, at most, in an update where lr·λ is no more than ``step``; grows it, where it is.

    They are those of roots of the update's characteristic polynomial. The first is that of the larger one; about
    step / (1 - momentum), which is at least as much where they are complex, and weights swing through zero.
    """
    momentum: float = group["momentum"]
    first, second = 1 - group["dampening"] if momentum else 1.0, 0.0
    if group["nesterov"]:
        first, second = 1 + momentum, momentum
    half, product = (1 + momentum - step * first) / 2, momentum - step * second
    apart = math.sqrt(max(0.0, half * half - product))
    slowest = -math.log(max(half + apart, 1e-300))
    growth = math.log(max(abs(half) + apart, math.sqrt(max(0.0, product)), 1e-300))
    return max(slowest, step * (1 if group["nesterov"] else first) / (1 - momentum)), growth

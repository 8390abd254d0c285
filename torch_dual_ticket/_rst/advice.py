"""What stands in the way of a penalty: said early where it is certain, else where finalize() finds too much left.

Nothing early makes the host wait for a device. Where it is not sure, it is silent.
"""

from __future__ import annotations

import math
import warnings
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from .._engine.optimizer_hooks import held_by
from .._tensors.async_scalar import AsyncScalar
from .._tensors.dtensor import local
from .residual import MAX_RESIDUAL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from .._engine.batch import Batch
    from .._engine.ticket import Ticket
    from .schedule import Timeline

_NEEDED = -math.log(MAX_RESIDUAL)  # exponents by which masked weights must shrink
_DROWNED = 10  # times that a penalty under Adam is too small before it is said: gradients get smaller in a training
_OVERDUE = 100  # scheduler steps at least, and as many as the schedule has
_SAMPLE = 1 << 14  # weights of each parameter that are looked at
_WEIGHTS, _OUT_OF_REACH, _SQUARES, _MOMENTS, _LARGEST = 1, 2, 3, 4, 5  # columns of samples


class Advice:
    """What ``step()`` says of the optimizers, once, after a tenth of the schedule: on GPUs a little later."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._time = max(1, min(timeline.total // 10, timeline.per_cycle // 2))  # most warm-ups are over then
        self._messages: list[str] = []
        self._samples: list[_Sample] = []
        self._seen = self._overdue = 0  # scheduler steps since construction or restart, and after the schedule's end

    def __getstate__(self) -> dict[str, Any]:
        return Advice(self._timeline).__dict__  # samples on their way from a device cannot be copied

    def look(self, ticket: Ticket, before: int, after: int) -> None:
        """Call it at each scheduler step, with their number before and after, while the ticket knows the updates."""
        if before == self._timeline.total:
            self._overdue += 1
            if self._overdue == max(_OVERDUE, self._timeline.total):
                self._messages.append(
                    f"the schedule has been over for {self._overdue:,} steps, and nothing is masked yet: call"
                    " rst.finalize() when rst.done says so. (For more time at the ceiling there is hold=…)"
                )
        self._seen += before != after
        # The first scheduler step after a restart may have fewer updates than the others, if each is an epoch.
        if before == after or after != self._time or (before and self._seen == 1):
            return
        try:
            penalties = [self._timeline.penalty(step) for step in range(self._timeline.per_cycle)]
        except Exception:  # of a custom schedule: step() raises it when it comes to that point
            return
        for optimizer, held in held_by(ticket) if max(penalties) > 0 else ():
            updates = ticket.transformation.updates.by[id(optimizer)]
            groups = {id(group): group for group in held.groups}.values()
            if not updates or any(isinstance(group.get("lr"), Tensor) for group in groups):  # reading it might wait
                continue
            if type(optimizer) is SGD:  # a subclass may update in another way
                self._messages += [message for group in groups for message in _about_sgd(group, penalties, updates)]
            elif type(optimizer) in (Adam, AdamW) and (left := penalties[after:]):
                self._samples += _take_samples(ticket, optimizer, held, updates * sum(left), updates * len(left))

    def speak(self) -> None:
        """Warn of what was seen. Call it at the end of the scheduler step: a warning may be an error."""
        messages, self._messages = self._messages, []
        if self._samples and all(sample.sums.has_arrived() for sample in self._samples):
            samples, self._samples = self._samples, []
            messages += _about_adam(samples)
        for message in messages:
            warnings.warn(message, stacklevel=3)


def lever(ticket: Ticket) -> str:
    """What to change where ``finalize()`` finds too much left. It may wait for the device."""
    for optimizer, held in held_by(ticket):
        group = held.groups[0]
        lr, highest = float(group.get("lr", 0.0)), _highest_rate(group)
        if lr < highest / 2:
            return f"The lr was at {lr:g} of {highest:g}: transform for longer, or while lr is high"
        samples = _take_samples(ticket, optimizer, held, 0.0) if type(optimizer) in (Adam, AdamW) else []
        for sample in samples:
            sample.sums.wait()
        if samples:
            if _mean(samples, _MOMENTS) < _mean(samples, _SQUARES) / 4:  # no two updates went the same way
                return "The loss's gradients were larger than the penalty: raise max_penalty"
            return "Adam moves a weight by about lr in an update, whatever the penalty: raise steps, hold or lr"
    return "Transform for longer, or with a higher max_penalty or lr"


def _highest_rate(group: Mapping[str, Any]) -> float:
    """The learning rate now, or the highest that a schedule of torch names in the group: a warm-up rises to it."""
    rates = (group.get(name) for name in ("lr", "initial_lr", "max_lr"))
    return max((rate for rate in rates if isinstance(rate, (int, float)) and math.isfinite(rate)), default=0.0)


def _about_sgd(group: Mapping[str, Any], penalties: Sequence[float], updates: int) -> list[str]:
    """A weight shrinks by a factor of exp(-Σ lr·λ / (1 - momentum)), with so many updates for each of the penalties.

    It diverges where lr·λ reaches 2·(1 + momentum), divided by 1 - d under dampening d, by 1 + 2·momentum under
    Nesterov's momentum: there the update's characteristic polynomial has a root of -1.
    """
    lr, momentum, ceiling = group["lr"], group["momentum"], max(penalties)
    dampening = group["dampening"] if momentum else 0.0
    limit = 2 * (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else 1 - dampening or math.inf)
    if lr * ceiling >= limit > 0:
        return [
            f"with lr={lr:g}, momentum={momentum:g} and a penalty up to {ceiling:g}, the masked weights will diverge:"
            f" lr times penalty must stay below {limit:g} with this SGD. Lower max_penalty to less than"
            f" {limit / lr:.3g}, unless lr falls before the penalty is reached."
        ]
    if momentum >= 1:  # nothing comes to rest, so the formula does not hold
        return []
    rate = _highest_rate(group)
    exponent = updates * rate * sum(penalties) * (1 - dampening) / (1 - momentum)
    if not 0 < exponent < _NEEDED:
        return []
    times = _NEEDED / exponent
    levers = "steps, hold, max_penalty or lr"
    if rate * ceiling * times >= limit:
        levers = f"steps or hold (lr times max_penalty must stay below {limit:g})"
    return [
        f"with lr={rate:g}, momentum={momentum:g} and a penalty up to {ceiling:g}, {updates * len(penalties):,} updates"
        f" will leave about {math.exp(-exponent):.0%} of the masked weights, and finalize() will remove that. Make"
        f" {levers} larger, together {times:.2g} times."
    ]


class _Sample(NamedTuple):
    """Of the first rows of a parameter under Adam, on the way to the host."""

    sums: AsyncScalar  # of masked weights: how many; w², what is out of reach², Adam's v, and m²; and the largest |w|
    pruned: int
    rate: float
    updates: int  # that are left in the cycle
    penalty: float  # the sum of λ over them


@torch.no_grad()
def _take_samples(ticket: Ticket, optimizer: Optimizer, held: Batch, penalty: float, updates: int = 1) -> list[_Sample]:
    samples = []
    for (managed, parameter), group in zip(held, held.groups, strict=True):
        weight, rate, state = local(parameter), _highest_rate(group), optimizer.state[parameter]
        if weight.device.type in ("cpu", "cuda") and weight.dim() and weight.numel() and rate > 0 and state:
            mask, rows = ticket.mask(managed), max(1, _SAMPLE * len(weight) // weight.numel())
            moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
            pieces: Any = managed.cache.pieces(mask, parameter, weight, weight, *moments, holds=False)
            sizes, means, squares, gone = (piece[:rows].abs().float() for piece in next(iter(pieces)))
            step = state["step"]
            correction = 1 - group["betas"][1] ** (step if step.device == weight.device else float(step))
            sizes, means, squares = sizes * gone, means * gone, squares * gone / correction
            summed = gone, sizes.square(), (sizes - rate * updates).clamp(min=0).square(), squares, means.square()
            sums = torch.stack([*(column.sum() for column in summed), sizes.max()])
            samples.append(_Sample(AsyncScalar(sums), mask.pruned_weights, rate, updates, penalty))
    return samples


def _mean(samples: Sequence[_Sample], column: int) -> float:
    """Of a sum over masked weights, where parameters count by their size."""
    rows: list[tuple[int, list[float]]] = [(sample.pruned, sample.sums.values.tolist()) for sample in samples]
    return sum(pruned * row[column] / max(1.0, row[0]) for pruned, row in rows) / max(1, sum(p for p, _ in rows))


def _about_adam(samples: Sequence[_Sample]) -> list[str]:
    """Adam moves a weight by about lr in an update, and by less where the loss's gradients are larger than the penalty.

    So it moves no further than lr·updates in all; and where they are much larger, by a factor of exp(-Σ lr·λ / √v).
    """
    times, worst = max(
        ((sample.sums.values[_LARGEST].item() / (sample.rate * sample.updates), sample) for sample in samples),
        key=itemgetter(0),
    )
    size, gradient = (math.sqrt(_mean(samples, column)) for column in (_WEIGHTS, _SQUARES))
    far = math.sqrt(_mean(samples, _OUT_OF_REACH)) / (size or 1.0)
    moved = worst.rate * worst.penalty / (gradient or math.inf)
    obstacles, left = [], far
    if far > MAX_RESIDUAL:
        obstacles.append(
            f"Adam moves a weight by about lr in an update, whatever the penalty: make steps, hold or lr larger,"
            f" together {times:.2g} times."
        )
    if 0 < moved < _NEEDED / _DROWNED and gradient > size * worst.penalty / worst.updates:
        left = max(left, math.exp(-moved))
        obstacles.append(
            f"The loss's gradients are much larger than the penalty: make max_penalty about {_NEEDED / moved:.1g} times"
            " larger, or take the mean of the loss where it is a sum."
        )
    if not obstacles:
        return []
    return [
        f"with lr={worst.rate:g}, {worst.updates:,} more updates will leave about {left:.0%} of the masked weights, and"
        f" finalize() will remove that. {' '.join(obstacles)}"
    ]

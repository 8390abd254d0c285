"""Early warnings: of a penalty that cannot do its work at the learning rate at hand, and of a missing ``finalize()``.

Nothing here makes the host wait for a device. Where it is not sure, it is silent.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from .._engine.optimizer_hooks import held_by
from .._tensors.async_scalar import AsyncScalar
from .._tensors.dtensor import local, local_offset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.optim import Optimizer

    from .._engine.batch import Batch
    from .._engine.ticket import Ticket
    from ..masks.mask import Mask
    from .schedule import Timeline

_LEFT = 0.05  # of the masked weights: if more is left, the mask removes what the network still uses
_OVERDUE = 100  # scheduler steps at least, and as many as the schedule has
_SAMPLE = 1 << 14  # weights of each parameter that are looked at


def _updates_of(ticket: Ticket) -> Iterator[tuple[Optimizer, Batch, int]]:
    """The optimizers that applied the penalty since the last scheduler step: their targets, and how many updates."""
    for optimizer, held in held_by(ticket):
        if updates := ticket.updates.by[id(optimizer)]:
            yield optimizer, held, updates


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
        for optimizer, held, updates in _updates_of(ticket) if max(penalties) > 0 else ():
            groups = {id(group): group for group in held.groups}.values()
            if any(isinstance(group.get("lr"), Tensor) for group in groups):  # reading it might wait for a device
                continue
            if type(optimizer) is SGD:  # a subclass may update in another way
                self._messages += [message for group in groups for message in _about_sgd(group, penalties, updates)]
            elif type(optimizer) in (Adam, AdamW):
                self._samples += _take_samples(ticket, held, updates * (len(penalties) - after))

    def speak(self) -> None:
        """Warn of what was seen. Call it at the end of the scheduler step: a warning may be an error."""
        messages, self._messages = self._messages, []
        if self._samples and all(sample.weights.has_arrived() for sample in self._samples):
            samples, self._samples = self._samples, []
            messages += _about_adam(samples)
        for message in messages:
            warnings.warn(message, stacklevel=3)


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
    factor = 1 + 2 * momentum if group["nesterov"] else 1 - dampening
    if lr * ceiling * factor >= 2 * (1 + momentum):
        limit = 2 * (1 + momentum) / factor
        return [
            f"with lr={lr:g}, momentum={momentum:g} and a penalty up to {ceiling:g}, the masked weights will diverge:"
            f" lr times penalty must stay below {limit:g} with this SGD. Lower max_penalty to less than"
            f" {limit / lr:.3g}, unless lr falls before the penalty is reached."
        ]
    if momentum >= 1:  # nothing comes to rest, so the formula does not hold
        return []
    rate = _highest_rate(group)
    exponent = updates * rate * sum(penalties) * (1 - dampening) / (1 - momentum)
    if not 0 < exponent < -math.log(_LEFT):
        return []
    return [
        f"with lr={rate:g}, momentum={momentum:g} and a penalty up to {ceiling:g}, {updates * len(penalties):,} updates"
        f" will leave about {math.exp(-exponent):.0%} of the masked weights, and finalize() will remove that. Make"
        f" steps, hold, max_penalty or lr larger, together {-math.log(_LEFT) / exponent:.2g} times."
    ]


class _Sample(NamedTuple):
    """The first rows of a parameter under Adam, as magnitudes, on their way to the host."""

    weights: AsyncScalar
    mask: Mask
    offset: tuple[int, ...]
    rate: float
    updates: int  # that are left in the cycle


@torch.no_grad()
def _take_samples(ticket: Ticket, held: Batch, updates: int) -> list[_Sample]:
    samples = []
    for (managed, parameter), group in zip(held, held.groups, strict=True):
        weight, rate = local(parameter), _highest_rate(group)
        if weight.device.type in ("cpu", "cuda") and weight.dim() and weight.numel() and rate * updates > 0:
            rows = weight[: max(1, _SAMPLE * len(weight) // weight.numel())]
            offset = local_offset(parameter) or (0,) * weight.dim()
            samples.append(_Sample(AsyncScalar(rows.abs().float()), ticket.mask(managed), offset, rate, updates))
    return samples


def _about_adam(samples: Sequence[_Sample]) -> list[str]:
    """Adam moves a weight by about lr in an update, whatever the penalty: no further than lr·updates in all."""
    squares = squares_left = times = 0.0
    worst = samples[0]
    for sample in samples:
        kept = sample.mask.draw(offset=sample.offset, size=tuple(sample.weights.values.shape))
        masked, reach = sample.weights.values[~kept], sample.rate * sample.updates
        if masked.numel():
            squares += sample.mask.pruned_weights * float(masked.square().mean())
            squares_left += sample.mask.pruned_weights * float((masked - reach).clamp(min=0).square().mean())
            times, worst = max((times, worst), (float(masked.max()) / reach, sample), key=lambda pair: pair[0])
    left = math.sqrt(squares_left / (squares or 1.0))
    if not left > _LEFT:
        return []
    return [
        f"with lr={worst.rate:g}, {worst.updates:,} more updates will leave {left:.0%} of the masked weights or more,"
        " and finalize() will remove that: Adam moves a weight by about lr in an update, whatever the penalty. Make"
        f" steps, hold or lr larger, together {times:.2g} times."
    ]

"""Early word on a penalty that cannot do its work at the learning rate at hand."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from .readings import Reading
from .shards import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from .holds import Hold
    from .hooks import Held
    from .schedules import Timeline
    from .tickets import Ticket

_LEFT = 0.05  # of the masked weights: with more, the mask will take away what is still in use
_LEFT_BY_ESTIMATE = 0.2  # where the estimate may be wrong by a factor of two


class Advice:
    """What ``step()`` says of the optimizers, once, after a tenth of the schedule: on GPUs a little later."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._expected: list[_Sample] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_timeline": self._timeline, "_expected": []}

    def give(self, ticket: Ticket, ticks: int) -> None:
        """Warn where the penalty cannot do its work; to be called with the ticks after each update."""
        if ticks == self._timeline.time_for_advice:
            try:
                penalties = [self._timeline.penalty(tick) for tick in range(self._timeline.ticks_per_cycle)]
            except Exception:  # of a schedule of the user's own, which step() will let through when it comes to that
                return
            if max(penalties) == 0:
                return
            for optimizer, members in ticket.members.items():
                if isinstance(optimizer, SGD):
                    for group in {id(group): group for _, _, group in members.held}.values():
                        if not isinstance(group["lr"], Tensor):  # reading it might wait for a GPU
                            _warn_of_group(group["lr"], group["momentum"], group["dampening"], penalties)
                elif isinstance(optimizer, (Adam, AdamW)):
                    updates = len(penalties) - ticks
                    self._expected += _take_samples(members.held, optimizer, ticket.penalty, max(penalties), updates)
        if self._expected and all(sample.reading.has_arrived() for sample in self._expected):
            samples, self._expected = self._expected, []
            _warn_of_samples(samples)


def _warn_of_group(lr: float, momentum: float, dampening: float, penalties: Sequence[float]) -> None:
    """What shrinks a weight under SGD is Σ lr·λ / (1 - momentum); and it diverges where lr·λ is 2·(1 + momentum)."""
    ceiling, limit = max(penalties), 2 * (1 + momentum)
    what = f"with lr={lr:g}, momentum={momentum:g} and a penalty up to {ceiling:g}"
    if lr * ceiling >= limit:
        warnings.warn(
            f"{what}, the masked weights will diverge: lr times penalty must stay below 2·(1 + momentum) = {limit:g}."
            f" Lower max_penalty to less than {limit / lr:.3g}.",
            stacklevel=4,
        )
        return
    shrinks_by = lr * sum(penalties) * (1 - dampening) / (1 - momentum)
    if 0 < shrinks_by < -math.log(_LEFT):
        warnings.warn(
            f"{what}, {len(penalties):,} updates will leave about {math.exp(-shrinks_by):.0%} of the masked weights,"
            " and finalize() will take that away. Make steps, hold, max_penalty or lr larger, together"
            f" {-math.log(_LEFT) / shrinks_by:.2g} times.",
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Sample:
    """Some of one parameter's masked weights, under Adam."""

    size: int  # masked weights of the parameter
    lr: float
    updates: int  # that are left for the transformation
    penalty: float  # λ now
    ceiling: float
    reading: Reading  # means: of the squares, of what lies out of reach, squared, of gradients' sizes; kept squares

    @property
    def rms(self) -> float:
        return math.sqrt(float(self.reading.values[0]))

    @property
    def original(self) -> float:
        """The rms that they had, by that of the weights that stay."""
        return max(self.rms, math.sqrt(float(self.reading.values[3])))

    @property
    def out_of_reach(self) -> float:
        """The rms of what is left where every weight moves towards zero by lr in each update, as far as it has to."""
        return math.sqrt(float(self.reading.values[1]))

    @property
    def at_rest(self) -> float:
        """The size of weights at which the penalty balances the gradients of the loss, as large as these are now."""
        both, its_own = float(self.reading.values[2]), self.penalty * self.rms
        if 2 * its_own**2 > both**2:  # it is stronger already
            return 0.0
        return math.sqrt(both**2 - its_own**2) / self.ceiling


@torch.no_grad()
def _take_samples(held: Held, optimizer: Optimizer, penalty: float, ceiling: float, updates: int) -> list[_Sample]:
    """Nothing waits for a device here."""
    samples = []
    for hold, parameter, group in held:
        weight, state, lr = local(parameter), optimizer.state.get(parameter, {}), group["lr"]
        is_known = weight.device.type in ("cpu", "cuda") and weight.is_floating_point() and weight.numel() > 0
        if is_known and "exp_avg_sq" in state and not isinstance(lr, Tensor):
            means = _means(hold, parameter, local(state["exp_avg_sq"]), state["step"], group["betas"][1], lr * updates)
            samples.append(_Sample(hold.mask.pruned_weights, lr, updates, penalty, ceiling, Reading(means)))
    return samples


def _means(hold: Hold, parameter: Tensor, squares: Tensor, step: Tensor, beta: float, reach: float) -> Tensor:
    weight = local(parameter)
    rows, masked = hold.local_mask.sample(parameter, weight)
    sizes = weight[rows].abs().float()
    gradients = (squares[rows].float() / (1 - beta**step)).sqrt()
    seen = torch.stack([sizes.square(), (sizes - reach).clamp(min=0).square(), gradients, sizes.square()])
    which = torch.stack([masked, masked, masked, ~masked])
    return (seen * which).flatten(1).sum(1) / which.flatten(1).sum(1).clamp(min=1)


def _warn_of_samples(samples: Sequence[_Sample]) -> None:
    """Say what holds for Adam, which divides by the size of the gradient, the penalty's part included.

    A weight moves by about lr in an update, whatever λ is; and it comes to rest where the penalty's gradient is as
    large as that of the loss.
    """

    def share(part: str) -> float:
        left = sum(sample.size * getattr(sample, part) ** 2 for sample in samples)
        return math.sqrt(left / (sum(sample.size * sample.original**2 for sample in samples) or 1.0))

    lr, updates, ceiling = samples[0].lr, samples[0].updates, samples[0].ceiling
    if (left := share("out_of_reach")) > _LEFT:
        largest = max(2.5 * sample.rms / (sample.lr * sample.updates) for sample in samples)
        warnings.warn(
            f"with lr={lr:g}, {updates:,} more updates will leave {left:.0%} of the masked weights or more, and"
            " finalize() will take that away: Adam moves a weight by about lr in an update, whatever the penalty is."
            f" Make steps, hold or lr larger, together {largest:.2g} times.",
            stacklevel=4,
        )
    elif (left := share("at_rest")) > _LEFT_BY_ESTIMATE:
        warnings.warn(
            "the masked weights come to rest where the penalty balances the gradients of the loss: with a penalty up"
            f" to {ceiling:g} and gradients as they were, at up to {min(1, left):.0%} of their size. finalize() will"
            f" take that away. Make max_penalty {left / _LEFT:.2g} times larger.",
            stacklevel=4,
        )

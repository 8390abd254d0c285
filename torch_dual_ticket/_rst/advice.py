"""Early word on a penalty that cannot do its work at the learning rate at hand."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from .._engine.dtensor import local
from .._engine.local_masks import SAMPLE
from .._engine.readings import Reading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from .._engine.holds import Hold
    from .._engine.hooks import Held
    from .._engine.tickets import Ticket
    from .schedule import Timeline

_LEFT = 0.05  # of the masked weights: with more, the mask will take away what is still in use
_OVERDUE = 100  # ticks at the least, and as many as the schedule has
_LEFT_BY_ESTIMATE = 0.2  # where the estimate may be wrong by a factor of two


class Advice:
    """What ``step()`` says of the optimizers, once, after a tenth of the schedule: on GPUs a little later.

    And of a ``finalize()`` that does not come.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._messages: list[str] = []
        self._expected: list[_Sample] = []
        self._updates: Counter[int] = Counter()  # the most in a tick, which may be an epoch, by id of the optimizer
        self._first_rates: dict[int, Any] = {}  # learning rates at the first tick that was seen, by id of the group
        self._looks = 0  # ticks before the advice
        self._overdue = 0  # ticks

    def __getstate__(self) -> dict[str, Any]:
        return Advice(self._timeline).__dict__

    def look(self, ticket: Ticket, before: int, ticks: int) -> None:
        """To be called at each tick, with their number before and after, while it is known what carried the penalty."""
        if before == self._timeline.ticks:
            self._overdue += 1
            if self._overdue == max(_OVERDUE, self._timeline.ticks):
                self._messages.append(
                    f"the schedule has been over for {self._overdue:,} ticks, and nothing is masked yet: call"
                    " rst.finalize() when rst.done says so. (For more time at the ceiling there is hold=…)"
                )
        if before == ticks or ticks > self._timeline.time_for_advice:
            return
        self._looks += 1  # the first tick may be odd: after a restart within an epoch, or a while without ticks
        self._updates = self._updates | ticket.carriers if self._looks > 2 else Counter(ticket.carriers)
        if ticks < self._timeline.time_for_advice:
            for group in (group for members in ticket.members.values() for _, _, group in members.held):
                self._first_rates.setdefault(id(group), group.get("lr"))
            return
        if self._looks == 1 and before:
            return
        try:
            penalties = [self._timeline.penalty(tick) for tick in range(self._timeline.ticks_per_cycle)]
        except Exception:  # of a schedule of the user's own, which step() will let through when it comes to that
            return
        if max(penalties) <= 0:
            return
        for optimizer, members in ticket.members.items():
            if id(optimizer) not in ticket.carriers:
                continue
            updates = self._updates[id(optimizer)]
            if isinstance(optimizer, SGD):
                for group in {id(group): group for _, _, group in members.held}.values():
                    if not isinstance(group["lr"], Tensor):  # reading it might wait for a GPU
                        self._messages += _about_sgd(group, penalties, updates, self._rate_ahead(group))
            elif isinstance(optimizer, (Adam, AdamW)):
                rates = [self._rate_ahead(group) for _, _, group in members.held]
                self._expected += _take_samples(members.held, rates, optimizer, penalties, ticks, updates)

    def _rate_ahead(self, group: Mapping[str, Any]) -> Any:
        """The highest rate to expect: that at the end of a warm-up, if the rate has been rising, or may have been.

        torch's schedulers leave it in the group, and when they are over it stays there.
        """
        rate = group["lr"]
        first = self._first_rates.get(id(group))
        if isinstance(rate, Tensor) or (isinstance(first, (int, float)) and rate <= first):
            return rate
        named = (group.get(name) for name in ("initial_lr", "max_lr"))
        return max([rate, *(other for other in named if isinstance(other, (int, float)) and math.isfinite(other))])

    def speak(self) -> None:
        """Warn of what was seen; to be called when the tick is over."""
        messages, self._messages = self._messages, []
        if self._expected and all(sample.reading.has_arrived() for sample in self._expected):
            samples, self._expected = self._expected, []
            messages += _about_adam(samples)
        for message in messages:
            warnings.warn(message, stacklevel=3)


def _about_sgd(group: Mapping[str, Any], penalties: Sequence[float], updates: int, rate_ahead: float) -> list[str]:
    """What shrinks a weight under SGD is Σ lr·λ / (1 - momentum); and it diverges where lr·λ is 2·(1 + momentum).

    Dampening d makes that 2·(1 + momentum) / (1 - d), Nesterov's momentum 2·(1 + momentum) / (1 + 2·momentum): there
    the update's characteristic polynomial has a root of -1. ``updates`` are those of one tick.
    """
    lr, momentum, dampening = group["lr"], group["momentum"], group["dampening"] if group["momentum"] else 0.0
    ceiling, taken = max(penalties), 1 + 2 * momentum if group["nesterov"] else 1 - dampening
    what = f"with lr={lr:g}, momentum={momentum:g} and a penalty up to {ceiling:g}"
    if lr * ceiling * taken >= 2 * (1 + momentum):
        limit = 2 * (1 + momentum) / taken
        return [
            f"{what}, the masked weights will diverge: lr times penalty must stay below {limit:g}, what this SGD bears."
            f" Lower max_penalty to less than {limit / lr:.3g}, unless lr falls before the penalty is there."
        ]
    if momentum >= 1:  # nothing ever comes to an end
        return []
    what = f"with lr={rate_ahead:g}, momentum={momentum:g} and a penalty up to {ceiling:g}"
    shrinks_by = updates * rate_ahead * sum(penalties) * (1 - dampening) / (1 - momentum)
    if 0 < shrinks_by < -math.log(_LEFT):
        return [
            f"{what}, {updates * len(penalties):,} updates will leave about {math.exp(-shrinks_by):.0%} of the masked"
            " weights, and finalize() will take that away. Make steps, hold, max_penalty or lr larger, together"
            f" {-math.log(_LEFT) / shrinks_by:.2g} times."
        ]
    return []


def _about_adam(samples: Sequence[_Sample]) -> list[str]:
    """What holds for Adam, which divides by the size of the gradient, the penalty's part included.

    A weight moves by about lr in an update, whatever λ is; and it comes to rest where the penalty's gradient is as
    large as that of the loss, and shakes there.
    """

    def share(part: str) -> float:
        """Of the size that the masked weights had, over all layers."""
        left = sum(sample.size * getattr(sample, part) ** 2 for sample in samples)
        return math.sqrt(left / (sum(sample.size * sample.original**2 for sample in samples) or 1.0))

    first, balanced, shaken = samples[0], share("balanced"), share("shaken")
    if (left := share("out_of_reach")) > _LEFT:
        times = max(sample.largest / sample.reach for sample in samples)
        return [
            f"with lr={first.rate_ahead:g}, {first.updates:,} more updates will leave {left:.0%} of the masked weights"
            " or more, and finalize() will take that away: Adam moves a weight by about lr in an update, whatever the"
            f" penalty. Make steps, hold or lr larger, together {times:.2g} times."
        ]
    if (left := math.hypot(balanced, shaken)) > _LEFT_BY_ESTIMATE:
        times = max(balanced / _LEFT, (shaken / _LEFT) ** 2)
        return [
            "the masked weights come to rest where the penalty balances the gradients of the loss: with a penalty up to"
            f" {first.ceiling:g} and gradients as they were, at about {left:.0%} of their size. finalize() will take"
            f" that away. Make max_penalty {times:.2g} times larger."
        ]
    return []


@dataclass(frozen=True)
class _Sample:
    """Some of one parameter's masked weights under Adam, with the statistics of its gradients."""

    size: int  # masked weights of the parameter
    lr: float
    rate_ahead: float
    updates: int  # that are left for the transformation
    ceiling: float  # of λ and the optimizer's own weight decay, where that is in the gradients as well
    noise_in_mean: float  # the share of the noise's variance that is left in Adam's mean of the gradients
    reading: Reading

    @property
    def reach(self) -> float:
        """How far a weight can move towards zero."""
        return self.rate_ahead * self.updates

    @property
    def _means(self) -> list[float]:
        return [float(value) for value in self.reading.values]

    @property
    def original(self) -> float:
        """The rms that the masked weights had, by that of the weights that stay."""
        return math.sqrt(max(self._means[0], self._means[1]))

    @property
    def largest(self) -> float:
        return self._means[5]

    @property
    def out_of_reach(self) -> float:
        """The rms of what is left where each weight moves towards zero as far as it has to."""
        return math.sqrt(self._means[2])

    @property
    def balanced(self) -> float:
        """The size at which λ·w is as large as the gradients of the loss on average."""
        pull = max(0.0, self._means[3] - self.noise_in_mean * self._means[4])
        return min(math.sqrt(pull) / self.ceiling, self.original)

    @property
    def shaken(self) -> float:
        """The size that random gradients give a weight, by updates of lr·g/σ against lr·λ·w/σ."""
        return min(math.sqrt(self.lr * math.sqrt(self._means[4]) / (2 * self.ceiling)), self.original)


@torch.no_grad()
def _take_samples(
    held: Held,
    rates_ahead: Sequence[Any],
    optimizer: Optimizer,
    penalties: Sequence[float],
    ticks: int,
    updates_per_tick: int,
) -> list[_Sample]:
    """Nothing waits for a device here."""
    samples = []
    updates = updates_per_tick * (len(penalties) - ticks)
    for (hold, parameter, group), rate_ahead in zip(held, rates_ahead, strict=True):
        state, lr, betas = optimizer.state.get(parameter, {}), group["lr"], group["betas"]
        if any(isinstance(number, Tensor) for number in (lr, *betas)) or not _is_known(local(parameter), state):
            continue
        is_decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
        decay = 0.0 if is_decoupled else group["weight_decay"]
        if rate_ahead > 0 and updates > 0:
            reach = rate_ahead * updates
            statistics = _statistics(hold, parameter, state, betas, penalties[ticks - 1] + decay, reach)
            noise_in_mean = (1 - betas[0]) / (1 + betas[0])
            facts = (hold.mask.pruned_weights, lr, rate_ahead, updates, max(penalties) + decay, noise_in_mean)
            samples.append(_Sample(*facts, Reading(statistics)))
    return samples


def _is_known(weight: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether the state is Adam's, and not one that a subclass has made smaller, or has put elsewhere."""
    return (
        weight.device.type in ("cpu", "cuda")
        and weight.is_floating_point()
        and weight.numel() > 0
        and weight.dim() > 0  # there are no rows to take samples of
        and "step" in state
        and all(
            name in state and local(state[name]).shape == weight.shape and state[name].device == weight.device
            for name in ("exp_avg", "exp_avg_sq")
        )
    )


def _statistics(
    hold: Hold, parameter: Tensor, state: Mapping[str, Any], betas: tuple[float, float], shrinkage: float, reach: float
) -> Tensor:
    """Means over the masked weights, but for the second: w², w² of those that stay, what lies out of reach, squared,
    the squared mean gradient of the loss, the variance of gradients; and the largest |w|."""
    weight = local(parameter)
    rows, masked = hold.local_mask.sample(parameter, weight)

    def sample(tensor: Tensor) -> Tensor:
        return tensor[rows].reshape(masked.shape[0], -1)[:, :SAMPLE].float()

    masked = sample(masked)
    weights, step = sample(weight), state["step"]
    gradients = sample(local(state["exp_avg"])) / (1 - betas[0] ** step)
    squares = sample(local(state["exp_avg_sq"])) / (1 - betas[1] ** step)
    seen = torch.stack(
        [
            weights.square(),
            weights.square(),
            (weights.abs() - reach).clamp(min=0).square(),
            (gradients - shrinkage * weights).square(),
            (squares - gradients.square()).clamp(min=0),
        ]
    )
    which = torch.stack([masked, 1 - masked, masked, masked, masked])
    means = (seen * which).flatten(1).sum(1) / which.flatten(1).sum(1).clamp(min=1)
    return torch.cat([means, (weights.abs() * masked).max().reshape(1)])

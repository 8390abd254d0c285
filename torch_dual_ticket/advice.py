"""Early word on a penalty that cannot do its work at the learning rate at hand."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .schedules import Timeline
    from .tickets import Ticket

_LEFT = 0.05  # of a masked weight that no gradient holds up: with more, the mask will take away what is still in use


def warn_of_penalty(ticket: Ticket, timeline: Timeline) -> None:
    """Warn, on behalf of ``step()``, where SGD would diverge under the penalty, or hardly shrink anything.

    What shrinks a weight is not λ but Σ lr·λ / (1 - momentum) over the updates; and SGD diverges where lr·λ reaches
    2·(1 + momentum). Adam and its kin divide by the size of the gradient, the penalty's part included: nothing of the
    kind can be said of them.

    Args:
        ticket: which has had updates.
        timeline: λ over the ticks.
    """
    try:
        penalties = [timeline.penalty(tick) for tick in range(timeline.steps + timeline.hold)]
    except Exception:  # of a schedule of the user's own, which step() will let through when it comes to that
        return
    for optimizer, members in ticket.members.items():
        if not isinstance(optimizer, torch.optim.SGD):
            continue
        for group in {id(group): group for _, _, group in members.held}.values():
            if not isinstance(group["lr"], Tensor):  # reading it might wait for a GPU
                _warn_of_group(group["lr"], group["momentum"], group["dampening"], penalties)


def _warn_of_group(lr: float, momentum: float, dampening: float, penalties: Sequence[float]) -> None:
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

"""How a schedule fits into the number of updates that a trainer is going to make."""

from __future__ import annotations

import inspect
import math
import warnings
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from .._rst.schedule import Timeline, resolve
from ..scheduler import RSTScheduler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .._rst.residual import Report

_DEFAULT_FRACTION = 0.5
_TIMELINE = ("steps", "hold", "cycles", "max_penalty", "schedule")


def check_settings(finalize_at: float | None, settings: Mapping[str, Any]) -> None:
    """What a callback is given can be used: said when it is made, not when the training starts.

    >>> check_settings(1.5, {})
    Traceback (most recent call last):
    ...
    ValueError: finalize_at must be a fraction of the training in (0, 1], got 1.5
    """
    given = inspect.signature(RSTScheduler).bind(None, **{"steps": 1, **settings})
    given.apply_defaults()
    steps, hold, cycles, max_penalty, schedule = itemgetter(*_TIMELINE)(given.arguments)
    Timeline(steps, hold, cycles, max_penalty, resolve(schedule))
    if finalize_at is None:
        return
    if isinstance(finalize_at, bool) or not isinstance(finalize_at, (int, float)) or not 0 < finalize_at <= 1:
        raise ValueError(f"finalize_at must be a fraction of the training in (0, 1], got {finalize_at!r}")
    if "steps" in settings:
        raise ValueError(
            f"finalize_at={finalize_at} and steps={settings['steps']} both say how long the transformation is: give one"
        )


def fitted(updates: float, finalize_at: float | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the ``steps`` that end the schedule at that fraction of the updates.

    Where ``steps`` are given they stay; then this warns if the training is too short for them.

    >>> fitted(1000, None, {"sparsity": 0.9})
    {'sparsity': 0.9, 'steps': 500}
    >>> fitted(1000, 0.8, {"cycles": 2, "hold": 100})
    {'cycles': 2, 'hold': 100, 'steps': 300}
    >>> fitted(math.inf, None, {"steps": 300})
    {'steps': 300}
    """
    hold, cycles = settings.get("hold", 0), settings.get("cycles", 1)
    if "steps" in settings:
        needed = cycles * (settings["steps"] + hold)
        if needed > updates:
            warnings.warn(
                f"the schedule takes {needed:,} updates, but this training makes {updates:,}: it will end before"
                " finalize(). Give finalize_at (a fraction of the training) instead of steps, or train for longer.",
                stacklevel=3,
            )
        return dict(settings)
    if not math.isfinite(updates):
        raise ValueError("the trainer does not know how many updates it is going to make: give steps, or a limit to it")
    fraction = _DEFAULT_FRACTION if finalize_at is None else finalize_at
    per_cycle = max(1, round(fraction * updates)) // cycles
    if per_cycle <= hold:
        raise ValueError(
            f"hold={hold} leaves no updates for λ to rise: {fraction:.0%} of {updates:,} updates in {cycles} cycle(s)"
            f" are {per_cycle:,} each. Lower hold or cycles, raise finalize_at, or train for longer."
        )
    return {**settings, "steps": per_cycle - hold}


def report_of(rst: RSTScheduler | None) -> Report | None:
    """What ``finalize()`` returned, if it has been called."""
    return None if rst is None or rst.phase == "transform" else rst.finalize()


def warn_if_unfinished(rst: RSTScheduler | None) -> None:
    """Training is over, and the model is not sparse."""
    if rst is not None and rst.phase == "transform":
        warnings.warn(
            f"the training ended at {rst.progress:.0%} of the transformation: no weight was set to zero. Resume it from"
            " its checkpoint, or call the callback's scheduler.finalize() to mask the weights now.",
            stacklevel=3,
        )

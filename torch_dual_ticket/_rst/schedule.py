"""How the penalty grows: functions from progress (0 … 1) to the fraction of its ceiling that it has reached."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def linear(progress: float) -> float:
    """Grow evenly, as in the Dual Lottery Ticket paper.

    >>> linear(0.5)
    0.5
    """
    return progress


def quadratic(progress: float) -> float:
    """Grow slowly at first: progress squared.

    >>> quadratic(0.5)
    0.25
    """
    return progress**2


def cubic(progress: float) -> float:
    """Grow slower still at first: progress cubed.

    >>> cubic(0.5)
    0.125
    """
    return progress**3


SCHEDULES = {"linear": linear, "quadratic": quadratic, "cubic": cubic}


def resolve(schedule: str | Callable[[float], float]) -> Callable[[float], float]:
    """The function that a name stands for, or the given one; either is checked at every call to return a finite number.

    Raises:
        ValueError: an unknown name; at a call: the function returned NaN or an infinity.
        TypeError: neither a name nor callable; at a call: the function returned something that is no real number.

    >>> resolve("quadratic")(0.5), resolve(lambda progress: min(1, 2 * progress))(0.75)
    (0.25, 1.0)
    >>> resolve("quadratik")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: unknown schedule 'quadratik' (did you mean 'quadratic'?); allowed are 'linear', ...
    """
    allowed = f"allowed are {', '.join(map(repr, SCHEDULES))} or a function from progress (0 … 1) to a fraction"
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            close = get_close_matches(schedule, SCHEDULES, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown schedule {schedule!r}{hint}; {allowed}")
        return partial(_checked, SCHEDULES[schedule])
    if not callable(schedule):
        raise TypeError(f"schedule must be a name or a function, got {schedule!r}; {allowed}")
    return partial(_checked, schedule)


def _checked(schedule: Callable[[float], float], progress: float) -> float:
    value = schedule(progress)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"schedule {schedule!r} returned {value!r} (a {type(value).__name__}) at progress {progress}; "
            "it must return a finite float: wrap the result in float()"
        )
    if not math.isfinite(value):
        raise ValueError(
            f"schedule {schedule!r} returned {value!r} at progress {progress}; it must return a finite float"
        )
    return float(value)


@dataclass(frozen=True)
class Timeline:
    """λ over the ticks: in each cycle a rise of ``steps`` ticks and a ``hold`` at the ceiling.

    Args:
        steps: ticks over which λ rises, at least 1.
        hold: ticks after that at the ceiling.
        cycles: how often that happens.
        max_penalty: the ceiling.
        schedule: progress of the rise (0 … 1) -> fraction of the ceiling.

    Raises:
        TypeError, ValueError: a number of the wrong kind or out of range, or a schedule that fails at its start.

    >>> timeline = Timeline(steps=4, hold=1, cycles=2, max_penalty=1.0, schedule=linear)
    >>> [timeline.penalty(ticks) for ticks in range(timeline.ticks + 1)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    steps: int
    hold: int
    cycles: int
    max_penalty: float
    schedule: Callable[[float], float]

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("hold", 0), ("cycles", 1)):  # plain integers, so that a state can be saved
            object.__setattr__(self, name, check_integer(name, getattr(self, name), at_least=least))
        if isinstance(self.max_penalty, bool) or not isinstance(self.max_penalty, Real):
            kind = type(self.max_penalty).__name__
            raise TypeError(f"max_penalty must be a finite number of at least 0, got {self.max_penalty!r} (a {kind})")
        if not (math.isfinite(self.max_penalty) and self.max_penalty >= 0):
            raise ValueError(f"max_penalty must be a finite number of at least 0, got {self.max_penalty!r}")
        self.penalty(0)

    @property
    def time_for_advice(self) -> int:
        """After so many ticks a warm-up is mostly over, and little is lost yet."""
        return max(1, min(self.ticks // 10, self.ticks_per_cycle // 2))

    @property
    def ticks_per_cycle(self) -> int:
        return self.steps + self.hold

    @property
    def ticks(self) -> int:
        """Of all cycles together."""
        return self.cycles * self.ticks_per_cycle

    def cycle(self, ticks: int) -> int:
        """The cycle, from 0, after so many ticks."""
        return min(ticks // self.ticks_per_cycle, self.cycles - 1)

    def penalty(self, ticks: int) -> float:
        """λ of the update that follows so many ticks."""
        within = ticks - self.cycle(ticks) * self.ticks_per_cycle
        return self.max_penalty * self.schedule(min(1.0, (within + 1) / self.steps))


def check_integer(name: str, value: Any, at_least: int | None = None) -> int:
    """An integer, not a bool, of at least a bound."""
    allowed = "an integer" if at_least is None else f"an integer of at least {at_least}"
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got the bool {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {value!r} (a {type(value).__name__})") from None
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number

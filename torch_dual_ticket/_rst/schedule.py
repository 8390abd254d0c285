"""How the penalty grows: functions from progress (0 … 1) to a fraction of its ceiling, and λ at each scheduler step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from numbers import Real
from typing import Any

DEFAULT_STEPS = 10_000  # the paper's
MAX_CYCLES = 1_000  # each has masks and a plan
SCHEDULES = {"linear": 1, "quadratic": 2, "cubic": 3}  # exponents of progress; the paper's is linear


def resolve(schedule: str | Callable[[float], float]) -> Callable[[float], float]:
    """The function that a name stands for, or the given one, checked at every call to return a finite number.

    Raises:
        ValueError: an unknown name; at a call: the function returned NaN or an infinity.
        TypeError: neither a name nor callable; at a call: the function returned something that is not a real number.

    >>> [resolve(name)(0.5) for name in SCHEDULES], resolve(lambda progress: min(1, 2 * progress))(0.75)
    ([0.5, 0.25, 0.125], 1.0)
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
        return partial(_power, SCHEDULES[schedule])
    if not callable(schedule):
        raise TypeError(f"schedule must be a name or a function, got {schedule!r}; {allowed}")
    return partial(_checked, schedule)


def _power(exponent: int, progress: float) -> float:  # by name, as a lambda cannot be pickled
    return float(progress**exponent)


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
    """λ at each scheduler step: in each cycle it rises for ``steps`` of them and stays at the ceiling for ``hold``.

    The ceiling is ``max_penalty``, and ``schedule`` a function from progress (0 … 1) to a fraction of it.
    ``TypeError`` or ``ValueError`` for numbers of the wrong kind or out of range; a schedule may fail at its start.

    >>> timeline = Timeline(steps=4, hold=1, cycles=2, max_penalty=1.0, schedule=resolve("linear"))
    >>> [timeline.penalty(done) for done in range(timeline.total + 1)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    steps: int
    hold: int
    cycles: int
    max_penalty: float
    schedule: Callable[[float], float]

    def __post_init__(self) -> None:
        # Plain integers, which any format can save.
        for name, least, most in (("steps", 1, None), ("hold", 0, None), ("cycles", 1, MAX_CYCLES)):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), at_least=least, at_most=most))
        problem = f"max_penalty must be a finite number of at least 0, got {self.max_penalty!r}"
        if isinstance(self.max_penalty, bool) or not isinstance(self.max_penalty, Real):
            raise TypeError(f"{problem} (a {type(self.max_penalty).__name__})")
        if not (math.isfinite(self.max_penalty) and self.max_penalty >= 0):
            raise ValueError(problem)
        self.penalty(0)

    @property
    def per_cycle(self) -> int:
        return self.steps + self.hold

    @property
    def total(self) -> int:
        """The scheduler steps of all cycles together."""
        return self.cycles * self.per_cycle

    def cycle(self, done: int) -> int:
        """The cycle, from 0, after so many scheduler steps."""
        return min(done // self.per_cycle, self.cycles - 1)

    def penalty(self, done: int) -> float:
        """λ of the update that follows so many scheduler steps."""
        within = done - self.cycle(done) * self.per_cycle
        return self.max_penalty * self.schedule(min(1.0, (within + 1) / self.steps))


def make_timeline(
    steps: int | None,
    hold: int | None,
    updates: int | None,
    cycles: int,
    max_penalty: float,
    schedule: str | Callable[[float], float],
) -> Timeline:
    """The timeline that the arguments of a scheduler describe.

    Given the ``updates`` of the whole training, all cycles together take a quarter of them, a fifth of that as hold.

    >>> timeline = make_timeline(None, None, 20_000, 1, 1.0, "linear")
    >>> timeline.steps, timeline.hold
    (4000, 1000)
    """
    shape = resolve(schedule)
    if updates is None:
        return Timeline(
            DEFAULT_STEPS if steps is None else steps, 0 if hold is None else hold, cycles, max_penalty, shape
        )
    for name, value in (("steps", steps), ("hold", hold)):
        if value is not None:
            raise ValueError(
                f"updates={updates!r} and {name}={value!r} both say how long the transformation is: give updates (of"
                " the whole training, of which it takes a quarter), or steps and hold"
            )
    cycles = check_integer("cycles", cycles, at_least=1, at_most=MAX_CYCLES)
    per_cycle = check_integer("updates", updates, at_least=4 * cycles) // (4 * cycles)
    return Timeline(per_cycle - per_cycle // 5, per_cycle // 5, cycles, max_penalty, shape)


def check_integer(name: str, value: Any, at_least: int | None = None, at_most: int | None = None) -> int:
    """An integer, not a bool, within bounds."""
    allowed = "an integer" if at_least is None else f"an integer of at least {at_least}"
    allowed += "" if at_most is None else f" and at most {at_most:,}"
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got the bool {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {value!r} (a {type(value).__name__})") from None
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number

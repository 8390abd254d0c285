"""What the callbacks share: a ticket whose schedule fits into the number of updates that a trainer makes."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._model.exclusions import check_exclusions
from .._model.masked import check_given
from .._model.targets import check_types
from .._rst.residual import Report
from .._rst.schedule import check_integer, make_timeline
from .._rst.validation import check_optimizer
from ..masks.distributions import check_distribution, validate_sparsity
from ..masks.patterns import parse_pattern
from ..scheduler import RSTScheduler

_DEFAULT_FRACTION = 0.5


def check_settings(finalize_at: float | None, settings: Mapping[str, Any]) -> None:
    """The arguments of a callback can be used: checked when it is built, not when the training starts.

    >>> check_settings(1.5, {})
    Traceback (most recent call last):
    ...
    ValueError: finalize_at must be a fraction of the training in (0, 1], got 1.5
    """
    bound = inspect.signature(RSTScheduler).bind(None, **settings)
    bound.apply_defaults()
    given = bound.arguments
    if given["updates"] is not None:
        raise ValueError("the trainer knows how many updates it makes: give finalize_at in place of updates")
    make_timeline(*(given[name] for name in ("steps", "hold", "updates", "cycles", "max_penalty", "schedule")))
    sparsity = given["sparsity"]
    for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        if value is not None:
            validate_sparsity(value)
    check_types(given["targets"])
    check_exclusions(given["exclude"])
    check_optimizer(given["optimizer"])
    if given["masks"] is not None:
        check_given(given["masks"])
    parse_pattern(given["pattern"])
    check_distribution(given["distribution"])
    if given["seed"] is not None:
        check_integer("seed", given["seed"])
    if finalize_at is None:
        return
    if isinstance(finalize_at, bool) or not isinstance(finalize_at, (int, float)) or not 0 < finalize_at <= 1:
        raise ValueError(f"finalize_at must be a fraction of the training in (0, 1], got {finalize_at!r}")
    if settings.get("steps") is not None:
        raise ValueError(
            f"finalize_at={finalize_at} and steps={settings['steps']} both say how long the transformation is: give one"
        )


def fitted(updates: float, finalize_at: float | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the ``steps`` that end the schedule at that fraction of the updates.

    Given ``steps`` are kept, with a warning if the training is too short for them.

    >>> fitted(1000, None, {"sparsity": 0.9})
    {'sparsity': 0.9, 'steps': 500}
    >>> fitted(1000, 0.8, {"cycles": 2, "hold": 100})
    {'cycles': 2, 'hold': 100, 'steps': 300}
    >>> fitted(math.inf, None, {"steps": 300})
    {'steps': 300}
    """
    hold, cycles = settings.get("hold") or 0, settings.get("cycles", 1)
    if settings.get("steps") is not None:
        needed = cycles * (settings["steps"] + hold)
        if needed > updates:
            warnings.warn(
                f"the schedule takes {needed:,} updates, but this training makes {updates:,}: it will end before"
                " finalize(). Give finalize_at (a fraction of the training) instead of steps, or train for longer.",
                stacklevel=3,
            )
        return dict(settings)
    if not math.isfinite(updates):
        raise ValueError("the trainer does not know how many updates it will make: give steps or limit its training")
    fraction = _DEFAULT_FRACTION if finalize_at is None else finalize_at
    per_cycle = max(1, round(fraction * updates)) // cycles
    if per_cycle <= hold:
        raise ValueError(
            f"hold={hold} leaves no updates for λ to rise: {fraction:.0%} of {updates:,} updates in {cycles} cycle(s)"
            f" are {per_cycle:,} each. Lower hold or cycles, raise finalize_at, or train for longer."
        )
    return {**settings, "steps": per_cycle - hold}


class TrainerTicket:
    """What the callbacks share: their arguments, the scheduler that is built from them, and its report."""

    scheduler: RSTScheduler | None = None
    _model: nn.Module | None = None  # that the scheduler is on

    def __init__(
        self, sparsity: float | Mapping[str, float] | None = None, *, finalize_at: float | None = None, **settings: Any
    ) -> None:
        super().__init__()
        self._finalize_at, self._settings = finalize_at, {"sparsity": sparsity, **settings}
        check_settings(finalize_at, self._settings)

    def _start(self, model: nn.Module, updates: float) -> None:
        """Build the scheduler, if this is another model than before."""
        if self._model is not model:
            self.scheduler = RSTScheduler(model, **fitted(updates, self._finalize_at, self._settings))
            self._model = model

    def _started(self) -> RSTScheduler:
        if self.scheduler is None:
            raise RuntimeError("this RSTCallback joined a training that had started: give it to the Trainer")
        return self.scheduler

    @property
    def report(self) -> Report | None:
        """What ``finalize()`` returned, if it has been called."""
        rst = self.scheduler
        return None if rst is None or rst.phase == "transform" else rst.finalize()

    def _sparsity(self) -> float:
        """Of the weights, not of masks that are not applied yet."""
        rst = self._started()
        return rst.sparsity if rst.phase == "finetune" else 0.0

    def _warn_if_unfinished(self) -> None:
        """At the end of a training, if the model is not sparse."""
        rst = self.scheduler
        if rst is not None and rst.phase == "transform":
            rst._unfinished.is_said = True
            warnings.warn(
                f"the training ended at {rst.progress:.0%} of the transformation: no weight was set to zero. Resume it"
                " from its checkpoint, or call the callback's scheduler.finalize() to mask the weights now.",
                stacklevel=3,
            )

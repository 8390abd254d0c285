"""What is said where a loop has left out a call, or the model has left out a layer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

IDLE_TICKS = 1_000  # more than anyone accumulates gradients over, and than GradScaler skips


def warn_of_missing_penalty(changed: Sequence[str], *, other_than_given: bool) -> None:
    """Of weights that change, by name, or ticks that pass, while no update carries the penalty."""
    what = f"{', '.join(changed[:3])} changed" if changed else f"step() was called {IDLE_TICKS:,} times"
    others = (
        "something else than the optimizer that was given to the scheduler"
        if other_than_given
        else "something that is not a torch.optim.Optimizer holding the model's own parameters (master weights, an"
        " optimizer of another library or of another model)"
    )
    yet = "" if changed else "if there were any, "
    warnings.warn(
        f"{what}, but no update carried the penalty: {yet}the updates come from {others}. Call rst.apply_penalty()"
        " after backward(), before each such update.",
        stacklevel=4,
    )


def patience(ticks: int) -> int:
    """The updates after which a tick is missed; a schedule of few ticks may count epochs, which can be long."""
    return 1_000 if ticks >= 1_000 else 10_000


def warn_of_missing_ticks(updates: int, penalty: float) -> None:
    """Of updates at a λ that never grows, from within the step of an optimizer."""
    warnings.warn(
        f"{updates:,} updates carried the penalty, and rst.step() has not been called: λ stays at"
        f" {penalty:.3g}, and the schedule does not end, until it is. Call it after each optimizer.step(), or after"
        " each epoch if steps and hold count epochs.",
        stacklevel=2,
    )


def warn_of_lost_layers(names: Sequence[str], stacklevel: int) -> None:
    """Of parameters whose layers are gone, or have no hook of ours any more."""
    warnings.warn(
        f"{', '.join(names[:3])}{', …' if names[3:] else ''} will not be pruned any more: the layer was dropped"
        " or replaced in the model, or its hooks were cleared, after the scheduler was built. To prune what is"
        " in its place, build a new RSTScheduler, after remove() on this one.",
        stacklevel=stacklevel,
    )


def warn_of_orphaned_parameter(name: str) -> None:
    """Of a parameter of a finalized model that another layer has taken over, from within backward()."""
    warnings.warn(
        f"{name} is trained on, but the layer that it belonged to is gone, and its zeros are held no more. To hold them"
        " where it is now: torch_dual_ticket.baselines.hold(model, masks).",
        stacklevel=2,
    )

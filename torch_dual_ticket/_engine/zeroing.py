"""Zeros in several parameters at once: views of one tensor share a version, so all are zeroed before any is noted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .holds import Hold

    Held = Sequence[tuple[Hold, Tensor]]


def zero_all(held: Held) -> None:
    """Set the masked weights to zero. Call it under ``no_grad``, as all of these."""
    for hold, parameter in held:
        hold.zero(parameter)
    _note(held)


def zero_after_update(held: Held) -> None:
    """The same after a step of an optimizer."""
    for hold, parameter in held:
        # Without a gradient it was hardly updated, and backward() may still need it; or the step was one that writes to
        # .data, which nobody counts, and has freed the gradient.
        hold.zero(parameter, counted=parameter.grad is not None or not hold.is_clean(parameter))
    _note(held)


def activate_all(holds: Sequence[Hold]) -> None:
    """Let these holds, all of a ticket, keep zeros from now on."""
    for hold in holds:
        hold.activate()
    _note([(hold, parameter) for hold in holds if (parameter := hold.parameter()) is not None])


def _note(held: Held) -> None:
    for hold, parameter in held:
        hold.note_zeroed(parameter)

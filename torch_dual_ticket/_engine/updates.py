"""Did an update happen? Those that applied the penalty since the last scheduler step, and by which optimizers."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._tensors.async_scalar import AsyncScalar


class Updates:
    """The updates of a ticket's parameters, of which those that applied the penalty count.

    One counts when its optimizer's step is over: one that raised does not, nor does one that ``GradScaler`` made void
    because of infinities. With a fused optimizer only the device knows that, and the host must not wait for it: there
    an update counts at first, and if it turns out to have been void, a later one does not count in its place.
    """

    def __init__(self) -> None:
        self.number = 0  # of the update that gradients are treated for
        self.serial = 0  # of the last penalty batch
        self.serial_at_step = 0  # the same, at the last scheduler step
        self.silenced = False  # apply_penalty() stands in for the optimizer hook until the next scheduler step
        self.pending = False
        self.any_so_far = False
        self.count_by_optimizer: Counter[int] = Counter()  # since the last scheduler step, by id
        self._begun: int | None = None  # id of the optimizer whose step is about to apply the penalty
        self._found_inf: Tensor | None = None  # 0 if one of the updates since the last scheduler step was not void
        self._outcomes: list[AsyncScalar] = []  # of scheduler steps that counted without knowing
        self._void = 0  # of those, how many were void and are still to be made up for

    def begin(self, optimizer: Optimizer) -> None:
        """The optimizer's step is about to use gradients that have the penalty in them."""
        self._begun = id(optimizer)

    def complete(self, optimizer: Optimizer) -> bool:
        """The optimizer's step is over; returns whether it was an update."""
        if self._begun != id(optimizer):
            return False
        self._begun = None
        self.count_by_optimizer[id(optimizer)] += 1
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler where a fused optimizer skips the step
        if found_inf is None:
            self.note()
        else:
            self._found_inf = found_inf if self._found_inf is None else torch.minimum(self._found_inf, found_inf)
        return True

    def note(self) -> None:
        """An update has applied the penalty."""
        self.pending = self.any_so_far = True

    def settle(self, *, wait: bool) -> bool:
        """Whether a scheduler step counts now; with ``wait`` that is certain, but may wait for the device."""
        if self._found_inf is not None and not self.pending:
            self._outcomes.append(AsyncScalar(self._found_inf))
            self.pending = True
        self._found_inf = None
        while self._outcomes and (wait or self._outcomes[0].has_arrived()):
            outcome = self._outcomes.pop(0)
            if wait:
                outcome.wait()
            self._void += bool(outcome.values.item())
        if self.pending and self._void:
            self.pending, self._void = False, self._void - 1
        self.any_so_far = self.any_so_far or self.pending
        return self.pending

    def begin_step(self) -> None:
        """Begin the next scheduler step."""
        # Gradients that apply_penalty() has penalized stay marked: their update may be made after this.
        self.number += self.pending and not self.silenced
        self.serial_at_step, self.silenced, self.pending = self.serial, False, False
        self.count_by_optimizer.clear()
        self._begun = None

    def resume(self, *, pending: bool) -> None:
        """Go on from a saved state: what was applied here before counts no more."""
        self.number += 1
        self.begin_step()
        self.pending = self.any_so_far = pending
        self._found_inf, self._outcomes, self._void = None, [], 0

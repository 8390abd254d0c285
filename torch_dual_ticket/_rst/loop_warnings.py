"""What is said where a loop has left out a call, or the model has left out a layer."""

from __future__ import annotations

import math
import os
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._engine import optimizer_hooks
from .._engine.graph_capture import is_capturing
from .._engine.parameter import ManagedParameter
from .._engine.stage import Phase
from .._engine.ticket import Ticket
from .._tensors.dtensor import local, version

_IDLE_STEPS = 1_000  # more than anyone accumulates gradients over, and than GradScaler skips
_OVERDUE = 100  # scheduler steps at least, and as many as the schedule has
_DENSE = 0.2  # of a layer's norm: without that much it computes something else
_LOOKS = (1, 5, 20, 100)  # steps before the first penalty at which a few weights are read


class MissingPenalty:
    """Warns, once, of weights that change while no update applies the penalty, or of steps that pass."""

    def __init__(self) -> None:
        self._idle_steps = 0  # before the first penalty
        self._sample: dict[str, Tensor] = {}  # a few weights of parameters without a penalty since then
        self._elsewhere = 0  # steps of other optimizers until then
        self._versions: dict[str, int] = {}  # of parameters without a penalty before the last scheduler step
        self._is_said = False

    def look(self, ticket: Ticket, unpenalized: Sequence[ManagedParameter]) -> None:
        """Call it at each scheduler step, with the parameters that got no penalty since the last one."""
        if self._is_said:
            return
        if ticket.updates.any_so_far and not unpenalized:  # as in most steps
            self._versions, self._sample = {}, {}
            return
        is_overdue = reads = False
        before = self._versions
        found = ((one.name, one.tensor()) for one in unpenalized)
        self._versions = {name: version(p) for name, p in found if p is not None and p.requires_grad}
        if not ticket.updates.any_so_far:
            self._idle_steps += 1
            if self._idle_steps == 1:
                self._elsewhere = optimizer_hooks.steps_elsewhere
            reads = self._idle_steps in _LOOKS  # what is written through .data counts no versions
            elsewhere = optimizer_hooks.steps_elsewhere - self._elsewhere
            follows_others = elsewhere >= self._idle_steps - 1  # each step one of theirs
            is_overdue = self._idle_steps >= (_LOOKS[-1] if follows_others else _IDLE_STEPS)
        changed: list[str] = []
        sample = {name: values for name, values in self._sample.items() if name in self._versions}
        if reads or any(before.get(name, now) != now for name, now in self._versions.items()):
            # An evaluation with averaged weights counts versions, too, and then puts back the values.
            now = {name: values for name, values in _sample(ticket) if name in self._versions}
            changed, sample = _changed(sample, now), now | sample
        self._sample = sample
        if not (changed or is_overdue):
            return
        self._is_said, self._sample = True, {}
        what = f"{', '.join(changed[:3])} changed" if changed else f"step() was called {self._idle_steps:,} times"
        others = (
            "something that is not a torch.optim.Optimizer holding the model's own parameters (master weights, an"
            " optimizer of another library or of another model, one with an optimizer in it that made no step)"
            if ticket.optimizer is None
            else "something else than the optimizer that was given to the scheduler"
        )
        yet = "" if changed else "if there were any, "
        warnings.warn(
            f"{what}, but no update applied the penalty: {yet}the updates come from {others}. Call rst.apply_penalty()"
            " after backward(), before each such update; or build the scheduler on the model that is updated.",
            stacklevel=3,
        )


@torch.no_grad()
def _sample(ticket: Ticket) -> Iterator[tuple[str, Tensor]]:
    """Two or three weights along each dimension of each parameter: views, so that nothing else is copied."""
    for managed, parameter in ticket.managed():
        weight = local(parameter)
        if weight.numel() and not weight.is_meta:
            yield managed.name, weight[tuple(slice(None, None, max(1, size // 2)) for size in weight.shape)].clone()


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of parameters of which sampled weights are not what they were. It waits for the device."""
    return [
        name
        for name, now in after.items()
        if (then := before.get(name)) is not None
        and (then.shape, then.device) == (now.shape, now.device)  # not sharded or moved since
        and not torch.equal(then, now)
    ]


class Unfinished:
    """Warns, once each, of a schedule that is over without finalize(), and of a transformation that ends without it."""

    def __init__(self, scheduler: Any, ticket: Ticket, total: int) -> None:
        self._ticket, self._total = ticket, total
        self._overdue = 0  # scheduler steps since the schedule's end
        self.saved_at = 0  # scheduler steps of the last state that was saved or loaded
        self.is_said = False
        self._process = os.getpid()
        weakref.finalize(scheduler, self._say)  # of a copy there is none

    def look(self) -> None:
        """Call it after each scheduler step."""
        self._overdue += self._ticket.stage.steps == self._total
        if self._overdue == 1 + max(_OVERDUE, self._total):  # the last of the schedule is among them
            warnings.warn(
                f"the schedule has been over for {self._overdue - 1:,} steps, and nothing is masked yet: call"
                " rst.finalize() when rst.done says so. (For more time at the ceiling there is hold=…)",
                stacklevel=3,
            )

    def _say(self) -> None:
        ticket, steps = self._ticket, self._ticket.stage.steps
        is_transforming = ticket.stage.phase is Phase.TRANSFORM and ticket.parameters
        # Where an exception ended the training, the user knows: one that is handled now, or has reached the top. Of one
        # that was caught before, Python knows nothing any more, and whatever goes on has a dense model.
        is_known = sys.exc_info()[1] or getattr(sys, "last_value", None)
        is_saved = self.saved_at == steps < self._total  # it goes on later, or was not begun
        is_forked = self._process != os.getpid()  # the training goes on in the process that this one comes from
        if not is_transforming or is_known or is_saved or is_forked or self.is_said:
            return
        self.is_said = True
        advice = (
            "give updates=N, the number of updates of your training, in place of steps and hold, or choose them smaller"
            if steps < self._total
            else "call rst.finalize() when rst.done says so"
        )
        above = sys._getframe(1).f_back  # weakref's frame; none, where the last one of all has gone with the scheduler
        warnings.warn(
            f"a transformation ended at {steps:,} of {self._total:,} steps, without finalize(): no weight was set to"
            f" zero. To get a sparse model, {advice}. (Where it was broken off on purpose, rst.remove() says so; where"
            " it goes on later, rst.state_dict() after its last step.)",
            stacklevel=4 if above and above.f_code.co_name == "_exitfunc" else 3,  # at the process's end
        )


class MissingStep:
    """Warns, once, where many updates apply the penalty and no scheduler step comes."""

    def __init__(self, total: int) -> None:
        self._patience = 1_000 if total >= 1_000 else 10_000  # few steps may count epochs, which can be long

    def look(self, ticket: Ticket, updates: int) -> None:
        """Call it after each update, with their number since the last scheduler step."""
        if updates != self._patience or ticket.stage.steps:
            return
        warnings.warn(
            f"{updates:,} updates applied the penalty, and rst.step() has not been called: λ stays at"
            f" {ticket.stage.penalty:.3g}, and the schedule does not end, until it is. Call it after each"
            " optimizer.step(), or after each epoch if steps and hold count epochs.",
            stacklevel=3,
        )


class DenseState:
    """Warns, once, where a finalized model is about to be evaluated or saved with weights of before finalize()."""

    def __init__(self) -> None:
        self._is_said = False

    def look(self, ticket: Ticket, managed: ManagedParameter, parameter: Tensor) -> None:
        """Call it where something else than an optimizer has changed a parameter, before its zeros are put back."""
        layer = managed.layer()
        if self._is_said or ticket.stage.report is None:  # GradualPruning's masks at once: finalize() is to come
            return
        if layer is None or layer.training or is_capturing():  # who trains on from other weights means it
            return
        if parameter.is_meta:  # offloaded: it has no values here
            return
        masked, whole = managed.squared_norms(ticket.mask(managed), parameter, holds=True).tolist()
        if not masked > _DENSE**2 * whole:
            return
        self._is_said, share = True, math.sqrt(masked / whole)
        warnings.warn(
            f"{managed.name} was given weights with {share:.0%} of their norm where it is masked. There they are set to"
            " zero, and the others were not finetuned for that. Of checkpoints, choose among those of after finalize();"
            " an average that was begun before it is masked with rst.apply_masks(average).",
            stacklevel=2,
        )


def warn_of_lost_layers(names: Sequence[str], stacklevel: int) -> None:
    """Of parameters whose layers are gone, or have no hook of ours any more."""
    warnings.warn(
        f"{', '.join(names[:3])}{', …' if names[3:] else ''} will not be pruned any more: the layer was dropped"
        " or replaced in the model, or its hooks were cleared, after the scheduler was built. To prune what is"
        " in its place, build a new RSTScheduler, after remove() on this one. To replace layers of a finalized"
        " model, call remove() before it, and baselines.hold(model) after it.",
        stacklevel=stacklevel,
    )

"""What happens before and after each step of an optimizer.

One pair of hooks for all optimizers is installed in a process, once and for good: taking a hook away while an optimizer
walks over its hooks is not safe, and a scheduler may be dropped at any moment.
"""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .._tensors.dtensor import is_sharded
from .batch import Batch
from .call_stack import in_dummy_step, outer_steps
from .hook_order import pair
from .penalty import loss_term
from .stage import Phase
from .ticket import Ticket

Found = list[tuple[Ticket, Batch]]

_lock = threading.Lock()
_tickets: tuple[weakref.ref[Ticket], ...] = ()  # replaced, never changed: steps in other threads may be walking over it
steps_elsewhere = 0  # made so far by optimizers that have no managed parameter: those of another copy, say
_lookups: weakref.WeakKeyDictionary[Optimizer, Lookup] = weakref.WeakKeyDictionary()


def register(ticket: Ticket) -> None:
    """Let the steps of optimizers reach the ticket."""
    global _tickets
    with _lock:
        if not _tickets:  # the first of all
            # Compiled steps call them as they are. Not at import: it loads the compiler, as the first optimizer does.
            register_optimizer_step_pre_hook(torch.compiler.disable(_before))  # type: ignore[no-untyped-call]
            register_optimizer_step_post_hook(torch.compiler.disable(_after_step))  # type: ignore[no-untyped-call]
            atexit.register(_drop_tensors)
        if not any(ref() is ticket for ref in _tickets):
            _tickets = (*(ref for ref in _tickets if ref() is not None), weakref.ref(ticket))


def _drop_tensors() -> None:
    """At the end of the process: process groups cannot go while something still has tensors that are sharded."""
    _lookups.clear()
    for ticket in tickets():
        ticket.drop_tensors()


def tickets() -> list[Ticket]:
    """All that there are in this process."""
    return [ticket for ref in _tickets if (ticket := ref()) is not None]


def held_by(ticket: Ticket) -> Iterator[tuple[Optimizer, Batch]]:
    """The optimizers that have made a step with parameters of the ticket, and what they have of it."""
    for optimizer, lookup in list(_lookups.items()):
        yield from ((optimizer, held) for ref, held, _ in lookup.found if held and ref() is ticket)


class Lookup:
    """Which managed parameters an optimizer has: looked up once, and checked at each step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._tickets, self._contents = _tickets, _contents_of(optimizer)
        self.found = [(weakref.ref(t), held := _held(t, optimizer), _ids(t, held)) for t in tickets()]

    def is_current(self, optimizer: Optimizer) -> bool:
        """Whether there are no other tickets, and neither models nor the optimizer have other parameters since."""
        return (
            self._tickets is _tickets
            and _contents_of(optimizer) == self._contents
            and all((ticket := ref()) is None or _ids(ticket, held) == ids for ref, held, ids in self.found)
        )


def _held(ticket: Ticket, optimizer: Optimizer) -> Batch:
    groups = groups_of(optimizer)
    if any(is_sharded(group["params"][0]) for group in groups.values()):
        ticket.reshard()  # the model may have whole parameters in their places
    found = [entry for entry in ticket.managed() if id(entry[1]) in groups]
    return Batch(found, [groups[id(tensor)] for _, tensor in found])


def _ids(ticket: Ticket, held: Batch) -> list[int]:
    """Of the ticket's tensors; of the first alone where the optimizer has none, so that its steps stay cheap."""
    return [id(managed.tensor()) for managed in (ticket.parameters if held else ticket.parameters[:1])]


def _contents_of(optimizer: Optimizer) -> list[tuple[int, list[int]]]:
    """Its groups and their parameters, which may be exchanged in place; by id, so that none of them is kept alive."""
    return [(id(group), list(map(id, group["params"]))) for group in optimizer.param_groups]


def groups_of(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """By the id of a parameter the group that has it."""
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def _find(optimizer: Optimizer, *, checks: bool = True) -> Found:
    """The tickets that have something to do with the optimizer, and their parameters that it has."""
    lookup = _lookups.get(optimizer)
    if lookup is None or (checks and not lookup.is_current(optimizer)):
        lookup = _lookups[optimizer] = Lookup(optimizer)
    found = [(ticket, held) for ref, held, _ in lookup.found if held and (ticket := ref()) is not None]
    return [(ticket, held) for ticket, held in found if ticket.phase is not Phase.IDLE]


def _begin_update(found: Found, optimizer: Optimizer) -> Found:
    """Mask gradients where zeros are held; returns the other tickets, with what they are to penalize."""
    due = []
    for ticket, held in found:
        if ticket.holds:
            ticket.before_update(held, optimizer)
        elif not ticket.updates.silenced and (ticket.optimizer is None or _is_part(optimizer, ticket.optimizer())):
            due.append((ticket, held))
    if due and _parts(optimizer):
        own = _own(optimizer)
        due = [(ticket, held.where(id(tensor) in own for _, tensor in held)) for ticket, held in due]
    return due


def _own(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that the optimizer updates itself: not of those that its parts update."""
    return set(groups_of(optimizer)).difference(*map(groups_of, _parts(optimizer)))


def _parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one is made of (SAM, Lookahead): their steps are the updates, and apply the penalty."""
    values = [value for name, value in vars(optimizer).items() if name not in ("param_groups", "state", "defaults")]
    values += [part for value in values if isinstance(value, (list, tuple)) for part in value]
    values += [part for value in values if isinstance(value, dict) for part in value.values()]
    return [part for part in values if isinstance(part, Optimizer)]


def _is_part(optimizer: Optimizer, given: Optimizer | None) -> bool:
    return optimizer is given or (given is not None and any(_is_part(optimizer, part) for part in _parts(given)))


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch calls before each step; if the optimizer has pre-hooks itself, the last of them calls ours."""
    before: Any = optimizer._optimizer_step_pre_hooks
    after: Any = optimizer._optimizer_step_post_hooks
    if before or after:
        is_concerned = bool(_find(optimizer))
        pair(after, next(iter(after), None) if is_concerned else None, _after_step_and)
        pair(before, next(reversed(before), None) if is_concerned else None, _before_step_and)
    return None if before else _before_step(optimizer, args, kwargs)


def _before_step_and(hook: Callable[..., Any], optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    given = hook(optimizer, args, kwargs)
    if isinstance(given, tuple) and len(given) == 2:
        args, kwargs = given
    elif given is not None:
        return given  # torch will refuse it
    ours = _before_step(optimizer, args, kwargs)
    return given if ours is None else ours


def _after_step_and(hook: Callable[..., Any], optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    _after_step(optimizer, args, kwargs)
    return hook(optimizer, args, kwargs)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global steps_elsewhere
    found = _find(optimizer)
    steps_elsewhere += not found
    to_penalize = _begin_update(found, optimizer)
    if not found or (to_penalize and in_dummy_step()):
        return None
    closure = args[1] if len(args) > 1 and callable(args[1]) else kwargs.get("closure")
    if closure is None:
        for ticket, held in to_penalize:
            since = ticket.updates.serial_at_step
            if ticket.updates.serial > since and (outside := set[int]().union(*map(_own, outer_steps()))):
                # A step around this one has penalized these, and may have changed or replaced the gradients since.
                held = held.where(not (one.penalized_at > since and id(tensor) in outside) for one, tensor in held)
            ticket.penalize(held, optimizer)
        return None
    wrapped = _with_penalty(closure, optimizer)
    return (args, {**kwargs, "closure": wrapped}) if "closure" in kwargs else ((args[0], wrapped, *args[2:]), kwargs)


def _with_penalty(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """The closure, with zeros in place when it computes the loss and the penalty added when it has the gradients."""

    @functools.wraps(closure)
    def evaluate() -> Any:
        found = _find(optimizer)
        for ticket, held in found:
            if ticket.holds and any(changed := [not one.is_clean(parameter) for one, parameter in held]):
                ticket.zero(held.where(changed))
        before = {id(ticket): ticket.updates.serial for ticket, _ in found}
        loss = closure()
        for ticket, held in _begin_update(_find(optimizer), optimizer):
            serial = ticket.updates.serial
            since = before.get(id(ticket), serial)
            if serial > since:  # penalized within closure(): super().step() was given the outer step's wrapped one
                held = held.where(one.penalized_at <= since for one, _ in held)
            penalized = ticket.penalize(held, optimizer)
            if isinstance(optimizer, LBFGS):  # its line search compares losses
                loss = loss + loss_term(penalized, ticket.stage.masks, ticket.stage.penalty)
        return loss

    return evaluate


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for ticket, held in _find(optimizer, checks=False):  # as it was before the step
        if ticket.holds:
            ticket.after_update(held)
        else:
            ticket.note_update(optimizer)

"""What happens before and after each step of an optimizer.

One pair of hooks for all optimizers is installed in a process, once and for good: taking a hook away while an optimizer
walks over its hooks is not safe, and the garbage collector may drop a scheduler at any moment.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .frames import in_rehearsal
from .own_hooks import pair
from .vacancy import watch_collector
from .zeroing import zero_after_update, zero_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from torch import Tensor

    from .holds import Hold
    from .tickets import Ticket

    Groups = dict[int, dict[str, Any]]  # id of a parameter -> the optimizer's group that holds it
    Held = list[tuple[Hold, Tensor, dict[str, Any]]]

_lock = threading.Lock()
_tickets: tuple[weakref.ref[Ticket], ...] = ()  # replaced, never changed: steps in other threads may be walking over it
_installed = False
_STEP_CODE = Optimizer.profile_hook_step(lambda: None).__code__  # of the function that runs hooks around each step


def register(ticket: Ticket) -> None:
    global _tickets, _installed
    with _lock:
        _tickets = (*(ref for ref in _tickets if ref() is not None), weakref.ref(ticket))
        if not _installed:
            # Compiled steps call them as they are. Not at import: it loads the compiler, as the first optimizer does.
            register_optimizer_step_pre_hook(torch.compiler.disable(_before_all))  # type: ignore[no-untyped-call]
            register_optimizer_step_post_hook(torch.compiler.disable(_after_step))  # type: ignore[no-untyped-call]
            watch_collector()
            _installed = True


def held_parameters() -> set[int]:
    """The ids of the parameters that tickets in this process hold."""
    tickets = [ticket for ref in _tickets if (ticket := ref()) is not None]
    return {id(hold.parameter()) for ticket in tickets for hold in ticket.holds}


def groups_of(optimizer: Optimizer) -> Groups:
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def _held(optimizer: Optimizer, *, enforcing: bool) -> list[tuple[Ticket, Held]]:
    """The tickets of one phase that have parameters in this optimizer, with their holds on them."""
    found = []
    for ref in _tickets:
        ticket = ref()
        if ticket is not None and ticket.enforcing is enforcing and (held := ticket.held_by(optimizer)):
            found.append((ticket, held))
    return found


def _enforced(optimizer: Optimizer) -> list[tuple[Hold, Tensor]]:
    """The holds that keep zeros in this optimizer's parameters."""
    return [entry[:2] for _, held in _held(optimizer, enforcing=True) for entry in held]


def _penalized(optimizer: Optimizer) -> list[tuple[Ticket, Held]]:
    """The tickets in transformation, with their holds on what the optimizer itself is about to update."""
    found = [
        (ticket, held)
        for ticket, held in _held(optimizer, enforcing=False)
        if not ticket.silenced and (ticket.optimizer is None or _is_part(optimizer, ticket.optimizer()))
    ]
    if found and (parts := _parts(optimizer)):
        left = {key for part in parts for key in groups_of(part)}
        found = [(ticket, [entry for entry in held if id(entry[1]) not in left]) for ticket, held in found]
    return found


def _parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one is made of (SAM, Lookahead): their steps are the updates, and carry the penalty."""
    return [part for part in vars(optimizer).values() if isinstance(part, Optimizer)]


def _is_part(optimizer: Optimizer, given: Optimizer | None) -> bool:
    return optimizer is given or (given is not None and any(_is_part(optimizer, part) for part in _parts(given)))


def _before_all(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch calls before each step; if the optimizer has pre-hooks of its own, the last of them calls ours."""
    before: Any = optimizer._optimizer_step_pre_hooks
    after: Any = optimizer._optimizer_step_post_hooks
    if before or after:
        is_concerned = bool(_held(optimizer, enforcing=False) or _held(optimizer, enforcing=True))
        pair(after, next(iter(after), None) if is_concerned else None, _after_step_and)
        pair(before, next(reversed(before), None) if is_concerned else None, _before_step_and)
        if before:
            return None
    return _before_step(optimizer, args, kwargs)


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


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        zero_after_update(_enforced(optimizer))
    for ref in _tickets:
        ticket = ref()
        if ticket is not None:
            ticket.note_update(optimizer)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    enforced = _enforced(optimizer)
    with torch.no_grad():
        for hold, parameter in enforced:
            hold.watch.over(parameter)
    penalized = _penalized(optimizer)
    if penalized and in_rehearsal(sys._getframe()):
        return None
    closure = args[1] if len(args) > 1 and callable(args[1]) else kwargs.get("closure")
    if closure is None:
        with torch.no_grad():
            for ticket, held in penalized:
                ticket.penalize(held, optimizer, in_step=True)
        return None
    if not (enforced or penalized):
        return None
    wrapped = _penalized_closure(closure, optimizer)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": wrapped}
    return (args[0], wrapped, *args[2:]), kwargs


def _penalized_closure(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """The closure, with zeros in force when it computes the loss and the penalty added when it has the gradients."""

    @functools.wraps(closure)
    def penalized() -> Any:
        with torch.no_grad():
            zero_all([(hold, parameter) for hold, parameter in _enforced(optimizer) if not hold.is_clean(parameter)])
        with _evaluation(optimizer) as done:
            loss = closure()
        with torch.no_grad():
            for ticket, held in _penalized(optimizer):
                due = [entry for entry in held if entry[0].name not in done.get(ticket, ())]
                if ticket.penalize(due, optimizer) and isinstance(optimizer, LBFGS):  # its line search compares losses
                    loss = loss + ticket.penalty_of(due)
        return loss

    return penalized


@contextmanager
def _evaluation(optimizer: Optimizer) -> Iterator[dict[Ticket, set[str]]]:
    """What each ticket penalizes within: by the closure of a step around this one, which hands it down to this one.

    It may have changed or replaced the gradients since, as steps that call the one they inherit do. Tickets that have
    nothing in this optimizer are left alone: another thread may be training them.
    """
    before = {ticket: ticket.carried for ticket, _ in _held(optimizer, enforcing=False)}
    within: dict[Ticket, set[str]] = {}
    for ticket in before:
        ticket.carried = set()
    try:
        yield within
    finally:
        for ticket, names in before.items():
            within[ticket] = ticket.carried
            ticket.carried = names | within[ticket]


def updated_by_outer_steps() -> set[int]:
    """The ids of the parameters that are updated by steps in which the running step was called.

    Read off the call stack: a flag set before a step and cleared after it would stay set when the step raises.
    """
    running: list[Any] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _STEP_CODE:
            running.append(frame.f_locals["self"])
        frame = frame.f_back
    outer = running[1:]
    left = {key for optimizer in outer for part in _parts(optimizer) for key in groups_of(part)}
    return {key for optimizer in outer for key in groups_of(optimizer)} - left

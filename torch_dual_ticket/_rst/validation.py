"""Checks of what a user gives to the scheduler, all made before anything is changed."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, ParamSpec

import torch
from torch import nn
from torch.optim import Optimizer

from .._engine.optimizer_hooks import tickets
from .._engine.stage import Phase
from .._engine.ticket import Ticket
from .._model.names import unwrapped_modules
from .._model.targets import Target
from ..masks.mask import Mask
from .loop_warnings import warn_of_lost_layers
from .residual import LayerReport, Report

STATE_VERSION = 1
P = ParamSpec("P")


_MEANT = {
    "amount": "sparsity",
    "total_steps": "steps (or updates, of the whole training)",
    "num_steps": "steps (or updates, of the whole training)",
    "num_training_steps": "updates",
    "max_steps": "updates",
    "penalty": "max_penalty",
    "ignore": "exclude",
    "params": "model (the module itself)",
}


def explains_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Where the arguments do not fit, the error names those that do."""

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            inspect.signature(init).bind(*args, **kwargs)
        except TypeError as error:
            names = [*inspect.signature(init).parameters][1:]
            unknown = next((name for name in kwargs if name not in names), None)
            if unknown is not None:
                close = get_close_matches(unknown, names, n=1)
                meant = _MEANT.get(unknown) or (close[0] if close else None)
                hint = f"did you mean {meant}? " if meant else ""
                raise TypeError(f"there is no argument {unknown!r}: {hint}Allowed are {', '.join(names)}") from None
            if len(args) > 3:
                raise TypeError(
                    f"got {len(args) - 1} arguments without a name, and only model and sparsity may be: give the others"
                    f" by name, as in RSTScheduler(model, {args[2]!r:.20}, steps={args[3]!r:.20})"
                ) from None
            raise TypeError(f"RSTScheduler(model, sparsity, ...): {error}") from None
        init(*args, **kwargs)

    return checked


def check_unmanaged(targets: list[Target]) -> None:
    """Nothing else manages a target."""
    mine = {id(target.parameter) for target in targets}
    if not mine.isdisjoint(managed_parameters()):
        gc.collect()  # it may be a scheduler that was dropped in a cycle of references, as tracebacks make them
    managed = managed_parameters()
    for target in targets:
        if id(target.parameter) in managed:
            raise ValueError(
                f"{target.name} is managed by another RSTScheduler, or held masks. Call remove() on them first, or"
                " where no name reaches them, as for a copied model, torch_dual_ticket.release(model); or leave the"
                f" layer out, with exclude=[{target.layer_name!r}] or by giving no mask for it."
            )


def managed_parameters() -> set[int]:
    """The ids of the parameters that tickets in this process manage."""
    working = [ticket for ticket in tickets() if ticket.phase is not Phase.IDLE]
    return {id(tensor) for ticket in working for _, tensor in ticket.managed()}


def check_alone(what: str, others: Mapping[str, bool]) -> None:
    """None of the other arguments was given, as ``what`` says already which weights are pruned."""
    for other, is_given in others.items():
        if is_given:
            raise ValueError(f"{what} and {other} were given, and both say which weights are pruned: leave out {other}")


def check_optimizer(optimizer: Any, targets: Sequence[Target] = ()) -> None:
    """An optimizer of torch that holds a target, if there are any yet; or None."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. Give the torch optimizer"
            " inside it; or leave it out, and call rst.apply_penalty() before each update if there is none."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if targets and not any(id(target.parameter) in held for target in targets):
        raise ValueError(
            f"this {type(optimizer).__name__} holds none of the parameters to prune ({targets[0].name}, …). Build it"
            " from the parameters of the model that is given to the scheduler."
        )


def check_directions(targets: list[Target], masks: Mapping[str, Mask]) -> None:
    """No mask empties a slice that weight_norm divides by the norm of."""
    for target in targets:
        for occurrence in target.occurrences:
            dim = occurrence.direction_dim
            if dim is None:
                continue
            kept = masks[target.name].draw()
            slices = kept.movedim(dim, 0).flatten(1) if dim != -1 else kept.flatten().unsqueeze(0)
            if not bool(slices.any(1).all()):
                raise ValueError(
                    f"{target.name} is the direction of a weight_norm, and its mask would empty a whole slice of it,"
                    " whose norm is a divisor. Choose a lower sparsity for the layer, an unstructured pattern or"
                    f" another seed, or leave it out with exclude=[{target.layer_name!r}]."
                )


def check_manages(ticket: Ticket) -> None:
    """There is something to finalize."""
    if not ticket.parameters:
        raise RuntimeError(
            "this scheduler manages no layer: it was removed, or it is a copy made during the transformation, or all"
            " its layers were replaced. Build a new RSTScheduler on the model, and load the state_dict() of the one"
            " that was copied to go on where that was."
        )


def check_trained(ticket: Ticket, steps: int) -> None:
    """There is something to finalize, it can be reached, and an update applied the penalty."""
    check_manages(ticket)
    ticket.updates.settle(wait=True)
    if not (steps or ticket.updates.any_so_far):
        raise RuntimeError(
            "finalize() was called but no update ever applied the penalty. Train first: optimizer.step() with an"
            " optimizer that holds the model's own parameters, then rst.step(); if your updates are not a"
            " torch.optim.Optimizer's, call rst.apply_penalty() before each."
        )
    check_untied(ticket)
    check_reachable(ticket, stacklevel=4, inside=modules_of(ticket))
    check_manages(ticket)


def check_reachable(ticket: Ticket, stacklevel: int, inside: set[nn.Module] | None = None) -> None:
    """Every parameter is where it was; ``RuntimeError`` names the first that is not.

    One whose layer is gone is detached with a warning: a head may have been replaced on purpose.
    """
    lost = ticket.detach_lost(inside)
    if lost:
        warn_of_lost_layers(lost, stacklevel + 1)
    for managed in ticket.parameters:
        managed.check_present()


def modules_of(ticket: Ticket) -> set[nn.Module] | None:
    model = ticket.model()
    return None if model is None else {module for _, module in unwrapped_modules(model)}


def check_untied(ticket: Ticket) -> None:
    """Each parameter in the model has one mask."""
    names: dict[int, str] = {}
    inside = modules_of(ticket)
    for managed, tensor in ticket.managed():
        other = names.setdefault(id(tensor), managed.name) if managed.is_attached(inside) else managed.name
        if other != managed.name:
            raise RuntimeError(
                f"{other} and {managed.name} were tied after the scheduler was built, and have two masks. Tie them"
                " first; or detach one of the layers from the scheduler with"
                f" prune.remove(layer, {managed.occurrences[0].tensor_name!r})."
            )


@contextmanager
def generator_unchanged_on_error() -> Iterator[None]:
    """A seed may have been drawn from torch's global generator before something turns out to be wrong."""
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        raise


def check_state(state: Mapping[str, Any], ticket: Ticket) -> tuple[int, bool, str, int | None, Report]:
    """Scheduler steps, pending, phase, seed and report of a state that the ticket can go on from."""
    fields: dict[str, Any] = {"version": int, "ticks": int, "update_pending": bool, "phase": str, "masks": dict}
    fields["seed"] = int | None  # explicit masks have none
    try:
        values = {name: state[name] for name in fields}
    except (KeyError, TypeError, IndexError):
        keys = sorted(map(str, state)) if hasattr(state, "keys") else type(state).__name__
        raise ValueError(f"not a state_dict() of an RSTScheduler: needs {', '.join(fields)}; got {keys}") from None
    wrong = {name: value for name, value in values.items() if not isinstance(value, fields[name])}
    if not wrong and (values["ticks"] < 0 or values["phase"] not in ("transform", "finetune")):
        wrong = {name: values[name] for name in ("ticks", "phase")}
    try:
        report = Report.of([LayerReport(*row) for row in state.get("report", [])])
    except (TypeError, ValueError):
        wrong["report"] = state["report"]
    if wrong:
        listed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(f"a damaged state_dict() of an RSTScheduler, with {listed}. Load it as it was saved.")
    if state["version"] != STATE_VERSION:
        raise ValueError(f"a state of version {state['version']}; this release reads version {STATE_VERSION}")
    if state["phase"] == "finetune":
        check_manages(ticket)
        check_untied(ticket)
    return state["ticks"], state["update_pending"], state["phase"], state["seed"], report


def check_same_masks(mine: Mapping[str, str], theirs: Mapping[str, str], seeds: tuple[int | None, int | None]) -> None:
    """The fingerprints in a state are those of the masks here; names the first parameter where they are not."""
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            what = "differs" if name in mine and name in theirs else "is only here" if name in mine else "is only there"
            here, there = ("no seed" if seed is None else seed for seed in seeds)
            why = "" if here == there else f" (the seeds differ: {here} here, {there} in the state)"
            raise ValueError(
                f"the state belongs to other masks: {name} {what}{why}. Build the scheduler as the saved one was built:"
                " same seed, sparsity, pattern, distribution, targets and exclusions, or the same masks."
            )

"""What a user does. Each action takes plain settings, and does nothing where it cannot be done: any may be left out."""

from __future__ import annotations

import contextlib
import copy
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import _init_optim_state

from .sides import Explicit, FaultError, Library

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from torch import nn

    from .world import World

Settings = dict[str, Any]


@dataclass(frozen=True)
class Action:
    run: Callable[..., None]
    draw: Callable[[random.Random], Settings]
    weight: float


ACTIONS: dict[str, Action] = {}


def action(weight: float, draw: Callable[[random.Random], Settings] = lambda choose: {}) -> Any:
    """Registers a function under its name, with how often it is chosen and what draws its settings."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ACTIONS[function.__name__] = Action(function, draw, weight)
        return function

    return register


def _data(choose: random.Random) -> int:
    return choose.randrange(10**6)


# -- parts of an update ------------------------------------------------------------------------------------------------


def zero_gradients(world: World, how: str) -> None:
    """ "keep" goes on with the gradients of the last update, where they are whole."""
    if how == "keep" and world.can_accumulate and not world.frozen:
        return
    for side in world.sides:
        side.model.zero_grad(set_to_none=how != "in-place")


def backward(world: World, index: int, *, compiled: bool = False, infinite: bool = False, scale: bool = False) -> None:
    """``infinite``: the gradients of the masked weights are."""
    sign = -1.0 if world.setup.maximizes else 1.0
    # Compiled code does not see what other than an optimizer has done to the weights, until the next update.
    compiled = compiled and world.setup.compiles and not (world.is_dirty or world.is_replaced)
    for side in world.sides:
        with _infinite_gradients(world, side.model) if infinite else contextlib.nullcontext():
            loss = side.loss(index, compiled=compiled, sign=sign)
            (side.scaler.scale(loss) if scale else loss).backward()
        side.after_backward()
    world.is_dirty = world.is_replaced = False
    world.check_gradients()


@contextlib.contextmanager
def _infinite_gradients(world: World, model: nn.Module) -> Iterator[None]:
    handles = []
    for ticket in world.theirs.tickets:
        for parameter, masked in ticket.of(model) if ticket.phase == "finetune" else ():
            if parameter.requires_grad:
                hook = lambda grad, masked=masked: grad.masked_fill(masked, float("inf"))  # noqa: E731
                handles.append(parameter.register_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def differentiate(world: World, index: int, *, in_place: bool) -> None:
    """Gradients that do not come from backward()."""
    for side in world.sides:
        parameters = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
        sign = -1.0 if world.setup.maximizes else 1.0
        gradients = torch.autograd.grad(side.loss(index, sign=sign), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if in_place and parameter.grad is not None:
                parameter.grad.copy_(gradient)
            else:
                parameter.grad = gradient.clone()
    world.is_dirty = False


@torch.no_grad()
def add_noise(world: World, index: int) -> None:
    """What an optimizer that takes each weight by itself does with it does not reach the kept weights."""
    if world.setup.optimizer == "muon":
        return
    for side in world.sides:
        generator = torch.Generator().manual_seed(index)
        for parameter in side.model.parameters():
            if parameter.grad is not None:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad.add_(noise, alpha=0.003)
    world.momentum_differs = True


def scheduler_step(world: World, which: str = "all") -> None:
    handles = world.with_handles
    for index in handles if which == "all" else handles[:1]:
        for side in world.sides:
            side.scheduler_step(index)


def finalize(world: World, which: str = "all") -> None:
    handles = [index for index in world.with_handles if world.theirs.tickets[index].can_finalize]
    for index in handles if which == "all" else handles[-1:]:
        world.mine.finalize(index)
        world.theirs.finalize(index)


def evaluate(world: World, mode: str = "no_grad", index: int = 0) -> None:
    """A forward in evaluation, whose outputs must agree."""
    outputs = []
    for side in world.sides:
        side.model.eval()
        with torch.inference_mode() if mode == "inference" else torch.no_grad():
            outputs.append(side.loss(index))
        side.model.train()
    world.is_dirty = False
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)


def look(world: World) -> None:
    """Everything that there is to see, which must change nothing."""
    for index in world.with_handles:
        rst, ticket = world.mine.ticket(index), world.theirs.tickets[index]
        assert list(rst.masks) == list(ticket.masks)
        assert all(torch.equal(rst.masks[name], kept) for name, kept in ticket.masks.items()), "masks"
        state = rst.state_dict()
        observed = state["ticks"], state["update_pending"], state["phase"]
        expected = ticket.scheduler_steps, ticket.update_pending and ticket.phase == "transform", ticket.phase
        if ticket.phase == "finetune":
            observed, expected = observed[::2], expected[::2]
        assert observed == expected, f"state_dict: (ticks, update_pending, phase) {observed}, not {expected}"
        if not world.is_dirty:
            pairs = ticket.of(world.theirs.model)
            squares = [(weight.detach() * masked).square().sum() for weight, masked in pairs]
            whole = torch.stack([weight.detach().square().sum() for weight, _ in pairs]).sum()
            expected_residual = float((torch.stack(squares).sum() / whole).sqrt())
            assert abs(rst.residual() - expected_residual) < 1e-9, "residual()"
        kept = sum(int(kept.sum()) for kept in ticket.masks.values())
        assert (
            rst.sparsity == 1 - kept / sum(kept.numel() for kept in ticket.masks.values())
            or abs(rst.sparsity - 1 + kept / sum(kept.numel() for kept in ticket.masks.values())) < 1e-12
        )
        repr(rst)


BETWEEN: dict[str, Callable[[World], None]] = {
    "scheduler step": scheduler_step,
    "finalize": finalize,
    "evaluate": evaluate,
    "look": look,
    "collect": lambda world: void(gc.collect(1)),
}


def void(_: object) -> None: ...


def between(world: World, names: list[str]) -> None:
    for name in names:
        BETWEEN[name](world)


def _between(choose: random.Random) -> list[str]:
    return choose.choices([*BETWEEN, "scheduler step"], k=choose.choice([0, 0, 0, 1, 1, 2]))


def step(world: World, *, scheduler_step_between: bool = False) -> None:
    for number in range(len(world.mine.optimizers)):
        for side in world.sides:
            side.before_update(side.optimizers[number])
            side.optimizers[number].step()
            side.updated(side.optimizers[number])
        if scheduler_step_between and number == 0:
            scheduler_step(world)


def _scheduler_steps(choose: random.Random) -> list[str]:
    return choose.choice([["all"]] * 6 + [[], [], ["first"], ["all", "all"]])


def finish(world: World, scheduler_steps: list[str]) -> None:
    for which in scheduler_steps:
        scheduler_step(world, which)
    world.can_accumulate = True


# -- updates -----------------------------------------------------------------------------------------------------------


def _update(choose: random.Random) -> Settings:
    return {
        "index": _data(choose),
        "zero": choose.choice(["none", "none", "in-place", "keep"]),
        "backwards": choose.choice([1, 1, 1, 2, 3]),
        "how": choose.choice(["backward"] * 5 + ["grad", "grad in place"]),
        "infinite": choose.random() < 0.1,
        "compiled": choose.random() < 0.3,
        "clip": choose.choice([None, None, "norm", "value"]),
        "noise": choose.random() < 0.1,
        "then": _between(choose),
        "fails": choose.choice([None] * 9 + ["retry", "again", "in backward"]),
        "scheduler_step_between": choose.random() < 0.1,
        "scheduler_steps": _scheduler_steps(choose),
    }


@action(20, _update)
def update(
    world: World,
    *,
    index: int,
    zero: str,
    backwards: int,
    how: str,
    infinite: bool,
    compiled: bool,
    clip: str | None,
    noise: bool,
    then: list[str],
    fails: str | None,
    scheduler_step_between: bool,
    scheduler_steps: list[str],
) -> None:
    """One iteration of a loop without closures."""
    if world.setup.needs_closure:
        with_closure(
            world, index=index, backwards=backwards, clip=clip, then=then, fails_at=0, scheduler_steps=scheduler_steps
        )
        return

    def make_gradients() -> None:
        for part in range(backwards):
            if how == "backward":
                backward(world, index + part, compiled=compiled, infinite=infinite)
            else:
                in_place = how == "grad in place" and world.setup.optimizer != "muon"  # which looks at whole layers
                differentiate(world, index + part, in_place=in_place)
                world.momentum_differs |= in_place
        for side in world.sides:
            side.clip(clip)
        if noise:
            add_noise(world, index)
        between(world, then)

    zero_gradients(world, zero)
    if fails == "in backward":
        fail_in_backward(world, index)
        zero_gradients(world, "none")
    make_gradients()
    if fails in ("retry", "again"):
        fail_in_step(world)
        if fails == "again":
            world.can_accumulate = False
            zero_gradients(world, "none" if index % 2 else "in-place")
            make_gradients()
    step(world, scheduler_step_between=scheduler_step_between)
    finish(world, scheduler_steps)


def fail_in_backward(world: World, index: int) -> None:
    """One parameter has raised: the gradients of some are there, those of others are not."""
    for side in world.sides:
        parameters = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
        handle = parameters[index % len(parameters)].register_hook(_raise)
        with contextlib.suppress(FaultError):  # torch does not call it on a parameter that was swapped
            side.loss(index).backward()  # type: ignore[no-untyped-call]
        handle.remove()
    world.is_dirty = False


def _raise(*_: object) -> None:
    raise FaultError


def fail_in_step(world: World) -> None:
    """The last hook before an optimizer's step raises: nothing was updated, and nothing counts."""
    for optimizer in world.mine.optimizers:
        handle = optimizer.register_step_pre_hook(_raise)
        try:
            optimizer.step()
        except FaultError:
            pass
        else:
            raise AssertionError("step() did not raise")
        handle.remove()


def _with_closure(choose: random.Random) -> Settings:
    return {
        "index": _data(choose),
        "backwards": choose.choice([1, 1, 2]),
        "clip": choose.choice([None, None, "norm", "value"]),
        "then": _between(choose),
        "fails_at": choose.choice([0] * 6 + [1, 2]),
        "scheduler_steps": _scheduler_steps(choose),
    }


@action(5, _with_closure)
def with_closure(
    world: World,
    *,
    index: int,
    backwards: int,
    clip: str | None,
    then: list[str],
    fails_at: int,
    scheduler_steps: list[str],
) -> None:
    """One update by ``optimizer.step(closure)``; a closure may raise."""
    if world.setup.is_lbfgs:
        clip = None  # its line search would compare losses with gradients that are not theirs
    world.can_accumulate = False
    between(world, then)
    for number in range(len(world.mine.optimizers)):
        raised = []
        for side in world.sides:
            try:
                side.step_with_closure(number, index, backwards=backwards, clip=clip, fails_at=fails_at)
                raised.append(False)
            except FaultError:
                raised.append(True)
                if isinstance(side, Explicit):
                    side.failed()
        assert raised[0] == raised[1], f"the closure was not called as often: {raised}"
        if raised[0]:
            recover(world)
    world.is_dirty = False
    finish(world, scheduler_steps)
    world.can_accumulate = not any(raised) and not world.setup.needs_closure


def recover(world: World) -> None:
    """A line search, or SAM, that was interrupted leaves the weights where it had moved them."""
    world.was_written = True
    if world.setup.needs_closure:
        evaluate(world)
        for side in world.sides:
            side.make_optimizers()


@action(3, lambda choose: {"index": _data(choose), "infinite": choose.random() < 0.4, "unscale": choose.random() < 0.5})
def scaled(world: World, *, index: int, infinite: bool, unscale: bool) -> None:
    """One update under GradScaler, which skips it where a gradient is infinite."""
    if world.setup.needs_closure or world.setup.optimizer == "halving" or world.frozen:
        return
    if infinite and world.setup.optimizer == "sgd-fused":
        return  # in its first step it would read momentum that nobody has written: a mistake of torch
    zero_gradients(world, "none")
    backward(world, index, scale=True)
    skipped = index % len(world.mine.optimizers) if infinite else -1
    for side in world.sides:
        if infinite:
            group = side.optimizers[skipped].param_groups[0]["params"]
            having = [parameter for parameter in group if parameter.grad is not None]
            if not having:
                world.can_accumulate = False
                return
            _first_kept(world, side.model, having).fill_(float("inf"))
        for number, optimizer in enumerate(side.optimizers):
            if unscale or isinstance(side, Explicit):
                side.scaler.unscale_(optimizer)
            if number != skipped:
                side.before_update(optimizer)
            side.scaler.step(optimizer)
            if number != skipped:
                side.updated(optimizer)
        side.scaler.update()
    scheduler_step(world)
    world.can_accumulate = False
    if not unscale and world.setup.optimizer.endswith("fused"):  # λ times the scale, in the float32 of GradScaler
        world.synchronize(tolerance=1e-6)
        world.theirs.load_optimizers(world.mine.optimizer_states())


def _first_kept(world: World, model: nn.Module, having: list[Any]) -> Any:
    """A gradient of a weight that no mask concerns."""
    masked = {id(weight): where for ticket in world.theirs.tickets for weight, where in ticket.of(model)}
    parameter = having[-1]
    grad = parameter.grad.view(-1)
    where = masked.get(id(parameter))
    position = 0 if where is None else int((~where).flatten().nonzero()[0])
    return grad[position]


@action(1)
def empty_step(world: World) -> None:
    """A step without any gradient is not an update."""
    if world.setup.needs_closure:
        return
    zero_gradients(world, "none")
    world.can_accumulate = False
    step(world)
    scheduler_step(world)


def _manual(choose: random.Random) -> Settings:
    return {
        "index": _data(choose),
        "zero": choose.choice(["none", "in-place", "keep"]),
        "style": choose.choice(["data", "no_grad", "optimizer"]),
        "calls": choose.choice([1, 1, 2]),
        "scheduler_steps": choose.choice([["all"], ["all"], [], ["first"]]),
        "scheduler_step_first": choose.random() < 0.3,
    }


@action(3, _manual)
def manual(
    world: World,
    *,
    index: int,
    zero: str,
    style: str,
    calls: int,
    scheduler_steps: list[str],
    scheduler_step_first: bool,
) -> None:
    """apply_penalty(), and an update that no hook sees, or one by an optimizer that the call has silenced."""
    if style == "optimizer" and (world.setup.needs_closure or world.setup.maximizes):
        style = "data"
    if world.setup.optimizer == "halving" and style == "optimizer":
        style = "no_grad"
    for ticket in world.theirs.tickets:
        if ticket.has_handle and all(not weight.requires_grad for weight, _ in ticket.of(world.theirs.model)):
            return  # apply_penalty() would raise
    zero_gradients(world, zero)
    backward(world, index)
    for handle in world.with_handles:
        world.theirs.apply_penalty(handle)
        for _ in range(calls):
            world.mine.apply_penalty(handle)
    if style == "optimizer":
        step(world)
    else:
        if scheduler_step_first:
            scheduler_step(world)
        for side in world.sides:
            with torch.no_grad():
                for parameter in side.model.parameters():
                    if parameter.grad is not None:
                        (parameter.data if style == "data" else parameter).sub_(parameter.grad, alpha=0.02)
        if scheduler_step_first:
            scheduler_steps = []
    world.was_written = True
    finish(world, scheduler_steps)


# -- the schedule ------------------------------------------------------------------------------------------------------


@action(2, lambda choose: {"which": choose.choice(["all", "first"])})
def scheduler_step_alone(world: World, *, which: str) -> None:
    scheduler_step(world, which)


@action(1.5, lambda choose: {"which": choose.choice(["all", "all", "last"])})
def finalize_now(world: World, *, which: str) -> None:
    finalize(world, which)


@action(1)
def finalize_when_done(world: World) -> None:
    if all(ticket.scheduler_steps == ticket.setup.total for ticket in world.theirs.tickets):
        finalize(world)


@action(2, lambda choose: {"mode": choose.choice(["no_grad", "inference"]), "index": _data(choose)})
def evaluation(world: World, *, mode: str, index: int) -> None:
    evaluate(world, mode, index)


@action(2)
def looking(world: World) -> None:
    look(world)


# -- the model changes -------------------------------------------------------------------------------------------------


@action(1.5, lambda choose: {"layer": choose.randrange(10)})
def freeze(world: World, *, layer: int) -> None:
    """Freezes one of the pruned layers, or thaws it."""
    # LBFGS would move the layer all the same; fused SGD fails where momentum exists for a part of the gradients.
    if world.setup.is_lbfgs or world.setup.optimizer == "sgd-fused":
        return
    layers = world.setup.kind.layers
    name = layers[layer % len(layers)]
    thaws = name in world.frozen
    if not thaws and len(world.frozen) + 1 == len(layers):
        return
    world.frozen ^= {name}
    for side in world.sides:
        side.model.get_submodule(name).requires_grad_(thaws)
        side.model.zero_grad(set_to_none=True)
    world.can_accumulate = False


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "double": lambda model: model.double(),
    "float": lambda model: model.float().double(),
    "half": lambda model: model.half().double(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "contiguous": lambda model: model.to(memory_format=torch.contiguous_format),
}
# Compiled code refers to parameters weakly, and torch 2.6 swaps no tensor to which anything does so.
SWAPS_COMPILED = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
FUTURES = {
    "swap": (
        torch.__future__.get_swap_module_params_on_conversion,
        torch.__future__.set_swap_module_params_on_conversion,
    ),
    "overwrite": (
        torch.__future__.get_overwrite_module_params_on_conversion,
        torch.__future__.set_overwrite_module_params_on_conversion,
    ),
}


def _convert(choose: random.Random) -> Settings:
    return {"how": choose.choice(list(CONVERSIONS)), "future": choose.choice([None, None, *FUTURES])}


@action(2, _convert)
def convert(world: World, *, how: str, future: str | None) -> None:
    """To another type and back, or to another layout in memory; in place, by swapping, or with new parameters."""
    # LBFGS takes views of the gradients that such a layout does not have; fused optimizers of torch walk over weights
    # and momentum as if both had the same.
    if how == "channels_last" and (world.setup.is_lbfgs or world.setup.optimizer.endswith("fused")):
        return
    if future == "overwrite" and not world.setup.kind.can_assign:
        future = None
    if future == "swap" and not world.setup.kind.sees_all:  # clipping would see the first gradient as it is
        future = None
    if future == "swap" and world.setup.compiles and not SWAPS_COMPILED:
        future = None
    world.synchronize()
    zero_gradients(world, "none")
    world.can_accumulate, world.was_written = False, True
    for side in world.sides:
        if future is not None:
            getattr(torch.__future__, f"set_{future}_module_params_on_conversion")(True)
        try:
            CONVERSIONS[how](side.model)
        finally:
            if future is not None:
                getattr(torch.__future__, f"set_{future}_module_params_on_conversion")(False)
        if future == "overwrite":
            side.make_optimizers(side.optimizer_states())
    world.is_replaced |= future is not None


@action(1.5, lambda choose: {"seed": _data(choose), "assign": choose.random() < 0.4, "masks": choose.random() < 0.3})
def load_other_weights(world: World, *, seed: int, assign: bool, masks: bool) -> None:
    """A dense state; after finalize() its masked weights are zero again at the next forward, or by apply_masks()."""
    if not world.setup.kind.sees_all and "finetune" in world.phases:
        return
    assign = assign and world.setup.kind.can_assign
    for side in world.sides:
        side.model.zero_grad(set_to_none=True)
        state = copy.deepcopy(world.setup.build(seed).state_dict())
        side.model.load_state_dict(state, assign=assign)
        if assign:
            for name in world.frozen:
                side.model.get_submodule(name).requires_grad_(False)
            side.make_optimizers(side.optimizer_states())
    world.is_replaced |= assign
    world.can_accumulate, world.was_written = False, True
    finetuned = [index for index, ticket in enumerate(world.theirs.tickets) if ticket.phase == "finetune"]
    world.is_dirty = bool(finetuned)
    if masks and finetuned and set(finetuned) <= set(world.with_handles):
        for index in finetuned:
            for side in world.sides:
                side.apply_masks(index, side.model)
        world.is_dirty = False


@action(1)
def new_optimizer(world: World) -> None:
    for side in world.sides:
        side.make_optimizers()
    world.momentum_differs = False


@action(0.5)
def new_optimizer_with_a_dummy_step(world: World) -> None:
    """torch.distributed.checkpoint makes one, which is not an update, so that there is a state to load into."""
    if world.setup.needs_closure:
        return
    new_optimizer(world)
    zero_gradients(world, "none")
    for side in world.sides:
        for optimizer in side.optimizers:
            _init_optim_state(optimizer)
    world.can_accumulate = False


# -- copies and restarts -----------------------------------------------------------------------------------------------


@action(0.7, lambda choose: {"how": choose.choice(["deepcopy", "pickle"])})
def go_on_with_a_copy(world: World, *, how: str) -> None:
    """A copy of a finalized model keeps its zeros; one made before is a plain model."""
    if not world.setup.kind.can_pickle:
        how = "deepcopy"
    for side in world.sides:
        side.copy_model(how)
    world.mine.tickets = [None] * len(world.mine.tickets)
    for index in range(len(world.theirs.tickets)):
        world.theirs.drop(index)
    world.can_accumulate, world.was_written = False, True
    drop_momentum(world)


def drop_momentum(world: World) -> None:
    """Of masked weights that are not held at zero any more, it begins to matter."""
    if world.momentum_differs and "gone" in world.phases:
        new_optimizer(world)


def _states(side: Library | Explicit) -> dict[str, Any]:
    return {
        "model": copy.deepcopy(side.model.state_dict()),
        "optimizers": side.optimizer_states(),
        "tickets": side.ticket_states(),
    }


def _load(side: Library | Explicit, states: dict[str, Any], order: list[str]) -> None:
    for part in order:
        if part == "model":
            side.model.load_state_dict(copy.deepcopy(states["model"]))
        elif part == "optimizers":
            side.load_optimizers(states["optimizers"])
        else:
            side.load_tickets(states["tickets"])


PARTS = ["model", "optimizers", "tickets"]


@action(1.5, lambda choose: {"order": choose.sample(PARTS, 3), "seed": _data(choose)})
def resume(world: World, *, order: list[str], seed: int) -> None:
    """A new process: new objects, and the states of the old ones."""
    if len(world.with_handles) < len(world.theirs.tickets) or world.is_dirty:
        return
    saved = [_states(side) for side in world.sides]
    world.mine = Library(world.setup, seed, world.mask_seeds)
    world.theirs = Explicit(world.setup, seed, [ticket.all_masks for ticket in world.theirs.tickets])
    world.sides = (world.mine, world.theirs)
    for side, states in zip(world.sides, saved, strict=True):
        _load(side, states, order)
    world.frozen.clear()
    world.can_accumulate, world.was_written = False, True


@action(2)
def save(world: World) -> None:
    if len(world.with_handles) == len(world.theirs.tickets) and not world.is_dirty:
        world.saved = (_states(world.mine), _states(world.theirs))


@action(2, lambda choose: {"order": choose.sample(PARTS, 3)})
def go_back(world: World, *, order: list[str]) -> None:
    """To an earlier state in the same process, also from finetuning to the transformation."""
    if world.saved is None or len(world.with_handles) < len(world.theirs.tickets):
        return
    for side, states in zip(world.sides, world.saved, strict=True):
        side.model.zero_grad(set_to_none=True)
        _load(side, states, order)
        if order[-1] != "model":  # what was held at zero as the model was loaded
            side.model.load_state_dict(copy.deepcopy(states["model"]))
    world.is_dirty = world.can_accumulate = False
    world.was_written = True


# -- averages ----------------------------------------------------------------------------------------------------------


@action(1, lambda choose: {"begins": choose.random() < 0.3})
def average(world: World, *, begins: bool) -> None:
    if world.is_dirty:
        return
    for side in world.sides:
        if side.average is None or begins:
            side.begin_average()
        side.update_average()


@action(1)
def prune_average(world: World) -> None:
    if world.mine.average is not None:
        for index in world.with_handles:
            for side in world.sides:
                assert side.average is not None
                side.apply_masks(index, side.average)


# -- the end of a scheduler --------------------------------------------------------------------------------------------


@action(0.8, lambda choose: {"how": choose.choice(["remove", "drop"]), "which": choose.randrange(2)})
def end(world: World, *, how: str, which: int) -> None:
    """remove() leaves a plain model; a scheduler that is dropped stops penalizing, and keeps zeros."""
    if which not in world.with_handles or world.is_dirty:
        return
    for side in world.sides:
        getattr(side, how)(which)
    world.was_written = True
    world.can_accumulate = False
    for side in world.sides:
        side.model.zero_grad(set_to_none=True)
    drop_momentum(world)


@action(2)
def new_schedulers(world: World) -> None:
    """On a model that no scheduler manages any more."""
    if world.phases != {"gone"} or world.frozen:
        return
    world.mask_seeds, masks = world.choose_masks(next(world.fresh_seeds))
    world.mine.make_tickets(world.mask_seeds)
    world.theirs.make_tickets(masks)
    world.saved, world.was_ticket = None, True

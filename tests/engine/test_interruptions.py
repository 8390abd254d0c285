"""KeyboardInterrupt at every line of the package that a call runs: what was begun is wholly done, or not at all.

After each interruption the loop goes on, and must equal an explicit loop in the state of before or in that of after.
Kept weights are never touched; masked ones are as they were, or zero. With INTERRUPT_EVERY_TIME=1 in the environment
each line is interrupted whenever it runs, otherwise a few times.
"""

from __future__ import annotations

import ast
import functools
import gc
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fuzz.setups import Setup, Ticket
from fuzz.sides import Explicit, Library, Side
from fuzz.world import World, assert_close
from models import assert_same, loss_of, make, mlp
from reference import ExplicitLoop
from torch import nn

import torch_dual_ticket
from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors import kernels
from torch_dual_ticket.baselines import GradualPruning, hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

PACKAGE = str(Path(torch_dual_ticket.__file__).parent)
# "attention" has a layer whose zeros are put right by another one, "tied" a parameter that stands in two layers.
CASES = [("tied", 1), ("attention", 2)]  # with a number of cycles
EVERY_TIME = bool(os.environ.get("INTERRUPT_EVERY_TIME"))  # slow, and rarely finds more
CHANGING = ("_engine/", "baselines/", "scheduler.py")  # what has a state; the rest computes
Line = tuple[str, int, str]  # file, number, function
Moment = tuple[Line, int]  # at the so manieth time
State = tuple[int, bool, str]  # scheduler steps, whether an update is pending, phase


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Nothing is transformed to its end here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the masked weights still held")
        warnings.filterwarnings("ignore", message=r"finalize\(\) (in cycle|after)")
        yield


@pytest.fixture(autouse=True)
def _path_of_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the models takes the way that large tensors take on an accelerator, where masks stand in lists."""
    if "attention" in request.node.name:
        monkeypatch.setattr(kernels, "_on_cpu", lambda tensor: False)
        monkeypatch.setattr(kernels, "SMALL", 4)


# -- interruptions -----------------------------------------------------------------------------------------------------


def interrupt(call: Callable[[], object], at: Moment | None = None) -> tuple[Counter[Line], KeyboardInterrupt | None]:
    """Call, and interrupt it where a line of the package begins for the so manieth time.

    Returns how often each line began, and the interruption if it got out of the call.
    """
    seen: Counter[Line] = Counter()
    last: dict[Any, int] = {}

    def lines(frame: Any, event: str, arg: object) -> Any:
        if event == "line":
            came_from, last[frame] = last.get(frame, 0), frame.f_lineno
            # Python looks for signals after calls, but not between the body of a `with` and its end.
            if came_from not in bodies_of_with(frame.f_code.co_filename).get(frame.f_lineno, ()):
                line = (frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno, frame.f_code.co_name)
                seen[line] += 1
                if (line, seen[line]) == at:
                    raise KeyboardInterrupt
        return lines

    def calls(frame: Any, event: str, arg: object) -> Any:
        return lines if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    gc.collect(0)
    gc.disable()  # its callbacks are none of the call's lines, and lose what they raise
    sys.settrace(calls)
    try:
        call()
    except KeyboardInterrupt as error:
        return seen, error
    finally:
        sys.settrace(before)
        gc.enable()
        last.clear()  # its traceback would keep the variables alive
    return seen, None


def moments_of(seen: Counter[Line]) -> list[Moment]:
    """Where to interrupt the call."""
    moments = []
    for line, times in seen.items():
        some = {1, min(2, times), times} if line[0].startswith(CHANGING) else {1}
        moments += [(line, number) for number in (range(1, times + 1) if EVERY_TIME else sorted(some))]
    return moments


@functools.cache
def bodies_of_with(path: str) -> dict[int, range]:
    """The lines of each `with` statement of a file, and those of its body."""
    tree = ast.parse(Path(path).read_text())
    return {
        line: range(node.body[0].lineno, (node.body[-1].end_lineno or 0) + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for line in range(node.lineno, node.body[0].lineno)
    }


def at_every_line(
    prepare: Callable[[], Any],
    call: Callable[[Any], object],
    judge: Callable[[Any], None],
    *,
    keeps_traceback: bool = True,  # as a notebook does: what the interrupted calls had stays alive
) -> None:
    """Reports all lines at which an interruption does harm, not the first one alone."""
    harm: Counter[str] = Counter()
    seen: Counter[Line] = Counter()
    for _ in range(2):  # the first fills caches
        scene = prepare()
        seen, _ = interrupt(functools.partial(call, scene))
    moments = moments_of(seen)
    assert len(moments) > 10
    for moment in moments:
        scene = prepare()
        reached, error = interrupt(functools.partial(call, scene), moment)
        if reached[moment[0]] < moment[1]:  # what is done once in a process, or for each scheduler there is
            continue
        if not keeps_traceback:
            error = None
        try:
            assert torch.is_grad_enabled(), "no_grad() has not ended"
            judge(scene)
        except Exception as wrong:
            harm["{}:{} {}: ".format(*moment[0]) + f"{type(wrong).__name__}: {wrong}".splitlines()[0]] += 1
        torch.set_grad_enabled(True)
        del error
    assert not harm, f"{sum(harm.values())} of {len(moments)} interruptions do harm:\n" + "\n".join(
        f"{count} x {what}" for what, count in harm.items()
    )


# -- the loop ----------------------------------------------------------------------------------------------------------


def world_of(model: str, cycles: int = 1, updates: int = 0, *, finalized: bool = False) -> World:
    setup = Setup(model, "sgd-momentum", (_ticket(model, cycles),), optimizer_first=True)
    world = World(setup, seed=5)
    for side in world.sides:
        for index in range(updates):
            update(side, index)
            side.scheduler_step(0)
        if finalized:
            side.finalize(0)
    return world


def _ticket(model: str, cycles: int) -> Ticket:
    layers = {"tied": ("first", "head"), "attention": ("attention", "head")}[model]
    sparsities = dict.fromkeys(layers, 0.6)
    return Ticket(sparsities, steps=3, hold=0, cycles=cycles, max_penalty=1.0, schedule="linear", store_masks=True)


def make_gradients(side: Side, index: int) -> None:
    side.model.zero_grad()
    side.loss(index).backward()  # type: ignore[no-untyped-call]
    side.after_backward()
    side.clip("norm")


def update(side: Side, index: int) -> None:
    make_gradients(side, index)
    side.before_update(side.optimizers[0])
    side.optimizers[0].step()
    side.updated(side.optimizers[0])


def observe(side: Library | Explicit) -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
    """The weights, and what a scheduler tells of itself."""
    weights = {name: value.detach().clone() for name, value in side.model.named_parameters()}
    ticket = side.tickets[0]
    if ticket is None or (isinstance(side, Explicit) and not side.tickets[0].has_handle):
        return weights, None, {}
    if isinstance(side, Explicit):
        explicit = side.tickets[0]
        return (
            weights,
            (explicit.phase, explicit.penalty, explicit.scheduler_steps / explicit.setup.total),
            explicit.masks,
        )
    rst = side.ticket(0)
    return weights, (rst.phase, rst.penalty, rst.progress), dict(rst.masks)


def go_on(side: Library | Explicit, *, finalizes: bool = True) -> list[Any]:
    """What follows: updates, steps of the scheduler, the end of the transformation, and updates again."""
    observed = []
    for index in range(100, 104):
        if index == 102 and finalizes:
            side.finalize(0)
            if isinstance(side, Library):
                assert len(side.ticket(0).finalize().layers) == len(side.ticket(0).masks), "the report has other layers"
        update(side, index)
        observed.append(observe(side))
        if side.tickets[0] is not None:
            side.scheduler_step(0)
        observed.append(observe(side))
    return observed


def in_state(world: World, state: State, *, has_handle: bool = True) -> Explicit:
    """An explicit loop with the weights and the momentum of the library's side."""
    side = Explicit(world.setup, world.seed, [ticket.all_masks for ticket in world.theirs.tickets])
    side.model.load_state_dict(world.mine.model.state_dict())
    side.load_optimizers(world.mine.optimizer_states())
    side.load_tickets([state])
    side.tickets[0].has_handle = has_handle
    return side


def assert_goes_on_as_one_of(world: World, candidates: list[Explicit], *, finalizes: bool = True) -> Explicit:
    """The candidate that the library equals in everything that follows."""
    mine = go_on(world.mine, finalizes=finalizes)
    differences = []
    for side in candidates:
        try:
            for expected, found in zip(go_on(side, finalizes=finalizes), mine, strict=True):
                _assert_same(found, expected)
            return side
        except AssertionError as error:
            differences.append(str(error))
    raise AssertionError("; ".join(f"not as candidate {number}: {what}" for number, what in enumerate(differences)))


def _assert_same(found: Any, expected: Any) -> None:
    assert found[1] == expected[1], f"(phase, λ, progress) is {found[1]}, not {expected[1]}"
    assert found[2].keys() == expected[2].keys()
    for name, kept in expected[2].items():
        assert torch.equal(found[2][name], kept), f"the mask of {name} is another"
    for name, value in expected[0].items():
        assert_close(name, found[0][name], value, 1e-10)


def assert_kept_weights(world: World, before: dict[str, Tensor]) -> None:
    """Nothing but masked weights has changed, and those to zero."""
    masks = world.theirs.tickets[0].all_masks[-1]
    for name, value in world.mine.model.named_parameters():
        changed = value != before[name]
        assert name in masks or not changed.any(), f"{name} has changed"
        if name in masks:
            assert not (changed & masks[name]).any(), f"kept weights of {name} have changed"
            assert not value[changed].any(), f"masked weights of {name} are neither as before nor zero"


Scene = tuple[World, dict[str, "Tensor"]]


def scene(world: World) -> Scene:
    return world, {name: value.detach().clone() for name, value in world.mine.model.named_parameters()}


# -- the calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "keeps_traceback"), [("tied", False), ("attention", True)])
def test_the_constructor(model, keeps_traceback):
    """Nothing penalizes after it, and a new scheduler can be built."""

    def prepare() -> Scene:
        world = world_of(model)
        for side in world.sides:
            side.remove(0)
        return scene(world)

    def judge(scene: Scene) -> None:
        world, before = scene
        for name, value in world.mine.model.named_parameters():
            assert torch.equal(value, before[name]), f"{name} has changed"
        for side in world.sides:
            update(side, 50)
        _assert_same(observe(world.mine), observe(world.theirs))
        world.mine.make_tickets(world.mask_seeds)
        world.theirs.make_tickets([ticket.all_masks for ticket in world.theirs.tickets])
        assert_goes_on_as_one_of(world, [world.theirs])

    at_every_line(
        prepare,
        lambda scene: scene[0].mine.make_tickets(scene[0].mask_seeds),
        judge,
        keeps_traceback=keeps_traceback,
    )


@pytest.mark.parametrize(("model", "cycles"), CASES)
def test_finalize(model, cycles):
    def judge(scene: Scene) -> None:
        world, before = scene
        assert_kept_weights(world, before)
        assert_goes_on_as_one_of(world, [in_state(world, (2, False, phase)) for phase in ("transform", "finetune")])

    at_every_line(lambda: scene(world_of(model, cycles, updates=2)), lambda scene: scene[0].mine.finalize(0), judge)


@pytest.mark.parametrize(("model", "cycles"), CASES)
@pytest.mark.parametrize("to", ["finetune", "transform"])
def test_load_state_dict(to, model, cycles):
    """To the end, and back from it."""
    end, start = world_of(model, cycles, updates=3, finalized=True), world_of(model, cycles, updates=2)
    states: list[State] = [(2, False, "transform"), (3, False, "finetune")]
    if to == "transform":
        states.reverse()
    loaded = (end if to == "finetune" else start).mine.ticket_states()

    def prepare() -> Scene:
        return scene(world_of(model, cycles, updates=states[0][0], finalized=to == "transform"))

    def judge(scene: Scene) -> None:
        world, before = scene
        assert_kept_weights(world, before)
        assert_goes_on_as_one_of(world, [in_state(world, state) for state in states])

    at_every_line(prepare, lambda scene: scene[0].mine.load_tickets(loaded), judge)


@pytest.mark.parametrize(("model", "cycles"), CASES)
def test_step_of_the_scheduler(model, cycles):
    """With two cycles it is the one between them, at which the masks grow."""

    def prepare() -> Scene:
        world = world_of(model, cycles, updates=2)
        for side in world.sides:
            update(side, 2)
        return scene(world)

    def judge(scene: Scene) -> None:
        world, before = scene
        for name, value in world.mine.model.named_parameters():
            assert torch.equal(value, before[name]), f"{name} has changed"
        states: list[State] = [(2, True, "transform"), (3, False, "transform")]
        assert_goes_on_as_one_of(world, [in_state(world, state) for state in states])

    at_every_line(prepare, lambda scene: scene[0].mine.scheduler_step(0), judge)


@pytest.mark.parametrize(("model", "how"), [("tied", "plain"), ("attention", "closure")])
@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_step_of_the_optimizer(phase, model, how):
    """Its update has happened or not, and counts or not; the gradients are made anew after it."""

    def prepare() -> Scene:
        world = world_of(model, updates=1, finalized=phase == "finetune")
        make_gradients(world.mine, 50)
        return scene(world)

    def call(scene: Scene) -> None:
        side = scene[0].mine
        if how == "plain":
            side.optimizers[0].step()
        else:
            side.step_with_closure(0, 50, backwards=1, clip=None, fails_at=0)

    def judge(scene: Scene) -> None:
        world, before = scene
        for name, kept in world.theirs.tickets[0].all_masks[-1].items():
            weight = world.mine.model.get_parameter(name).detach()
            assert bool(weight[kept].all()), f"kept weights of {name} are zero"
            assert phase == "transform" or not before[name][~kept].any()
        candidates = [in_state(world, (1, pending, phase)) for pending in (False, True)]
        assert_goes_on_as_one_of(world, candidates, finalizes=phase == "transform")

    at_every_line(prepare, call, judge)


@pytest.mark.parametrize("model", ["tied"])
def test_hold(model):
    """All masks are in force, or none is and they can be given again."""

    def prepare() -> Scene:
        world = world_of(model)
        for side in world.sides:
            side.remove(0)
        return scene(world)

    def call(scene: Scene) -> None:
        world = scene[0]
        hold(world.mine.model, world.theirs.tickets[0].all_masks[-1])

    def judge(scene: Scene) -> None:
        world, before = scene
        assert_kept_weights(world, before)
        plain, held = (in_state(world, (0, False, phase), has_handle=False) for phase in ("gone", "finetune"))
        if assert_goes_on_as_one_of(world, [plain, held], finalizes=False) is plain:
            call(scene)
            plain.tickets[0].phase = "finetune"
            assert_goes_on_as_one_of(world, [plain], finalizes=False)

    at_every_line(prepare, call, judge)


Managing = tuple[nn.Module, torch.optim.Optimizer, Any, "dict[str, Tensor]", "dict[str, Tensor]"]


@pytest.mark.parametrize("kind", ["held", "transformed", "gradual", "gradual at once"])
def test_other_masks(kind):
    """Those of before apply, or the new ones; then the loop goes on as the explicit one. Called again, it is done."""
    before, after = ({"0.weight": torch.rand(20, 12) > 0.5, "4.weight": torch.rand(5, 16) > 0.5} for _ in range(2))

    def prepare() -> Managing:
        model = make(mlp)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        managed: Any = {
            "held": lambda: hold(model, before),
            "transformed": lambda: RSTScheduler(model, masks=before, steps=9),
            "gradual": lambda: GradualPruning(model, 0.5, 9, intervals=2, max_penalty=1, exclude=["2"]),
            "gradual at once": lambda: GradualPruning(model, 0.5, 9, intervals=2, max_penalty=0, exclude=["2"]),
        }[kind]()
        for index in range(3):
            go(model, optimizer, index)
            if index < 2 and kind != "held":
                managed.step()
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        return model, optimizer, managed, weights, dict(managed.masks)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
        optimizer.zero_grad()
        loss_of(model, index, (12,)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def call(managing: Managing) -> None:
        managed = managing[2]
        if "gradual" in kind:
            managed.step()  # the third, at which the mask grows
        else:
            managed.set_masks(after)

    def judge(managing: Managing) -> None:
        model, optimizer, managed, weights, masks = managing
        now = dict(managed.masks)
        if "gradual" not in kind:
            assert any(all(map(torch.equal, now.values(), one.values())) for one in (masks, after))
        elif not all(map(torch.equal, now.values(), masks.values())):
            assert [int((~mask).sum()) for mask in now.values()] == [round(0.875 * 120), round(0.875 * 40)]
        for name, value in model.named_parameters():
            changed = value != weights[name]
            assert not value[changed].any()
            assert name in now or not changed.any()
        other = make(mlp)
        other.load_state_dict(model.state_dict())
        loop = ExplicitLoop(other, now, steps=1, max_penalty=managed.penalty)
        if managed.phase == "finetune":
            loop.finalize()
        other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        for index in range(5, 8):
            go(model, optimizer, index)
            other_optimizer.zero_grad()
            loss_of(other, index, (12,)).backward()
            loop.before_update()
            other_optimizer.step()
            loop.after_update()
        assert_same(model, other)
        call(managing)
        if "gradual" not in kind:
            assert all(map(torch.equal, managed.masks.values(), after.values()))
        if kind != "held":
            managed.finalize()
        assert not any(model.get_parameter(name)[~mask].any() for name, mask in managed.masks.items())

    at_every_line(prepare, call, judge)


@pytest.mark.parametrize(("model", "phase"), [("tied", "finetune"), ("attention", "transform")])
def test_remove(model, phase):
    """What is left can be removed again, and after that the model is plain and takes a new scheduler."""

    def prepare() -> Scene:
        return scene(world_of(model, updates=2, finalized=phase == "finetune"))

    def judge(scene: Scene) -> None:
        world, before = scene
        for name, value in world.mine.model.named_parameters():
            assert torch.equal(value, before[name]), f"{name} has changed"
        rst = world.mine.ticket(0)
        world.mine.tickets[0] = None  # what it tells of itself in between is not asked
        candidates = [in_state(world, (2, False, now), has_handle=False) for now in (phase, "gone")]
        for side in candidates:  # no scheduler steps: λ stays
            side.scheduler_step = lambda index: None  # type: ignore[method-assign]
        side = assert_goes_on_as_one_of(world, candidates, finalizes=False)
        rst.remove()
        side.remove(0)
        assert_goes_on_as_one_of(world, [side], finalizes=False)
        assert not any(nn.utils.prune.is_pruned(module) for module in world.mine.model.modules())
        world.mine.make_tickets(world.mask_seeds)
        del side.scheduler_step  # type: ignore[attr-defined]
        side.make_tickets([ticket.all_masks for ticket in side.tickets])
        assert_goes_on_as_one_of(world, [side])

    at_every_line(prepare, lambda scene: scene[0].mine.ticket(0).remove(), judge)

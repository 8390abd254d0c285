"""Both sides of one run, what must be the same on them after each action, and how a failure is made small."""

from __future__ import annotations

import itertools
import random
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch

from .setups import draw_setup
from .sides import Explicit, Library, draw_masks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .setups import Setup

    Action = tuple[str, dict[str, Any]]

TOLERANCE = 1e-10
ALLOWED_WARNINGS = re.compile(
    r"the masked weights still held|finalize\(\) in cycle|with lr=.* will leave|a transformation ended at"
    r"|got no penalty in any update"  # a layer that was frozen, or not used, all the time
)
# Weights that change between two updates may come from an optimizer that the library does not know.
ALLOWED_AFTER_WRITING = re.compile(r"changed, but no update applied")
ALLOWED_ON_A_TICKET = re.compile(r"were exactly zero before the first update")


class World:
    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.seed = setup, seed
        self.mask_seeds, masks = self.choose_masks(seed)
        self.mine, self.theirs = Library(setup, seed, self.mask_seeds), Explicit(setup, seed, masks)
        self.sides: tuple[Library | Explicit, ...] = (self.mine, self.theirs)
        self.can_accumulate = False  # whether the gradients are whole, and no older than the last update
        self.is_dirty = False  # masked weights were written to, and no forward or update has come since
        self.is_replaced = False  # parameters are other objects, and no uncompiled forward has come since
        self.was_written = False  # weights were changed by something else than an update
        self.momentum_differs = False  # at masked weights, where it does not matter while they are held
        self.frozen: set[str] = set()
        self.was_ticket = False  # the schedulers are not the first on the model
        self.saved: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.fresh_seeds = itertools.count(seed + 1_000_000)

    def choose_masks(self, first: int) -> tuple[list[int], list[Any]]:
        """The first seeds that weight_norm accepts: no row may be empty."""
        seeds, masks = [], []
        for ticket in self.setup.tickets:
            for seed in itertools.count(first):
                try:
                    masks.append(draw_masks(self.setup, ticket, seed))
                except ValueError:
                    continue
                seeds.append(seed)
                break
        return seeds, masks

    @property
    def with_handles(self) -> list[int]:
        return [index for index, ticket in enumerate(self.theirs.tickets) if ticket.has_handle]

    @property
    def phases(self) -> set[str]:
        return {ticket.phase for ticket in self.theirs.tickets}

    # -- what must hold ------------------------------------------------------------------------------------------------

    def check(self, tolerance: float = TOLERANCE) -> None:
        self.check_weights(self.mine.model, self.theirs.model, tolerance)
        if self.mine.average is not None and self.theirs.average is not None:
            self.check_weights(self.mine.average, self.theirs.average, tolerance)
        for index in self.with_handles:
            rst, ticket = self.mine.ticket(index), self.theirs.tickets[index]
            observed = rst.phase, rst.penalty, rst.progress, rst.done
            expected = (
                ticket.phase,
                ticket.penalty,
                ticket.scheduler_steps / ticket.setup.total,
                ticket.scheduler_steps == ticket.setup.total,
            )
            assert observed == expected, f"scheduler {index}: (phase, λ, progress, done) {observed}, not {expected}"

    def check_weights(self, mine: nn.Module, theirs: nn.Module, tolerance: float) -> None:
        masked = self._masked_weights() if mine is self.mine.model else {}
        states = [
            {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}
            for model in (mine, theirs)
        ]
        assert states[0].keys() == states[1].keys()
        for name, expected in states[1].items():
            found = states[0][name]
            # A tied weight has several names here, and its mask is known by the first.
            where = next((gone for known, gone in masked.items() if is_same(states[0][known], found)), None)
            if where is not None:
                if self.is_dirty:
                    found, expected = found.masked_fill(where, 0), expected.masked_fill(where, 0)
                else:
                    zeros = found[where]
                    assert not zeros.any(), f"{name}: {int((zeros != 0).sum())} masked weights are not zero"
                    assert not torch.signbit(zeros).any(), f"{name}: masked weights are -0"
            assert_close(name, found, expected, tolerance)

    def _masked_weights(self) -> dict[str, Tensor]:
        finetuned = [ticket for ticket in self.theirs.tickets if ticket.phase == "finetune"]
        return {name: ~kept for ticket in finetuned for name, kept in ticket.masks.items()}

    def check_gradients(self) -> None:
        """After backward(): what a clipping would see."""
        for name, masked in self._masked_weights().items():
            grad = self.mine.model.get_parameter(name).grad
            assert grad is None or not grad[masked].any(), f"{name}: gradients of masked weights are not zero"

    def synchronize(self, tolerance: float = TOLERANCE) -> None:
        """Before weights are rounded: what differs by an ulp must not be rounded to different neighbors."""
        self.check(tolerance)
        with torch.no_grad():
            for mine, theirs in zip(self.mine.model.parameters(), self.theirs.model.parameters(), strict=True):
                theirs.data.copy_(mine)

    def is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.theirs.model.state_dict().values())

    def check_warnings(self, caught: list[warnings.WarningMessage]) -> None:
        for message in map(str, (warning.message for warning in caught)):
            is_allowed = ALLOWED_WARNINGS.search(message)
            is_allowed = is_allowed or (self.was_written and ALLOWED_AFTER_WRITING.search(message))
            is_allowed = is_allowed or (self.was_ticket and ALLOWED_ON_A_TICKET.search(message))
            assert is_allowed, f"warning: {message}"


def assert_close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    if torch.equal(found, expected):
        return
    error = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-300)
    assert error <= tolerance, f"{name} differs by {error:.2e} relative"


# -- runs --------------------------------------------------------------------------------------------------------------


class DifferenceError(Exception):
    """What differed, and after which action of the list."""

    def __init__(self, number: int, cause: BaseException) -> None:
        super().__init__(f"action {number}: {type(cause).__name__}: {cause}")
        self.number, self.cause = number, cause


def run(setup: Setup, seed: int, actions: list[Action]) -> None:
    """Raises :class:`DifferenceError` at the first difference."""
    from .actions import ACTIONS

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            world = World(setup, seed)
            world.check()
        except Exception as error:
            raise DifferenceError(-1, error) from error
        for number, (name, settings) in enumerate(actions):
            try:
                ACTIONS[name].run(world, **settings)
                world.check()
                world.check_warnings(caught)
            except Exception as error:
                raise DifferenceError(number, error) from error
            caught.clear()
            if not world.is_finite():
                return


def draw(seed: int, count: int, *, compile_share: float = 0.02) -> tuple[Setup, list[Action]]:
    """The setup and the actions of a seed."""
    from .actions import ACTIONS

    choose = random.Random(seed)
    setup = draw_setup(choose, compile_share=compile_share)
    names, weights = list(ACTIONS), [action.weight for action in ACTIONS.values()]
    chosen = choose.choices(names, weights, k=count)
    return setup, [(name, ACTIONS[name].draw(choose)) for name in chosen]


def failure_of(setup: Setup, seed: int, actions: list[Action]) -> DifferenceError | None:
    try:
        run(setup, seed, actions)
    except DifferenceError as failure:
        return failure
    return None


def minimized(setup: Setup, seed: int, actions: list[Action]) -> tuple[list[Action], DifferenceError]:
    """As few of the actions as fail too, in whichever way: halves are dropped first, then single ones."""
    failure = failure_of(setup, seed, actions)
    assert failure is not None
    actions = actions[: failure.number + 1]
    size = max(1, len(actions) // 2)
    while True:
        start, dropped = 0, False
        while start < len(actions):
            fewer = actions[:start] + actions[start + size :]
            other = failure_of(setup, seed, fewer)
            if other is None:
                start += size
            else:
                actions, failure, dropped = fewer[: other.number + 1], other, True
        if size > 1:
            size //= 2
        elif not dropped:
            return actions, failure


def is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape

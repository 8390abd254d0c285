"""One training loop, twice: with the library, and with everything explicit.

An action calls the same methods of both sides at the same moments. Where the library works by itself, its side does
nothing, and :class:`Explicit` does what somebody without the library would write there.
"""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_dual_ticket import RSTScheduler

from .setups import SAM, SCHEDULES

if TYPE_CHECKING:
    from .setups import Setup
    from .setups import Ticket as TicketSetup

Masks = dict[str, Tensor]


class FaultError(Exception):
    """Raised in the middle of something, and caught by the loop."""


class Side:
    """The model, its optimizers, and what the loop does with them whether it has the library or not."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup = setup
        self.model = setup.build(seed)
        self.average: torch.optim.swa_utils.AveragedModel | None = None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if setup.optimizer_first:
            self.make_optimizers()

    def make_optimizers(self, states: list[Any] | None = None) -> None:
        self.optimizers = self.setup.optimizers(self.model.parameters())
        for optimizer in self.optimizers:
            if isinstance(optimizer, SAM):
                optimizer.before_update = lambda optimizer=optimizer: self.before_update(optimizer)  # type: ignore[misc]
        if states is not None:
            self.load_optimizers(states)

    def optimizer_states(self) -> list[Any]:
        return copy.deepcopy([getattr(optimizer, "inner", optimizer).state_dict() for optimizer in self.optimizers])

    def load_optimizers(self, states: list[Any]) -> None:
        for optimizer, state in zip(self.optimizers, copy.deepcopy(states), strict=True):
            getattr(optimizer, "inner", optimizer).load_state_dict(state)
            if isinstance(optimizer, SAM):
                optimizer.param_groups = optimizer.inner.param_groups

    def loss(self, index: int, *, compiled: bool = False, sign: float = 1.0) -> Tensor:
        self.before_forward()
        called = torch.compile(self.model, backend="eager") if compiled else self.model
        output = called(self.setup.inputs(index))
        return sign * (output - 1).square().mean()

    def step_with_closure(self, number: int, index: int, *, backwards: int, clip: str | None, fails_at: int) -> None:
        """One update of one of the optimizers; the closure raises at its call ``fails_at`` (from 1)."""
        optimizer, calls = self.optimizers[number], 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            self.model.zero_grad(set_to_none=bool(index % 2))
            total: Tensor | float = 0.0
            for part in range(backwards):
                loss = self.loss(index + part, sign=-1.0 if self.setup.maximizes else 1.0)
                loss.backward()  # type: ignore[no-untyped-call]
                total = total + loss.detach()
            self.after_backward()
            self.clip(clip)
            if calls == fails_at:
                raise FaultError
            if not isinstance(optimizer, SAM):  # it does not update yet
                self.before_update(optimizer)
            return total + self.penalty_of_loss(optimizer)

        if isinstance(optimizer, SAM):
            closure()
        optimizer.step(closure)
        self.updated(optimizer)

    def clip(self, how: str | None) -> None:
        if how == "norm":
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        elif how == "value":
            nn.utils.clip_grad_value_(self.model.parameters(), 0.003)

    def begin_average(self) -> None:
        self.average = torch.optim.swa_utils.AveragedModel(self.model)

    def update_average(self) -> None:
        assert self.average is not None
        self.average.update_parameters(self.model)

    def copy_model(self, how: str) -> None:
        """Go on with a copy of the model, and new optimizers with the states of the old ones."""
        states = self.optimizer_states()
        self.model = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        self.average = None
        self.make_optimizers(states)

    # what is different on the two sides

    def before_forward(self) -> None: ...
    def after_backward(self) -> None: ...
    def before_update(self, optimizer: torch.optim.Optimizer) -> None: ...
    def updated(self, optimizer: torch.optim.Optimizer) -> None: ...
    def penalty_of_loss(self, optimizer: torch.optim.Optimizer) -> Tensor | float:
        return 0.0


class Library(Side):
    """What one writes with the library."""

    def __init__(self, setup: Setup, seed: int, mask_seeds: list[int]) -> None:
        super().__init__(setup, seed)
        self.tickets: list[RSTScheduler | None] = []
        self.make_tickets(mask_seeds)
        if not setup.optimizer_first:
            self.make_optimizers()

    def make_tickets(self, mask_seeds: list[int]) -> None:
        self.tickets = [
            make_scheduler(self.model, self.setup, ticket, seed)
            for ticket, seed in zip(self.setup.tickets, mask_seeds, strict=True)
        ]

    def ticket(self, index: int) -> RSTScheduler:
        found = self.tickets[index]
        assert found is not None
        return found

    def scheduler_step(self, index: int) -> None:
        self.ticket(index).step()

    def finalize(self, index: int) -> None:
        self.ticket(index).finalize()

    def apply_penalty(self, index: int) -> None:
        self.ticket(index).apply_penalty()

    def apply_masks(self, index: int, model: nn.Module) -> None:
        self.ticket(index).apply_masks(model)

    def remove(self, index: int) -> None:
        self.ticket(index).remove()
        self.tickets[index] = None

    def drop(self, index: int) -> None:
        self.tickets[index] = None

    def ticket_states(self) -> list[Any]:
        return [None if ticket is None else copy.deepcopy(ticket.state_dict()) for ticket in self.tickets]

    def load_tickets(self, states: list[Any]) -> None:
        for ticket, state in zip(self.tickets, states, strict=True):
            if ticket is not None:
                ticket.load_state_dict(copy.deepcopy(state))


def make_scheduler(model: nn.Module, setup: Setup, ticket: TicketSetup, seed: int) -> RSTScheduler:
    return RSTScheduler(
        model,
        ticket.sparsities,
        steps=ticket.steps,
        hold=ticket.hold,
        cycles=ticket.cycles,
        max_penalty=ticket.max_penalty,
        schedule=SCHEDULES[ticket.schedule],
        targets=setup.kind.targets,
        seed=seed,
        store_masks=ticket.store_masks,
    )


def draw_masks(setup: Setup, ticket: TicketSetup, seed: int) -> list[Masks]:
    """The masks of each cycle: those of a ticket that has its sparsity from the start."""
    drawn = []
    for cycle in range(1, ticket.cycles + 1):
        rst = RSTScheduler(setup.build(0), ticket.of_cycle(cycle), targets=setup.kind.targets, seed=seed)
        drawn.append({name: kept.clone() for name, kept in rst.masks.items()})
        rst.remove()
    return drawn


class Ticket:
    """One mask, one penalty, and an explicit count."""

    def __init__(self, setup: TicketSetup, masks: list[Masks]) -> None:
        self.setup, self.all_masks = setup, masks
        self.phase = "transform"  # then "finetune"; "gone" where nothing is penalized or masked any more
        self.has_handle = True  # whether the loop still has the scheduler
        self.scheduler_steps = 0
        self.update_pending = False
        self.is_penalizing = False  # an update that has the penalty is on its way
        self.silenced = False  # apply_penalty() was called since the last call of step()

    @property
    def cycle(self) -> int:
        """From 0."""
        per_cycle = self.setup.steps + self.setup.hold
        return min(self.scheduler_steps // per_cycle, self.setup.cycles - 1)

    @property
    def masks(self) -> Masks:
        return self.all_masks[-1 if self.phase == "finetune" else self.cycle]

    @property
    def penalty(self) -> float:
        if self.phase != "transform":
            return 0.0
        within = self.scheduler_steps - self.cycle * (self.setup.steps + self.setup.hold)
        rise = min(1.0, (within + 1) / self.setup.steps)
        return self.setup.max_penalty * SCHEDULES[self.setup.schedule](rise)

    @property
    def can_finalize(self) -> bool:
        """Whether an update is known to have had the penalty."""
        return self.has_handle and self.phase == "transform" and (self.scheduler_steps > 0 or self.update_pending)

    def of(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The parameters, and where they are masked."""
        return [(model.get_parameter(name), ~kept) for name, kept in self.masks.items()]


class Explicit(Side):
    """What one has to write without the library."""

    def __init__(self, setup: Setup, seed: int, masks: list[list[Masks]]) -> None:
        super().__init__(setup, seed)
        self.tickets: list[Ticket] = []
        self.zeros_of_average: list[tuple[Tensor, Tensor]] = []
        self.make_tickets(masks)
        if not setup.optimizer_first:
            self.make_optimizers()

    def make_tickets(self, masks: list[list[Masks]]) -> None:
        self.tickets = [Ticket(*pair) for pair in zip(self.setup.tickets, masks, strict=True)]

    def _in(self, phase: str) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.phase == phase]

    # -- zeros ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def zero_weights(self) -> None:
        for ticket in self._in("finetune"):
            for parameter, masked in ticket.of(self.model):
                parameter.data.masked_fill_(masked, 0)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        for ticket in self._in("finetune"):
            for parameter, masked in ticket.of(self.model):
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(masked, 0)

    def before_forward(self) -> None:
        self.zero_weights()

    def after_backward(self) -> None:
        self.zero_gradients()

    # -- the penalty ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        self.zero_gradients()
        signs = {id(p): -1 if g.get("maximize") else 1 for g in optimizer.param_groups for p in g["params"]}
        for ticket in self._in("transform"):
            if not ticket.silenced:
                ticket.is_penalizing |= self._penalize(ticket, signs)

    def _penalize(self, ticket: Ticket, signs: dict[int, int]) -> bool:
        due = [(parameter, masked) for parameter, masked in ticket.of(self.model) if id(parameter) in signs]
        due = [(parameter, masked) for parameter, masked in due if parameter.grad is not None]
        for parameter, masked in due:
            parameter.grad += signs[id(parameter)] * ticket.penalty * parameter * masked
        return bool(due)

    def penalty_of_loss(self, optimizer: torch.optim.Optimizer) -> Tensor | float:
        """½·λ·‖masked weights‖², for LBFGS: it compares losses."""
        if not isinstance(optimizer, torch.optim.LBFGS):
            return 0.0
        total: Tensor | float = 0.0
        for ticket in self._in("transform"):
            if not ticket.silenced:
                for parameter, masked in ticket.of(self.model):
                    total = total + 0.5 * ticket.penalty * (parameter.detach() * masked).square().sum()
        return total

    def updated(self, optimizer: torch.optim.Optimizer) -> None:
        self.zero_weights()
        for ticket in self.tickets:
            ticket.update_pending |= ticket.is_penalizing
            ticket.is_penalizing = False

    def failed(self) -> None:
        """An update has raised: it does not count."""
        for ticket in self.tickets:
            ticket.is_penalizing = False

    @torch.no_grad()
    def apply_penalty(self, index: int) -> None:
        ticket = self.tickets[index]
        if ticket.phase == "transform":
            everything = {id(parameter): 1 for parameter in self.model.parameters()}
            ticket.update_pending |= self._penalize(ticket, everything)
        else:
            self.zero_gradients()
            self.zero_weights()
        ticket.silenced = True

    # -- the schedule --------------------------------------------------------------------------------------------------

    def scheduler_step(self, index: int) -> None:
        ticket = self.tickets[index]
        if ticket.phase == "transform":
            ticket.scheduler_steps = min(ticket.scheduler_steps + ticket.update_pending, ticket.setup.total)
            ticket.update_pending = ticket.silenced = False

    def finalize(self, index: int) -> None:
        self.tickets[index].phase = "finetune"
        self.zero_weights()
        self.zero_gradients()

    def remove(self, index: int) -> None:
        self.tickets[index].phase, self.tickets[index].has_handle = "gone", False

    def drop(self, index: int) -> None:
        """Without its scheduler a transformation ends, and a finalized model is kept as it is."""
        ticket = self.tickets[index]
        ticket.has_handle = False
        if ticket.phase == "transform":
            ticket.phase = "gone"

    def begin_average(self) -> None:
        """A copy of a finalized model holds its zeros, whatever becomes of the original."""
        super().begin_average()
        assert self.average is not None
        held = [ticket for ticket in self.tickets if ticket.phase == "finetune"]
        self.zeros_of_average = [pair for ticket in held for pair in ticket.of(self.average.module)]

    @torch.no_grad()
    def update_average(self) -> None:
        super().update_average()
        for parameter, masked in self.zeros_of_average:
            parameter.masked_fill_(masked, 0)

    @torch.no_grad()
    def apply_masks(self, index: int, model: nn.Module) -> None:
        inner = model.module if isinstance(model, torch.optim.swa_utils.AveragedModel) else model
        for parameter, masked in self.tickets[index].of(inner):
            parameter.masked_fill_(masked, 0)

    # -- restarts ------------------------------------------------------------------------------------------------------

    def ticket_states(self) -> list[Any]:
        return [(ticket.scheduler_steps, ticket.update_pending, ticket.phase) for ticket in self.tickets]

    def load_tickets(self, states: list[Any]) -> None:
        for ticket, state in zip(self.tickets, states, strict=True):
            if ticket.has_handle:
                ticket.scheduler_steps, ticket.update_pending, ticket.phase = state
                ticket.silenced = False

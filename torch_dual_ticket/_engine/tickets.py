"""A ticket: all the holds on one model, the penalty on them, and what has carried it."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from .dtensor import is_sharded, reshard, sum_over_shards, version
from .dues import Dues
from .forgotten import IDLE_TICKS, warn_of_lost_layers, warn_of_missing_penalty, warn_of_missing_ticks
from .graphed import GraphedPenalty
from .holds import Hold
from .hooks import groups_of, register, updated_by_outer_steps
from .members import Members
from .zeroing import activate_all, zero_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from .._model.targets import Target
    from ..masks.seeded import Mask
    from .holds import Zeroed
    from .hooks import Held

_MARK = "_dual_ticket_penalized_at"  # the attribute of a gradient that says when it got the penalty


class Ticket:
    """The holds on a model, in one of two phases: penalized (``enforcing`` is False) or held at zero."""

    def __init__(self, model: nn.Module | None = None, *, stores_masks: bool = True) -> None:
        self.stores_masks = stores_masks
        self._holds: list[weakref.ref[Hold]] = []  # the layers own their holds, which own the ticket
        self.detached = 0  # holds that have ended
        self.zeroed: dict[str, Zeroed] = {}  # by parameter name: a tied one is zeroed at one of its places
        self._names: dict[str, None] = {}  # of the parameters, in their order
        self.given_up: set[str] = set()  # parameters that prune.remove took out, or whose layers are gone
        self.enforcing = False
        self._graphed = GraphedPenalty()
        self.by_hand = False  # the updates are not a torch.optim.Optimizer's: apply_penalty() has been called
        self.silenced = False  # apply_penalty() stands in for the optimizer hook until the next tick
        self.update_pending = False
        self._ever_carried = False
        self.carried: set[str] = set()  # names of the parameters that got the penalty since the last tick
        self.carriers: Counter[int] = Counter()  # updates that did that, by the id of the optimizer
        self._version_at_tick: dict[str, int] = {}  # of those that did not before it
        self.optimizer: weakref.ref[Optimizer] | None = None
        self.members: weakref.WeakKeyDictionary[Optimizer, Members] = weakref.WeakKeyDictionary()
        self._carrying: int | None = None  # id of the optimizer whose step is about to carry the penalty
        self._found_inf: Tensor | None = None  # 0 if an update since the last tick was not skipped for infinities
        self._round = 0  # ticks that had an update: it has used the gradients that it found
        self._round_is_over = False  # once the update comes for which apply_penalty() was called before the tick
        self._idle_ticks = 0
        self.patience = math.inf  # updates of one optimizer after which a first tick is missed
        self._has_warned = False
        self._model = None if model is None else weakref.ref(model)
        register(self)

    def attach(self, model: nn.Module) -> None:
        """The root of the modules that are held."""
        self._model = weakref.ref(model)

    def model(self) -> nn.Module | None:
        """None when it was dropped, or is not known: a copy."""
        return None if self._model is None else self._model()

    def take(self, targets: list[Target], masks: Mapping[str, Mask]) -> None:
        """Begin to hold the targets, with these masks."""
        for target in targets:
            for index, place in enumerate([*target.places, *target.users]):
                self.add(Hold(self, target.name, place, masks[target.name], primary=index == 0))

    def add(self, hold: Hold) -> None:
        self._holds.append(weakref.ref(hold))
        self._names[hold.name] = None

    @property
    def penalty(self) -> float:
        """λ of the next update."""
        return self._graphed.value

    @penalty.setter
    def penalty(self, value: float) -> None:
        self._graphed.value = value

    @property
    def holds(self) -> list[Hold]:
        """Those that are in place, in the order of the parameters."""
        return [hold for ref in self._holds if (hold := ref()) is not None and hold.is_in_place()]

    @property
    def primary_holds(self) -> list[Hold]:
        """One hold for each parameter."""
        first: dict[str, Hold] = {}
        for hold in self.holds:
            first.setdefault(hold.name, hold)
        return list(first.values())

    def check_reachable(self, stacklevel: int) -> None:
        """Every parameter is where it was; ``RuntimeError`` names the first that is not.

        One whose layer is gone is given up, with a warning: a head may have been exchanged on purpose.
        """
        holds = self.primary_holds
        known = self.given_up.union(hold.name for hold in holds)
        lost = [name for name in self._names if name not in known]
        if lost:
            self.given_up.update(lost)
            for ref in self._holds:
                if (hold := ref()) is not None and hold.name in lost:  # an optimizer keeps it
                    hold.detach()
            warn_of_lost_layers(lost, stacklevel + 1)
        for hold in holds:
            hold.check_reachable()

    def set_masks(self, masks: Mapping[str, Mask]) -> None:
        """Go over to other masks, by parameter name."""
        changed = [hold for hold in self.holds if hold.mask != masks[hold.name]]
        if changed:
            self._graphed.warn_of_old_graphs()
        for hold in changed:
            hold.set_mask(masks[hold.name])

    def reshard(self) -> None:
        """Put the shards of an FSDP2 model in place, so that changes reach them."""
        if (model := self.model()) is not None:
            reshard(model)

    def enforce(self) -> None:
        """Set the masked weights to zero, and hold them there. The shards are in place."""
        self._graphed.warn_of_old_graphs()
        self.enforcing, penalty = True, self.penalty
        self.zeroed.clear()
        self.penalty = 0.0
        try:
            with torch.no_grad():
                activate_all(self.holds)
        except BaseException:  # some hold zeros and some do not
            self.relax()
            self.penalty = penalty
            raise
        torch.clear_autocast_cache()  # it may hold casts of the weights as they were

    def relax(self) -> None:  # back to the transformation
        self.enforcing = False
        for hold in self.holds:
            hold.deactivate()

    def release(self) -> None:
        """Let go of the model: no hook is left."""
        for hold in self.holds:
            hold.detach()
        self._names.clear()
        self.members.clear()  # it references the holds
        self.penalty = 0.0

    def abandon(self) -> None:
        """When nobody can reach the scheduler any more: a transformation ends, a finalized model stays held."""
        if not self.enforcing:
            self.release()

    # -- ticks ---------------------------------------------------------------------------------------------------------

    def has_pending_update(self) -> bool:
        """Whether an update carried the penalty since the last tick; one that was skipped for infinities did not."""
        if self._found_inf is not None and not self.update_pending and self._found_inf.item() == 0:
            self.update_pending = self._ever_carried = True
        self._found_inf = None
        return self.update_pending

    def is_due(self) -> bool:
        """Whether a tick counts. Replays of a CUDA graph are not seen: one is taken for granted."""
        self._graphed.check_not_capturing()
        return self.has_pending_update() or self._graphed.is_captured

    def has_ever_carried(self) -> bool:
        """Whether any update carried the penalty."""
        return self.has_pending_update() or self._ever_carried

    def everything_carried(self) -> bool:
        """Whether every parameter got the penalty since the last tick; so none of them is out of reach."""
        return len(self.carried) == len(self._names) - len(self.given_up) > 0

    def tick(self) -> None:
        """Begin a new tick; warns, once, if the weights are changed by something that carries no penalty."""
        versions = {}
        if not (self.everything_carried() or self._graphed.is_captured):
            looked_up = [(hold.name, hold.parameter()) for hold in self.primary_holds if hold.name not in self.carried]
            versions = {name: version(found) for name, found in looked_up if found is not None and found.requires_grad}
        bypassed = [name for name, now in versions.items() if self._version_at_tick.get(name, now) != now]
        self._version_at_tick = versions
        self.carried.clear()
        self.carriers.clear()
        self._idle_ticks += not self._ever_carried
        self.patience = math.inf
        if not self._has_warned and (bypassed or self._idle_ticks >= IDLE_TICKS):
            self._has_warned = True
            warn_of_missing_penalty(bypassed, other_than_given=self.optimizer is not None)
        if self.update_pending and self.silenced:  # what is done by hand may come before the tick and the update
            self._round_is_over = True
        elif self.update_pending:
            self._round += 1
        self.update_pending = self.silenced = False
        self._carrying = None

    def resume(self, pending: bool) -> None:
        """Go on from a saved state of the transformation: what was carried here before counts no more."""
        self.update_pending, self._ever_carried, self.silenced = pending, pending, False
        self._carrying = self._found_inf = None
        self.patience = math.inf
        self._round += 1
        self._round_is_over = False
        self.carried.clear()
        self.carriers.clear()
        self._version_at_tick.clear()

    # -- the penalty ---------------------------------------------------------------------------------------------------

    def held_by(self, optimizer: Optimizer) -> Held:
        """The holds whose parameters the optimizer has, each parameter once."""
        members = self.members.get(optimizer)
        if members is None or not members.are_current(self, optimizer):
            groups = groups_of(optimizer)
            members = Members(self, optimizer, groups)
            if members.missing and any(is_sharded(group["params"][0]) for group in groups.values()):
                self.reshard()
                members = Members(self, optimizer, groups)
            self.members[optimizer] = members
        return members.held

    def penalize(self, held: Held, optimizer: Optimizer | None = None, *, in_step: bool = False) -> bool:
        """Add λ·w to the gradients of the masked weights, once to each gradient; returns whether any was due."""
        dues = Dues()
        outer: set[int] | None = None
        carries = False  # a penalty that it got before a step that raised, or in the step around this one
        for hold, parameter, group in held:
            grad = parameter.grad
            if grad is None:
                continue
            mark = grad.__dict__.get(_MARK)
            if mark is not None and mark == (version(grad), self._round):
                self.carried.add(hold.name)
                carries = True
                continue
            if in_step and hold.name in self.carried:
                # A step within a step of an optimizer that has the parameter too: the gradient has its penalty, even if
                # the outer step has changed or replaced it since.
                if outer is None:
                    outer = updated_by_outer_steps()
                if id(parameter) in outer:
                    continue
            self.carried.add(hold.name)
            dues.take(hold, parameter, grad, -1 if group.get("maximize") else 1)
        self._carrying = id(optimizer) if dues.grads or carries else self._carrying
        if not dues.grads:
            return False
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler where a fused optimizer does the unscaling
        factor = self._graphed.factor(dues.grads[0])
        if isinstance(factor, torch.Tensor) or factor != 0:
            dues.add_(factor if scale is None else scale * factor)
        # After all additions: views of one DDP bucket share a version.
        for grad in dues.grads:
            grad.__dict__[_MARK] = (version(grad), self._round)
        return True

    def note_update(self, optimizer: Optimizer) -> None:
        """A step of the optimizer is over. One that raised never gets here, and does not count."""
        if self._carrying != id(optimizer):
            return
        self._carrying = None
        self.carriers[id(optimizer)] += 1
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler, likewise; reading it would synchronize
        if found_inf is None:
            self.update_pending = self._ever_carried = True
        else:
            self._found_inf = found_inf if self._found_inf is None else torch.minimum(self._found_inf, found_inf)
        if self.carriers[id(optimizer)] >= self.patience:
            self.patience = math.inf
            warn_of_missing_ticks(self.carriers[id(optimizer)], self.penalty)

    def penalize_by_hand(self) -> bool:
        """For loops whose update no hook sees; returns whether a target had a gradient."""
        self.reshard()
        looked_up = [(hold, hold.parameter()) for hold in self.holds]
        everything = {id(parameter): (hold, parameter) for hold, parameter in looked_up if parameter is not None}
        if all(parameter.grad is None for _, parameter in everything.values()):
            return False
        self._round, self._round_is_over = self._round + self._round_is_over, False
        self.by_hand = self.silenced = True
        if self.enforcing:
            for hold, parameter in everything.values():
                hold.mask_gradient(parameter)
            zero_all(list(everything.values()))
        elif self.penalize([(hold, parameter, {}) for hold, parameter in everything.values()]):
            self.update_pending = self._ever_carried = True
        return True

    def penalty_of(self, held: Held) -> Tensor | float:
        """½·λ·‖masked weights‖²: the term of the loss whose gradient the penalty is."""
        total: Tensor | float = 0.0
        for hold, parameter, _ in held:
            total = total + sum_over_shards(hold.squared_norms(parameter)[0], parameter)
        return 0.5 * self.penalty * total

    # -- copies --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        names = ("enforcing", "by_hand", "stores_masks")
        return {name: getattr(self, name) for name in names} | {"given_up": set(self.given_up)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)  # the holds of the copied layers add themselves

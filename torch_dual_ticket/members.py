"""Which of a ticket's parameters an optimizer has: looked up once, and checked at each step."""

from __future__ import annotations

import operator
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from .holds import Hold
    from .hooks import Groups, Held
    from .tickets import Ticket


class Members:
    """The holds that an optimizer has a part in; looking them up costs as much as penalising small layers.

    What the optimizer has no part in is not kept alive: a dropped model must not wait for another model's optimizer.
    """

    def __init__(self, ticket: Ticket, optimizer: Optimizer, groups: Groups) -> None:
        self.held: Held = []
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._parameters: list[Tensor] = []
        self._missing: list[tuple[weakref.ref[Hold], int]] = []
        seen: set[int] = set()
        for hold in ticket.holds:
            parameter = hold.parameter()
            owner = hold.owner()
            if parameter is None or owner is None or id(parameter) not in groups:
                self._missing.append((weakref.ref(hold), id(parameter)))
                continue
            self._dicts.append(owner._parameters)
            self._names.append(hold.attribute)
            self._parameters.append(parameter)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                self.held.append((hold, parameter, groups[id(parameter)]))
        self.missing = bool(self._missing)
        self._detached = ticket.detached
        self._groups = optimizer.param_groups
        self._listed = [(group, list(group["params"])) for group in self._groups]

    def are_current(self, ticket: Ticket, optimizer: Optimizer) -> bool:
        """Whether neither the model nor the optimizer has other parameters since."""
        return (
            optimizer.param_groups is self._groups
            and ticket.detached == self._detached
            and len(self._groups) == len(self._listed)
            and all(map(_lists, self._groups, self._listed))
            and all(map(operator.is_, map(dict.get, self._dicts, self._names), self._parameters))
            and all((hold := ref()) is None or id(hold.parameter()) == known for ref, known in self._missing)
        )


def _lists(group: dict[str, Any], listed: tuple[dict[str, Any], list[Tensor]]) -> bool:
    """Whether a group is still the one with these parameters; they may be exchanged in place."""
    parameters = group["params"]
    return group is listed[0] and len(parameters) == len(listed[1]) and all(map(operator.is_, parameters, listed[1]))

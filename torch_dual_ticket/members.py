"""Which of a ticket's parameters an optimizer has: looked up once, and checked at each step."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from .hooks import Groups, Held
    from .tickets import Ticket


class Members:
    """The holds that an optimizer has a part in; looking them up costs as much as penalising small layers."""

    def __init__(self, ticket: Ticket, optimizer: Optimizer, groups: Groups) -> None:
        self.held: Held = []
        self.missing = False
        self._sources: list[tuple[dict[str, Any], str, Tensor | None]] = []
        seen: set[int] = set()
        for hold in ticket.holds:
            parameter = hold.parameter()
            owner = hold.owner()
            if owner is not None:
                self._sources.append((owner._parameters, hold.attribute, parameter))
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in groups:
                self.held.append((hold, parameter, groups[id(parameter)]))
            else:
                self.missing = True
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
            and all(parameters.get(name) is parameter for parameters, name, parameter in self._sources)
        )


def _lists(group: dict[str, Any], listed: tuple[dict[str, Any], list[Tensor]]) -> bool:
    """Whether a group is still the one with these parameters; they may be exchanged in place."""
    parameters = group["params"]
    return group is listed[0] and len(parameters) == len(listed[1]) and all(map(operator.is_, parameters, listed[1]))

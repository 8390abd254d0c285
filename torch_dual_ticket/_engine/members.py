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
    """The holds that an optimizer has a part in; looking them up costs as much as penalizing small layers.

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
        self._contents = _contents_of(optimizer)

    def are_current(self, ticket: Ticket, optimizer: Optimizer) -> bool:
        """Whether neither the model nor the optimizer has other parameters since."""
        return (
            ticket.detached == self._detached
            and _contents_of(optimizer) == self._contents
            and all(map(operator.is_, map(dict.get, self._dicts, self._names), self._parameters))
            and all((hold := ref()) is None or id(hold.parameter()) == known for ref, known in self._missing)
        )


def _contents_of(optimizer: Optimizer) -> list[tuple[int, list[int]]]:
    """Its groups and their parameters, which may be exchanged in place; by id, so that none of them is kept alive."""
    return [(id(group), list(map(id, group["params"]))) for group in optimizer.param_groups]

"""The lottery ticket hypothesis: train, prune by magnitude, rewind."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._model.targets import DEFAULT_TARGETS, Target, TargetType, find_targets
from .._rst.cut_warnings import warn_of_emptied
from .._rst.schedule import MAX_CYCLES, check_integer
from .._rst.validation import check_directions, check_unmanaged
from ..masks.explicit import ExplicitMask
from ..masks.records import of_state
from .held import HeldMasks
from .magnitude import ALL_LAYERS, counts_of_rest, remove_smallest, rounds_of_counts


class LotteryTicket:
    """A lottery ticket (Frankle and Carbin, arXiv 1803.03635): train, prune by magnitude, rewind, and again.

    Weights and buffers are rewound to what they were when this object was built, or when :meth:`remember` was last
    called: at initialization, or at an early update (Frankle et al., arXiv 1912.05671). Round r of R removes what is
    smallest among the weights still kept, up to a sparsity of ``1 - (1 - sparsity)**(r/R)``.

    Args:
        model: the module to prune.
        sparsity: fraction of weights removed at the end; as for :func:`magnitude_masks`.
        rounds: 1 for one-shot pruning, more for iterative.
        distribution: "uniform", "erk", or "global"; as for :func:`magnitude_masks`.
        targets: module types whose ``weight`` is masked.
        exclude: fnmatch patterns of module names that stay dense, with all below them.

    Attributes:
        held: the masks in force, as :func:`torch_dual_ticket.baselines.hold` returns them; None before the first round.

    Raises:
        TypeError, ValueError: arguments that cannot be used; the model is left as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> def train(model, updates):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # a new one after each rewinding
        ...     for _ in range(updates):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(32, 8)).square().mean().backward()
        ...         optimizer.step()
        >>> ticket = LotteryTicket(model, 0.75, rounds=2)
        >>> while not ticket.done:
        ...     train(model, 20)
        ...     ticket.prune_and_rewind()
        ...     print(f"{ticket.sparsity:.2f}")
        0.50
        0.75
        >>> train(model, 20)
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float] = 0.9,
        *,
        rounds: int = 1,
        distribution: str = "uniform",
        targets: Sequence[TargetType] = DEFAULT_TARGETS,
        exclude: Sequence[str] = (),
    ) -> None:
        self.rounds = check_integer("rounds", rounds, at_least=1, at_most=MAX_CYCLES)
        self.round = 0
        found = find_targets(model, targets, exclude)
        self._counts = rounds_of_counts(found, sparsity, distribution, self.rounds)
        check_unmanaged(found)
        self._model, self._targets, self._exclude = model, tuple(targets), tuple(exclude)
        self.held: HeldMasks | None = None
        self.remember()

    def remember(self) -> None:
        """Rewind to the present weights and buffers from now on: call it after a few updates, before the first round.

        Raises:
            RuntimeError: a round has been pruned already.
        """
        if self.round:
            raise RuntimeError("remember() must come before the first prune_and_rewind(): later weights are sparse")
        self._origin = copy.deepcopy(self._model.state_dict())

    def prune_and_rewind(self) -> None:
        """End a round: choose the masks by the present weights, rewind, and put the masks in force.

        Begin the training that follows with a new optimizer.

        Raises:
            RuntimeError: all rounds are over.
        """
        if self.done:
            raise RuntimeError(f"all {self.rounds} rounds are over; the ticket has its sparsity of {self.sparsity:.2%}")
        every = found = find_targets(self._model, self._targets, self._exclude)
        if self.held is not None:  # a layer that prune.remove() has detached stays so
            found = [target for target in every if target.name in self.masks]
        self._check_unmanaged(found)
        counts = counts_of_rest(self._counts[self.round], every, found)
        masks = remove_smallest(self._model, found, counts, self.masks)
        found = [target for target in found if target.name in masks]
        explicit = {name: ExplicitMask(mask) for name, mask in masks.items()}
        check_directions(found, explicit)  # before anything is changed
        if ALL_LAYERS in self._counts[self.round]:  # else the constructor has warned
            warn_of_emptied(explicit)
        self.remove()
        self._model.load_state_dict(self._origin)
        for parameter in self._model.parameters():
            parameter.grad = None  # of the weights before
        self.held = HeldMasks(self._model, found, explicit)
        self.round += 1

    def state_dict(self) -> dict[str, Any]:
        """The round, its masks, and the weights to rewind to: save it beside the model's and the optimizer's state."""
        return {
            "round": self.round,
            "origin": dict(self._origin),
            "held": None if self.held is None else self.held.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the saved round. Load the model's and the optimizer's state too, before or after.

        Raises:
            ValueError: not a state of this class, or one of another model or of more rounds; nothing is changed then.
        """
        try:
            number, origin, held = state["round"], dict(state["origin"]), state["held"]
            masks = {} if held is None else of_state(held)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a state_dict() of a LotteryTicket: {error!r}") from error
        if not 0 <= number <= self.rounds:
            raise ValueError(f"the state is of round {number}, and this ticket has {self.rounds} rounds")
        shapes, saved = (
            {name: tuple(getattr(value, "shape", ())) for name, value in of.items()} for of in (self._origin, origin)
        )
        if wrong := sorted(shapes.items() ^ saved.items()):
            raise ValueError(f"the state is of another model: {wrong[0][0]} is not there, or has another shape")
        targets = find_targets(self._model, self._targets, self._exclude)
        targets = [target for target in targets if target.name in masks]
        if len(targets) < len(masks) or any(target.shape != masks[target.name].shape for target in targets):
            raise ValueError(f"the state is of other layers: it has masks of {', '.join(masks)}")
        self._check_unmanaged(targets)
        check_directions(targets, masks)  # before anything is changed
        origin = copy.deepcopy(origin)
        self.remove()
        self.held = HeldMasks(self._model, targets, masks) if masks else None
        self._origin, self.round = origin, number

    def _check_unmanaged(self, targets: list[Target]) -> None:
        """Nothing but the masks that were held so far manages them."""
        mine = set() if self.held is None else {managed.name for managed in self.held._ticket.parameters}
        check_unmanaged([target for target in targets if target.name not in mine])

    @property
    def done(self) -> bool:
        """Whether the last round is over: the training that follows is that of the ticket."""
        return self.round == self.rounds

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor, True = kept; empty before the first round."""
        return {} if self.held is None else self.held.masks

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights over all targets; 0 before the first round."""
        return 0.0 if self.held is None else self.held.sparsity

    def remove(self) -> None:
        """Remove every hook and leave a plain model: zeros stay where they are, but nothing keeps them."""
        if self.held is not None:
            self.held.remove()

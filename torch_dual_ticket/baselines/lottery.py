"""The lottery ticket hypothesis: train, prune by magnitude, rewind."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from .._model.targets import DEFAULT_TARGETS, find_targets
from .._rst.schedule import MAX_CYCLES, check_integer
from .._rst.validation import check_directions, check_unmanaged
from ..masks.explicit import ExplicitMask
from .held import HeldMasks
from .magnitude import remove_smallest, rounds_of_counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from .._model.targets import TargetType


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
        self._held: HeldMasks | None = None
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
        found = find_targets(self._model, self._targets, self._exclude)
        if self._held is not None:  # a layer that prune.remove() has detached stays so
            found = [target for target in found if target.name in self.masks]
        masks = remove_smallest(self._model, found, self._counts[self.round], self.masks)
        found = [target for target in found if target.name in masks]
        explicit = {name: ExplicitMask(mask) for name, mask in masks.items()}
        check_directions(found, explicit)  # before anything is changed
        self.remove()
        self._model.load_state_dict(self._origin)
        for parameter in self._model.parameters():
            parameter.grad = None  # of the weights before
        self._held = HeldMasks(self._model, found, explicit)
        self.round += 1

    @property
    def done(self) -> bool:
        """Whether the last round is over: the training that follows is that of the ticket."""
        return self.round == self.rounds

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor, True = kept; empty before the first round."""
        return {} if self._held is None else self._held.masks

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights over all targets; 0 before the first round."""
        return 0.0 if self._held is None else self._held.sparsity

    def remove(self) -> None:
        """Remove every hook and leave a plain model: zeros stay where they are, but nothing keeps them."""
        if self._held is not None:
            self._held.remove()

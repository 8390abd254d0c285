"""What a transformed random ticket is to be compared with, held at zero by the same mechanism.

==========================  =========================================================================================
dense                       train; this module is not needed
random ticket, scratch      ``random_ticket(model, 0.9)`` at initialization; train
magnitude pruning           train; ``hold(model, magnitude_masks(model, 0.9))``; finetune
random after dense          train; ``random_ticket(model, 0.9)``; finetune. RST without its penalty: the control
lottery ticket              :class:`LotteryTicket`
==========================  =========================================================================================

For a fair comparison give every method the same number of updates in all, and begin each of its stretches of training
with a new optimizer: the momentum of masked weights, and of weights that were rewound, means nothing any more.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from .._engine.tickets import Ticket
from .._model.targets import DEFAULT_TARGETS, find_targets
from .._rst.mask_view import MaskView, apply_masks, sparsity_of, still_held
from .._rst.ranks import agree_on_seed
from .._rst.schedule import check_integer
from .._rst.validation import check_directions, check_unheld, generator_unchanged_on_error
from ..masks.explicit import ExplicitMask, find_masked
from ..masks.plan import make_plan
from .magnitude import magnitude_masks, remove_smallest, rounds_of_counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from .._model.targets import Target, TargetType
    from ..masks.seeded import Mask

__all__ = ["HeldMasks", "LotteryTicket", "hold", "magnitude_masks", "random_ticket"]


class HeldMasks:
    """Masks in force on a model: what :func:`hold` and :func:`random_ticket` return.

    The zeros stay held for as long as the model lives, also when this object is dropped; :meth:`remove` ends it. After
    a restart, build the model, hold the same masks again, and load the weights.
    """

    def __init__(self, model: nn.Module, targets: list[Target], masks: Mapping[str, Mask]) -> None:
        check_unheld(targets)
        check_directions(targets, masks)
        self._masks = {target.name: masks[target.name] for target in targets}
        self._ticket = Ticket(model)
        self._ticket.take(targets, self._masks)
        self._ticket.enforce()

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor of the full shape, True = kept."""
        return MaskView(self._still_held(), self._ticket)

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights over all held parameters."""
        return sparsity_of(self._still_held())

    def _still_held(self) -> dict[str, Mask]:
        return still_held(self._masks, self._ticket)

    def apply_masks(self, model: nn.Module) -> None:
        """Set the masked weights of another model of the same structure to zero, such as an EMA copy begun before.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: a parameter's name or shape is not found in ``model``; nothing is changed then.
        """
        apply_masks(model, self._still_held())

    def remove(self) -> None:
        """Take every hook off and leave a plain model: zeros stay where they are, but nothing holds them."""
        self._ticket.release()


def hold(
    model: nn.Module, masks: Mapping[str, Tensor], *, targets: Sequence[TargetType] = DEFAULT_TARGETS
) -> HeldMasks:
    """Set the masked weights to zero now, and keep them at exactly zero in whatever loop trains the model.

    Args:
        model: a module; its structure and names stay as they are.
        masks: parameter name -> bool tensor of the parameter's shape, True = kept. Parameters without one stay dense.
        targets: module types whose ``weight`` may be masked, as for :class:`torch_dual_ticket.RSTScheduler`.

    Raises:
        TypeError, ValueError: a mask that is not bool, has another shape than its parameter, or has no parameter to go
            on; a parameter that is held already. Nothing is changed then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
        >>> held = hold(model, {"0.weight": torch.tensor([[True, False, False, True], [False, True, True, True]])})
        >>> held.sparsity, int((model[0].weight == 0).sum())
        (0.375, 3)
    """
    found = find_masked(model, masks, targets)
    return HeldMasks(model, found, {target.name: ExplicitMask(masks[target.name]) for target in found})


def random_ticket(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    distribution: str = "uniform",
    pattern: str = "unstructured",
    targets: Sequence[TargetType] = DEFAULT_TARGETS,
    exclude: Sequence[str] = (),
    seed: int | None = None,
) -> HeldMasks:
    """Hold a random ticket from now on, without a transformation: call it at initialization to train from scratch.

    The arguments, and with them the masks, are those of :class:`torch_dual_ticket.RSTScheduler`: with one seed both
    have the same ticket.

    Raises:
        TypeError, ValueError, RuntimeError: as that class; nothing is changed then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> random_ticket(model, 0.75, exclude=["2"], seed=0).masks["0.weight"].sum()
        tensor(32)
    """
    given = None if seed is None else check_integer("seed", seed)
    found = find_targets(model, targets, exclude)
    plan = make_plan(found, sparsity, distribution=distribution, pattern=pattern)
    found = [target for target in found if target.name in plan.shapes]
    check_unheld(found)
    with generator_unchanged_on_error():
        return HeldMasks(model, found, plan.masks(agree_on_seed(given, plan, model)))


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
        self.rounds = check_integer("rounds", rounds, at_least=1)
        self.round = 0
        found = find_targets(model, targets, exclude)
        self._counts = rounds_of_counts(found, sparsity, distribution, self.rounds)
        check_unheld(found)
        self._model, self._targets, self._exclude = model, tuple(targets), tuple(exclude)
        self._held: HeldMasks | None = None
        self.remember()

    def remember(self) -> None:
        """Rewind to the weights and buffers of this moment from now on: call it after a few updates, before pruning.

        Raises:
            RuntimeError: a round has been pruned already.
        """
        if self.round:
            raise RuntimeError("remember() must come before the first prune_and_rewind(): later weights are sparse")
        self._origin = copy.deepcopy(self._model.state_dict())

    def prune_and_rewind(self) -> None:
        """End a round: choose the masks by the weights as they are now, go back to the remembered ones, hold the masks.

        Begin the training that follows with a new optimizer.

        Raises:
            RuntimeError: all rounds are over.
        """
        if self.done:
            raise RuntimeError(f"all {self.rounds} rounds are over; the ticket has its sparsity of {self.sparsity:.2%}")
        found = find_targets(self._model, self._targets, self._exclude)
        if self._held is not None:  # prune.remove() takes a layer out of the ticket for good
            found = [target for target in found if target.name in self.masks]
        masks = remove_smallest(self._model, found, self._counts[self.round], self.masks)
        found = [target for target in found if target.name in masks]
        chosen = {name: ExplicitMask(mask) for name, mask in masks.items()}
        check_directions(found, chosen)  # before anything is changed
        self.remove()
        self._model.load_state_dict(self._origin)
        for parameter in self._model.parameters():
            parameter.grad = None  # of the weights before
        self._held = HeldMasks(self._model, found, chosen)
        self.round += 1

    @property
    def done(self) -> bool:
        """Whether the last round has been pruned: the training that follows is the ticket's own."""
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
        """Take every hook off and leave a plain model: zeros stay where they are, but nothing holds them."""
        if self._held is not None:
            self._held.remove()

"""A mask that is chosen little by little: transformed while it grows, or in force at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._model.targets import DEFAULT_TARGETS, TargetType, find_targets
from .._rst.schedule import check_integer
from .._rst.validation import check_reachable, check_state, modules_of
from ..masks.mask import Mask
from ..masks.records import as_state, of_state
from ..scheduler import RSTScheduler
from .magnitude import ALL_LAYERS, check_scores, counts_of_rest, remove_smallest, rounds_of_counts

Scores = Mapping[str, Tensor] | Callable[[nn.Module], Mapping[str, Tensor]]

_GROWTH = 0.6  # of `steps`: what is chosen last is penalized for the rest


class GradualPruning(RSTScheduler):
    """Gradual pruning of a trained network, in which each part of the mask is under RST's penalty once it is chosen.

    The mask grows along the cubic schedule of Zhu and Gupta (arXiv 1710.01878), in ``intervals`` steps over the first
    60 % of ``steps``, always by what is smallest then, and what was chosen stays chosen. λ rises over ``steps`` on all
    that is chosen so far; nothing is set to zero before ``finalize()``. With ``max_penalty=0`` it is the gradual
    magnitude pruning of that paper: each part of the mask is in force at once, and every call of ``step()`` counts.

    It is an :class:`torch_dual_ticket.RSTScheduler`, and used like one: ``step()`` once per update, and ``finalize()``
    when ``done``. Earlier, ``finalize()`` completes the mask, and warns. A step at which the mask grows reads every
    target weight, and is collective where a default process group exists.

    Args:
        model: the module to prune, best trained already.
        sparsity: fraction of weights removed at the end; as for :func:`magnitude_masks`.
        steps: calls of ``step()`` over which λ rises.
        hold: calls after that with λ at its ceiling.
        max_penalty: the ceiling of λ; 0: no penalty, and masks that are in force at once.
        schedule: of λ; as for :class:`torch_dual_ticket.RSTScheduler`.
        intervals: how often the mask grows.
        distribution: "uniform", "erk", or "global"; as for :func:`magnitude_masks`.
        pattern: as for :func:`magnitude_masks`; "n:m" is complete at the end. Of whole filters BatchNorm undoes the
            penalty: give ``max_penalty=0``, or :class:`torch_dual_ticket.RSTScheduler` masks of the norm as well.
        scores: what is compared in place of the magnitudes; as for :func:`magnitude_masks`, or a function that is given
            the model each time the mask grows, and returns such a mapping.
        targets: module types whose ``weight`` is masked.
        exclude: fnmatch patterns of module names that stay dense, with all below them.
        optimizer: as for :class:`torch_dual_ticket.RSTScheduler`.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that cannot be used; nothing is changed.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> pruning = GradualPruning(model, 0.75, steps=100, hold=25)
        >>> for update in range(150):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     pruning.step()
        ...     if pruning.done:
        ...         report = pruning.finalize()
        ...     if update in (15, 30, 149):
        ...         print(f"{pruning.phase} {pruning.sparsity:.2f}")
        transform 0.44
        transform 0.66
        finetune 0.75
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float] | None,
        steps: int,
        *,
        hold: int = 0,
        max_penalty: float = 10.0,
        schedule: str | Callable[[float], float] = "linear",
        intervals: int = 20,
        distribution: str = "uniform",
        pattern: str = "unstructured",
        scores: Scores | None = None,
        targets: Sequence[TargetType] = DEFAULT_TARGETS,
        exclude: Sequence[str] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not callable(scores):
            check_scores(scores, " or a function of the model that returns one")
        self._intervals = check_integer("intervals", intervals, at_least=1)
        self._pattern, self._scores = pattern, scores
        found = find_targets(model, targets, exclude)
        self._counts = rounds_of_counts(found, sparsity, distribution, rounds=1, pattern=pattern)[0]  # at the end
        self._targets = [target for target in found if ALL_LAYERS in self._counts or target.name in self._counts]
        nothing = torch.ones((), dtype=torch.bool, device="cpu")
        masks = {target.name: nothing.expand(target.shape) for target in self._targets}
        super().__init__(
            model,
            steps=steps,
            hold=hold,
            max_penalty=max_penalty,
            schedule=schedule,
            optimizer=optimizer,
            masks=masks,
        )
        if self._timeline.max_penalty == 0:
            self._ticket.hold_zeros(self._ticket.stage.masks)

    def _interval(self, steps: int) -> int:
        """How often the mask has grown after so many scheduler steps."""
        return min(self._intervals, steps * self._intervals // max(1, round(_GROWTH * self._timeline.steps)))

    def _masks_after(self, steps: int) -> Mapping[str, Mask]:
        interval = self._interval(steps)
        return self._ticket.stage.masks if interval == self._interval(self._steps) else self._grown(interval)

    def _grown(self, interval: int) -> Mapping[str, Mask]:
        share = 1 - (1 - interval / self._intervals) ** 3
        scores = self._scores
        if callable(scores) and not isinstance(scores := scores(self._model), Mapping):
            raise TypeError(
                "scores(model) must return a mapping from parameter names to tensors, but returned"
                f" {type(scores).__name__}"
            )
        check_reachable(self._ticket, stacklevel=5, inside=modules_of(self._ticket))  # a head may have been replaced
        managed = self._masks()
        found = [target for target in self._targets if target.name in managed]
        rest = counts_of_rest(self._counts, self._targets, found)
        counts = {name: round(share * count) for name, count in rest.items()}
        chosen = remove_smallest(self._model, found, counts, self.masks, self._pattern, scores)
        return self._checked(chosen)

    def _step_in_force(self) -> None:
        ticket = self._ticket
        if ticket.stage.report is not None or not ticket.parameters:  # after finalize(), or remove()
            return
        steps = min(self._steps + 1, self._timeline.total)
        masks = self._masks_after(steps)
        if masks is ticket.stage.masks:
            ticket.stage = replace(ticket.stage, steps=steps)
        else:
            ticket.reshard()
            ticket.hold_zeros(masks, steps)

    def _final_masks(self) -> Mapping[str, Mask]:
        """Complete them."""
        interval = self._interval(self._steps)
        if interval == self._intervals:
            return self._ticket.stage.masks
        warnings.warn(
            f"finalize() after {interval} of {self._intervals} intervals: the rest of the mask is chosen and removed at"
            " once",
            stacklevel=3,
        )
        return self._grown(self._intervals)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Not here: this class chooses the masks.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "GradualPruning chooses its masks: to choose your own, use RSTScheduler(masks=…).set_masks()"
        )

    def state_dict(self) -> dict[str, Any]:
        """As of ``RSTScheduler``, and the masks so far: a byte for eight weights."""
        return super().state_dict() | {"chosen": as_state(self._masks())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved one was. Load the model's and the optimizer's state too, before or after.

        Raises:
            ValueError: not a state of this class, one of other layers, or of another kind (penalized, or with
                ``max_penalty=0``) that was not finalized; nothing is changed then.
        """
        steps, pending, phase, _, report = check_state(state, self._ticket)
        if "chosen" not in state:
            raise ValueError("not a state_dict() of GradualPruning: it has no masks, under 'chosen'")
        is_penalized, was_penalized = self._timeline.max_penalty > 0, phase == "transform"
        if is_penalized != was_penalized and not report.layers:
            kinds = ("is 0, with masks in force at once", "is positive, with masks that are penalized first")
            raise ValueError(
                f"max_penalty {kinds[is_penalized]}; in the state it {kinds[was_penalized]}: build GradualPruning with"
                " the max_penalty of the saved one"
            )
        masks = self._checked({name: mask.draw() for name, mask in of_state(state["chosen"]).items()})
        steps = min(steps, self._timeline.total)
        self._resume(masks, steps, phase, report if report.layers else None, pending=pending)

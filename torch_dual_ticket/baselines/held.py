"""Masks in force on a model from the moment they are given: explicit ones, or a random ticket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._engine.layer_hook import manage
from .._engine.ticket import Ticket
from .._model.names import unwrapped_modules, unwrapped_parameters
from .._model.targets import DEFAULT_TARGETS, check_model, find_targets
from .._rst.mask_view import MaskView, apply_masks, sparsity_of, still_managed
from .._rst.ranks import agree_on_seed
from .._rst.schedule import check_integer
from .._rst.validation import check_directions, check_unmanaged, generator_unchanged_on_error
from ..masks.explicit import ExplicitMask
from ..masks.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .._model.targets import Target, TargetType
    from ..masks.mask import Mask


class HeldMasks:
    """Masks in force on a model: what :func:`hold` and :func:`random_ticket` return.

    The masked weights stay zero for as long as the model lives, also when this object is dropped; :meth:`remove` ends
    it. After a restart, build the model, hold the same masks again, and load the weights.
    """

    def __init__(self, model: nn.Module, targets: list[Target], masks: Mapping[str, Mask]) -> None:
        check_unmanaged(targets)
        check_directions(targets, masks)
        masks = {target.name: masks[target.name] for target in targets}
        self._ticket = Ticket(model, masks)
        manage(self._ticket, targets)
        self._ticket.hold_zeros(masks)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor of the full shape, True = kept."""
        return MaskView(self._managed(), self._ticket)

    @property
    def sparsity(self) -> float:
        """The fraction of masked weights over all managed parameters."""
        return sparsity_of(self._managed())

    def _managed(self) -> dict[str, Mask]:
        """Without the parameters that ``prune.remove`` has detached."""
        return still_managed(self._ticket)

    def apply_masks(self, model: nn.Module) -> None:
        """Set the masked weights of another model of the same structure to zero, such as an EMA copy begun before.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: a parameter's name or shape is not found in ``model``; nothing is changed then.
        """
        apply_masks(model, self._managed())

    def remove(self) -> None:
        """Remove every hook and leave a plain model: zeros stay where they are, but nothing keeps them."""
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
        TypeError, ValueError: a mask that is not bool, has another shape than its parameter, or the name of no
            parameter; a parameter that is managed already. Nothing is changed then.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
        >>> held = hold(model, {"0.weight": torch.tensor([[True, False, False, True], [False, True, True, True]])})
        >>> held.sparsity, int((model[0].weight == 0).sum())
        (0.375, 3)
    """
    found = _find_masked(model, masks, targets)
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
    """Put a random ticket in force now, without a transformation: call it at initialization to train from scratch.

    The arguments, and with them the masks, are those of :class:`torch_dual_ticket.RSTScheduler`: with the same seed
    both have the same ticket.

    Raises:
        TypeError, ValueError, RuntimeError: as that class; nothing is changed then.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> random_ticket(model, 0.75, exclude=["2"], seed=0).masks["0.weight"].sum()
        tensor(32)
    """
    given = None if seed is None else check_integer("seed", seed)
    found = find_targets(model, targets, exclude)
    plan = make_plan(found, sparsity, distribution=distribution, pattern=pattern)
    found = [target for target in found if target.name in plan.shapes]
    with generator_unchanged_on_error():
        return HeldMasks(model, found, plan.masks(agree_on_seed(given, plan, model)))


def _find_masked(model: nn.Module, masks: Mapping[str, Tensor], types: Sequence[TargetType]) -> list[Target]:
    """The parameters that these masks, by parameter name, are for; errors as of :func:`hold`."""
    check_model(model)
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks go from parameter names to bool tensors, True = kept; got {type(masks).__name__}")
    if not masks:
        raise ValueError("there is nothing to hold: masks is empty")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name} must be a bool tensor, True = kept; got {kind}")
    parameters = dict(unwrapped_parameters(model))
    masked = {id(parameter) for name, parameter in parameters.items() if name in masks}
    # Layers without a mask may be frozen, lazy or already pruned: find_targets() would refuse them.
    others = [
        _literally(name)
        for name, module in unwrapped_modules(model)
        if name and not any(id(parameter) in masked for parameter in module.parameters())
    ]
    found = {target.name: target for target in find_targets(model, types, others)} if masked else {}
    for name, mask in masks.items():
        if name not in found:
            first = {id(target.parameter): target.name for target in found.values()}.get(id(parameters.get(name)))
            why = "the model has no such parameter"
            if name in parameters:
                why = f"it is tied to {first}: name that" if first else "it belongs to none of the types in `targets`"
            names = ", ".join(found) or "none"
            raise ValueError(f"the mask of {name!r} does not belong to a parameter: {why}. Found: {names}")
        if tuple(mask.shape) != found[name].shape:
            raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {found[name].shape}")
    return [target for name, target in found.items() if name in masks]


def _literally(name: str) -> str:
    """An fnmatch pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)

"""Masks in force on a model from the moment they are given: explicit ones, or a random ticket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._engine.layer_hook import manage
from .._engine.ticket import Ticket
from .._model.masked import find_masked, masks_of_zeros
from .._model.targets import DEFAULT_TARGETS, Target, TargetType, find_targets
from .._rst.cut_warnings import warn_of_constant_outputs, warn_of_emptied
from .._rst.managed import ManagedMasks
from .._rst.ranks import agree_on_masks, agree_on_seed
from .._rst.schedule import check_integer
from .._rst.validation import check_directions, check_unmanaged, generator_unchanged_on_error
from ..masks.mask import Mask
from ..masks.plan import make_plan
from ..masks.records import as_state, of_state


class HeldMasks(ManagedMasks):
    """Masks in force on a model: what :func:`hold` and :func:`random_ticket` return.

    The masked weights stay zero for as long as the model lives, also when this object is dropped; :meth:`remove` ends
    it. ``export.save_ticket()``, ``report.summary()`` and ``report.History`` take it like a scheduler.
    """

    def __init__(self, model: nn.Module, targets: list[Target], masks: Mapping[str, Mask]) -> None:
        check_unmanaged(targets)
        check_directions(targets, masks)
        masks = {target.name: masks[target.name] for target in targets}
        self._model, self._ticket = model, Ticket(model, masks)
        manage(self._ticket, targets)
        self._ticket.hold_zeros(masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put other masks in force from now on: for gradual pruning, or to exchange weights (SET, RigL).

        What they remove is set to zero now; weights that come back start from zero, and are trained from the next
        ``backward()`` on. Call it between two updates. Collective where a default process group exists.

        A copy of the model, such as an average, goes on with the masks of the moment when it was made. Where weights
        come back, make it a plain one first: ``torch_dual_ticket.release(average)``.

        Args:
            masks: as for :func:`hold`, for exactly the same parameters.

        Raises:
            TypeError, ValueError: masks that cannot be used; nothing is changed then.
            RuntimeError: after :meth:`remove`; or ranks disagree.

        Warns:
            UserWarning: a mask keeps nothing of its weight; or a layer was replaced, which has left these masks.
        """
        self._hold(self._checked(masks))

    def _hold(self, masks: Mapping[str, Mask]) -> None:
        self._ticket.reshard()
        self._ticket.hold_zeros(masks)

    def state_dict(self) -> dict[str, Any]:
        """The masks, for a checkpoint: a byte for eight weights, or the seed of a random ticket."""
        return as_state(self._masks())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the saved masks in force, as :meth:`set_masks`. Load the model's state too, before or after.

        After a restart :func:`hold` any masks of the same parameters first.

        Args:
            state: of :meth:`state_dict`, or what ``export.load_ticket()`` returned for such masks.

        Raises:
            ValueError: not such a state, or one of other parameters; nothing is changed then.
        """
        saved = of_state(state)
        checked = self._checked({name: mask.draw() for name, mask in saved.items()})
        self._hold({**checked, **saved})  # what is drawn from a seed stays so


def hold(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> HeldMasks:
    """Set the masked weights to zero now, and keep them at exactly zero in whatever loop trains the model.

    Collective where a default process group exists: every rank gives the full masks, and the same ones.

    Args:
        model: a module; its structure and names stay as they are.
        masks: parameter name -> mask of the parameter's shape, bool or 0 and 1 of any dtype, True = kept. Parameters
            without one stay dense. None: the zeros that the weights of two or more dimensions have now, in a model that
            is sparse already; weights without zeros, and embeddings, stay dense. Parameters may be frozen.

    Raises:
        TypeError, ValueError: a mask with other values, or of another shape than its parameter, or the name of no
            parameter; a parameter that is managed already; None, and no weight is zero. Nothing is changed then.
        RuntimeError: ranks disagree.

    Warns:
        UserWarning: a mask keeps nothing of its weight; with None, the weight is nothing but zeros.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
        >>> held = hold(model, {"0.weight": torch.tensor([[True, False, False, True], [False, True, True, True]])})
        >>> held.sparsity, int((model[0].weight == 0).sum())
        (0.375, 3)
    """
    if masks is None:
        masks = masks_of_zeros(model)
        if not masks:
            raise ValueError(
                "there is nothing to hold: no weight of two or more dimensions, but for embeddings, is zero. Load the"
                " sparse weights first, or give masks: hold(model, magnitude_masks(model, 0.9))"
            )
    found, explicit = find_masked(model, masks, frozen=True)
    check_directions(found, explicit)
    agree_on_masks(explicit, model)
    warn_of_emptied(explicit)
    return HeldMasks(model, found, explicit)


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
        seeded = plan.masks(agree_on_seed(given, plan, model))
        warn_of_constant_outputs(model, found, seeded)
        return HeldMasks(model, found, seeded)

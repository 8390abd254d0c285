"""Random pruning for ``torch.nn.utils.prune``, drawn from a seed."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

from ._engine.ticket import Ticket
from ._model.targets import runs_forward
from .masks.seeded import SeededMask

_Stock = prune.RandomUnstructured  # by the name in torch there may be the class below


class RandomUnstructured(_Stock):
    """Prune (currently unpruned) entries of a tensor at random, from a seed.

    It takes the place of :class:`torch.nn.utils.prune.RandomUnstructured`: same signature, same number of entries
    pruned, same layout on the module (``name + "_orig"``, ``name + "_mask"`` and a forward pre-hook), on top of and
    under every other method of ``torch.nn.utils.prune``. What is new:

    - ``seed``. The entries depend on the seed, the number of entries still unpruned and the number to prune, and on
      nothing else: not on the device, the dtype, the memory format or the release of torch. With one seed, pruning
      more of the same entries only removes more. Layers of one size pruned with one seed get one mask; give each
      its own seed where that matters.
    - It also prunes complex and ``channels_last`` tensors. A first mask keeps the tensor's memory format; a container
      of torch makes later ones contiguous.
    - When it raises, the module is as it was before.

    Call it like the stock method: once, before or after training, on each tensor to prune.

    Args:
        amount: what to prune. A float in [0, 1] is the fraction, rounded to a whole number of entries as Python's
            ``round`` does; an int is that number of entries.
        seed: any int; or None to draw one from torch's global CPU generator for each mask, so that
            ``torch.manual_seed`` makes it reproducible. Give one where several ranks train replicas (a ``UserWarning``
            asks for it): their generators may differ, and the replicas would drift apart.

    Raises:
        TypeError: ``amount`` is not a real number, or ``seed`` not an int.
        ValueError: ``amount`` is out of range; when the mask is drawn, also if it is an int larger than the number
            of entries still unpruned.

    Example:
        >>> layer = nn.Linear(4, 5)
        >>> method = RandomUnstructured.apply(layer, "weight", amount=0.9, seed=0)
        >>> int(layer.weight_mask.sum()), layer.weight_mask.shape
        (2, torch.Size([5, 4]))
    """

    def __init__(self, amount: float, seed: int | None = None) -> None:
        super().__init__(amount)  # checks type and range, but lets these two pass
        if isinstance(amount, bool):
            raise TypeError(f"Invalid type for amount: {amount}. Must be int or float.")
        if amount != amount:
            raise ValueError(f"amount={amount} should either be a float in the range [0, 1] or a non-negative integer")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
            raise TypeError(f"seed={seed!r} should be an int, or None to draw one from torch's global generator")
        self.seed = seed

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return ``default_mask`` with ``amount`` of the entries of ``t`` set to zero.

        As in torch, the entries are drawn from all of ``t``, the already masked ones among them;
        ``prune.PruningContainer`` passes in the unpruned ones alone.

        Args:
            t: the tensor to prune, of any shape and dtype. Its values do not matter.
            default_mask: the mask so far, of the shape of ``t``; it is not changed.

        Returns:
            A new mask of the shape and dtype of ``default_mask``: 1 = kept, 0 = pruned.
        """
        size = t.nelement()
        pruned = int(self.amount) if isinstance(self.amount, numbers.Integral) else round(self.amount * size)
        if pruned > size:
            raise ValueError(
                f"amount={self.amount} should be no larger than the number of parameters left to prune, which is {size}"
            )
        mask = default_mask.clone()
        if pruned == 0 or mask.is_meta:  # nothing to draw, so nothing is taken from the generator either
            return mask
        if self.seed is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(  # to agree would take a collective call, which torch's method is not
                f"each of the {dist.get_world_size()} ranks draws this mask from its own generator: where those differ,"
                " masks do, and replicas drift apart. Give every rank the same seed=….",
                stacklevel=5,
            )
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if self.seed is None else int(self.seed)
        kept = SeededMask(seed, "", (size,), pruned).draw(device=mask.device)
        return mask.masked_fill_(~kept.view(mask.shape), 0)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, seed: int | None = None
    ) -> prune.BasePruningMethod:
        """Prune the parameter ``name`` of ``module`` and keep it so by a forward pre-hook.

        Args:
            module: the module that holds the parameter.
            name: the parameter's name within it, such as ``"weight"``.
            amount: see the class.
            seed: see the class.

        Returns:
            The hook: this method, or the ``PruningContainer`` that combines it with earlier ones.
        """
        with _unchanged_on_error(module):
            stock_apply = super(_Stock, cls).apply
            hook: prune.BasePruningMethod = stock_apply(  # type: ignore[no-untyped-call]
                module, name, amount=amount, seed=seed
            )
        return hook


def random_unstructured(module: nn.Module, name: str, amount: float, seed: int | None = None) -> nn.Module:
    """Prune ``amount`` of the (currently unpruned) entries of one parameter at random, from a seed.

    The function of :class:`RandomUnstructured`, in the place of ``torch.nn.utils.prune.random_unstructured``:
    ``module`` gets the parameter ``name + "_orig"``, the buffer ``name + "_mask"``, and ``name`` itself becomes
    their product, made anew before each forward.

    Args:
        module: the module that holds the parameter. It is changed in place.
        name: the parameter's name within it, such as ``"weight"``.
        amount: a float in [0, 1] for a fraction of the unpruned entries, an int for a number of them.
        seed: any int; or None to draw one from torch's global CPU generator.

    Returns:
        ``module``.

    Raises:
        TypeError: ``amount`` is not a real number, or ``seed`` not an int.
        ValueError: ``amount`` is out of range.

    Example:
        >>> layer = random_unstructured(nn.Linear(2, 3), "weight", amount=1, seed=0)
        >>> int(torch.sum(layer.weight_mask == 0))
        1
        >>> sorted(layer.state_dict())
        ['bias', 'weight_mask', 'weight_orig']
    """
    RandomUnstructured.apply(module, name, amount, seed)
    return module


def check_stock_layout(ticket: Ticket) -> None:
    """Whether the stock layout can carry these parameters; ``ValueError`` names the first that it cannot."""
    for managed in ticket.parameters:
        parameter, layer, first = managed.tensor(), managed.layer(), managed.occurrences[0]
        if len({id(occurrence.owner()) for occurrence in managed.occurrences}) > 1:
            reason = "is tied, and two layers cannot share a `weight_orig` and keep one mask"
        elif first.attribute != first.tensor_name:
            reason = "is parametrized, and the stock layout replaces the attribute that the parametrization computes"
        elif type(parameter) is not nn.Parameter:
            reason = f"is a {type(parameter).__name__}, which a mask buffer cannot be multiplied into"
        elif layer is None or not runs_forward(layer):
            reason = "is used by its parent without a call of its layer, in which torch would make the masked weight"
        else:
            continue
        raise ValueError(
            f"{managed.name} {reason}. Leave the model in the plain layout, or take the layer out with prune.remove"
            " first."
        )


def to_stock_layout(ticket: Ticket) -> None:
    """Give managed parameters the layout that ``torch.nn.utils.prune`` works on, and end the ticket.

    The parameter objects and their positions among the module's parameters stay, so that an optimizer's state still
    fits. ``ValueError`` as :func:`check_stock_layout`, before anything is changed.
    """
    check_stock_layout(ticket)
    parameters = ticket.parameters
    ticket.release()
    for managed in parameters:
        module, name = managed.layer(), managed.occurrences[0].tensor_name
        assert module is not None
        renamed = {f"{name}_orig" if key == name else key: value for key, value in module._parameters.items()}
        module._parameters.clear()
        module._parameters.update(renamed)
        orig = renamed[f"{name}_orig"]
        assert orig is not None
        kept = ticket.mask(managed).draw(device=orig.device)
        module.register_buffer(f"{name}_mask", torch.empty_like(orig, requires_grad=False).copy_(kept))
        method: Any = prune.CustomFromMask(None)  # it would keep another copy of the mask
        method._tensor_name = name
        setattr(module, name, method.apply_mask(module))
        module.register_forward_pre_hook(method)


@contextmanager
def _unchanged_on_error(module: nn.Module) -> Iterator[None]:
    """Put back what a failed ``apply`` of torch leaves behind: a lost hook, a renamed parameter, a longer container."""
    stores: list[MutableMapping[Any, Any]] = [module._parameters, module._buffers, module._forward_pre_hooks]
    before = [dict(store) for store in stores]
    containers = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.PruningContainer)]
    methods = [container._pruning_methods for container in containers]
    try:
        yield
    except BaseException:
        for store, items in zip(stores, before, strict=True):
            store.clear()
            store.update(items)
        for container, earlier in zip(containers, methods, strict=True):
            container._pruning_methods = earlier
        raise

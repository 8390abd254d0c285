"""Masks by magnitude, or by other scores: the weights, or whole units, that have the smallest now are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .._model.masked import find_masked
from .._model.targets import DEFAULT_TARGETS, Target, TargetType, find_targets
from .._tensors.dtensor import reshard
from .._tensors.sharding import whole
from ..masks.distributions import validate_sparsity
from ..masks.patterns import parse_pattern, pruned_units, tile
from ..masks.plan import DEFAULT_SPARSITY, make_plan, sparsity_of_cycle

ALL_LAYERS = ""  # the key of all layers together, where they have one threshold


def magnitude_masks(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    distribution: str = "uniform",
    pattern: str = "unstructured",
    within: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    targets: Sequence[TargetType] = DEFAULT_TARGETS,
    exclude: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The masks that remove the weights of smallest magnitude, or score, as they are now; nothing is changed.

    Ties go by position: earlier weights are removed first. Of a weight under weight_norm the direction is compared.

    Args:
        model: a module. Where its parameters are sharded (FSDP2) this is collective, and gathers one at a time.
        sparsity: fraction of weights removed, in [0, 1); a mapping as for :class:`torch_dual_ticket.RSTScheduler`.
            None: 0.9, or what ``pattern`` implies.
        distribution: "uniform" or "erk" (a count for each layer), or "global": one threshold for all layers.
        pattern: as for :class:`torch_dual_ticket.RSTScheduler`. "n:m": of every m weights along the input dimension
            the n largest stay. "filter", "channel", "block:RxC": those go whose magnitudes, or scores, have the
            smallest sums (of filters as Li et al. do, arXiv 1608.08710).
        within: earlier masks, as :func:`hold` takes them; what they remove is removed first, so that masks are nested.
        scores: parameter name -> finite tensor of the parameter's shape, compared in place of the magnitudes: what is
            smallest is removed. So SNIP, GraSP, wanda … are a line each. Names that are no targets do not matter.
        targets: module types whose ``weight`` is masked.
        exclude: fnmatch patterns of module names that stay dense, with all below them.

    Returns:
        Parameter name -> bool tensor on the parameter's device, True = kept; for :func:`hold`.

    Raises:
        TypeError, ValueError: arguments that cannot be used; scores that are missing, or not finite.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[0.3, -0.1, 0.2, -0.4]]))
        >>> magnitude_masks(model, 0.5)
        {'weight': tensor([[ True, False, False,  True]])}
        >>> magnitude_masks(model, pattern="1:2")
        {'weight': tensor([[ True, False, False,  True]])}
        >>> magnitude_masks(model, 0.5, scores={"weight": model.weight})  # signed
        {'weight': tensor([[ True, False,  True, False]])}
        >>> magnitude_masks(nn.Linear(3, 8), 0.5, pattern="filter")["weight"].all(1).sum()  # of 8 outputs
        tensor(4)
    """
    check_scores(scores)
    if within is not None and (not isinstance(within, Mapping) or within):
        within = {name: mask.draw() for name, mask in find_masked(model, within, frozen=True)[1].items()}
    found = find_targets(model, targets, exclude)
    counts = rounds_of_counts(found, sparsity, distribution, rounds=1, pattern=pattern)[0]
    return remove_smallest(model, found, counts, within, pattern, scores)


def check_scores(scores: object, otherwise: str = "") -> None:
    """A mapping, or None."""
    if not (scores is None or isinstance(scores, Mapping)):
        raise TypeError(
            f"scores must be a mapping from parameter names to tensors{otherwise}; got {type(scores).__name__}"
        )


def rounds_of_counts(
    targets: list[Target],
    sparsity: float | Mapping[str, float] | None,
    distribution: str,
    rounds: int,
    pattern: str = "unstructured",
) -> list[dict[str, int]]:
    """The number of units removed after each round: of each layer, or of all of them together under the name ""."""
    if distribution not in ("uniform", "erk", "global"):
        raise ValueError(f"unknown distribution {distribution!r}; allowed are 'uniform', 'erk' and 'global'")
    if distribution != "global":
        settings = {"distribution": distribution, "pattern": pattern}
        return make_plan(targets, sparsity, **settings, cycles=rounds, stacklevel=4).pruned
    if pattern != "unstructured":
        raise ValueError(f"pattern {pattern!r} prunes every layer alike, so distribution='global' is not possible")
    if isinstance(sparsity, Mapping):
        raise ValueError("distribution='global' has one sparsity for all layers together: give a number, not a mapping")
    total = sum(math.prod(target.shape) for target in targets)
    sparsity = validate_sparsity(DEFAULT_SPARSITY if sparsity is None else sparsity)
    counts = [pruned_units(sparsity_of_cycle(sparsity, cycle, rounds), total) for cycle in range(1, rounds + 1)]
    if not counts[-1]:
        raise ValueError(f"nothing to prune: sparsity={sparsity!r} of {total} weights rounds to none")
    return [{ALL_LAYERS: count} for count in counts]


def counts_of_rest(counts: Mapping[str, int], targets: list[Target], rest: list[Target]) -> Mapping[str, int]:
    """Where some have been detached: one count for all layers becomes the share of those that are left."""
    if ALL_LAYERS not in counts:
        return counts
    left, total = (sum(math.prod(target.shape) for target in some) for some in (rest, targets))
    return {ALL_LAYERS: round(counts[ALL_LAYERS] * left / total)}


@torch.no_grad()
def remove_smallest(
    model: nn.Module,
    targets: list[Target],
    counts: Mapping[str, int],
    within: Mapping[str, Tensor] | None,
    pattern: str = "unstructured",
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The masks that remove this many of the smallest units, within the earlier masks.

    Under "n:m" fewer than all that the pattern removes may go: of those the smallest.
    """
    reshard(model)
    parsed = parse_pattern(pattern)
    masks, magnitudes = {}, {}
    for target in targets:
        name = target.name
        if ALL_LAYERS not in counts and name not in counts:
            continue  # stays dense
        magnitude = whole(target.parameter).detach().abs() if scores is None else _score(target, scores)
        if within is not None and name in within:
            magnitude = magnitude.masked_fill(within[name].to(magnitude.device) == 0, -math.inf)
        if parsed.kind == "n:m":
            assert target.input_dim is not None  # the plan needs it too
            stay = _largest_of_groups(magnitude, parsed.first, parsed.second, target.input_dim)
            masks[name] = stay.masked_scatter(~stay, _largest(magnitude[~stay], counts[name]))
        elif ALL_LAYERS in counts:
            magnitudes[name] = magnitude
        else:
            unit = tile(target.shape, pattern, 1 if target.input_dim is None else target.input_dim)
            masks[name] = _largest_units(magnitude, unit, counts[name])
    if not magnitudes:
        return masks
    device = next(iter(magnitudes.values())).device
    together = torch.cat([magnitude.flatten().to(device) for magnitude in magnitudes.values()])
    parts = torch.split(
        _largest(together, counts[ALL_LAYERS]), [magnitude.numel() for magnitude in magnitudes.values()]
    )
    return {
        name: part.view(magnitude.shape).to(magnitude.device)
        for (name, magnitude), part in zip(magnitudes.items(), parts, strict=True)
    }


def _score(target: Target, scores: Mapping[str, Tensor]) -> Tensor:
    """What somebody computed for a weight, on its device."""
    name, score = target.name, scores.get(target.name)
    if not isinstance(score, Tensor) or tuple(score.shape) != target.shape:
        got = "nothing" if score is None else getattr(score, "shape", type(score).__name__)
        raise ValueError(f"scores must have a tensor of shape {target.shape} for {name}, got {got}")
    score = whole(score.detach()).to(target.parameter.device)
    if score.is_complex() or not bool(score.isfinite().all()):
        raise ValueError(f"the scores of {name} must be finite real numbers, which can be ordered")
    return score if score.is_floating_point() else score.double()


def _largest(magnitude: Tensor, pruned: int) -> Tensor:
    """All but the smallest, as a bool tensor; of equal ones the earlier are removed first."""
    kept = torch.ones(magnitude.numel(), dtype=torch.bool, device=magnitude.device)
    kept[magnitude.flatten().argsort(stable=True)[:pruned]] = False
    return kept.view(magnitude.shape)


def _largest_units(magnitude: Tensor, unit: tuple[int, ...], pruned: int) -> Tensor:
    """All but the units whose sum is smallest; of equal ones the earlier are removed first."""
    sizes = [(size // of, of) for size, of in zip(magnitude.shape, unit, strict=True)]
    split = magnitude.reshape([size for pair in sizes for size in pair])
    exact = torch.promote_types(magnitude.dtype, torch.float32)  # sums of half precision would be rounded to ties
    sums = split.sum(list(range(1, split.dim(), 2)), keepdim=True, dtype=exact)
    return _largest(sums, pruned).expand(split.shape).reshape(magnitude.shape).contiguous()


def _largest_of_groups(magnitude: Tensor, kept: int, size: int, dim: int) -> Tensor:
    """The largest of each group of neighbors along a dimension; of equal ones the earlier are removed first."""
    last = magnitude.movedim(dim, -1)
    groups = last.reshape(*last.shape[:-1], -1, size)
    removed = groups.argsort(stable=True)[..., : size - kept]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, removed, False)
    return mask.view(last.shape).movedim(-1, dim).contiguous()

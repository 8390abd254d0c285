"""What the ranks must agree on: replicas whose masks or penalties differ would drift apart unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .._model.names import unwrapped_parameters
from ..masks.mask import Mask
from ..masks.plan import Plan
from .schedule import Timeline

Layers = dict[str, tuple[tuple[int, ...], str]]  # by parameter name: its shape, and what is pruned of it


def world_size() -> int:
    """How many ranks the default process group has; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agree_on_seed(seed: int | None, plan: Plan, model: nn.Module, timeline: Timeline | None = None) -> int:
    """The seed to use on every rank: the one given, or one drawn from torch's global CPU generator on rank 0.

    Collective where a default process group exists: every rank must call it.

    Raises:
        RuntimeError: on all ranks, if they were given different seeds or schedules, or prune a parameter of the same
            name and shape differently.
    """
    mine = int(torch.randint(2**63 - 1, (), device="cpu").item()) if seed is None else seed
    if world_size() == 1:
        return mine
    pruned = {
        name: (shape, f"{', then '.join(str(counts[name]) for counts in plan.pruned)} units ({plan.pattern})")
        for name, shape in plan.shapes.items()
    }
    return _gather_and_compare(mine, seed, pruned, model, timeline)[0]


def agree_on_masks(masks: Mapping[str, Mask], model: nn.Module, timeline: Timeline | None = None) -> None:
    """Explicit masks are the same on every rank. Collective where a default process group exists.

    Raises:
        RuntimeError: on all ranks, if they were given different masks or schedules.
    """
    if world_size() > 1:
        pruned = {
            name: (mask.shape, f"{mask.pruned_weights} weights (mask {mask.fingerprint})")
            for name, mask in masks.items()
        }
        _gather_and_compare(0, None, pruned, model, timeline)


def _gather_and_compare(
    mine: int, given_seed: int | None, pruned: Layers, model: nn.Module, timeline: Timeline | None
) -> list[int]:
    """What all ranks have for ``mine``; they were given the same settings, and prune parameters of one name alike."""
    everyone: list[Any] = [None] * world_size()
    settings = {"seed": given_seed} if timeline is None else {"seed": given_seed, **_schedule(timeline)}
    layers: Layers = {name: (tuple(parameter.shape), "nothing") for name, parameter in unwrapped_parameters(model)}
    with _device_of(model):
        dist.all_gather_object(everyone, (mine, settings, layers | pruned))
    for setting in settings:
        given = {rank: theirs.get(setting) for rank, (_, theirs, _) in enumerate(everyone)}
        if any(value != given[0] for value in given.values()):
            raise RuntimeError(
                f"the ranks were given different values of {setting}: {given}. Their replicas would drift apart. Give"
                f" every rank the same {setting}."
            )
    _check_layers([layers for _, _, layers in everyone])
    return [theirs for theirs, _, _ in everyone]


def check_not_joined(ranks: int) -> None:
    """A seed that so many ranks agreed on is known to all ranks that there are now.

    Raises:
        RuntimeError: the process group is younger than the seed.
    """
    if world_size() > ranks:
        raise RuntimeError(
            "this scheduler was built before torch.distributed was initialized: each rank drew a seed alone, and their"
            " masks may differ. Build it after init_process_group(), or give every rank the same seed."
        )


def _device_of(model: nn.Module) -> AbstractContextManager[object]:
    """Makes the model's accelerator the current device: NCCL gathers objects through that.

    It is another one, often the same on all ranks, where a rank has moved its model but not called set_device().
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type in ("cpu", "meta"):
        return nullcontext()
    use: Any = getattr(torch.get_device_module(device), "device", nullcontext)  # Apple's GPU is always the current one
    context: AbstractContextManager[object] = use(device)
    return context


def _schedule(timeline: Timeline) -> dict[str, object]:
    """The arguments; in place of the function, which cannot be compared, λ at a few scheduler steps."""
    samples = range(0, timeline.total, max(1, timeline.total // 8))
    fields = {name: getattr(timeline, name) for name in ("steps", "hold", "cycles", "max_penalty")}
    return {**fields, "schedule": tuple(map(timeline.penalty, samples))}


def _check_layers(of_rank: list[Layers]) -> None:
    """Ranks may have different parameters, as the stages of a pipeline do, but must prune the same one alike."""
    first: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}
    for rank, layers in enumerate(of_rank):
        for name, (shape, pruned) in layers.items():
            other, theirs = first.setdefault((name, shape), (rank, pruned))
            if theirs != pruned:
                raise RuntimeError(
                    f"rank {other} prunes {theirs} of {name}, rank {rank} prunes {pruned}. Give every rank the same"
                    " sparsity, pattern, distribution, targets and exclusions, or the same masks; and parameters that"
                    " are not the same, different names."
                )

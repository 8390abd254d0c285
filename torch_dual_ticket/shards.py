"""Parameters that are spread over processes (DTensor), and what the ranks of a job must agree on."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_WHOLE = (nn.Parameter, Tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor: this process holds a part of it."""
    # Asked by attribute and not by type: importing torch.distributed.tensor takes longer than importing this package.
    return type(tensor) not in _WHOLE and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds: the tensor itself, or the local shard of a DTensor (shared memory, no copy)."""
    if type(tensor) in _WHOLE:
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def placed_like(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient, spread over the processes as the parameter is; the same object where it already is."""
    if not is_sharded(grad):
        return grad
    sharded: Any = grad
    placements = parameter.placements  # type: ignore[attr-defined]
    return grad if sharded.placements == placements else sharded.redistribute(placements=placements)


def placement(tensor: Tensor) -> tuple[Any, ...]:
    """How the tensor is spread over processes; empty for a tensor that is whole."""
    if not is_sharded(tensor):
        return ()
    sharded: Any = tensor
    return sharded.device_mesh, sharded.placements


def local_offset(tensor: Tensor) -> tuple[int, ...] | None:
    """Where the local shard of a DTensor begins in the whole tensor; None for a tensor that is whole."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    return compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)[1]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor, gathered. Collective for a DTensor: every rank must call it."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor()
    return gathered


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every rank has, spread over the processes as the parameter is; the same object if that is whole."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter
    size, offset = local(parameter).shape, local_offset(parameter)
    assert offset is not None
    part = tensor[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))]
    spread: Tensor = DTensor.from_local(
        part.to(parameter.device),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return spread


def sum_over_shards(value: Tensor, tensor: Tensor) -> Tensor:
    """Add up a quantity that each process has computed on its shard of ``tensor``; replicas count once."""
    if not is_sharded(tensor):
        return value
    sharded: Any = tensor
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            dist.all_reduce(value, group=sharded.device_mesh.get_group(dim))
    return value


def reshard(model: nn.Module) -> bool:
    """Put the sharded parameters back in place where FSDP2 has left whole ones, as it does at the root after an eval
    forward.

    A change to a whole parameter would be lost at the next gathering. Returns whether the model has FSDP2 modules at
    all.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # fully_shard cannot have been called
        return False
    modules = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for module in modules:
        module.reshard()
    return bool(modules)


def agree_on_seed(seed: int | None, layers: dict[str, tuple[tuple[int, ...], int]]) -> int:
    """The seed to use on every rank: the one given, or one drawn from torch's global CPU generator on rank 0.

    ``layers`` gives the shape and the pruned units of each target. Collective where a default process group exists:
    every rank must call it.

    Raises:
        RuntimeError: on all ranks, if they were given different seeds, or prune different numbers in one layer.
    """
    mine = int(torch.randint(2**63 - 1, ()).item()) if seed is None else seed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (seed, mine, layers))
    given = [entry[0] for entry in everyone]
    if len(set(given)) > 1:
        raise RuntimeError(
            f"the ranks were given different seeds: {dict(enumerate(given))}. Their masks would differ, and the"
            " replicas would drift apart. Give every rank the same seed, or none."
        )
    for rank, (_, _, theirs) in enumerate(everyone):
        for name, (shape, pruned) in theirs.items():
            if name in layers and layers[name][0] == shape and layers[name][1] != pruned:
                raise RuntimeError(
                    f"rank {rank} prunes {pruned} units of {name!r}, rank {dist.get_rank()} prunes {layers[name][1]}. "
                    "Give every rank the same sparsity, pattern and exclusions."
                )
    return int(everyone[0][1])

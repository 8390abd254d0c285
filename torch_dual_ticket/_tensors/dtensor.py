"""Sharded parameters: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

_WHOLE = (nn.Parameter, Tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor: this process holds a part of it."""
    # Asked by attribute and not by type: importing torch.distributed.tensor takes longer than importing this package.
    return type(tensor) not in _WHOLE and hasattr(tensor, "placements")


def mesh_of(tensor: Tensor) -> Any:
    """The devices over which a DTensor is sharded; None for a tensor that is whole."""
    return tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds: the tensor itself, or the local shard of a DTensor (shared memory, no copy)."""
    if type(tensor) in _WHOLE:
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def version(tensor: Tensor) -> int:
    """Grows with every change: operations on a DTensor are counted by itself, those on its shard by the shard."""
    part = local(tensor)
    return tensor._version if part is tensor else tensor._version + part._version


def placed_like(grad: Tensor, parameter: Tensor) -> Tensor:
    """A DTensor's gradient, sharded as the parameter is; the same object where it already is."""
    sharded: Any = grad
    placements = parameter.placements  # type: ignore[attr-defined]
    return grad if sharded.placements == placements else sharded.redistribute(placements=placements)


def placement(tensor: Tensor) -> tuple[Any, ...]:
    """How the tensor is sharded; empty for a tensor that is whole."""
    sharded: Any = tensor
    return (sharded.device_mesh, sharded.placements) if is_sharded(tensor) else ()


def coordinates(tensor: Tensor) -> tuple[Any, ...]:
    """What decides which part of a DTensor this process has, in plain numbers; empty for a tensor that is whole.

    What is kept must not refer to a mesh: at the end of the process its group has to go before everything else.
    """
    if not is_sharded(tensor):
        return ()
    mesh, placements = placement(tensor)
    return tuple(mesh.shape), tuple(mesh.get_coordinate() or ()), placements


def local_offset(tensor: Tensor) -> tuple[int, ...] | None:
    """Where the local shard of a DTensor begins in the whole tensor; None for a tensor that is whole."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, *placement(tensor))[1]


def sum_over_shards(value: Tensor, tensor: Tensor) -> Tensor:
    """Add up a quantity that each process has computed on its shard of ``tensor``; replicas count once."""
    if not is_sharded(tensor):
        return value
    mesh, placements = placement(tensor)
    total = value.to(mesh.device_type)  # where its process groups can work; the shard may be offloaded
    for dim, placed in enumerate(placements):
        if placed.is_shard():
            dist.all_reduce(total, group=mesh.get_group(dim))
    return total.to(value.device)


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place where FSDP2 has left whole ones, as at the root after an eval forward.

    A change to a whole parameter would be lost at the next gathering.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # fully_shard cannot have been called
        return
    from torch.distributed._composable_state import _module_state_mapping

    # The root may lie above the model: fully_shard leaves no trace of it on the modules whose parameters it manages.
    sharding = [module for module in list(_module_state_mapping) if isinstance(module, fsdp.FSDPModule)]
    managed = set(model.modules()) if sharding else set()
    for module in sharding:
        if not managed.isdisjoint(module.modules()):
            module.reshard()

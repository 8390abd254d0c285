"""Parameters that are spread over processes: DTensors, as FSDP2 and tensor parallelism make them."""

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
    """The devices over which a DTensor is spread; None for a tensor that is whole."""
    return tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]


def is_first_rank_of(tensor: Tensor) -> bool:
    """Whether this process is the first of those over which a DTensor is spread; True for a tensor that is whole."""
    mesh = mesh_of(tensor)
    return mesh is None or not any(mesh.get_coordinate())


def is_offloaded(tensor: Tensor) -> bool:
    """Whether FSDP2 keeps the shard on the CPU, and computes elsewhere."""
    mesh = mesh_of(tensor)
    return mesh is not None and tensor.device.type != mesh.device_type


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
    """A DTensor's gradient, spread over the processes as the parameter is; the same object where it already is."""
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
    mesh = sharded.device_mesh
    total = value.to(mesh.device_type)  # where its process groups can work; the shard may be offloaded
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            dist.all_reduce(total, group=mesh.get_group(dim))
    return total.to(value.device)


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place where FSDP2 has left whole ones, as it does at the root after an eval
    forward.

    A change to a whole parameter would be lost at the next gathering.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # fully_shard cannot have been called
        return
    from torch.distributed._composable_state import _module_state_mapping

    # The root may lie above the model: fully_shard leaves no trace of it on the modules whose parameters it manages.
    sharding = [module for module in list(_module_state_mapping) if isinstance(module, fsdp.FSDPModule)]
    held = set(model.modules()) if sharding else set()
    for module in sharding:
        if not held.isdisjoint(module.modules()):
            module.reshard()

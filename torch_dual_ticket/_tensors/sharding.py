"""Whole tensors and their shards, for what reads or writes a model: files and baselines."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .dtensor import is_sharded, local, local_offset, mesh_of


def is_first_rank_of(tensor: Tensor) -> bool:
    """Whether this process is the first of those over which a DTensor is sharded; True for a tensor that is whole."""
    mesh = mesh_of(tensor)
    return mesh is None or not any(mesh.get_coordinate())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor, gathered. Collective for a DTensor: every rank must call it."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor()
    return gathered


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as the parameter is; the same object if that is whole."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter
    size, offset = local(parameter).shape, local_offset(parameter)
    assert offset is not None
    part = tensor[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))]
    result: Tensor = DTensor.from_local(
        part.to(parameter.device),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return result

"""A state_dict without what the masks remove: the kept values, and what gives the masks again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._tensors.kernels import bits
from .._tensors.sharding import whole
from ..masks.mask import Mask
from ..masks.records import as_record, of_record


def encode(
    state: Mapping[str, Tensor], masks: Mapping[str, Mask], *, stored: bool = True
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors to store, and an entry for each name of the state_dict that says how to make it of them.

    An entry has ``dtype`` and ``shape`` of the dense tensor. ``kept_by`` names the mask whose kept elements alone are
    stored, in the order of their positions; ``equals_mask`` the mask that the tensor is, of which nothing is stored.
    The entry of a tied weight has only ``same_as``, the name of an earlier one. Complex tensors are stored as real ones
    with a last dimension of 2. Collective where a tensor is sharded.

    Args:
        state: name -> tensor; names of a tied weight have the same object.
        masks: parameter name -> mask. In the layout of ``torch.nn.utils.prune`` the parameter has its names there.
        stored: False makes no copy of any tensor, on ranks that only take part in gathering them.

    Raises:
        ValueError: a mask without a parameter of its shape, or masked weights that are not zero.
    """
    roles = _roles(state, masks)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    first_keys: dict[int, str] = {}
    for key, tensor in state.items():
        first = first_keys.setdefault(id(tensor), key)
        if first != key:
            entries[key] = {"same_as": first}
            continue
        value = whole(tensor.detach())
        entry = entries[key] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if id(tensor) in roles:
            name, role = roles[id(tensor)]
            kept = _draw(masks[name], key, tuple(value.shape), value.device)
            if role == "mask" and torch.equal(value, kept.to(value.dtype)):
                entry["equals_mask"] = name
                continue
            if role != "multiplied":
                _check_zeros(value, kept, key, name)
            entry["kept_by"] = name
            value = value[kept]
        if stored:
            tensors[key] = _plain_copy(value)
    return tensors, entries


def describe(masks: Mapping[str, Mask]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What gives the masks again: the bits of explicit masks as tensors to store, and for each mask what is plain."""
    records = {name: as_record(mask) for name, mask in masks.items()}
    stored = {f"{name} (mask)": record.pop("bits") for name, record in records.items() if "bits" in record}
    return stored, records


def masks_of(tensors: dict[str, Tensor], records: Mapping[str, dict[str, Any]]) -> dict[str, Mask]:
    """The inverse of :func:`describe`; takes the bits out of the stored tensors."""
    return {
        name: of_record(record if "seed" in record else {**record, "bits": tensors.pop(f"{name} (mask)")})
        for name, record in records.items()
    }


def decode(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Mask], entries: Mapping[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """The dense state_dict, on the CPU: the inverse of :func:`encode`.

    Raises:
        AttributeError, KeyError, RuntimeError, TypeError, ValueError: they do not belong together.
    """
    state: dict[str, Tensor] = {}
    used = set()
    for key, entry in entries.items():
        if "same_as" in entry:
            state[key] = state[entry["same_as"]]
            continue
        dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
        name = entry.get("kept_by", entry.get("equals_mask"))
        kept = None if name is None else _draw(masks[name], key, shape, torch.device("cpu"))
        if "equals_mask" in entry:
            assert kept is not None
            state[key] = kept.to(dtype)
            continue
        used.add(key)
        value, pair = tensors[key], (2,) if dtype.is_complex else ()
        stored_shape = (*(shape if kept is None else (int(kept.sum()),)), *pair)
        if value.dtype != dtype.to_real() or value.shape != stored_shape:
            raise ValueError(
                f"{key} is stored as {value.dtype} of shape {tuple(value.shape)}, not {dtype.to_real()} of shape"
                f" {stored_shape}"
            )
        if kept is not None:
            value = _scatter(value, kept.unsqueeze(-1) if pair else kept, (*shape, *pair))
        state[key] = torch.view_as_complex(value) if pair else value
    if unused := set(tensors) - used:
        raise ValueError(f"{min(unused)} is stored but not described")
    return state


def _roles(state: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> dict[int, tuple[str, str]]:
    """By the id of a tensor: the name of its mask, and what the tensor is.

    "weight": zero where masked. In the layout of ``torch.nn.utils.prune``: "multiplied" by "mask".
    """
    roles = {}
    for name in masks:
        if name in state:
            roles[id(state[name])] = (name, "weight")
        elif f"{name}_orig" in state and f"{name}_mask" in state:
            roles[id(state[f"{name}_orig"])] = (name, "multiplied")
            roles[id(state[f"{name}_mask"])] = (name, "mask")
        else:
            raise ValueError(f"{name} has a mask, but is not in the model's state_dict any more")
    return roles


def _check_zeros(value: Tensor, kept: Tensor, key: str, mask: str) -> None:
    wrong = int((value[~kept] != 0).sum())
    if wrong:
        raise ValueError(
            f"{key}: {wrong:,} masked entries are not zero, and a ticket file does not store them. Set them to zero"
            f" first: under torch.no_grad(), {key.rpartition('.')[2]}[~rst.masks[{mask!r}]] = 0"
        )


def _plain_copy(value: Tensor) -> Tensor:
    """On the CPU, contiguous, in its own memory, and real: safetensors knows one complex dtype of three."""
    copy = torch.empty(value.shape, dtype=value.dtype, device="cpu").copy_(value)
    return torch.view_as_real(copy) if copy.is_complex() else copy


def _scatter(values: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros with the values where the mask keeps them. Moved as integers, which keeps every bit of a NaN."""
    dense = torch.zeros(shape, dtype=values.dtype, device=values.device)
    bits(dense).masked_scatter_(kept, bits(values))
    return dense


def _draw(mask: Mask, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if mask.shape != shape:
        raise ValueError(f"{key} has shape {shape}, and its mask {mask.shape}")
    return mask.draw(device=device)

"""Write a finalized model to a file, and read it back: into a model, or as a dense ``state_dict``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._engine.layer_hook import layer_hooks
from .._model.names import unwrapped_modules, unwrapped_name
from .._rst.managed import ManagedMasks
from .._tensors.dtensor import is_sharded, local
from .._tensors.sharding import is_first_rank_of, sharded_like
from ..masks.records import as_state
from ..scheduler import RSTScheduler
from . import checksum
from .encoding import decode, describe, encode, masks_of

_VERSION = 1


def save_ticket(rst: ManagedMasks, path: str | os.PathLike[str]) -> None:
    """Write the whole ``state_dict`` of a finalized model to a file: of each target the kept weights alone.

    Call it at any time after ``finalize()``, also after ``to_prune()`` or ``remove()``. Everything comes back bit by
    bit, but for masked weights, which are not stored: they come back as +0. (After ``to_prune()`` the masked entries of
    ``weight_orig`` may hold anything, and have no effect.) The file appears whole or not at all.

    If parameters are sharded (FSDP2, DTensor) every rank of their mesh must call it: each tensor is gathered in turn,
    and the mesh's first rank writes. The others return before the file is there: call ``torch.distributed.barrier()``
    before they read it. Otherwise it is not collective: under DDP call it on one rank.

    Args:
        rst: a scheduler whose ``finalize()`` has been called, or masks of :mod:`torch_dual_ticket.baselines`.
        path: an existing file is replaced. The suffix ".safetensors" tells people what it is.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``rst`` is neither.
        RuntimeError: ``finalize()`` has not been called.
        ValueError: masked weights that are not zero (any more), or an entry of the state_dict that is not a dense
            tensor with its own memory.

    Example: in :mod:`torch_dual_ticket.export`.
    """
    if not isinstance(rst, ManagedMasks):
        raise TypeError(
            "save_ticket() takes the RSTScheduler that made the ticket, or what baselines.hold() returned; got"
            f" {type(rst).__name__}"
        )
    if rst.phase != "finetune":
        raise RuntimeError("save_ticket() needs the final masks: call finalize() first")
    state, masks = _state_of(rst._model), rst._masks()
    writes = all(is_first_rank_of(tensor) for tensor in state.values())
    tensors, entries = encode(state, masks, stored=writes)
    if not writes:
        return
    bits, records = describe(masks)
    description = {
        "version": _VERSION,
        "scheduler": RSTScheduler.state_dict(rst) if isinstance(rst, RSTScheduler) else None,
        "masks": records,
        "state_dict": entries,
    }
    checksum.write(path, tensors | bits, description)


def load_ticket(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load the whole ``state_dict`` of a file into a model of the same architecture, in place, all or nothing.

    Call it before or after wrapping the model (DDP, ``torch.compile``, FSDP2: on every rank) and creating the
    optimizer; on any device. The model then has its zeros, but nothing keeps them: to train on, give what this returns
    to the ``load_state_dict`` of an ``RSTScheduler`` on the model, built with the arguments of the first; or let
    ``baselines.hold(model)`` hold the zeros. (In the layout of ``torch.nn.utils.prune`` nothing more is needed: there
    torch keeps them.)

    Args:
        path: a file of :func:`save_ticket`.
        model: names, shapes, dtypes and tied weights must be those of the file.

    Returns:
        The ``state_dict()`` of the scheduler, or of the held masks, as it was when the ticket was saved.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        TypeError: ``model`` is not a module.
        ValueError: the file is not a ticket, is damaged, or is of another architecture: says what differs first. Or
            masks that are in force on the model would cut what the file keeps.

    Example: in :mod:`torch_dual_ticket.export`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_ticket(path, model) takes a torch.nn.Module to load into, got {type(model).__name__}")
    current = _state_of(model)
    problem = f"{os.fspath(path)} does not fit this {type(model).__name__}"
    saved, scheduler_state = _read(path, {key: tuple(tensor.shape) for key, tensor in current.items()}, problem)
    _check_fits(saved, current, problem)
    inner = _unwrapped(model)
    _check_masks_in_force(inner, saved, current, problem)
    with torch.no_grad():
        new = {
            key: sharded_like(saved[unwrapped_name(inner, key)], current[unwrapped_name(inner, key)])
            for key in inner.state_dict()
        }
        before = {key: local(tensor).detach().to("cpu", copy=True) for key, tensor in current.items()}
        try:
            inner.load_state_dict(new)
        except Exception as error:
            for key, tensor in current.items():
                with suppress(Exception):  # what could not be written has not changed
                    local(tensor).copy_(before[key])
            raise ValueError(
                f"{type(model).__name__}.load_state_dict() failed, and the model is as it was: {error}"
            ) from error
    return scheduler_state


def read_ticket(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The dense ``state_dict`` of a file: for ``model.load_state_dict``, ``torch.save`` or whatever reads such dicts.

    Args:
        path: a file of :func:`save_ticket`.

    Returns:
        Name -> tensor, on the CPU, as in ``state_dict()`` of the unwrapped model: of full shape, zeros where weights
        are masked. The names of a tied weight share one tensor.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: the file is not a ticket, or is damaged.

    Example: in :mod:`torch_dual_ticket.export`.
    """
    return _read(path)[0]


def _read(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]] | None = None, problem: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The dense state_dict and the scheduler's state; other ``shapes`` than those given are a ``problem``."""
    tensors, description = checksum.read(path)
    try:
        described = {key: tuple(entry["shape"]) for key, entry in description["state_dict"].items() if "shape" in entry}
    except (AttributeError, KeyError, TypeError):
        described = {}  # decode() says what is wrong
    for key, shape in (shapes or {}).items():  # before a mask is drawn: a small file can describe a large tensor
        if described.get(key, shape) != shape:
            raise ValueError(f"{problem}: {key} has shape {described[key]} in the file, {shape} here")
    try:
        if description["version"] != _VERSION:
            raise ValueError(f"its version is {description['version']!r}, and this release reads version {_VERSION}")
        masks, scheduler = masks_of(tensors, description["masks"]), description["scheduler"]
        state = as_state(masks) if scheduler is None else dict(scheduler)
        return decode(tensors, masks, description["state_dict"]), state
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is not a ticket that this release can read: {error!r}") from error


def _unwrapped(model: nn.Module) -> nn.Module:
    return next(unwrapped_modules(model))[1]


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the state_dict themselves, by their names in the unwrapped model."""
    inner = _unwrapped(model)
    state = {unwrapped_name(inner, key): value for key, value in inner.state_dict(keep_vars=True).items()}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            problem = f"is a {type(value).__name__} (extra state), and a ticket file holds tensors only"
        elif is_lazy(value):
            problem = "has no shape yet: run one forward pass through the lazy module first"
        elif value.is_meta:
            problem = "is on the meta device, without memory: give the model memory first, with to_empty(device=...)"
        elif is_sharded(value):
            continue
        elif value.layout is not torch.strided or value.is_quantized or is_traceable_wrapper_subclass(value):
            kind = type(value).__name__ if type(value) is not Tensor else f"{value.layout} {value.dtype}"
            problem = f"is not an ordinary dense tensor ({kind}), and a ticket file holds no others"
        else:
            continue
        raise ValueError(f"{key} {problem}")
    return state


def _check_fits(saved: dict[str, Tensor], current: dict[str, Tensor], what: str) -> None:
    """The same names, dtypes, and ties, with shapes that are known to be; the first that differs is named."""
    ties = [_first_names(saved), _first_names(current)]
    for key in [*current, *saved]:
        if key not in saved or key not in current:
            there, missing = ("model", "file") if key in current else ("file", "model")
            advice = ""
            if {f"{key}_orig", key.removesuffix("_orig")} & ({*saved} ^ {*current}) - {key}:
                advice = (
                    ". One of them is in the layout of torch.nn.utils.prune: bring the model into the file's, with"
                    " prune.identity(layer, name) or prune.remove(layer, name)"
                )
            raise ValueError(f"{what}: {key} is in the {there}, but not in the {missing}{advice}")
        in_file, here = saved[key], current[key]
        if in_file.dtype != here.dtype:
            raise ValueError(
                f"{what}: {key} has dtype {in_file.dtype} in the file, {here.dtype} here. Convert the model first,"
                " or load what read_ticket() gives with load_state_dict(), which converts it."
            )
        firsts = [tie[key] for tie in ties]
        if firsts[0] != firsts[1]:
            kinds = ["a separate tensor" if first == key else f"tied to {first}" for first in firsts]
            raise ValueError(f"{what}: {key} is {kinds[0]} in the file, {kinds[1]} here")


def _check_masks_in_force(model: nn.Module, saved: dict[str, Tensor], current: dict[str, Tensor], what: str) -> None:
    """They would cut at the next forward what has been loaded."""
    names = {id(tensor): key for key, tensor in current.items()}
    for hook in layer_hooks(model):
        key = names.get(id(hook.managed.tensor())) if hook.ticket.holds else None
        if key is not None and bool(saved[key][~hook.ticket.mask(hook.managed).draw()].any()):
            raise ValueError(
                f"{what}: masks are in force here that would set weights of {key} to zero which the file keeps. Call"
                " torch_dual_ticket.release(model) first, and build the scheduler of the file's ticket."
            )


def _first_names(state: dict[str, Tensor]) -> dict[str, str]:
    """For each name the first one of the same tensor."""
    firsts: dict[int, str] = {}
    return {key: firsts.setdefault(id(tensor), key) for key, tensor in state.items()}

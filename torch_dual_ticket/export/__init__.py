"""Tickets as files: only the weights that were kept, and the seed that redraws where they belong.

>>> from torch import nn
>>> from torch_dual_ticket import RSTScheduler
>>> def build():
...     return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
>>> model = build()
>>> rst = RSTScheduler(model, sparsity=0.9, steps=1)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
>>> for _ in range(10):
...     optimizer.zero_grad()
...     model(torch.randn(8, 64)).square().mean().backward()
...     optimizer.step()
...     rst.step()
>>> report = rst.finalize()
>>> path = f"{getfixture('tmp_path')}/ticket.safetensors"
>>> save_ticket(rst, path)

Elsewhere: the weights go into a model of the same architecture. To finetune on, let a scheduler hold the zeros again,
built with the same arguments; without a seed of its own it takes the ticket's.

>>> model = build()
>>> state = load_ticket(path, model)
>>> rst = RSTScheduler(model, sparsity=0.9, steps=1)
>>> rst.load_state_dict(state)
>>> rst.phase, f"{rst.sparsity:.1%}"
('finetune', '90.0%')

For those who want no ticket but an ordinary, dense state_dict, :func:`read_ticket` gives it, to use or to save as they
like. The way back is ``model.load_state_dict(dense)`` and ``rst.load_state_dict(state)``, then :func:`save_ticket`.

>>> dense = read_ticket(path)
>>> dense["0.weight"].shape, int((dense["0.weight"] != 0).sum())
(torch.Size([128, 64]), 819)

The format is safetensors, from the extra ``files`` of this package (``pip install numpy safetensors``); nothing is
pickled, and a changed bit anywhere in the file is noticed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._engine.dtensor import is_first_rank_of, is_sharded, local, spread_like
from .._model.names import unwrapped_modules, unwrapped_name
from . import checksum
from .encoding import decode, describe, encode

if TYPE_CHECKING:
    from ..scheduler import RSTScheduler

__all__ = ["load_ticket", "read_ticket", "save_ticket"]

_VERSION = 1


def save_ticket(rst: RSTScheduler, path: str | os.PathLike[str]) -> None:
    """Write the whole ``state_dict`` of a finalized model to a file: of each target the kept weights alone.

    Call it at any time after ``finalize()``, also after ``to_prune()`` or ``remove()``. Everything is restored bit by
    bit, but masked weights, which are not stored: they come back as +0. (After ``to_prune()`` the masked entries of
    ``weight_orig`` may hold anything, and have no effect.) The file appears whole or not at all.

    If parameters are sharded (FSDP2, DTensor) every rank of their mesh must call it: each tensor is gathered in turn,
    and the mesh's first rank writes. The others return before the file is there: call ``torch.distributed.barrier()``
    where they read it next. Otherwise it is not collective: under DDP call it on one rank.

    Args:
        rst: a scheduler whose ``finalize()`` has been called.
        path: an existing file is replaced. The suffix ".safetensors" tells people what it is.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``rst`` is no scheduler.
        RuntimeError: ``finalize()`` has not been called.
        ValueError: something that a ticket file cannot hold: masked weights that are not zero (any more), or an entry
            of the state_dict that is no dense tensor with memory of its own.

    Example: see the top of :mod:`torch_dual_ticket.export`.
    """
    phase = getattr(rst, "phase", None)
    if phase not in ("transform", "finetune"):
        raise TypeError(f"save_ticket() takes the RSTScheduler that made the ticket, got {type(rst).__name__}")
    if phase != "finetune":
        raise RuntimeError("save_ticket() needs the final masks: call finalize() first")
    state = _state_of(rst._model)
    specs = rst._masks()
    writes = all(is_first_rank_of(tensor) for tensor in state.values())
    tensors, entries = encode(state, specs, stored=writes)
    if not writes:
        return
    description = {
        "version": _VERSION,
        "scheduler": rst.state_dict(),
        "masks": describe(specs),
        "state_dict": entries,
    }
    checksum.write(path, tensors, description)


def load_ticket(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load the whole ``state_dict`` of a file into a model of the same architecture, in place, all or nothing.

    Call it before or after wrapping the model (DDP, ``torch.compile``, FSDP2: on every rank) and creating the
    optimizer; on any device. The model then has its zeros, but nothing holds them: to train on, give what this returns
    to the ``load_state_dict`` of an ``RSTScheduler`` on the model, built with the arguments of the first. (In the
    layout of ``torch.nn.utils.prune`` nothing more is needed: there torch holds them.)

    Args:
        path: a file of :func:`save_ticket`.
        model: names, shapes, dtypes and tied weights must be those of the file.

    Returns:
        The scheduler's ``state_dict()`` as it was when the ticket was saved.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is no ticket, is damaged, or is of another architecture; says what differs, first of all. The
            model is left as it was.

    Example: see the top of :mod:`torch_dual_ticket.export`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_ticket(path, model) takes a torch.nn.Module to load into, got {type(model).__name__}")
    current = _state_of(model)
    saved, scheduler_state = _read(path)
    _check_fits(saved, current, f"{os.fspath(path)} does not fit this {type(model).__name__}")
    inner = _unwrapped(model)
    with torch.no_grad():
        new = {
            key: spread_like(saved[unwrapped_name(inner, key)], current[unwrapped_name(inner, key)])
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
        ValueError: it is no ticket, or is damaged; says what differs.

    Example: see the top of :mod:`torch_dual_ticket.export`.
    """
    return _read(path)[0]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The dense state_dict and the scheduler's state."""
    tensors, description = checksum.read(path)
    try:
        if description["version"] != _VERSION:
            raise ValueError(f"its version is {description['version']!r}, and this release reads version {_VERSION}")
        return decode(tensors, description["masks"], description["state_dict"]), dict(description["scheduler"])
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is no ticket that this release can read: {error!r}") from error


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
            problem = f"is no ordinary dense tensor ({kind}), and a ticket file holds no others"
        else:
            continue
        raise ValueError(f"{key} {problem}")
    return state


def _check_fits(saved: dict[str, Tensor], current: dict[str, Tensor], what: str) -> None:
    """The same names, shapes, dtypes, and ties; the first that differs is named."""
    ties = [_first_keys(saved), _first_keys(current)]
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
        mine, theirs = saved[key], current[key]
        if mine.shape != theirs.shape:
            raise ValueError(f"{what}: {key} has shape {tuple(mine.shape)} in the file, {tuple(theirs.shape)} here")
        if mine.dtype != theirs.dtype:
            raise ValueError(
                f"{what}: {key} has dtype {mine.dtype} in the file, {theirs.dtype} here. Convert the model first,"
                " or load what read_ticket() gives with load_state_dict(), which converts it."
            )
        firsts = [tie[key] for tie in ties]
        if firsts[0] != firsts[1]:
            kinds = ["a tensor of its own" if first == key else f"tied to {first}" for first in firsts]
            raise ValueError(f"{what}: {key} is {kinds[0]} in the file, {kinds[1]} here")


def _first_keys(state: dict[str, Tensor]) -> dict[str, str]:
    """For each name the first one of the same tensor."""
    firsts: dict[int, str] = {}
    return {key: firsts.setdefault(id(tensor), key) for key, tensor in state.items()}

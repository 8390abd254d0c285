"""What is said where a transformation begins on sparse weights: those of a ticket whose state was not loaded, say."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from .._engine.ticket import Ticket
from .._tables import percent
from .._tensors.async_scalar import AsyncScalar
from .._tensors.dtensor import local
from .managed import sparsity_of

_SHARE = 0.5  # of the sparsity asked for: dense weights have next to no zeros, quantized ones a fifth at most


class SparseStart:
    """Counts the zeros once, before the first update, and warns when the numbers are there."""

    def __init__(self) -> None:
        self._counts: list[tuple[int, AsyncScalar]] = []  # of each parameter: size; non-zeros, norms, largest weight
        self._sparsity = 0.0  # of the masks, then

    def __getstate__(self) -> dict[str, Any]:
        return SparseStart().__dict__  # numbers on their way from a device cannot be copied

    @torch.no_grad()
    def count(self, ticket: Ticket) -> None:
        """Call it before the first update: a model may be loaded at any time before it."""
        self._sparsity = sparsity_of(ticket.stage.masks)
        if ticket.stage.steps or not self._sparsity:  # masks that somebody gives may begin with nothing
            return
        for managed, parameter in ticket.managed():
            weight = local(parameter)
            if weight.numel() and not weight.is_meta:
                norms = managed.squared_norms(ticket.mask(managed), parameter, holds=False)  # of masked, and of all
                largest = torch.linalg.vector_norm(weight, torch.inf)
                counts = torch.stack([weight.count_nonzero().to(norms), *norms, largest.to(norms)])
                self._counts.append((weight.numel(), AsyncScalar(counts)))

    def speak(self) -> None:
        """Warn of what was seen. Call it at the end of the scheduler step: a warning may be an error."""
        if not (self._counts and all(counts.has_arrived() for _, counts in self._counts)):
            return
        layers = [(size, *counts.values.tolist()) for size, counts in self._counts]
        self._counts = []
        # One that is zero altogether is initialized so, as is one whose other weights are equal: the identity.
        layers = [layer for layer in layers if not math.isclose(layer[1] * layer[4] ** 2, layer[3], rel_tol=1e-5)]
        size, nonzero, norm, *_ = map(sum, zip(*layers, strict=True)) if layers else (1, 1, 1)
        if 1 - nonzero / size < _SHARE * self._sparsity:
            return
        fits = " They are at this scheduler's masks, so it is its own ticket." if not norm else ""
        warnings.warn(
            f"{percent(1 - nonzero / size)} of the weights to prune were exactly zero before the first update, as in a"
            f" finished ticket.{fits} They are not held at zero, and grow again. If this training goes on from a"
            " checkpoint, load the scheduler's state with the model's: rst.load_state_dict(state). To keep these zeros"
            " and train the other weights, call torch_dual_ticket.baselines.hold(model) in place of RSTScheduler.",
            stacklevel=3,
        )

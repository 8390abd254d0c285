"""Which channels of coupled layers can be removed without a difference, and what has to take their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .observed import Constants


class Member(NamedTuple):
    """A layer that gives or takes the channels of a group of coupled layers."""

    layer: nn.Linear | _ConvNd
    dim: int  # of its weight, along which they stand
    channels: dict[int, list[int]]  # which of the layer's own channels belong to a channel of the group

    def used(self) -> Tensor:
        """For each of the layer's channels along `dim` whether any weight is not zero."""
        return (self.layer.weight.detach() != 0).movedim(self.dim, 0).flatten(1).any(1).cpu()


def removable(givers: Sequence[Member], takers: Sequence[Member], constants: Constants) -> list[int]:
    """The channels of a group that nothing reads, or that are constant because all their filters are zero."""
    used = {id(member): member.used() for member in (*givers, *takers)}

    def any_used(members: Sequence[Member], channel: int) -> bool:
        return any(bool(used[id(member)][member.channels.get(channel, [])].any()) for member in members)

    def constant(channel: int) -> bool:
        known = [constants.get(taker.layer) for taker in takers]
        return all(
            values is not None and not values[taker.channels.get(channel, [])].isnan().any()
            for taker, values in zip(takers, known, strict=True)
        )

    found = []
    for channel in sorted({channel for taker in takers for channel in taker.channels}):
        given = any(channel in giver.channels for giver in givers)
        is_zero = given and not any_used(givers, channel)
        if (is_zero and constant(channel)) or not any_used(takers, channel):
            found.append(channel)
    return found


def fold(takers: Sequence[Member], channels: Sequence[int], constants: Constants) -> list[int]:
    """Put into the layers that read these channels what their constants contributed; returns those to remove now.

    A bias takes the whole of it, but not where the layer pads with zeros, as the constant ends at the border there.
    Then one of the channels has to stay, and carries the sum of all.
    """
    contributions = {id(taker): _contributions(taker, channels, constants) for taker in takers}
    padded = [taker for taker in takers if _pads(taker.layer) and contributions[id(taker)]]
    removed = list(channels)
    if padded:
        loud = {channel for taker in padded for channel, _, _ in contributions[id(taker)]}

        def strength(channel: int) -> float:
            """How well its constants stand for the others: to divide by a small one would magnify its rounding."""
            return min(
                abs(constants[taker.layer][taker.channels[channel][0]].item())
                / max(abs(value) for _, _, value in contributions[id(taker)])
                if channel in taker.channels
                else 0.0
                for taker in padded
            )

        carrier = max(sorted(loud), key=strength)
        removed = [channel for channel in channels if channel != carrier]
        if strength(carrier) == 0:  # no channel reaches all of them
            removed = [channel for channel in channels if channel not in loud]
    chosen = set(removed)
    for taker in takers:
        mine = [(index, value) for channel, index, value in contributions[id(taker)] if channel in chosen]
        if mine and taker in padded:
            _carry(taker, taker.channels[carrier][0], mine, constants)
        elif mine:
            _add_to_bias(taker, mine)
    return removed


def _contributions(taker: Member, channels: Sequence[int], constants: Constants) -> list[tuple[int, int, float]]:
    """Channel, index and constant of each input that adds something to this layer's outputs."""
    used = taker.used()
    pairs = [(channel, index) for channel in channels for index in taker.channels.get(channel, []) if used[index]]
    values = [(channel, index, constants[taker.layer][index].item()) for channel, index in pairs]
    return [(channel, index, value) for channel, index, value in values if value != 0]


def _pads(layer: nn.Linear | _ConvNd) -> bool:
    """Whether zeros stand beside the input, so that a constant input does not make a constant output."""
    if not isinstance(layer, _ConvNd):
        return False
    widths = layer.padding if isinstance(layer.padding, tuple) else (layer.padding,)
    return layer.transposed or (layer.padding_mode == "zeros" and any(width not in (0, "valid") for width in widths))


def _carry(taker: Member, target: int, contributions: Sequence[tuple[int, float]], constants: Constants) -> None:
    """Let the channel `target` contribute what the others did."""
    old = taker.layer.weight
    weight = old.detach().double()
    divisor = constants[taker.layer][target].item()
    for index, value in contributions:
        weight.select(taker.dim, target).add_(weight.select(taker.dim, index), alpha=value / divisor)
    taker.layer.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)


def _add_to_bias(taker: Member, contributions: Sequence[tuple[int, float]]) -> None:
    old, weight = taker.layer.bias, taker.layer.weight
    inputs = weight.detach().double().movedim(taker.dim, 0)
    outputs = inputs.reshape(*inputs.shape[:2], -1).sum(2)  # what an input of 1 adds to each output
    bias = torch.zeros_like(outputs[0]) if old is None else old.detach().double()
    for index, value in contributions:
        bias = bias + value * outputs[index]
    taker.layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)

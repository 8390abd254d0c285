"""Which channels of coupled layers can be removed without changing the outputs, and what then replaces them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .constants import Constants


class Member(NamedTuple):
    """A layer that computes ("gives") or reads ("takes") the channels of a group of coupled layers."""

    layer: nn.Linear | _ConvNd
    dim: int  # of its weight, along which its channels lie
    channels: dict[int, list[int]]  # channel of the group -> channels of the layer

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
    """Add the contribution of these channels' constants to the layers that read them; returns the channels to remove.

    It goes into the bias, but not where the layer pads with zeros, as the constant ends at the border there. Then one
    of the channels stays, and contributes the sum of all.
    """
    contributions = {id(taker): _contributions(taker, channels, constants) for taker in takers}
    padded = [taker for taker in takers if _pads(taker.layer) and contributions[id(taker)]]
    removed = list(channels)
    if padded:
        contributing = {channel for taker in padded for channel, _, _ in contributions[id(taker)]}

        def strength(channel: int) -> float:
            """How large its constants are beside the others: dividing by a small one would magnify its rounding."""
            return min(
                abs(constants[taker.layer][taker.channels[channel][0]].item())
                / max(abs(value) for _, _, value in contributions[id(taker)])
                if channel in taker.channels
                else 0.0
                for taker in padded
            )

        remaining = max(sorted(contributing), key=strength)
        removed = [channel for channel in channels if channel != remaining]
        if strength(remaining) == 0:  # no channel is read by all of them
            removed = [channel for channel in channels if channel not in contributing]
    chosen = set(removed)
    for taker in takers:
        lost = [(index, value) for channel, index, value in contributions[id(taker)] if channel in chosen]
        if lost and taker in padded:
            _add_to_channel(taker, taker.channels[remaining][0], lost, constants)
        elif lost:
            _add_to_bias(taker, lost)
    return removed


def _contributions(taker: Member, channels: Sequence[int], constants: Constants) -> list[tuple[int, int, float]]:
    """Channel, index and constant of each input that adds something to this layer's outputs."""
    used = taker.used()
    pairs = [(channel, index) for channel in channels for index in taker.channels.get(channel, []) if used[index]]
    values = [(channel, index, constants[taker.layer][index].item()) for channel, index in pairs]
    return [(channel, index, value) for channel, index, value in values if value != 0]


def _pads(layer: nn.Linear | _ConvNd) -> bool:
    """Whether the input is padded with zeros, so that a constant input does not make a constant output."""
    if not isinstance(layer, _ConvNd):
        return False
    widths = layer.padding if isinstance(layer.padding, tuple) else (layer.padding,)
    return layer.transposed or (layer.padding_mode == "zeros" and any(width not in (0, "valid") for width in widths))


def _add_to_channel(
    taker: Member, target: int, contributions: Sequence[tuple[int, float]], constants: Constants
) -> None:
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

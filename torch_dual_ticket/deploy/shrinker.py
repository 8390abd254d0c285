"""Filter tickets as smaller layers: without the masked filters, by the dependency graph of Torch-Pruning."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .channels import Member, fold, removable
from .constants import call, check_equal, observe, tensors
from .plain_copy import plain_copy

# Operations of Torch-Pruning that lose the channels which the layers around them lose.
_CHANNEL_BY_CHANNEL = {"BN", "PRELU", "DEPTHWISE_CONV", "ELEMENTWISE", "CONCAT", "SPLIT", "SLICE", "RESHAPE"}


def shrink(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A smaller copy for inference: without the filters that are zero, and with the same outputs.

    Call it after ``finalize()`` and the finetuning of a ticket of pattern "filter" (or "channel"). The dependency graph
    of Torch-Pruning tells which layers share a channel. One is removed only if that changes nothing:

    - A channel that no layer reads is removed, whatever is in it.
    - A filter of zeros makes a constant channel: its bias, or batch normalization's shift, is still added. The layers
      that read it take the constant into their bias, and the channel is removed. This is not possible for convolutions
      that pad with zeros, as the constant ends at the border: there *one* of these channels remains, and contributes
      what all did. Both are exact and need no further training. After ReLU a shift that is not positive is zero, and no
      channel remains.
    - Channels that a residual connection adds up are one channel: it is removed only if its filters are zero in every
      layer that is added. As masks of different layers are independent, these seldom coincide; residual networks shrink
      within their blocks.

    After each removal the outputs for ``example_inputs`` are compared with those of the masked model. If they are not
    equal (to a relative 1e-5 in float32; float16 and bfloat16: 3e-2), or the forward pass fails because it relies on
    the old size, the layers get back what was removed, and a warning names them.

    Args:
        model: finalized; wrappers (DDP, ``torch.compile``) are left out of the copy.
        example_inputs: what the model is called with: a tensor, a tuple or list of arguments, or a dict of keyword
            arguments. Data or noise: a constant would show no differences.

    Returns:
        A plain model in evaluation mode, its layers of the same types and names. Nothing keeps masked weights at zero
        that could not be removed: they would come back in training.

    Raises:
        ImportError: Torch-Pruning is not installed (``pip install torch-pruning``).
        TypeError: ``model`` is not a module.
        ValueError: nothing can be removed; says why. ``model`` is never changed.

    Example:
        >>> from torch_dual_ticket.baselines import random_ticket
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3))
        >>> held = random_ticket(model, 0.75, pattern="filter", exclude=["3"], seed=0)
        >>> x = torch.randn(4, 3, 12, 12)
        >>> small = shrink(model, x)
        >>> small[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        >>> torch.allclose(small(x), model.eval()(x), atol=1e-5)
        True
    """
    if not tensors(example_inputs):
        raise TypeError(
            "example_inputs is a tensor, a tuple of arguments or a dict of keyword arguments, as the model takes them;"
            f" got {example_inputs!r:.60} without any tensor"
        )
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ImportError("shrink() needs Torch-Pruning: pip install torch-pruning") from error
    for tensor in tensors(example_inputs):
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
            raise ValueError(
                f"example_inputs has a tensor of shape {tuple(tensor.shape)} in which all is {float(tensor.min())}:"
                " it would show no differences. Give a batch of data, or noise."
            )
    with torch.inference_mode(False), torch.enable_grad():  # the graph follows gradients
        small = plain_copy(model)
        with _all_trainable(small):
            shrinker = _Shrinker(small, example_inputs, DependencyGraph)
            shrinker.run()
    if not shrinker.removed:
        raise ValueError(shrinker.reason())
    if shrinker.refused:
        warnings.warn(
            f"the outputs would not be the same without the zero filters of {', '.join(shrinker.refused)}: left as"
            f" they are ({next(iter(shrinker.refused.values()))})",
            stacklevel=2,
        )
    return small


class _Shrinker:
    """The groups of coupled layers of one model, one after the other."""

    def __init__(self, model: nn.Module, example_inputs: Any, graph_type: Any) -> None:
        self.model, self.inputs, self.graph_type = model, example_inputs, graph_type
        self.outputs, self.constants = observe(model, example_inputs)
        self.names = {layer: name for name, layer in model.named_modules()}
        self.removed = 0
        self.refused: dict[str, str] = {}  # the first layer of a group, and what happened

    def run(self) -> None:
        while not self._finished():
            pass

    def _finished(self) -> bool:
        """Go through all groups; False after one that had to be restored, as the graph does not fit any more then."""
        graph = self._graph()
        for group in graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear)):
            name = self.names[group[0].dep.target.module]
            if name in self.refused:
                continue
            layers = [item.dep.target.module for item in group]
            try:
                with _unchanged_on_error([layer for layer in layers if isinstance(layer, nn.Module)]):
                    self._shrink(graph, group)
            except Exception as error:  # whatever the model's own forward may raise
                self.refused[name] = str(error).partition("\n")[0]
                return False
        return True

    def _graph(self) -> Any:
        try:
            return self.graph_type().build_dependency(
                self.model, self.inputs, forward_fn=call, output_transform=tensors, verbose=False
            )
        except Exception as error:
            raise ValueError(f"Torch-Pruning cannot trace this {type(self.model).__name__}: {error!r}") from error

    def _shrink(self, graph: Any, group: Any) -> None:
        """Remove what can be removed from one group; raises if the outputs are not the same afterwards."""
        members = _members(graph, group)
        if members is None:
            return
        givers, takers = members
        channels = removable(givers, takers, self.constants)
        if len(channels) == len(group[0].idxs):
            channels = channels[1:]  # a layer needs one
        channels = fold(takers, channels, self.constants)
        if not channels:
            return
        root = group[0].dep
        removal = graph.get_pruning_group(root.target.module, root.handler, channels)
        _check_covers(members, _members(graph, removal), set(channels))
        if not graph.check_pruning_group(removal):
            raise ValueError("a layer would have no channel left")
        removal.prune(record_history=False)
        outputs, constants = observe(self.model, self.inputs)
        check_equal(outputs, self.outputs)
        self.constants = constants
        self.removed += len(channels)

    def reason(self) -> str:
        """Why nothing was removed."""
        what = f"nothing of this {type(self.model).__name__} can be removed"
        if self.refused:
            name, problem = next(iter(self.refused.items()))
            return f"{what}: without the zero filters of {name} the outputs would not be the same ({problem})"
        layers = [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear | _ConvNd)]
        zero = [name for name, layer in layers if not all(Member(layer, dim, {}).used().all() for dim in (0, 1))]
        if not zero:
            recurrent = any(isinstance(layer, nn.RNNBase | nn.RNNCellBase) for layer in self.model.modules())
            others = " Recurrent layers keep their size." if recurrent else ""
            return f'{what}: no filter is zero. finalize() a ticket of pattern="filter" first.{others}'
        return (
            f"{what}, although {zero[0]} has filters that are zero: they are inputs or outputs of the model, or belong"
            " to channels to which other layers add (residual connections), or that are normalized with others"
        )


def _members(graph: Any, group: Any) -> tuple[list[Member], list[Member]] | None:
    """The layers that give the channels of a group, and those that take them; None if a channel cannot be removed.

    Channels that do not exist everywhere are left out.
    """
    givers: list[Member] = []
    takers: list[Member] = []
    outside: set[int] = set()
    for item in group:
        layer, kind, handler = item.dep.target.module, item.dep.target.type.name, item.dep.handler
        gives = graph.is_out_channel_pruning_fn(handler)
        pairs = list(zip(item.root_idxs, item.idxs, strict=True))
        size = graph.get_out_channels(item.dep.target) if gives else graph.get_in_channels(item.dep.target)
        if size is not None:
            outside.update(channel for channel, index in pairs if not 0 <= index < size)
        if kind in ("CONV", "LINEAR"):
            if getattr(layer, "groups", 1) != 1 or "weight" not in layer._parameters:
                return None
            channels = defaultdict(list)
            for channel, index in pairs:
                channels[channel].append(index)
            dim = int(gives == getattr(layer, "transposed", False))
            (givers if gives else takers).append(Member(layer, dim, channels))
        elif kind not in _CHANNEL_BY_CHANNEL:
            return None
    for member in (*givers, *takers):
        for channel in outside:
            member.channels.pop(channel, None)
    return givers, takers


def _check_covers(
    members: tuple[list[Member], list[Member]], removal: tuple[list[Member], list[Member]] | None, removed: set[int]
) -> None:
    """What is about to be removed is what was found to be removable."""

    def indices(some: list[Member]) -> set[tuple[int, int]]:
        return {
            (id(one.layer), index) for one in some for channel in removed for index in one.channels.get(channel, [])
        }

    if removal is None or [*map(indices, removal)] != [*map(indices, members)]:
        raise ValueError("its channels are coupled with others in an unknown way")


@contextmanager
def _unchanged_on_error(layers: list[nn.Module]) -> Iterator[None]:
    own = {"_parameters", "_buffers"}  # dictionaries that are changed in place
    before = [{key: dict(value) if key in own else value for key, value in vars(layer).items()} for layer in layers]
    try:
        yield
    except BaseException:
        for layer, attributes in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(attributes)
        raise


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """No parameter is frozen meanwhile."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(model.get_parameter(name).is_floating_point())
    yield
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)

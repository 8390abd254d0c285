"""Filter tickets made small: layers without the masked filters, by the dependency graph of Torch-Pruning."""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import plain_copy
from .channels import Member, fold, removable
from .observed import call, check_equal, observe, tensors

if find_spec("torch_pruning") is None:
    raise ImportError("torch_dual_ticket.shrinking needs Torch-Pruning: pip install torch-pruning")

import torch_pruning

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["shrink"]

_KINDS = torch_pruning.ops.OPTYPE
_CHANNEL_BY_CHANNEL = {  # what has no part in the decision, and loses its channels with the layers around it
    *(_KINDS.BN, _KINDS.PRELU, _KINDS.DEPTHWISE_CONV, _KINDS.ELEMENTWISE),
    *(_KINDS.CONCAT, _KINDS.SPLIT, _KINDS.SLICE, _KINDS.RESHAPE),
}


def shrink(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A smaller copy for inference: without the filters that are zero, and with the same outputs.

    Call it after ``finalize()`` and the finetuning of a ticket of pattern "filter" (or "channel"). The dependency graph
    of Torch-Pruning tells which layers share a channel; one is removed only if that changes nothing:

    - A channel that no layer reads goes, whatever is in it.
    - A filter of zeros does not make a channel of zeros: behind it, its bias, or batch normalization's shift, is a
      constant. What reads a constant can have it in its own bias, so the channel goes. But a convolution that pads with
      zeros sees the constant end at the border, and no bias can. There all such channels of a layer become *one*: the
      weights that read it are the sum of theirs, weighted by their constants. Both are exact, not approximations, and
      need no further training; with ReLU behind it, a shift that is not positive leaves nothing to carry at all.
    - Channels that a residual connection adds up are one channel: it goes only if its filters are zero in every layer
      that is added. Masks are drawn for each layer on its own, so these seldom coincide; what shrinks in residual
      networks is what lies within the blocks.

    After each removal the outputs for ``example_inputs`` are compared with those of the masked model. If they are not
    equal (to a relative 1e-5 in float32; float16 and bfloat16: 3e-2), or the forward pass fails because it relies on
    the old size, the layers are put back as they were, and a warning names them.

    Args:
        model: finalized; wrappers (DDP, ``torch.compile``) are left out of the copy.
        example_inputs: what the model is called with: a tensor, a tuple or list of arguments, or a dict of keyword
            arguments. Real data, or noise: nothing can be seen with a constant.

    Returns:
        A plain model in evaluation mode, its layers of the same types and names. Nothing is held: masked weights that
        could not be removed would come back in training. What equals the masked model is its evaluation mode.

    Raises:
        ImportError: on import, if Torch-Pruning is not installed (``pip install torch-pruning``).
        TypeError: ``model`` is no module.
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
    for tensor in tensors(example_inputs):
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
            raise ValueError(
                f"example_inputs holds a tensor of shape {tuple(tensor.shape)} in which all is {float(tensor.min())}:"
                " with that it cannot be seen what makes a difference. Give a batch of data, or noise."
            )
    with torch.inference_mode(False), torch.enable_grad():  # the graph follows gradients
        small = plain_copy(model)
        with _all_trainable(small):
            shrinker = _Shrinker(small, example_inputs)
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

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.inputs = model, example_inputs
        self.outputs, self.constants = observe(model, example_inputs)
        self.names = {layer: name for name, layer in model.named_modules()}
        self.removed = 0
        self.refused: dict[str, str] = {}  # the first layer of a group, and what happened

    def run(self) -> None:
        while not self._finished():
            pass

    def _finished(self) -> bool:
        """Go through all groups; False after one that had to be put back, as the graph is a wrong one then."""
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
        graph = torch_pruning.DependencyGraph()
        try:
            return graph.build_dependency(
                self.model, self.inputs, forward_fn=call, output_transform=tensors, verbose=False
            )
        except Exception as error:
            raise ValueError(f"Torch-Pruning cannot trace this {type(self.model).__name__}: {error!r}") from error

    def _shrink(self, graph: Any, group: Any) -> None:
        """Remove from one group what can be removed; raises if the outputs are not the same then."""
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
            return f'{what}: no filter is zero. finalize() a ticket of pattern="filter" first.'
        return (
            f"{what}, although {zero[0]} has filters that are zero: they are inputs or outputs of the model, or stand"
            " for channels to which other layers add (residual connections), or that are normalized with others"
        )


def _members(graph: Any, group: Any) -> tuple[list[Member], list[Member]] | None:
    """The layers that give the channels of a group, and those that take them; None if a channel cannot be removed.

    Channels that do not exist everywhere are left out.
    """
    givers: list[Member] = []
    takers: list[Member] = []
    outside: set[int] = set()
    for item in group:
        layer, kind, handler = item.dep.target.module, item.dep.target.type, item.dep.handler
        gives = graph.is_out_channel_pruning_fn(handler)
        pairs = list(zip(item.root_idxs, item.idxs, strict=True))
        size = graph.get_out_channels(item.dep.target) if gives else graph.get_in_channels(item.dep.target)
        if size is not None:
            outside.update(channel for channel, index in pairs if not 0 <= index < size)
        if kind in (_KINDS.CONV, _KINDS.LINEAR):
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
        raise ValueError("its channels are coupled with others in a way that is not understood")


@contextmanager
def _unchanged_on_error(layers: list[nn.Module]) -> Iterator[None]:
    before = [(layer, dict(vars(layer)), dict(layer._parameters), dict(layer._buffers)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, attributes, parameters, buffers in before:
            vars(layer).clear()
            vars(layer).update(attributes)
            layer._parameters.clear()
            layer._parameters.update(parameters)
            layer._buffers.clear()
            layer._buffers.update(buffers)
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

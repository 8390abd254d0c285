"""The kept weights of one parameter as optimizers see them, and how they stay equal to those in the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._engine.gradient_hook import register
from .._engine.parameter import ManagedParameter, stamp_of
from ..masks.mask import Mask
from .gradient import KeptGradient
from .index import gather, kept_index, laid_out_as, scatter_

_TAKEN = "_dual_ticket_taken"  # the attribute of a gradient that the model's parameter had


class KeptWeight(ManagedParameter):
    """The kept weights of one managed parameter, the source, in a vector: all that an optimizer sees of it."""

    def __init__(self, source: ManagedParameter, mask: Mask, parameter: Tensor) -> None:
        super().__init__(source.name, stores_mask=False)
        self.source, self.mask = source, mask
        self.index = kept_index(source, mask, parameter)
        self.values = nn.Parameter(gather(parameter.detach(), self.index), requires_grad=parameter.requires_grad)
        self.source_stamp = stamp_of(parameter)  # of the parameter when the values were read or written
        self.stamp = stamp_of(self.values)  # of the values, then

    def tensor(self) -> Tensor:
        return self.values

    def read(self, parameter: Tensor) -> None:
        """Take over the parameter's values, if something else has changed them."""
        if self.source_stamp != stamp_of(parameter):
            self._read(parameter)

    @torch.no_grad()
    def _read(self, parameter: Tensor) -> None:
        self.index = kept_index(self.source, self.mask, parameter)
        values, grad = gather(parameter, self.index), self.values.grad
        if (values.device, values.dtype) == (self.values.device, self.values.dtype):
            self.values.copy_(values)
        else:  # the model was moved or converted
            self.values.grad, self.values.data = None, values
            if grad is not None:
                self.values.grad = grad.to(values)
                self.values.grad.__dict__.update(grad.__dict__)
        self.source_stamp, self.stamp = stamp_of(parameter), stamp_of(self.values)

    def write(self, parameter: Tensor) -> bool:
        """Write the values to the parameter; returns whether its masked weights are known to be zero."""
        is_clean = self.source.is_clean(parameter)
        scatter_(parameter, self.index, self.values)
        self.source_stamp, self.stamp = stamp_of(parameter), stamp_of(self.values)
        if is_clean:
            self.source.stamp = self.source_stamp
        return is_clean

    def pick(self, whole: Tensor) -> Tensor:
        """The elements at the kept weights of a tensor of the parameter's shape."""
        return gather(laid_out_as(self._current(), whole), self.index)

    def spread(self, values: Tensor | None) -> Tensor:
        """A tensor like the parameter, with these values at the kept weights and zeros at the others."""
        parameter = self._current()
        dtype = parameter.dtype if values is None else values.dtype
        whole = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        if values is not None:
            scatter_(whole, self.index, values.to(whole.device))
        return whole

    def _current(self) -> Tensor:
        """The parameter, which the index fits."""
        parameter = self.source.tensor()
        assert parameter is not None
        self.read(parameter)
        return parameter

    # -- gradients -----------------------------------------------------------------------------------------------------

    def connect(self, parameter: Tensor) -> None:
        self.disconnect()
        if isinstance(parameter.grad, KeptGradient):  # the copy in a converted model that replaces its tensors
            parameter.grad = KeptGradient(self, parameter)
        uncompiled: Any = torch.compiler.disable  # a compiled training step would trace into it
        self.hook = register(parameter, uncompiled(self.take_gradient))

    @torch.no_grad()
    def set_gradient(self, whole: Tensor, *, adds: bool = False) -> None:
        """Give the values what a gradient of the parameter has for them."""
        kept, grad = self.pick(whole), self.values.grad
        self.values.grad = kept if grad is None or not adds else grad.add_(kept)
        setattr(self.values.grad, _TAKEN, True)

    def take_gradient(self, parameter: Tensor) -> None:
        """Make the gradients of the parameter and of the values one, whichever of them was set or removed."""
        self.read(parameter)
        grad, known = parameter.grad, self.values.grad
        if grad is None:
            if hasattr(known, _TAKEN):  # zeroed through the model; others somebody has assigned
                self.values.grad = None
        elif not isinstance(grad, KeptGradient):
            self.set_gradient(grad)
            parameter.grad = KeptGradient(self, parameter)
        elif known is None:  # zeroed through the optimizer
            parameter.grad = None

    def hide_gradient(self, parameter: Tensor) -> None:
        """The parameter has none from now on; that of the values stays, as an optimizer leaves it."""
        if isinstance(parameter.grad, KeptGradient) and self.values.grad is not None:
            parameter.grad = None
            self.values.grad.__dict__.pop(_TAKEN, None)

    def give_back(self, parameter: Tensor) -> None:
        """Leave the parameter the gradient that it would have had."""
        self.take_gradient(parameter)
        if isinstance(parameter.grad, KeptGradient):
            parameter.grad = parameter.grad.spread()

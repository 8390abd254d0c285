"""What a parameter has as its gradient while its kept weights are trained alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten


class KeptGradient(Tensor):
    """The gradient of the kept values in the shape of the parameter, without memory for zeros.

    What reads it sees a whole gradient; what changes it in place changes that of the values. So whoever works on
    gradients of the model works on those that the optimizer sees: accumulation, DistributedDataParallel, clipping.

    Args:
        weight: the KeptWeight whose values have the gradient.
        like: what it looks like.
        copied: the gradient of the values at some time, if this is a copy.
    """

    weight: Any  # a KeptWeight, which is above
    copied: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, weight: Any, like: Tensor, copied: Tensor | None = None) -> KeptGradient:
        made: KeptGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=like.dtype, device=like.device
        )
        made.weight, made.copied = weight, copied
        return made

    def spread(self) -> Tensor:
        """As an ordinary tensor, where and of the type that the parameter is now."""
        whole: Tensor = self.weight.spread(self.weight.values.grad if self.copied is None else self.copied)
        return whole

    def replace(self, whole: Tensor) -> None:
        if self.copied is None:
            self.weight.set_gradient(whole)
        else:
            self.copied = self.weight.pick(whole)

    def share_memory_(self) -> KeptGradient:
        return self  # it has no memory, and torch would not notice

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.spread()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Tensor.__reduce_ex__(self.spread(), protocol)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.spread())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        first, kwargs, schema = args[0], kwargs or {}, func._schema
        is_added = func is _aten.add_.Tensor and type(args[1]) is Tensor and args[1].shape == first.shape and not kwargs
        if is_added and type(first) is cls and first.copied is None:  # as backward() does
            first.weight.set_gradient(args[1], adds=True)
            return first
        if func is _aten.detach.default:
            return cls(first.weight, first, first.copied)
        stand_ins = [one for one in tree_leaves((args, kwargs)) if isinstance(one, cls)]
        if func.namespace != "aten" or any(one.alias_info and not one.alias_info.is_write for one in schema.returns):
            raise RuntimeError(
                f"{func} needs the memory of the gradient of {stand_ins[0].weight.name}, which KeptParameters took. Use"
                " the gradients of kept.parameters(); or clone() this one, to read it."
            )
        wholes = {id(one): one.spread().to(one.device, one.dtype) for one in stand_ins}
        given: tuple[Any, Any] = tree_map_only(cls, lambda one: wholes[id(one)], (args, kwargs))
        result = func(*given[0], **given[1])
        if func is _aten._to_copy.default:  # Module.to() puts it in the place of the original
            return cls(first.weight, result, first.weight.pick(first.spread()))
        arguments = zip((one for one in schema.arguments if not one.kwarg_only), args, strict=False)
        written = [value for one, value in arguments if one.alias_info and one.alias_info.is_write]
        for one in tree_leaves((written, kwargs.get("out"))):
            if isinstance(one, cls):
                one.replace(wholes[id(one)])
        return first if written and written[0] is first and isinstance(first, cls) else result

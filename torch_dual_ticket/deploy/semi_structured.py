"""2:4 layers with torch's semi-structured weights, for GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._model.exclusions import check_exclusions, is_excluded
from .plain_copy import leave_fast_paths, linear_layers, plain_copy

_DEVICE = "cuda"


def to_semi_structured(model: nn.Module, exclude: Sequence[str] = ()) -> nn.Module:
    """A copy for inference on CUDA whose 2:4 ``Linear`` layers have ``torch.sparse.to_sparse_semi_structured`` weights.

    Call it after ``finalize()`` and the finetuning of a ticket of pattern "2:4", with the model on the GPU and in the
    dtype to run in: float16 or bfloat16, not float32. Every ``nn.Linear`` with at most two weights that are not zero in
    each four is converted; layers of other types and dense ones stay as they are. Save the finalized model rather than
    the copy, and convert again after loading.

    Args:
        model: finalized; wrappers (DDP, ``torch.compile``) are left out of the copy.
        exclude: :mod:`fnmatch` patterns of module names that stay dense, with all below them: layers of a shape that
            torch refuses.

    Returns:
        A plain model in evaluation mode. Semi-structured weights cannot be trained.

    Raises:
        TypeError: ``model`` is not a module, or ``exclude`` not a sequence of names.
        ValueError: no layer is 2:4, a pattern matches no module, or torch refuses a layer, which is named, for its
            device, shape or dtype. ``model`` is never changed.

    Example:
        >>> from torch_dual_ticket.baselines import random_ticket
        >>> model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> held = random_ticket(model, pattern="2:4", exclude=["2"])
        >>> if torch.cuda.is_available():
        ...     fast = to_semi_structured(model.half().cuda())
    """
    fast = plain_copy(model)
    check_exclusions(exclude, [name for name, _ in fast.named_modules()])
    layers = {
        name: layer
        for name, layer in linear_layers(fast).items()
        if not is_excluded(name, exclude) and _is_two_of_four(layer.weight)
    }
    if not layers:
        raise ValueError(
            f"no Linear layer of this {type(fast).__name__} is 2:4 (at most two of each four weights along the input"
            ' that are not zero): finalize() a ticket of pattern="2:4" first'
        )
    for name, layer in layers.items():
        weight = layer.weight.detach()
        if weight.device.type != _DEVICE:
            raise ValueError(
                f"{name}.weight is on {weight.device}, and torch has semi-structured kernels for CUDA alone (Ampere or"
                ' later): move the model first, with model.to("cuda")'
            )
        try:
            if weight.dtype is torch.float32:  # which torch converts silently
                raise ValueError("in this dtype its format has one of each two weights, and would lose the others.")
            converted = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"torch cannot make {name}.weight, {tuple(weight.shape)} in {weight.dtype}, semi-structured: {error}"
                f" For another dtype convert the model first, as with model.half(); a layer of such a shape can be left"
                f" out with exclude=[{name!r}]."
            ) from error
        layer.weight = nn.Parameter(converted, requires_grad=False)
    leave_fast_paths(fast, layers.values())
    return fast


def _is_two_of_four(weight: Tensor) -> bool:
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).reshape(-1, 4).sum(-1) <= 2).all())

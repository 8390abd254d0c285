"""Tickets that run faster: finished sparse layers in formats of torch that skip zeros.

Masks alone make nothing faster: a zero is multiplied like any other number. Each function here returns a copy for
inference; the model that it is given, with its masks, stays as it is, to be saved or trained further.

=============================  ==========================================================================
tickets of pattern "2:4"       :func:`to_semi_structured`, on CUDA
very sparse ``Linear`` layers  :func:`to_csr`, on the CPU
filter or channel tickets      :func:`torch_dual_ticket.shrinking.shrink`, anywhere: smaller dense layers
=============================  ==========================================================================

``benchmarks/inference.py`` measures where each is faster than the dense model, and where it is not.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .._engine.dtensor import is_sharded
from .._model.names import unwrapped_modules
from .._model.targets import check_exclusions, is_excluded, runs_forward

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["CSRLinear", "to_csr", "to_semi_structured"]

_SEMI_STRUCTURED_ON = "cuda"
# Where CSR is faster: measured with benchmarks/inference.py, whose table says how far.
_LEAST_ZEROS = 0.9
_LEAST_WEIGHTS = 2**18
_CSR_DTYPES = (torch.float32, torch.float64)  # those that MKL multiplies


def to_semi_structured(model: nn.Module, exclude: Sequence[str] = ()) -> nn.Module:
    """A copy for inference on CUDA whose 2:4 ``Linear`` layers hold ``torch.sparse.to_sparse_semi_structured`` weights.

    Call it after ``finalize()`` and the finetuning of a ticket of pattern "2:4", with the model on the GPU and in the
    dtype to run in; float16 and bfloat16 gain most. Every ``nn.Linear`` with at most two weights that are not zero in
    each four is converted; layers of other types and dense ones stay as they are. Save the finalized model rather than
    the copy, and convert again after loading.

    Args:
        model: finalized; wrappers (DDP, ``torch.compile``) are left out of the copy.
        exclude: :mod:`fnmatch` patterns of module names that stay dense, with all below them: layers of a shape that
            torch refuses.

    Returns:
        A plain model in evaluation mode: nothing is held, and semi-structured weights cannot be trained.

    Raises:
        TypeError: ``model`` is no module, or ``exclude`` no sequence of names.
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
        for name, layer in _linear_layers(fast)
        if not is_excluded(name, exclude) and _is_two_of_four(layer.weight)
    }
    if not layers:
        raise ValueError(
            f"no Linear layer of this {type(fast).__name__} is 2:4 (at most two of each four weights along the input"
            ' that are not zero): finalize() a ticket of pattern="2:4" first'
        )
    for name, layer in layers.items():
        weight = layer.weight.detach()
        if weight.device.type != _SEMI_STRUCTURED_ON:
            raise ValueError(
                f"{name}.weight is on {weight.device}, and torch has semi-structured kernels for CUDA alone (Ampere or"
                ' later): move the model first, with model.to("cuda")'
            )
        try:
            converted = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"torch cannot make {name}.weight, {tuple(weight.shape)} in {weight.dtype}, semi-structured: {error}"
                f" For another dtype convert the model first, as with model.half(); a layer of such a shape can be left"
                f" out with exclude=[{name!r}]."
            ) from error
        layer.weight = nn.Parameter(converted, requires_grad=False)
    _leave_fast_paths(fast, set(layers.values()))
    return fast


def to_csr(model: nn.Module) -> nn.Module:
    """A copy for inference on the CPU whose very sparse ``Linear`` layers are multiplied as CSR matrices, by MKL.

    Call it after ``finalize()`` and the finetuning of an unstructured ticket. Converted is every ``nn.Linear`` of at
    least 262,144 weights (512 × 512) of which at least 90 % are zero: there it was faster than dense for every number
    of rows that was measured. The others stay as they are: small layers, and such with fewer zeros, gain nothing or
    lose. (CSR tensors are a beta feature of torch.)

    Args:
        model: on the CPU, in float32 or float64; wrappers are left out of the copy.

    Returns:
        A plain model in evaluation mode, with :class:`CSRLinear` in the place of those layers. Outputs are the same up
        to rounding.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: this build of torch has no MKL.
        ValueError: no layer can gain; says what the best one is. ``model`` is never changed.

    Example:
        >>> from torch_dual_ticket.baselines import random_ticket
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> held = random_ticket(model, 0.95, exclude=["2"], seed=0)
        >>> fast = to_csr(model)
        >>> fast
        Sequential(
          (0): CSRLinear(in_features=512, out_features=512, weights=13107)
          (1): ReLU()
          (2): Linear(in_features=512, out_features=10, bias=True)
        )
        >>> x = torch.randn(32, 512)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    fast = plain_copy(model)
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        raise RuntimeError("to_csr() needs a torch that was built with MKL, which multiplies the CSR matrices")
    layers = dict(_linear_layers(fast))
    sparse = [name for name, layer in layers.items() if _gains_as_csr(layer.weight)]
    if not sparse:
        raise ValueError(
            f"no Linear layer of this {type(fast).__name__} would be faster as CSR: that takes {_LEAST_ZEROS:.0%} of"
            f" zeros in at least {_LEAST_WEIGHTS:,} weights, in float32 or float64 on the CPU. {_sparsest(layers)}"
        )
    converted: dict[nn.Module, nn.Module] = {layers[name]: CSRLinear(layers[name]) for name in sparse}
    for module in list(fast.modules()):
        for attribute, child in module._modules.items():  # a layer may stand in several places
            if child in converted:
                module._modules[attribute] = converted[child]
    _leave_fast_paths(fast, set(converted.values()))
    return converted.get(fast, fast)


def _leave_fast_paths(model: nn.Module, converted: set[nn.Module]) -> None:
    """Transformers would hand the weights of their layers to kernels for dense ones; these settings stop that."""
    for module in model.modules():
        if converted.isdisjoint(module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


class CSRLinear(nn.Module):
    """What ``nn.Linear`` computes, for inference: its weight stands in three buffers. Made by :func:`to_csr`.

    Shape: ``(*, in_features)`` -> ``(*, out_features)``, contiguous, as of ``nn.Linear``.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        with warnings.catch_warnings():  # said once in every process, and in the docstring of to_csr()
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            csr = weight.to_sparse_csr()
        # With indices of 32 bits MKL needs no copy of them in every call.
        self.register_buffer("crow_indices", csr.crow_indices().int())
        self.register_buffer("col_indices", csr.col_indices().int())
        self.register_buffer("values", csr.values())
        self.register_buffer("bias", weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach())

    @property
    def weight(self) -> Tensor:
        """In CSR format, as code that asks a layer for the dtype or device of its weight may read it."""
        # Made anew each time, which takes 3 µs: a tensor in CSR format cannot be deep-copied, nor loaded in place.
        parts = self.crow_indices, self.col_indices, self.values
        return torch.sparse_csr_tensor(*parts, (self.out_features, self.in_features), check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 1:
            result = torch.addmv(self.bias, weight, rows[0])
        else:
            result = torch.addmm(self.bias[:, None], weight, rows.t()).t().contiguous()
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={len(self.values)}"


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without wrappers, in which nothing is held or masked: zeros are zeros in the weights.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a parameter is sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: give the model itself")
    inner = next(unwrapped_modules(model))[1]
    for name, parameter in inner.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is sharded: load the whole state_dict (save_ticket() and load_ticket() carry it) into a model"
                " that is not, and use that"
            )
    with torch.no_grad():  # as a forward would: the layout of torch.nn.utils.prune can only be copied after one
        for layer in inner.modules():
            for hook in _pruning_hooks(layer):
                hook(layer, ())
    copied = copy.deepcopy(inner)
    for layer in copied.modules():
        while hooks := _pruning_hooks(layer):
            prune.remove(layer, hooks[0]._tensor_name)  # type: ignore[no-untyped-call]
    return copied.eval()


def _pruning_hooks(layer: nn.Module) -> list[prune.BasePruningMethod]:
    """Those of torch.nn.utils.prune, of which this library's are some."""
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Those that hold their weight and are called themselves, which attention's out_proj is not."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and runs_forward(layer) and "weight" in layer._parameters:
            yield name, layer


def _is_two_of_four(weight: Tensor) -> bool:
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).reshape(-1, 4).sum(-1) <= 2).all())


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


def _gains_as_csr(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _CSR_DTYPES or weight.numel() < _LEAST_WEIGHTS:
        return False
    return _zeros(weight) >= round(_LEAST_ZEROS * weight.numel())


def _sparsest(layers: dict[str, nn.Linear]) -> str:
    """The layer with the largest fraction of zeros, in words."""
    shares = {name: _zeros(layer.weight) / max(1, layer.weight.numel()) for name, layer in layers.items()}
    if not shares:
        return "It has no Linear layer."
    name = max(shares, key=lambda name: shares[name])
    weight = layers[name].weight
    where = f"{weight.dtype} on {weight.device}"
    forgotten = "" if shares[name] else " Is finalize() still to come?"
    return f"The sparsest, {name!r}, has {shares[name]:.1%} of {weight.numel():,}, {where}.{forgotten}"

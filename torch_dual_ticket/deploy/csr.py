"""Very sparse linear layers as CSR matrices, for CPUs."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .plain_copy import leave_fast_paths, linear_layers, plain_copy

# Where CSR is faster: measured with benchmarks/inference.py, whose table says how far.
_MIN_ZEROS = 0.9
_MIN_WEIGHTS = 2**18
_DTYPES = (torch.float32, torch.float64)  # those that MKL multiplies


def to_csr(model: nn.Module) -> nn.Module:
    """A copy for inference on the CPU whose very sparse ``Linear`` layers are multiplied as CSR matrices, by MKL.

    Call it after ``finalize()`` and the finetuning of an unstructured ticket. Every ``nn.Linear`` of at least 262,144
    weights (512 × 512) of which at least 90 % are zero is converted: such layers were faster than dense ones for all
    numbers of rows measured. The others stay as they are, as they gain nothing or lose. (CSR tensors are a beta
    feature of torch.)

    Args:
        model: on the CPU, in float32 or float64; wrappers are left out of the copy.

    Returns:
        A plain model in evaluation mode, with :class:`CSRLinear` in the place of those layers. Outputs are the same up
        to rounding.

    Raises:
        TypeError: ``model`` is not a module.
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
    layers = linear_layers(fast)
    converted: dict[nn.Module, nn.Module] = {
        layer: CSRLinear(layer) for layer in layers.values() if _gains_as_csr(layer.weight)
    }
    if not converted:
        raise ValueError(
            f"no Linear layer of this {type(fast).__name__} would be faster as CSR: that takes {_MIN_ZEROS:.0%} of"
            f" zeros in at least {_MIN_WEIGHTS:,} weights, in float32 or float64 on the CPU. {_sparsest(layers)}"
        )
    for module in list(fast.modules()):
        for attribute, child in module._modules.items():  # a layer may be registered several times
            if child in converted:
                module._modules[attribute] = converted[child]
    leave_fast_paths(fast, converted.values())
    return converted.get(fast, fast)


class CSRLinear(nn.Module):
    """What ``nn.Linear`` computes, for inference: its weight is stored in three buffers. Made by :func:`to_csr`.

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
        """In CSR format, for code that asks a layer for the dtype or device of its weight."""
        # Built at each use, which takes 3 µs: a tensor in CSR format can be neither deep-copied nor loaded in place.
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


def _gains_as_csr(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or weight.numel() < _MIN_WEIGHTS:
        return False
    return _zeros(weight) >= round(_MIN_ZEROS * weight.numel())


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


def _sparsest(layers: dict[str, nn.Linear]) -> str:
    """The layer with the largest fraction of zeros, in words."""
    fractions = {name: _zeros(layer.weight) / max(1, layer.weight.numel()) for name, layer in layers.items()}
    if not fractions:
        return "It has no Linear layer."
    name = max(fractions, key=lambda name: fractions[name])
    weight = layers[name].weight
    where = f"{weight.dtype} on {weight.device}"
    advice = "" if fractions[name] else " Call finalize() first."
    return f"The sparsest, {name!r}, has {fractions[name]:.1%} of {weight.numel():,}, {where}.{advice}"

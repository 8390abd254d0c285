"""Finished tickets that run faster: sparse layers in formats of torch that skip zeros, or as smaller dense layers.

Masks alone make nothing faster: a zero is multiplied like any other number. Each function here returns a copy for
inference. The model that it is given stays as it is, with its masks, to be saved or trained further.

=============================  ==========================================================================
tickets of pattern "2:4"       :func:`to_semi_structured`, on CUDA
very sparse ``Linear`` layers  :func:`to_csr`, on the CPU
filter or channel tickets      :func:`shrink`, anywhere (``pip install torch-pruning``)
=============================  ==========================================================================

``benchmarks/inference.py`` measures where each is faster than the dense model, and where it is not.
"""

from .csr import CSRLinear, to_csr
from .semi_structured import to_semi_structured
from .shrinker import shrink

__all__ = ["CSRLinear", "shrink", "to_csr", "to_semi_structured"]

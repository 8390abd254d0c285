"""Random tickets for PyTorch: train a sparse network chosen before the first batch."""

from .pruning import RandomUnstructured, random_unstructured

__all__ = ["RandomUnstructured", "random_unstructured"]

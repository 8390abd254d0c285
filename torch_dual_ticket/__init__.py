"""Random tickets for PyTorch: train a sparse network chosen before the first batch."""

from .prune import RandomUnstructured, random_unstructured
from .scheduler import RSTScheduler

__all__ = ["RSTScheduler", "RandomUnstructured", "random_unstructured"]

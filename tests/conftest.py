"""Settings for all tests: the same numbers in every run, one thread each, and small sizes."""

import torch
from hypothesis import settings

from torch_dual_ticket._tensors import kernels

torch.set_num_threads(1)  # sums are made in the same order everywhere
kernels.SMALL = 4096  # so that small models have layers for both ways of the kernels
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)

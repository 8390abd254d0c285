"""Settings for all tests: one thread each, so that sums are made in the same order everywhere."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")

"""What the rest of the package needs of a mask, wherever it comes from."""

from __future__ import annotations

from .explicit import ExplicitMask
from .seeded import SeededMask

Mask = SeededMask | ExplicitMask
"""The mask of one parameter, drawn or stored: ``shape``, ``pruned_weights``, ``fingerprint``, ``draw()``."""

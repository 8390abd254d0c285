"""Where a ticket is in its life."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..masks.mask import Mask


class Phase(Enum):
    """What a ticket does with the masked weights."""

    IDLE = "idle"  # nothing: it is not complete yet, was removed, or its scheduler is gone
    TRANSFORM = "transform"  # penalize them
    FINETUNE = "finetune"  # hold them at zero


@dataclass(frozen=True)
class Stage:
    """Phase, masks and λ. It is exchanged as a whole, so that no change of phase is ever half made."""

    phase: Phase
    masks: Mapping[str, Mask]  # by parameter name
    penalty: float = 0.0  # λ of the next update
    steps: int = 0  # scheduler steps that counted
    report: Any = None  # of the end of the transformation

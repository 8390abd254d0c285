"""Masks as they are saved: a seeded one as the fields that draw it, an explicit one as its bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .explicit import ExplicitMask
from .mask import Mask
from .seeded import SeededMask

VERSION = 1


def as_state(masks: Mapping[str, Mask]) -> dict[str, Any]:
    """A state to save. The bits of explicit masks are uint8 tensors, everything else is plain.

    >>> as_state({"fc.weight": SeededMask(0, "fc.weight", (4, 8), 24)})["masks"]["fc.weight"]["pruned"]
    24
    """
    return {"version": VERSION, "masks": {name: as_record(mask) for name, mask in masks.items()}}


def of_state(state: Mapping[str, Any]) -> dict[str, Mask]:
    """The masks of a state.

    Raises:
        ValueError: it is not one that :func:`as_state` has made.
    """
    try:
        if state["version"] != VERSION:
            raise ValueError(f"its version is {state['version']!r}, and this release reads version {VERSION}")
        return {str(name): of_record(record) for name, record in state["masks"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a state of masks: {error!r}") from error


def as_record(mask: Mask) -> dict[str, Any]:
    """One mask, with its fingerprint."""
    if isinstance(mask, SeededMask):
        # Most masks have no input_dim, and their files can be read by releases that know of none.
        fields = {key: value for key, value in asdict(mask).items() if value is not None}
    else:
        fields = {"shape": list(mask.shape), "bits": mask.bits}
    return fields | {"fingerprint": mask.fingerprint}


def of_record(record: Mapping[str, Any]) -> Mask:
    """The mask of a record.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is not one, or would give another mask than that was saved.
    """
    fields = dict(record)
    fingerprint = fields.pop("fingerprint")
    mask = ExplicitMask.of_bits(fields["bits"], fields["shape"]) if "bits" in fields else SeededMask(**fields)
    if mask.fingerprint != fingerprint:
        raise ValueError("the mask would not be the one that was saved: it has another fingerprint")
    return mask

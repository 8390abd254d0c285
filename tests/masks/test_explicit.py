"""Explicit masks: their bits and fingerprints, and how masks are saved."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_dual_ticket.masks.explicit import ExplicitMask
from torch_dual_ticket.masks.records import as_record, as_state, of_record, of_state
from torch_dual_ticket.masks.seeded import SeededMask


@given(st.lists(st.integers(0, 7), max_size=3), st.randoms(use_true_random=False))
def test_bits_give_the_mask_again(shape, random):
    kept = torch.tensor([random.random() < 0.5 for _ in range(math.prod(shape))], dtype=torch.bool).view(shape)
    mask = ExplicitMask(kept)
    bits = mask.bits
    assert bits.shape == (math.ceil(kept.numel() / 8),)
    for position, value in enumerate(kept.flatten().tolist()):  # what each bit means
        assert bool(int(bits[position // 8]) >> position % 8 & 1) == value
    again = ExplicitMask.of_bits(bits, shape)
    assert torch.equal(again.draw(), kept)
    assert (again.shape, again.pruned_weights, again.fingerprint) == (mask.shape, mask.pruned_weights, mask.fingerprint)


@given(st.integers(0, 39), st.sampled_from([(40,), (5, 8), (2, 4, 5)]))
def test_fingerprints_tell_masks_and_shapes_apart(position, shape):
    kept = torch.rand(40) < 0.5
    other = kept.clone()
    other[position] ^= True
    fingerprints = {ExplicitMask(mask.view(shape)).fingerprint for mask in (kept, other)}
    fingerprints |= {ExplicitMask(kept.view(8, 5)).fingerprint, ExplicitMask(kept.view(8, 5).t()).fingerprint}
    assert len(fingerprints) == 4


def test_the_fingerprint_is_stable_across_releases():
    """It is in saved states."""
    assert ExplicitMask(torch.arange(24).view(4, 6) % 3 == 0).fingerprint == "e4073b1e9ad5f88c"


def test_a_mask_is_copied_whatever_its_strides():
    kept = torch.rand(6, 4) < 0.5
    mask = ExplicitMask(kept.t())
    expected = kept.t().clone()
    kept.logical_not_()
    assert torch.equal(mask.draw(), expected)
    assert mask.draw().is_contiguous()


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (torch.zeros(2, dtype=torch.uint8), (8,)),
        (torch.zeros(1, dtype=torch.uint8), (9,)),
        (torch.zeros(1, 1, dtype=torch.uint8), (8,)),
        (torch.zeros(1, dtype=torch.int8), (8,)),
    ],
)
def test_bits_of_another_shape_or_dtype_are_refused(bits, shape):
    with pytest.raises(ValueError, match=r"the bits of a mask of shape .* are [12] bytes, got"):
        ExplicitMask.of_bits(bits, shape)


def test_states_of_masks():
    masks = {
        "a": SeededMask(3, "a", (4, 8), 2, "filter"),
        "b": ExplicitMask(torch.rand(4, 5) < 0.5),
    }
    state = as_state(masks)
    json.dumps(state["masks"]["a"])
    assert state["masks"]["b"].keys() == {"shape", "bits", "fingerprint"}
    again = of_state(state)
    assert again["a"] == masks["a"]
    assert torch.equal(again["b"].draw(), masks["b"].draw())
    for mask in masks.values():
        with pytest.raises(ValueError, match="another fingerprint"):
            of_record(as_record(mask) | {"fingerprint": ""})

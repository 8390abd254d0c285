"""What a pattern's text means, how many units it makes of a weight, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_dual_ticket.masks.patterns import (
    Pattern,
    count_units,
    parse_pattern,
    pruned_units,
    tile,
)

VALID = {
    "unstructured": Pattern("unstructured"),
    "filter": Pattern("filter"),
    "channel": Pattern("channel"),
    "2:4": Pattern("n:m", 2, 4),
    "1:16": Pattern("n:m", 1, 16),
    "block:4x4": Pattern("block", 4, 4),
    "block:1x32": Pattern("block", 1, 32),
}


@pytest.mark.parametrize("text", VALID)
def test_parses(text):
    assert parse_pattern(text) == VALID[text]


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "2:", ":4", "0:4", "4:4", "5:4", "-2:4", "2:4:8", "2.5:4", " 2:4", "2:4\n", "02:4", "2 : 4", "٢:٤"),
        *(
            "block",
            "block:",
            "block:4",
            "block:0x4",
            "block:4x0",
            "block:4x4x4",
            "block:4X4",
            "Block:4x4",
            "block:-4x4",
        ),
        *("Filter", "filters", "row", "n:m", "none", "9999999999:99999999999"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match='"unstructured", "n:m" such as "2:4"') as caught:
        parse_pattern(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("value", [None, 4, (2, 4), b"2:4", float("nan")])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="pattern must be a string"):
        parse_pattern(value)


def test_implied_sparsity():
    assert [parse_pattern(text).sparsity for text in ("2:4", "1:4", "3:4", "7:8")] == [0.5, 0.75, 0.25, 0.125]
    assert [parse_pattern(text).sparsity for text in VALID if ":" not in text or text.startswith("block")] == [None] * 5


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 2**34))
def test_implied_sparsity_prunes_exactly_what_the_pattern_says(n, more, groups):
    m = n + more
    assert pruned_units(parse_pattern(f"{n}:{m}").sparsity, groups * m) == groups * more


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**40))
def test_pruned_units_is_pythons_round(sparsity, units):
    pruned = pruned_units(sparsity, units)
    assert type(pruned) is int
    assert pruned == round(sparsity * units)
    assert 0 <= pruned <= units


def test_halves_go_to_even():
    assert [pruned_units(0.5, units) for units in (1, 3, 5, 7)] == [0, 2, 2, 4]


@pytest.mark.parametrize(
    ("shape", "pattern", "transposed", "expected", "units"),
    [
        ((), "unstructured", False, (), 1),
        ((5,), "unstructured", False, (1,), 5),
        ((6, 8, 3), "unstructured", False, (1, 1, 1), 144),
        ((6, 8, 3), "2:4", False, (1, 1, 1), 144),
        ((8, 6, 3), "2:4", True, (1, 1, 1), 144),
        ((6, 8, 3, 3), "block:3x4", False, (3, 4, 1, 1), 36),
        ((6, 8, 3, 3), "block:4x3", True, (3, 4, 1, 1), 36),
        ((6, 8, 3, 3), "filter", False, (1, 8, 3, 3), 6),
        ((6, 8, 3, 3), "filter", True, (6, 1, 3, 3), 8),
        ((6, 8, 3, 3), "channel", False, (6, 1, 3, 3), 8),
        ((6, 8, 3, 3), "channel", True, (1, 8, 3, 3), 6),
    ],
)
def test_units(shape, pattern, transposed, expected, units):
    assert tile(shape, pattern, 1 - transposed) == expected
    assert count_units(shape, pattern, 1 - transposed) == units
    assert units * math.prod(expected) == math.prod(shape)


@pytest.mark.parametrize(
    ("shape", "pattern", "transposed", "told"),
    [
        ((4, 6), "2:4", False, r"shape \(4, 6\): its 6 input units \(dimension 1\) are not a multiple of 4"),
        ((6, 4), "2:4", True, r"its 6 input units \(dimension 0\) are not a multiple of 4"),
        ((6, 8), "block:4x4", False, r"its 6 output units \(dimension 0\) are not a multiple of 4"),
        ((8, 6), "block:4x4", False, r"its 6 input units \(dimension 1\)"),
        ((8, 6), "block:4x4", True, r"its 6 output units \(dimension 1\)"),
        ((8,), "2:4", False, "needs output and input units"),
        ((8,), "filter", False, "needs output and input units"),
        ((8,), "channel", False, "needs output and input units"),
        ((), "block:1x1", False, "needs output and input units"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_a_remedy(shape, pattern, transposed, told):
    with pytest.raises(ValueError, match=told) as caught:
        count_units(shape, pattern, 1 - transposed)
    assert pattern in str(caught.value)
    assert "exclude" in str(caught.value)

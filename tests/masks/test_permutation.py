"""The keyed permutation against a slow one in plain integers, and its quality over many keys."""

import hashlib
import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_dual_ticket.masks import permutation
from torch_dual_ticket.masks.permutation import ROUNDS, SORTED_BELOW, KeyedPermutation


@lru_cache(maxsize=8)
def stream(key, words):
    return hashlib.shake_256(key).digest(8 * words)


def slow_rank(key, n, position):
    """The definition, one element at a time, with Python's integers."""

    def word(key, words, i):
        return int.from_bytes(stream(key, words)[8 * i : 8 * i + 8], "little", signed=True)

    if n < SORTED_BELOW:
        return sorted(range(n), key=lambda i: word(key, n, i)).index(position)
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    while True:
        row, column = divmod(position, columns)
        for number in range(ROUNDS):
            if number % 2 == 0:
                column = (column + word(key + bytes([number]), rows, row)) % columns
            else:
                row = (row + word(key + bytes([number]), rows, column)) % rows
        position = row * columns + column
        if position < n:
            return position


def p_value(statistic, degrees):
    """The chance that chi-square with `degrees` of freedom is at least `statistic`."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


SIZES = [1, 2, 3, 50, SORTED_BELOW - 1, SORTED_BELOW, SORTED_BELOW + 1, 71 * 71 - 1, 71 * 71, 71 * 71 + 1, 71 * 72 + 1]


@pytest.mark.parametrize("n", SIZES)
def test_every_rank_comes_once(n):
    ranks = KeyedPermutation(b"key", n).ranks(torch.arange(n))
    assert torch.equal(ranks.long().sort().values, torch.arange(n))


@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_definition(n):
    fast = KeyedPermutation(b"key", n)
    positions = sorted({0, 1 % n, n // 3, n // 2, n - 1})
    expected = [slow_rank(b"key", n, position) for position in positions]
    assert fast.ranks(torch.tensor(positions)).tolist() == expected


@pytest.mark.parametrize("n", [46340**2, 2**31 - 1, 2**31 + 11, 2**40, 2**40 + 2**20 + 1])
def test_agrees_with_the_definition_up_to_and_beyond_int32(n):
    """Where the permutation is too large to list, in windows at both ends and in the middle."""
    fast = KeyedPermutation(b"key", n)
    for start in (0, n // 2, n - 3):
        ranks = fast.ranks(torch.arange(start, start + 3, dtype=fast.dtype))
        assert ranks.tolist() == [slow_rank(b"key", n, position) for position in range(start, start + 3)]


def test_walks_past_the_values_outside():
    """71 x 72 + 1 needs 72 rows of 71 and leaves 71 values too many: some positions must walk, a few more than once."""
    n = 71 * 71 + 1
    fast = KeyedPermutation(b"key", n)
    assert (fast.rows, fast.columns) == (72, 71)
    straight = fast._network(torch.arange(n))
    walked = (straight >= n).nonzero().flatten().tolist()
    assert walked
    assert fast.ranks(torch.arange(n))[walked].tolist() == [slow_rank(b"key", n, position) for position in walked]


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 20_000), cut=st.data())
def test_any_part_can_be_computed_alone(n, cut):
    start = cut.draw(st.integers(0, n))
    stop = cut.draw(st.integers(start, n))
    fast = KeyedPermutation(b"part", n)
    whole = fast.ranks(torch.arange(n))
    assert torch.equal(fast.ranks(torch.arange(start, stop)), whole[start:stop])


def test_asks_nothing_of_torch_generators_or_defaults():
    expected = KeyedPermutation(b"key", 5000).ranks(torch.arange(5000))
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            drawn = KeyedPermutation(b"key", 5000).ranks(torch.arange(5000, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- quality

KEYS = 1000


@pytest.fixture(scope="module", params=[0.5, 0.9])
def masks(request):
    """Kept entries, centered, of 1,000 square masks as wide as the permutation's halves, where structure shows most."""
    side = 72
    pruned = round(request.param * side * side)
    ranks = [
        KeyedPermutation(b"quality %d" % number, side * side).ranks(torch.arange(side * side)) for number in range(KEYS)
    ]
    kept = torch.stack(ranks) >= pruned
    return kept.view(KEYS, side, side).double() - (1 - pruned / (side * side))


def variance(masks):
    """Variance of an entry."""
    return float((masks**2).mean())


def test_every_position_is_kept_equally_often(masks):
    n = masks[0].numel()
    statistic = float((masks.sum(0) ** 2).sum()) / (KEYS * variance(masks)) * (n - 1) / n
    assert 1e-4 < p_value(statistic, n - 1) < 1 - 1e-4


@pytest.mark.parametrize("dim", [1, 2], ids=["columns", "rows"])
def test_rows_and_columns_scatter_as_by_chance(masks, dim):
    """The sums of an exact-count mask are hypergeometric; tied to a total, they have one degree of freedom less."""
    side = masks.shape[1]
    n = side * side
    scatter = masks.sum(dim).pow(2).sum(1) / (side * variance(masks)) * (n - 1) / n
    assert 1e-4 < p_value(float(scatter.sum()), KEYS * (side - 1)) < 1 - 1e-4
    # Every single row over the keys, too.
    by_line = masks.sum(dim).sum(0).pow(2) / (KEYS * side * variance(masks))
    assert 1e-4 < p_value(float(by_line.sum()), side - 1) < 1 - 1e-4


@pytest.mark.parametrize("lag", [1, 2, 71, 72, 73, 144])
def test_neighbors_are_independent(masks, lag):
    flat = masks.flatten(1)
    n = flat.shape[1]
    products = flat[:, lag:] * flat[:, :-lag]
    # Without replacement, two entries of one mask have covariance -variance / (n - 1).
    expected = -variance(masks) / (n - 1)
    per_pair = (products.sum(0) - KEYS * expected).pow(2) / (KEYS * variance(masks) ** 2)
    spread = (float(per_pair.sum()) - (n - lag)) / math.sqrt(float(per_pair.var()) * (n - lag))
    assert abs(spread) < 4
    per_mask = products.sum(1) - (n - lag) * expected
    assert abs(float(per_mask.sum())) < 4 * math.sqrt(KEYS * (n - lag)) * variance(masks)
    assert 0.8 < float(per_mask.var()) / ((n - lag) * variance(masks) ** 2) < 1.2


@pytest.mark.parametrize(("n", "pruned"), [(2, 1), (4, 2), (5, 2), (6, 3), (7, 1)])
def test_small_masks_are_uniform_over_the_subsets(n, pruned):
    draws = 6000
    counts = {}
    for number in range(draws):
        subset = tuple((KeyedPermutation(b"subset %d" % number, n).ranks(torch.arange(n)) < pruned).tolist())
        counts[subset] = counts.get(subset, 0) + 1
    subsets = math.comb(n, pruned)
    expected = draws / subsets
    statistic = sum((count - expected) ** 2 for count in counts.values()) / expected
    statistic += (subsets - len(counts)) * expected
    assert 1e-4 < p_value(statistic, subsets - 1) < 1 - 1e-4


def test_the_quality_tests_see_too_few_rounds(monkeypatch):
    """Three rounds leave a correlation between rows that the tests above must be sharp enough to see."""
    monkeypatch.setattr(permutation, "ROUNDS", 3)
    side = 72
    ranks = [
        KeyedPermutation(b"quality %d" % number, side * side).ranks(torch.arange(side * side)) for number in range(KEYS)
    ]
    kept = torch.stack(ranks) >= side * side // 2
    weak = kept.view(KEYS, side, side).double() - 0.5
    with pytest.raises(AssertionError):
        test_neighbors_are_independent(weak, side)

"""How much per layer: exact counts, the capacity rule of ERK against a slow and a published-style reference, errors."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_dual_ticket.masks.distributions import by_name, erk, require_matches, uniform, validate_sparsity

RESNET_LIKE = {
    "conv1": (16, 3, 3, 3),
    **{f"layer1.{i}": (16, 16, 3, 3) for i in range(6)},
    "layer2.0": (32, 16, 3, 3),
    **{f"layer2.{i}": (32, 32, 3, 3) for i in range(1, 6)},
    "layer3.0": (64, 32, 3, 3),
    **{f"layer3.{i}": (64, 64, 3, 3) for i in range(1, 6)},
    "fc": (10, 64),
}
sparsities = st.floats(0, 1, exclude_max=True)
layers = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6).map(
    lambda shapes: {f"layer{number}": tuple(shape) for number, shape in enumerate(shapes)}
)


# ---------------------------------------------------------------------- a valid sparsity


@pytest.mark.parametrize("value", [0, 0.0, -0.0, 0.5, Fraction(1, 3), 1 - 2**-53, 5e-324])
def test_valid(value):
    assert validate_sparsity(value) == float(value)
    assert type(validate_sparsity(value)) is float


def test_numpy_numbers_are_numbers():
    np = pytest.importorskip("numpy")
    assert validate_sparsity(np.float32(0.5)) == 0.5
    with pytest.raises(TypeError):
        validate_sparsity(np.bool_(False))


@pytest.mark.parametrize(
    "value", [1, 1.0, 90, -0.1, -5e-324, float("nan"), float("inf"), 10**400, 1 - Fraction(1, 10**20)], ids=str
)
def test_out_of_range(value):
    with pytest.raises(ValueError, match=r"^the sparsity of 'fc' must lie in \[0, 1\), got"):
        validate_sparsity(value, "the sparsity of 'fc'")


@pytest.mark.parametrize("value", [True, False, None, "0.9", 1j, [0.9]])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match=r"must be a number in \[0, 1\), got .*\(a "):
        validate_sparsity(value)


# ---------------------------------------------------------------------- uniform and by name


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 10**12), sparsities)))
def test_uniform_rounds_each_layer(layers):
    units = {name: count for name, (count, _) in layers.items()}
    of_each = {name: sparsity for name, (_, sparsity) in layers.items()}
    assert uniform(units, of_each) == {name: round(sparsity * count) for name, (count, sparsity) in layers.items()}


def one_layer_each(*names):
    return {f"{name}.weight": [name] for name in names}


def test_first_match_wins_and_unmatched_stay_dense():
    layers = one_layer_each("features.0", "features.3", "head.fc", "stem")
    assert by_name(layers, {"features.0": 0.1, "features.*": 0.5, "*fc": 0.9}) == {
        "features.0.weight": 0.1,
        "features.3.weight": 0.5,
        "head.fc.weight": 0.9,
        "stem.weight": 0.0,
    }
    assert by_name(layers, {"*": 0.2, "stem": 0.9}) == dict.fromkeys(layers, 0.2)
    assert by_name(one_layer_each(""), {"*": 0.5}) == {".weight": 0.5}
    assert by_name(one_layer_each("STEM", "stem"), {"s*": 0.5}) == {"STEM.weight": 0.0, "stem.weight": 0.5}
    assert list(by_name(layers, {"stem": 0.5, "*": 0})) == list(layers)


def test_a_tied_weight_answers_to_each_of_its_layers():
    layers = {"embedding.weight": ["embedding", "head"], "fc.weight": ["fc"]}
    assert by_name(layers, {"head": 0.5}) == {"embedding.weight": 0.5, "fc.weight": 0.0}
    assert by_name(layers, {"head": 0.5, "embedding": 0.75})["embedding.weight"] == 0.75


def test_patterns_without_a_layer_are_refused_with_close_names():
    names = [*RESNET_LIKE]
    with pytest.raises(ValueError, match=r"pattern 'layr3.0' matches no module; close names: 'layer3.0'"):
        by_name(one_layer_each(*names), {"layer1.*": 0.5, "layr3.0": 0.9})
    with pytest.raises(ValueError, match=r"exclude pattern 'zzz' matches no module; there are: 'conv1', .*, …$"):
        require_matches(["zzz"], names, "exclude pattern")
    with pytest.raises(ValueError, match=r"there are: 'a'$"):
        require_matches(["zzz"], ["a"])
    with pytest.raises(ValueError, match=r"none exist"):
        require_matches(["zzz"], [])
    with pytest.raises(TypeError, match=r"must be a string .* got 3"):
        require_matches([3], names)


def test_bad_values_name_their_pattern():
    with pytest.raises(ValueError, match=r"the sparsity of 'f\*' must lie in"):
        by_name(one_layer_each("fc"), {"f*": 1.5})
    with pytest.raises(TypeError, match=r"the sparsity of 'fc' must be a number"):
        by_name(one_layer_each("fc"), {"fc": True})


# ---------------------------------------------------------------------- Erdős–Rényi-Kernel


def slow_erk(shapes, sparsity, units=None):
    """Keep unit after unit, in the order in which a growing density rounds layers up, to nearest the budget."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = sizes if units is None else units
    total = sum(sizes.values())
    budget = total - round(sparsity * total)
    queue = []
    for position, (name, shape) in enumerate(shapes.items()):
        weights = sizes[name] // counts[name]
        queue += [
            (Fraction((2 * j - 1) * weights, 2 * sum(shape)), position, name, weights)
            for j in range(1, counts[name] + 1)
        ]
    pruned = dict(counts)
    kept = 0
    for *_, name, weights in sorted(queue):
        if kept + weights > budget and kept + weights - budget >= budget - kept:
            break
        kept += weights
        pruned[name] -= 1
    return pruned


@settings(deadline=None)
@given(layers, sparsities)
def test_erk_is_exact_and_agrees_with_the_slow_way(shapes, sparsity):
    pruned = erk(shapes, sparsity)
    total = sum(map(math.prod, shapes.values()))
    assert sum(pruned.values()) == round(sparsity * total)
    assert pruned == slow_erk(shapes, sparsity)


@settings(deadline=None)
@given(layers, sparsities, st.data())
def test_erk_over_units(shapes, sparsity, data):
    units = {
        name: math.prod(shape) // data.draw(st.sampled_from([1, shape[0], math.prod(shape)]))
        for name, shape in shapes.items()
    }
    pruned = erk(shapes, sparsity, units)
    assert pruned == slow_erk(shapes, sparsity, units)
    weights = {name: math.prod(shape) // units[name] for name, shape in shapes.items()}
    missed = sum(pruned[name] * weights[name] for name in shapes) - round(
        sparsity * sum(map(math.prod, shapes.values()))
    )
    assert abs(missed) <= max(weights.values()) / 2


@settings(deadline=None)
@given(layers, sparsities, sparsities, st.booleans())
def test_erk_never_prunes_less_at_a_higher_sparsity(shapes, first, second, filters):
    """Masks of successive cycles are nested only if no layer's count falls."""
    units = {name: shape[0] for name, shape in shapes.items()} if filters else None
    low, high = (erk(shapes, sparsity, units) for sparsity in sorted((first, second)))
    assert all(low[name] <= high[name] for name in shapes)


def published_densities(shapes, density):
    """The rule as published, in floating point: make the densest layers dense until no density exceeds 1."""
    dense = set()
    while True:
        budget = density * sum(map(math.prod, shapes.values())) - sum(math.prod(shapes[name]) for name in dense)
        raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items() if name not in dense}
        scale = budget / sum(raw[name] * math.prod(shapes[name]) for name in raw)
        top = max(raw.values())
        if scale * top <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= {name for name, value in raw.items() if value == top}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_erk_gives_the_published_densities(sparsity):
    pruned = erk(RESNET_LIKE, sparsity)
    densities = published_densities(RESNET_LIKE, 1 - sparsity)
    if sparsity < 0.9:
        assert 1.0 in densities.values(), "the case should exercise the capacity rule"
    for name, shape in RESNET_LIKE.items():
        size = math.prod(shape)
        assert abs((size - pruned[name]) - densities[name] * size) <= 2  # rounding, and an exact total
        if densities[name] == 1.0:
            assert pruned[name] == 0


def test_erk_at_the_scale_of_language_models():
    shapes = {f"{number}.{name}": (4096, width) for number in range(80) for name, width in (("up", 14336), ("q", 4096))}
    pruned = erk(shapes, 0.9)
    assert sum(pruned.values()) == round(0.9 * sum(map(math.prod, shapes.values())))
    assert erk({}, 0.5) == {}


def test_erk_refuses_what_it_cannot_distribute():
    with pytest.raises(ValueError, match=r"layer 'a' of shape \(0, 3\) has no weights"):
        erk({"a": (0, 3)}, 0.5)

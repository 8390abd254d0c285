"""Masks: exact, nested, the same in any split, independent between names and seeds, and what patterns promise."""

import itertools
import json
import math
import pickle
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_dual_ticket.masks import seeded
from torch_dual_ticket.masks.patterns import count_units, pruned_units
from torch_dual_ticket.masks.seeded import SeededMask

GOLDEN = Path(__file__).parent / "golden.json"

SHAPES_AND_PATTERNS = [
    ((), "unstructured", False),
    ((7,), "unstructured", False),
    ((30, 20), "unstructured", False),
    ((80, 70), "unstructured", False),
    ((6, 5, 4, 3, 2), "unstructured", True),
    ((12, 16), "2:4", False),
    ((12, 16, 3, 2), "2:4", False),
    ((12, 16, 3, 2), "1:3", True),
    ((32, 64, 3), "5:8", False),
    ((12, 16), "block:4x2", False),
    ((12, 16, 3, 2), "block:3x8", False),
    ((12, 16, 3, 2), "block:8x3", True),
    ((12, 16), "filter", False),
    ((12, 16, 3, 2), "filter", True),
    ((12, 16, 3, 2), "channel", False),
    ((12, 16, 3, 2), "channel", True),
]
every_pattern = pytest.mark.parametrize(("shape", "pattern", "transposed"), SHAPES_AND_PATTERNS)


def spec_of(shape, pattern="unstructured", transposed=False, sparsity=0.6, seed=0, name="layer.weight"):
    units = count_units(shape, pattern, 1 - transposed)
    if ":" in pattern and not pattern.startswith("block"):
        n, m = map(int, pattern.split(":"))
        sparsity = 1 - n / m
    return SeededMask(seed, name, shape, pruned_units(sparsity, units), pattern, transposed)


def slow_mask(spec):
    """The mask from the order of its units, position by position."""
    order = spec._permutation(torch.device("cpu")).ranks(torch.arange(spec.units)).tolist()
    outputs, inputs = (1, 0) if spec.transposed else (0, 1)
    shape = spec.shape
    mask = torch.empty(shape, dtype=torch.bool)

    def weight_rank(position):
        linear = 0
        for length, at in zip(shape, position, strict=True):
            linear = linear * length + at
        return order[linear]

    kind, *numbers = spec.pattern.replace("block:", "block ").replace("x", " ").replace(":", " ").split()
    for position in itertools.product(*map(range, shape)):
        if kind == "unstructured":
            kept = weight_rank(position) >= spec.pruned
        elif kind == "filter":
            kept = order[position[outputs]] >= spec.pruned
        elif kind == "channel":
            kept = order[position[inputs]] >= spec.pruned
        elif kind == "block":
            size = {outputs: int(numbers[0]), inputs: int(numbers[1])}
            linear = 0
            for dim, at in enumerate(position):
                linear = linear * (shape[dim] // size.get(dim, 1)) + at // size.get(dim, 1)
            kept = order[linear] >= spec.pruned
        else:
            n, m = int(kind), int(numbers[0])
            first = position[inputs] // m * m
            group = [weight_rank((*position[:inputs], first + j, *position[inputs + 1 :])) for j in range(m)]
            kept = weight_rank(position) in sorted(group)[-n:]
        mask[position] = kept
    return mask


@every_pattern
def test_agrees_with_the_definition(shape, pattern, transposed):
    spec = spec_of(shape, pattern, transposed)
    mask = spec.draw()
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert torch.equal(mask, slow_mask(spec))
    assert int((~mask).sum()) == spec.pruned_weights


@every_pattern
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_block_can_be_drawn_alone(shape, pattern, transposed, data):
    spec = spec_of(shape, pattern, transposed)
    offset = [data.draw(st.integers(0, length)) for length in shape]
    size = [data.draw(st.integers(0, length - first)) for length, first in zip(shape, offset, strict=True)]
    part = spec.draw(offset=offset, size=size)
    whole = spec.draw()
    assert part.is_contiguous()
    assert torch.equal(part, whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))])
    assert torch.equal(spec.draw(offset=offset), whole[tuple(slice(o, None) for o in offset)])


@pytest.mark.parametrize("size", [(4000, 37), (100, 1000)])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_blocks_of_many_chunks(size, pattern):
    spec = spec_of((5000, 1000), pattern)
    offset = [(full - length) // 2 for full, length in zip(spec.shape, size, strict=True)]
    whole = spec.draw()
    assert torch.equal(
        spec.draw(offset=offset, size=size), whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:8x8", "filter"])
def test_chunk_size_does_not_matter(pattern, monkeypatch):
    spec = spec_of((400, 304), pattern)
    whole = spec.draw()
    monkeypatch.setattr("torch_dual_ticket.masks.seeded._CPU_CHUNK", 1000)
    assert torch.equal(spec.draw(), whole)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), n=st.one_of(st.integers(1, 50), st.integers(1, 50_000)), seed=st.integers(-(2**70), 2**70))
def test_counts_are_exact_and_nested(data, n, seed):
    counts = sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=3)))
    masks = [SeededMask(seed, "w", (n,), count).draw() for count in counts]
    assert [int((~mask).sum()) for mask in masks] == counts
    for smaller, larger in itertools.pairwise(masks):
        assert not (larger & ~smaller).any()


@pytest.mark.parametrize("n", [10_000_000, 9_998_243, 3163 * 3163])
@pytest.mark.parametrize("sparsity", [0.9, 1 / 3])
def test_counts_are_exact_in_large_layers(n, sparsity):
    spec = SeededMask(0, "w", (n,), pruned_units(sparsity, n))
    assert n - int(spec.draw().sum()) == round(sparsity * n) == spec.pruned_weights


def test_part_of_a_mask_too_large_to_draw():
    spec = SeededMask(0, "w", (2**20, 2**20), 2**40 // 10 * 9)
    part = spec.draw(offset=(2**19, 0), size=(1, 2**16))
    assert abs(int(part.sum()) - 2**16 / 10) < 4 * math.sqrt(2**16 * 0.09)
    assert torch.equal(spec.draw(offset=(2**19, 77), size=(2, 50))[:1], part[:, 77:127])
    assert spec.pruned_weights == 2**40 // 10 * 9


@pytest.mark.parametrize("count", ["none", "all"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "filter", "channel"])
def test_nothing_and_everything(count, pattern):
    units = count_units((80, 70), pattern)
    mask = SeededMask(0, "w", (80, 70), units if count == "all" else 0, pattern).draw()
    assert bool(mask.any()) == bool(mask.all()) == (count == "none")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0, 3)])
def test_empty_weights(shape):
    assert SeededMask(0, "w", shape, 0).draw().shape == shape


def test_a_mask_belongs_to_a_shape():
    """The same number of weights in another shape is another mask, not the same bits in another order."""
    flat = spec_of((100, 60)).draw().flatten()
    assert not torch.equal(flat, spec_of((60, 100)).draw().flatten())


# ---------------------------------------------------------------------- what a mask depends on


def test_independent_between_names_seeds_shapes_and_patterns():
    """Overlaps are hypergeometric: the number kept by both masks is what chance gives."""
    side = 80
    n = side * side
    base = [spec_of((side, side), name=f"layers.{number}.weight", seed=number % 3) for number in range(60)]
    base += [replace(spec, pattern="block:1x1") for spec in base]
    masks = torch.stack([spec.draw().flatten() for spec in base]).double()
    kept = float(masks[0].sum())
    overlaps = masks @ masks.T
    expected = kept * kept / n
    deviation = math.sqrt(expected * (1 - kept / n) * (n - kept) / (n - 1))
    scores = ((overlaps - expected) / deviation)[torch.ones_like(overlaps).triu(1).bool()]
    assert float(scores.abs().max()) < 5
    assert abs(float(scores.mean())) < 4 / math.sqrt(len(scores))
    assert abs(float(scores.var()) - 1) < 4 * math.sqrt(2 / len(scores))


def test_orientation_alone_does_not_change_an_unstructured_mask():
    spec = spec_of((12, 16))
    assert torch.equal(spec.draw(), replace(spec, transposed=True).draw())


def test_torch_state_does_not_matter():
    spec = spec_of((80, 72), "2:4")
    expected = spec.draw()
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"), torch.inference_mode():
            drawn = spec.draw()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(drawn, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "filter", "channel"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same(pattern):
    for shape in [(40, 40), (1000, 3000), (64, 64, 3, 3)]:
        spec = spec_of(shape, pattern)
        drawn = spec.draw(device="cuda")
        assert drawn.device.type == "cuda"
        assert torch.equal(drawn.cpu(), spec.draw())
        part = spec.draw(offset=(3, 5, *[0] * (len(shape) - 2)), device="cuda")
        assert torch.equal(part.cpu(), spec.draw()[3:, 5:])


@pytest.fixture
def drawing_devices(monkeypatch):
    """The devices on which permutations are made, in their order."""
    permutation, devices = seeded.KeyedPermutation, []

    def recording(key, n, device):
        devices.append(device.type)
        return permutation(key, n, device)

    monkeypatch.setattr(seeded, "KeyedPermutation", recording)
    return devices


def test_masks_for_apples_gpu_are_drawn_on_the_cpu(drawing_devices):
    """That GPU divides integers in floating point, and nearly no test machine has one."""
    with suppress(RuntimeError):  # from moving the mask there
        spec_of((80, 70)).draw(device="mps")
    assert drawing_devices == ["cpu"]


def test_a_mask_drawn_on_the_cpu_is_moved(drawing_devices, monkeypatch):
    """The meta device stands in for one that cannot draw."""
    monkeypatch.setattr(seeded, "_INEXACT_DEVICES", ("meta",))
    drawn = spec_of((80, 70), "block:2x2").draw(offset=(3, 5), size=(40, 50), device="meta")
    assert (drawn.device.type, tuple(drawn.shape), drawn.dtype) == ("meta", (40, 50), torch.bool)
    assert drawing_devices == ["cpu"]


# ---------------------------------------------------------------------- patterns


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 9),
    outputs=st.integers(1, 9),
    kernel=st.lists(st.integers(1, 3), max_size=3),
    n_m=st.tuples(st.integers(1, 16), st.integers(2, 16)).filter(lambda pair: pair[0] < pair[1]),
    transposed=st.booleans(),
)
def test_n_of_m_in_every_group(groups, outputs, kernel, n_m, transposed):
    n, m = n_m
    inputs = 0 if transposed else 1
    shape = (groups * m, outputs, *kernel) if transposed else (outputs, groups * m, *kernel)
    mask = spec_of(shape, f"{n}:{m}", transposed).draw()
    assert (mask.unflatten(inputs, (groups, m)).sum(inputs + 1) == n).all()


def test_n_of_m_subsets_are_uniform_and_neighbors_independent():
    mask = spec_of((1000, 1200), "2:4").draw().view(-1, 4).long()
    codes = (mask * torch.tensor([8, 4, 2, 1])).sum(1)
    subsets = sorted(set(codes.tolist()))
    assert len(subsets) == 6
    index = torch.searchsorted(torch.tensor(subsets), codes)
    for counts in (torch.bincount(index, minlength=6), torch.bincount(index[1:] * 6 + index[:-1], minlength=36)):
        expected = counts.sum() / len(counts)
        statistic = ((counts - expected) ** 2 / expected).sum()
        degrees = len(counts) - 1
        assert 1e-4 < float(torch.special.gammaincc(torch.tensor(degrees / 2), statistic / 2)) < 1 - 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_filters_and_channels_are_whole(transposed):
    outputs, inputs = (1, 0) if transposed else (0, 1)
    shape = (24, 36, 3, 3)
    mask = spec_of(shape, "block:6x4", transposed).draw()
    tiles = mask.unflatten(outputs, (-1, 6)).unflatten(inputs + (1 if inputs > outputs else 0), (-1, 4))
    dims = (1, 3)
    assert torch.equal(tiles.all(dims[1]).all(dims[0]), tiles.any(dims[1]).any(dims[0]))
    # Each kernel position has its own choice.
    assert not torch.equal(mask[:, :, 0, 0], mask[:, :, 0, 1])
    for pattern, dim in (("filter", outputs), ("channel", inputs)):
        lines = spec_of(shape, pattern, transposed).draw().movedim(dim, 0).flatten(1)
        assert torch.equal(lines.all(1), lines.any(1))
        assert int((~lines.any(1)).sum()) == round(0.6 * shape[dim])


# ---------------------------------------------------------------------- errors and identity


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match=r"pruned must lie in 0 … 6.*got 7"):
        SeededMask(0, "w", (2, 3), 7)
    with pytest.raises(ValueError, match=r"0 … 6.*got -1"):
        SeededMask(0, "w", (2, 3), -1)
    with pytest.raises(ValueError, match=r"prunes exactly 4 of the 8 weights.*pruned=3"):
        SeededMask(0, "w", (2, 4), 3, "2:4")
    with pytest.raises(ValueError, match="unknown pattern"):
        SeededMask(0, "w", (2, 4), 3, "3:2")
    with pytest.raises(TypeError):
        SeededMask(0, "w", (2, 4), 3.0)
    with pytest.raises(TypeError):
        SeededMask(0.5, "w", (2, 4), 3)


@pytest.mark.parametrize(
    ("offset", "size"),
    [((0,), None), ((0, 0, 0), None), ((-1, 0), (1, 1)), ((0, 0), (5, 1)), ((3, 3), (1, 4)), ((5, 0), None)],
)
def test_blocks_outside_are_refused(offset, size):
    with pytest.raises(ValueError, match="does not lie within shape"):
        SeededMask(0, "w", (4, 6), 3).draw(offset=offset, size=size)


def test_fingerprint_depends_on_every_field():
    spec = SeededMask(1, "a.weight", (8, 8), 32)
    others = [
        replace(spec, seed=2),
        replace(spec, name="b.weight"),
        replace(spec, shape=(4, 16)),
        replace(spec, pruned=33),
        replace(spec, pattern="2:4"),
        replace(spec, transposed=True),
    ]
    prints = {each.fingerprint for each in [spec, *others]}
    assert len(prints) == 7
    assert pickle.loads(pickle.dumps(spec)).fingerprint == spec.fingerprint
    assert SeededMask(1, "a.weight", torch.Size([8, 8]), 32) == spec
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


def test_numbers_of_other_integer_types_give_the_same_mask():
    np = pytest.importorskip("numpy")
    spec = SeededMask(np.int64(1), "w", (np.int32(8), 8), np.int64(5))
    assert spec == SeededMask(1, "w", (8, 8), 5)
    assert spec.fingerprint == SeededMask(1, "w", (8, 8), 5).fingerprint


# ---------------------------------------------------------------------- the golden file


def packed(mask):
    """The bits of a mask as bytes, the first in the lowest bit, zeros at the end."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return bytes((bits * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)).sum(1).tolist())


def load_golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", load_golden(), ids=lambda case: f"{case['name']}-{case['shape']}-{case['pattern']}")
def test_masks_are_what_they_were(case):
    """A ticket is its seed: if this fails, every ticket that anybody has saved would become another one.

    Where that is intended, increase `ALGORITHM` in masks/seeded.py and write the file anew with
    ``python tests/masks/test_masks.py``.
    """
    assert golden_entry(case) == case


def golden_entry(case):
    fields = {key: case[key] for key in ("seed", "name", "shape", "pruned", "pattern", "transposed")}
    spec = SeededMask(**fields)
    mask = spec.draw(offset=case["offset"], size=case["size"])
    return {
        **fields,
        "offset": case["offset"],
        "size": case["size"],
        "kept": int(mask.sum()),
        "sha256": sha256(packed(mask)).hexdigest(),
        "fingerprint": spec.fingerprint,
    }


def golden_cases():
    cases = [
        (0, "weight", (1,), 0),
        (0, "weight", (5,), 2),
        (7, "fc.weight", (10, 784), 7056),
        (7, "fc.weight", (10, 784), 3920),
        (8, "fc.weight", (10, 784), 7056),
        (7, "fc2.weight", (10, 784), 7056),
        (-1, "fc.weight", (63, 65), 4000),
        (2**63, "fc.weight", (64, 64), 4000),
        (0, "größe.weight", (97, 101), 5000),
        (0, "features.0.weight", (64, 64, 3, 3), 33178),
        (0, "weight", (1000, 1003), 902700),
        (0, "conv.weight", (64, 64, 3, 3), 18432, "2:4"),
        (0, "conv.weight", (64, 64, 3, 3), 18432, "2:4", True),
        (0, "conv.weight", (16, 16, 3, 3), 864, "5:8"),
        (0, "conv.weight", (64, 64, 3, 3), 1000, "block:4x8"),
        (0, "conv.weight", (64, 64, 3, 3), 1000, "block:4x8", True),
        (0, "conv.weight", (64, 64, 3, 3), 50, "filter"),
        (0, "conv.weight", (64, 32, 3, 3), 20, "filter", True),
        (0, "conv.weight", (64, 64, 3, 3), 50, "channel"),
        (0, "conv.weight", (5000, 2, 3, 3), 4500, "filter"),
    ]
    for seed, name, shape, pruned, *rest in cases:
        pattern, transposed = (*rest, *("unstructured", False)[len(rest) :])
        yield [0] * len(shape), list(shape), seed, name, list(shape), pruned, pattern, transposed
    huge = [2**21, 2**19]
    yield [2**20, 77], [100, 100], 0, "embedding.weight", huge, 2**40 // 10 * 9, "unstructured", False
    yield [2**20, 77], [100, 100], 0, "embedding.weight", huge, 2**39, "2:4", False


if __name__ == "__main__":
    keys = ("offset", "size", "seed", "name", "shape", "pruned", "pattern", "transposed")
    entries = [golden_entry(dict(zip(keys, case, strict=True))) for case in golden_cases()]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")

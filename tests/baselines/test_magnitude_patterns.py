"""Of every m weights along the input dimension the n largest stay; of blocks, filters and channels the largest sums."""

import itertools

import pytest
import torch
from models import make, mlp
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import hold, magnitude_masks

LAYERS = {
    "linear": (lambda outputs=5: nn.Linear(12, outputs), 1),
    "conv1d": (lambda outputs=5: nn.Conv1d(12, outputs, 3), 1),
    "conv2d": (lambda outputs=5: nn.Conv2d(12, outputs, 3), 1),
    "transposed": (lambda outputs=5: nn.ConvTranspose2d(12, outputs, 3), 0),
}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "2:6"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_largest_of_each_group_stay(layer, pattern):
    build, inputs = LAYERS[layer]
    torch.manual_seed(0)
    module = build()
    n, m = map(int, pattern.split(":"))
    mask = magnitude_masks(module, pattern=pattern)["weight"]
    assert mask.shape == module.weight.shape
    assert mask.is_contiguous()
    weight, mask = (tensor.detach().movedim(inputs, 0) for tensor in (module.weight, mask))
    for position in itertools.product(*map(range, weight.shape[1:])):
        column, kept = weight[(slice(None), *position)], mask[(slice(None), *position)]
        for first in range(0, len(column), m):
            group = column[first : first + m].abs()
            assert kept[first : first + m].nonzero().flatten().tolist() == sorted(group.topk(n).indices.tolist())


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:1x3", "block:2x4"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_units_of_the_largest_sums_stay(layer, pattern, dtype):
    build, inputs = LAYERS[layer]
    torch.manual_seed(0)
    module = build(outputs=6).to(dtype)
    rows, columns = {"filter": (1, 12), "channel": (6, 1)}.get(pattern) or map(int, pattern[6:].split("x"))
    mask = magnitude_masks(module, 0.5, pattern=pattern)["weight"]
    assert mask.is_contiguous()
    weight, mask = (t.detach().movedim(inputs, 1).flatten(2) for t in (module.weight.unsqueeze(-1), mask.unsqueeze(-1)))
    tiled = pattern.startswith("block")  # a block is one of each position of the kernel, the others of all
    sums = []
    for row, column in itertools.product(range(0, 6, rows), range(0, 12, columns)):
        for position in range(weight.shape[2]) if tiled else [slice(None)]:
            unit = (slice(row, row + rows), slice(column, column + columns), position)
            sums.append((weight[unit].double().abs().sum().item(), mask[unit].unique().tolist()))
    ordered = [kept for _, kept in sorted(sums)]
    assert ordered == [[False]] * round(len(sums) / 2) + [[True]] * (len(sums) - round(len(sums) / 2))


def test_masked_filters_are_removed_before_all_and_of_equal_ones_the_first():
    model = nn.Linear(3, 4)
    nn.init.ones_(model.weight)
    assert magnitude_masks(model, 0.5, pattern="filter")["weight"].all(1).tolist() == [False, False, True, True]
    earlier = {"weight": torch.tensor([True, True, True, False])[:, None].expand(4, 3)}
    masks = magnitude_masks(model, 0.5, pattern="filter", within=earlier)
    assert masks["weight"].all(1).tolist() == [False, True, True, False]


def test_of_equal_magnitudes_the_first_are_removed_and_masked_ones_before_all():
    model = nn.Linear(4, 2)
    nn.init.ones_(model.weight)
    assert magnitude_masks(model, pattern="2:4")["weight"].tolist() == [[False, False, True, True]] * 2
    earlier = {"weight": torch.tensor([[True, True, True, False], [True, True, False, False]])}
    masks = magnitude_masks(model, pattern="2:4", within=earlier)
    assert masks["weight"].tolist() == [[False, True, True, False], [True, True, False, False]]


def test_the_masks_have_the_pattern_and_can_be_held():
    model = make(mlp)
    masks = magnitude_masks(model, {"0": 0.5, "2": 0.5}, pattern="2:4")
    expected = RSTScheduler(make(mlp), {"0": 0.5, "2": 0.5}, pattern="2:4", seed=0).masks
    assert {name: mask.sum() for name, mask in masks.items()} == {name: mask.sum() for name, mask in expected.items()}
    assert hold(model, masks).sparsity == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.9, "pattern": "2:4"}, "means a sparsity of 0.5"),
        ({"pattern": "2:5"}, "not a multiple of 5"),
        ({"pattern": "2:4", "distribution": "global"}, "distribution='global' is not possible"),
        ({"pattern": "2:4", "distribution": "erk"}, "distribution='erk' is not possible"),
        ({"pattern": "filter", "distribution": "global"}, "distribution='global' is not possible"),
        ({"pattern": "block:5x5"}, "not a multiple of 5"),
        ({"pattern": "4:2"}, "unknown pattern '4:2'"),
    ],
)
def test_incompatible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        magnitude_masks(make(mlp), **options)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_the_default_sparsity_is_90_percent(distribution):
    masks = magnitude_masks(make(mlp), distribution=distribution)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == pytest.approx(0.1 * sum(sizes.values()), abs=len(masks))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_scores_are_compared_in_place_of_magnitudes(pattern):
    """Negative ones and integers, too; what earlier masks remove goes first."""
    model = make(mlp)
    weights = {name: layer.weight.detach() for name, layer in (("0.weight", model[0]), ("2.weight", model[2]))}
    options = {"pattern": pattern, "exclude": ["4"]} | ({"sparsity": 0.5} if pattern == "unstructured" else {})
    expected = magnitude_masks(model, **options)
    scores = {name: -1 / weight.abs() for name, weight in weights.items()}  # in the same order
    for given in (scores, {name: score.argsort().argsort() for name, score in flattened(scores).items()}):
        given = {name: score.view(weights[name].shape) for name, score in given.items()} | {"other": None}
        masks = magnitude_masks(model, scores=given, **options)
        assert all(torch.equal(masks[name], expected[name]) for name in weights)
    reverse = magnitude_masks(model, scores={name: -score for name, score in scores.items()}, **options)
    assert not any(torch.equal(reverse[name], expected[name]) for name in weights)
    again = magnitude_masks(model, scores=scores, within=reverse, **options)
    assert all(torch.equal(again[name], reverse[name]) for name in weights)


def test_two_of_four_stay_of_infinite_weights_too():
    layer = nn.Linear(8, 2)
    nn.init.constant_(layer.weight, torch.inf)
    assert (magnitude_masks(layer, pattern="2:4")["weight"].view(-1, 4).sum(1) == 2).all()


def flattened(scores):
    return {name: score.flatten() for name, score in scores.items()}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, r"scores must have a tensor of shape \(3, 4\) for weight, got nothing"),
        ({"weight": torch.ones(4, 3)}, r"for weight, got torch.Size\(\[4, 3\]\)"),
        ({"weight": 0.5}, "for weight, got float"),
        ({"weight": torch.full((3, 4), torch.nan)}, "scores of weight must be finite real numbers"),
        ({"weight": torch.ones(3, 4, dtype=torch.complex64)}, "scores of weight must be finite real numbers"),
    ],
)
def test_scores_that_cannot_be_ordered_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        magnitude_masks(nn.Linear(4, 3), 0.5, scores=scores)


def test_scores_without_names_are_refused():
    with pytest.raises(TypeError, match="scores must be a mapping from parameter names to tensors; got list"):
        magnitude_masks(nn.Linear(4, 3), 0.5, scores=[torch.ones(3, 4)])


def test_earlier_masks_may_be_of_zeros_and_ones():
    layer = nn.Linear(4, 3)
    first = magnitude_masks(layer, 0.5, scores={"weight": torch.arange(12.0).view(3, 4)})
    expected = magnitude_masks(layer, 0.75, within=first)
    assert torch.equal(
        magnitude_masks(layer, 0.75, within={"weight": first["weight"].float()})["weight"], expected["weight"]
    )


@pytest.mark.parametrize(
    ("within", "error", "message"),
    [
        (0, TypeError, "a mapping from parameter names to masks, got int"),
        (torch.ones(4, 8), TypeError, "a mapping from parameter names to masks, got Tensor"),
        ({"weigth": torch.ones(4, 8)}, ValueError, "'weigth' does not belong to a parameter"),
        ({"weight": torch.ones(3)}, ValueError, r"the mask of weight has shape \(3,\), the parameter \(4, 8\)"),
        ({"weight": torch.full((4, 8), 2.0)}, ValueError, "must hold 0 .pruned. and 1 .kept. only, got 2.0"),
    ],
)
def test_earlier_masks_that_are_none_are_refused(within, error, message):
    with pytest.raises(error, match=message):
        magnitude_masks(nn.Linear(8, 4), 0.5, within=within)

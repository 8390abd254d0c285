"""weight_norm and spectral_norm, old and new: the mask goes on the leaf under them. Others are refused by name."""

import copy

import pytest
import torch
from models import finalize_quietly, make
from plain_loop import assert_lives_alike, loss_of, normal, sgd
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_dual_ticket import RSTScheduler

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")

NORMS = {
    "old-weight-norm": (nn.utils.weight_norm, "weight_v"),
    "old-spectral-norm": (nn.utils.spectral_norm, "weight_orig"),
    "new-weight-norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "new-spectral-norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
}
LAYERS = {
    "Linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_leaf_is_penalized_and_masked(norm, layer):
    reparametrize, leaf = NORMS[norm]
    build, shape = LAYERS[layer]
    assert_lives_alike(lambda: reparametrize(build()), normal(*shape), [leaf], sparsity=0.4)


@pytest.mark.parametrize("norm", ["old-weight-norm", "new-weight-norm"])
@pytest.mark.parametrize("dim", [None, 1, -1])
def test_weight_norm_along_other_dimensions(norm, dim):
    reparametrize, leaf = NORMS[norm]
    assert_lives_alike(lambda: reparametrize(nn.Linear(7, 5), dim=dim), normal(4, 7), [leaf], sparsity=0.4)


def finalized(norm: str) -> tuple[nn.Module, RSTScheduler, torch.Tensor]:
    """A layer, and its direction before the zeros."""
    model = nn.Sequential(make(lambda: NORMS[norm][0](nn.Linear(7, 5))), nn.Identity())
    rst = RSTScheduler(model, 0.4, steps=2, seed=0)
    optimizer = sgd(model)
    for index in range(3):
        optimizer.zero_grad()
        loss_of(model(*normal(4, 7)(index))).backward()
        optimizer.step()
        rst.step()
    dense = copy.deepcopy(model.state_dict())
    finalize_quietly(rst)
    return model, rst, dense


@pytest.mark.parametrize("norm", NORMS)
def test_the_weight_that_the_forward_uses_has_the_zeros(norm):
    model, rst, _ = finalized(norm)
    (kept,) = rst.masks.values()
    model(*normal(4, 7)(0))
    assert torch.equal(model[0].weight != 0, kept)


@pytest.mark.parametrize("norm", NORMS)
def test_a_dense_state_is_masked_before_the_norm_is_taken(norm):
    """The safety net comes before the hook that computes the weight, so the backward finds what the forward used."""
    model, rst, dense = finalized(norm)
    (kept,) = rst.masks.values()
    model.load_state_dict(dense)
    loss = loss_of(model(*normal(4, 7)(0)))
    assert torch.equal(model[0].weight != 0, kept)
    loss.backward()
    (leaf,) = rst.masks
    assert torch.equal(model.get_parameter(leaf).grad != 0, kept)


@pytest.mark.parametrize("norm", NORMS)
def test_stock_prune_is_refused_and_leaves_the_hooks_in_their_order(norm):
    model = finalized(norm)[0]
    hooks = list(model[0]._forward_pre_hooks.items())
    with pytest.raises(RuntimeError, match="managed by an RSTScheduler"):
        prune.l1_unstructured(model[0], "weight", 3)
    assert list(model[0]._forward_pre_hooks.items()) == hooks
    assert prune.remove(model[0], "weight") is model[0]
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("norm", ["old-weight-norm", "new-weight-norm"])
@pytest.mark.parametrize(
    ("dim", "shape", "left", "is_refused"),
    [
        (0, (5, 1), 1, True),
        (0, (1, 5), 1, False),
        (-2, (5, 1), 1, True),
        (1, (1, 5), 1, True),
        (1, (5, 1), 1, False),
        (None, (2, 3), 1, False),
        (None, (2, 3), 0, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rounds to all")
def test_a_mask_that_would_empty_a_slice_is_refused(norm, dim, shape, left, is_refused):
    """Each slice along ``dim`` is divided by its norm, and there is not a weight left for each."""
    reparametrize, leaf = NORMS[norm]
    model = nn.Sequential(nn.Linear(5, 5), reparametrize(nn.Linear(*shape[::-1]), dim=dim))
    size = model.get_parameter(f"1.{leaf}").numel()
    sparsity = {"0": 0.5, "1": 1 - left / size if left else 0.99}
    if is_refused:
        with pytest.raises(ValueError, match=rf"1\.{leaf} is the direction of a weight_norm.* lower sparsity"):
            RSTScheduler(model, sparsity, seed=0)
        assert not model[0]._forward_pre_hooks
    else:
        RSTScheduler(model, sparsity, seed=0)
        assert model[1](torch.ones(1, shape[1])).isfinite().all()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("norm", ["new-weight-norm", "new-spectral-norm"])
def test_a_norm_with_another_parametrization_on_top_is_refused(norm):
    layer = NORMS[norm][0](nn.Linear(6, 6))
    parametrize.register_parametrization(layer, "weight", Doubled())
    with pytest.raises(ValueError, match=r"weight is parametrized by _\w+Norm and Doubled"):
        RSTScheduler(layer, 0.5)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda norm: norm.__name__)
def test_an_old_norm_of_the_bias_is_not_taken_for_one_of_the_weight(norm):
    layer = norm(nn.Linear(6, 6), "bias")
    prune.random_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match=r"weight is already pruned by torch\.nn\.utils\.prune"):
        RSTScheduler(layer, 0.5)


@pytest.mark.parametrize(("norm", "suffix"), [(nn.utils.weight_norm, "v"), (nn.utils.spectral_norm, "orig")])
def test_two_old_norms_on_one_layer(norm, suffix):
    """Each weight has its own leaf."""

    def build():
        return norm(norm(nn.LSTM(6, 5), "weight_ih_l0"), "weight_hh_l0")

    names = [f"weight_ih_l0_{suffix}", f"weight_hh_l0_{suffix}"]
    assert_lives_alike(build, normal(4, 3, 6), names, sparsity=0.4, targets=[(nn.LSTM, "weight_*")])


def test_other_parametrizations_are_refused_by_name_or_excluded():
    def build():
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        parametrize.register_parametrization(model[0], "weight", Doubled())
        return model

    with pytest.raises(ValueError, match=r"0\.weight is parametrized by Doubled.*exclude=\['0'\]"):
        RSTScheduler(make(build), 0.5)
    assert_lives_alike(build, normal(4, 6), ["2.weight"], exclude=["0"])


class ScaledStdConv2d(nn.Conv2d):
    """As in timm, in what matters: the kernel is computed from the weight in each forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.weight - mean, self.bias)


class ScaledStdConv2dSame(ScaledStdConv2d): ...


class WeightStandardizedConv2d(ScaledStdConv2d):
    """The name that transformers has for it."""


@pytest.mark.parametrize("kind", [ScaledStdConv2d, ScaledStdConv2dSame, WeightStandardizedConv2d])
def test_standardized_weights_are_refused_all_at_once(kind):
    stages = [nn.Sequential(kind(3, 4, 3), nn.ReLU(), kind(4, 4, 3)) for _ in range(2)]
    model = nn.ModuleDict({"stages": nn.ModuleList(stages), "head": nn.Linear(4, 4)})
    told = (
        r"stages\.0\.0\.weight, stages\.0\.2\.weight, stages\.1\.0\.weight and 1 more are standardized by the forward"
        rf" of {kind.__name__}, .*would not be zeros of the kernel.*exclude=\['stages'\]"
    )
    with pytest.raises(ValueError, match=told):
        RSTScheduler(model, 0.5)
    assert list(RSTScheduler(model, 0.5, exclude=["stages"]).masks) == ["head.weight"]


def test_a_parametrized_bias_is_not_an_obstacle():
    def build():
        layer = nn.Linear(6, 4)
        parametrize.register_parametrization(layer, "bias", Doubled())
        return layer

    assert_lives_alike(build, normal(4, 6), ["weight"])


def test_a_cached_parametrization():
    def build():
        return parametrizations.weight_norm(nn.Linear(6, 6))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = build()

        def forward(self, x):
            with parametrize.cached():
                return self.layer(self.layer(x).tanh())

    assert_lives_alike(Twice, normal(4, 6), ["layer.parametrizations.weight.original1"], sparsity=0.4)

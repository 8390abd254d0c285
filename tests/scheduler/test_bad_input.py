"""Input that cannot be used: the right type of error, the culprit and the remedy in it, and nothing changed."""

import inspect
import re
from collections import OrderedDict

import pytest
import torch
from snapshots import snapshot
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_dual_ticket import RSTScheduler


def named(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def plain() -> nn.Module:
    return named(first=nn.Linear(6, 8), body=nn.Sequential(nn.Linear(8, 8), nn.ReLU()), head=nn.Linear(8, 4))


def small() -> nn.Module:
    return named(first=nn.Linear(2, 2), head=nn.Linear(1, 3))


def convolutional() -> nn.Module:
    return named(first=nn.Conv2d(8, 8, 3), grouped=nn.Conv2d(8, 8, 3, groups=4))


def normed() -> nn.Module:
    return named(first=nn.Linear(6, 8), norm=nn.LayerNorm(8))


def recurrent() -> nn.Module:
    return named(first=nn.Linear(6, 8), memory=nn.LSTM(8, 8))


def lazy() -> nn.Module:
    return named(first=nn.Linear(6, 8), head=nn.LazyLinear(4))


def frozen() -> nn.Module:
    model = plain()
    model.head.weight.requires_grad_(False)
    return model


def with_weight(weight: torch.Tensor) -> nn.Module:
    model = plain()
    model.head.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point() or weight.is_complex())
    return model


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def custom() -> nn.Module:
    model = plain()
    parametrize.register_parametrization(model.head, "weight", Doubled())
    return model


def twice_parametrized() -> nn.Module:
    model = custom()
    parametrizations.weight_norm(model.head)
    return model


def orthogonal() -> nn.Module:
    model = plain()
    parametrizations.orthogonal(model.head)
    return model


def stock_pruned() -> nn.Module:
    model = plain()
    prune.l1_unstructured(model.head, "weight", 3)
    return model


def weight_normed() -> nn.Module:
    model = plain()
    parametrizations.weight_norm(model.head)
    return model


def weight_normed_as_a_whole() -> nn.Module:
    return named(first=nn.Linear(6, 8), head=parametrizations.weight_norm(nn.Linear(1, 8), dim=None))


def managed() -> nn.Module:
    model = plain()
    model.first.scheduler = RSTScheduler(model.body, 0.5, seed=0)  # kept alive, and not by a cycle
    return model


def nan(progress: float) -> float:
    return float("nan")


SPARSITY = r"sparsity must .*in \[0, 1\).* got "
TARGETS = "targets are module types, whose `weight` is taken, or pairs .* as in targets=.* dimension .* inputs"
EXCLUDE = "exclude is a sequence of name patterns, as in exclude="

# id: the model, the arguments, the type of the error, and what its message must have: the culprit and the remedy
CONSTRUCTIONS = {
    "model-is-a-list": (list, {}, TypeError, "model must be a torch.nn.Module, got list"),
    "model-is-a-class": (lambda: nn.Linear, {}, TypeError, "model must be a torch.nn.Module, got type"),
    "sparsity-negative": (plain, {"sparsity": -0.1}, ValueError, SPARSITY + "-0.1.* for example 0.9"),
    "sparsity-one": (plain, {"sparsity": 1.0}, ValueError, SPARSITY + "1.0.* for example 0.9"),
    "sparsity-percent": (plain, {"sparsity": 90}, ValueError, SPARSITY + "90.* for example 0.9"),
    "sparsity-nan": (plain, {"sparsity": float("nan")}, ValueError, SPARSITY + "nan"),
    "sparsity-inf": (plain, {"sparsity": float("inf")}, ValueError, SPARSITY + "inf"),
    "sparsity-bool": (plain, {"sparsity": True}, TypeError, SPARSITY + "True"),
    "sparsity-text": (plain, {"sparsity": "0.9"}, TypeError, SPARSITY + "'0.9'"),
    "sparsity-list": (plain, {"sparsity": [0.9]}, TypeError, SPARSITY + r"\[0.9\]"),
    "sparsity-zero": (plain, {"sparsity": 0}, ValueError, "nothing to prune: sparsity=0 leaves every layer dense"),
    "sparsity-rounds-to-none": (
        small,
        {"sparsity": 0.1},
        ValueError,
        "=0.1 rounds to no unit.* 4 units. Give a higher",
    ),
    "sparsity-mapping-empty": (plain, {"sparsity": {}}, ValueError, "nothing to prune: sparsity={}"),
    "sparsity-mapping-zeros": (plain, {"sparsity": {"*": 0.0}}, ValueError, "nothing to prune: sparsity={'[*]': 0.0}"),
    "sparsity-mapping-typo": (plain, {"sparsity": {"haed": 0.5}}, ValueError, "'haed' matches no module; .*'head'"),
    "sparsity-mapping-key": (plain, {"sparsity": {3: 0.5}}, TypeError, "pattern must be a string .* got 3"),
    "sparsity-mapping-value": (plain, {"sparsity": {"first": 1.5}}, ValueError, r"'first' must .*\[0, 1\), got 1.5"),
    "sparsity-mapping-bool": (plain, {"sparsity": {"first": True}}, TypeError, r"'first' must .*\[0, 1\), got True"),
    "steps-zero": (plain, {"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
    "steps-float": (plain, {"steps": 2.5}, TypeError, "steps must be an integer of at least 1, got 2.5"),
    "steps-bool": (plain, {"steps": True}, TypeError, "steps must be an integer of at least 1, got the bool True"),
    "hold-negative": (plain, {"hold": -1}, ValueError, "hold must be an integer of at least 0, got -1"),
    "hold-text": (plain, {"hold": "1"}, TypeError, "hold must be an integer of at least 0, got '1'"),
    "no-total_steps": (
        plain,
        {"total_steps": 9},
        TypeError,
        r"'total_steps': did you mean steps .or updates",
    ),
    "no-amount": (plain, {"amount": 0.5}, TypeError, "no argument 'amount': did you mean sparsity"),
    "no-excludes": (plain, {"excludes": ["0"]}, TypeError, "no argument 'excludes': did you mean exclude"),
    "no-colour": (plain, {"colour": 1}, TypeError, "no argument 'colour': Allowed are model, sparsity, steps, hold"),
    "updates-and-steps": (plain, {"updates": 400, "steps": 9}, ValueError, "updates=400 and steps=9 both say"),
    "updates-and-hold": (plain, {"updates": 400, "hold": 0}, ValueError, "updates=400 and hold=0 both say"),
    "updates-too-few": (
        plain,
        {"updates": 7, "cycles": 2},
        ValueError,
        "updates must be .* at least 8, got 7",
    ),
    "updates-float": (plain, {"updates": 1e5}, TypeError, "updates must be an integer of at least 4, got 100000.0"),
    "cycles-huge": (plain, {"cycles": 10**30}, ValueError, "at least 1 and at most 1,000, got 10000"),
    "cycles-zero": (
        plain,
        {"cycles": 0},
        ValueError,
        "cycles must be .* at least 1 and at most 1,000, got 0",
    ),
    "max_penalty-negative": (plain, {"max_penalty": -1.0}, ValueError, "max_penalty must .* at least 0, got -1.0"),
    "max_penalty-nan": (plain, {"max_penalty": float("nan")}, ValueError, "max_penalty must be a finite .* got nan"),
    "max_penalty-bool": (plain, {"max_penalty": True}, TypeError, "max_penalty must be a finite .* got True"),
    "schedule-typo": (plain, {"schedule": "linaer"}, ValueError, "'linaer' .did you mean 'linear'.*allowed are"),
    "schedule-number": (plain, {"schedule": 1.0}, TypeError, "schedule must be a name or a function, got 1.0"),
    "schedule-nan": (plain, {"schedule": nan}, ValueError, "nan at .*returned nan at .* must return a finite float"),
    "schedule-none": (plain, {"schedule": lambda p: None}, TypeError, "returned None .* must return a finite float"),
    "distribution": (plain, {"distribution": "ekr"}, ValueError, "distribution 'ekr'; allowed are 'uniform' and 'erk'"),
    "distribution-and-mapping": (
        plain,
        {"distribution": "erk", "sparsity": {"head": 0.5}},
        ValueError,
        "distribution='erk' spreads one sparsity .* Give a number, or leave the distribution at 'uniform'",
    ),
    "pattern-typo": (plain, {"pattern": "filters"}, ValueError, "unknown pattern 'filters'; allowed are"),
    "pattern-4:2": (plain, {"pattern": "4:2"}, ValueError, "unknown pattern '4:2'; allowed are"),
    "pattern-number": (plain, {"pattern": 24}, TypeError, "pattern must be a string, got 24; allowed are"),
    "pattern-and-sparsity": (
        plain,
        {"pattern": "2:4", "sparsity": 0.9},
        ValueError,
        "'2:4' means a sparsity of 0.5, but sparsity=0.9 was given. Leave sparsity out",
    ),
    "pattern-and-cycles": (plain, {"pattern": "2:4", "cycles": 2}, ValueError, "'2:4' .*cycles=2; use cycles=1"),
    "pattern-and-erk": (plain, {"pattern": "2:4", "distribution": "erk"}, ValueError, "'2:4' .*distribution='erk'"),
    "pattern-does-not-divide": (
        plain,
        {"pattern": "2:4"},
        ValueError,
        r"first.weight: pattern '2:4' does not fit shape \(8, 6\): its 6 input units .*exclude=\['first'\]",
    ),
    "block-does-not-divide": (
        plain,
        {"pattern": "block:8x2"},
        ValueError,
        r"head.weight: .*4 output.*exclude=\['head'",
    ),
    "pattern-of-groups": (convolutional, {"pattern": "filter"}, ValueError, r"grouped.weight: .*exclude=\['grouped'\]"),
    "pattern-of-a-vector": (
        normed,
        {"pattern": "filter", "targets": (nn.LayerNorm,)},
        ValueError,
        r"norm.weight: .*got shape \(8,\); exclude it or use",
    ),
    "targets-type": (plain, {"targets": nn.Linear}, TypeError, TARGETS + ".*; got <class"),
    "targets-none": (plain, {"targets": None}, TypeError, TARGETS + ".*; got None"),
    "targets-text": (plain, {"targets": ("Linear",)}, TypeError, TARGETS + ".* got 'Linear'"),
    "targets-instance": (plain, {"targets": (nn.Linear(1, 1),)}, TypeError, TARGETS + r".* got Linear\("),
    "targets-no-module": (plain, {"targets": (int,)}, TypeError, TARGETS + ".* got <class 'int'>"),
    "targets-pair": (plain, {"targets": ((nn.Linear, 3),)}, TypeError, TARGETS + ".* 3"),
    "targets-names": (plain, {"targets": ((nn.Linear, ["weight", 3]),)}, TypeError, TARGETS + ".* 3"),
    "targets-no-names": (plain, {"targets": ((nn.Linear, []),)}, TypeError, TARGETS),
    "targets-input-bool": (plain, {"targets": ((nn.Linear, "weight", True),)}, TypeError, TARGETS + ".*True"),
    "targets-four": (plain, {"targets": ((nn.Linear, "weight", 1, 1),)}, TypeError, TARGETS),
    "targets-input-dim": (
        plain,
        {"targets": ((nn.Linear, "weight", 2),)},
        ValueError,
        r"targets: 2 is given as the dimension of the inputs of first.weight, whose shape is \(8, 6\)",
    ),
    "targets-one-name-of-two": (
        recurrent,
        {"targets": ((nn.LSTM, ["weight_*", "wieght"]),)},
        ValueError,
        "no LSTM .* 'wieght'; 'memory' has weight_ih_l0",
    ),
    "targets-none-but-large-weights": (
        lambda: nn.ModuleDict({"memory": nn.LSTM(8, 8), "norm": nn.LayerNorm(8)}),
        {},
        ValueError,
        r"nothing to prune: .*largest weights are memory.weight_ih_l0 .*targets=\(\(nn.LSTM, \['weight_ih_l0'",
    ),
    "targets-none-but-large-weights-of-a-type-that-is-called-as-one-of-torch": (
        lambda: type("Linear", (nn.Bilinear,), {"__module__": "library.nn"})(8, 8, 8),
        {},
        ValueError,
        r"nothing to prune: .*targets=\(library.nn.Linear,\) would take them",
    ),
    "targets-empty": (plain, {"targets": ()}, ValueError, r"nothing to prune: .*targets=\(\)"),
    "targets-absent": (plain, {"targets": (nn.Conv2d,)}, ValueError, r"nothing to prune: .*targets=\(Conv2d\)"),
    "targets-without-weight": (
        recurrent,
        {"targets": (nn.Linear, nn.LSTM)},
        ValueError,
        r"no LSTM .* 'weight'; 'memory' has weight_ih_l0, weight_hh_l0. Give a pair .*targets=\(\(LSTM, 'weight_ih_l0'",
    ),
    "exclude-text": (plain, {"exclude": "head"}, TypeError, EXCLUDE + ".* got 'head'"),
    "exclude-none": (plain, {"exclude": None}, TypeError, EXCLUDE + ".* got None"),
    "exclude-number": (plain, {"exclude": [3]}, TypeError, EXCLUDE + r".* got \[3\]"),
    "exclude-typo": (
        plain,
        {"exclude": ["head", "fisrt"]},
        ValueError,
        "'fisrt' matches no module; close names: 'first'",
    ),
    "exclude-everything": (plain, {"exclude": ["*"]}, ValueError, r"nothing to prune: .*exclude=\['\*'\]"),
    "seed-float": (plain, {"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    "seed-bool": (plain, {"seed": True}, TypeError, "seed must be an integer, got the bool True"),
    "optimizer-text": (
        plain,
        {"optimizer": "sgd"},
        TypeError,
        "be a torch.optim.Optimizer, got str.*leave it out",
    ),
    "optimizer-of-others": (
        plain,
        {"optimizer": torch.optim.SGD([torch.zeros(1)])},
        ValueError,
        "this SGD holds none of the parameters to prune .first.weight.* Build it from the parameters of the model",
    ),
    "lazy": (lazy, {}, ValueError, "head.weight has no shape yet: run one forward pass"),
    "frozen": (frozen, {}, ValueError, r"head.weight is frozen .*Unfreeze it, or .* exclude=\['head'\]"),
    "integer": (
        lambda: with_weight(torch.ones(4, 8, dtype=torch.int8)),
        {},
        ValueError,
        r"head.weight has dtype torch.int8; only floating-point .*exclude=\['head'\]",
    ),
    "conjugate-view": (
        lambda: with_weight(torch.ones(4, 8, dtype=torch.complex64).conj()),
        {},
        ValueError,
        "head.weight is a lazily conjugated .*resolve_conj",
    ),
    "sparse": (
        lambda: with_weight(torch.eye(4).to_sparse()),
        {},
        ValueError,
        "head.weight has layout .*only dense",
    ),
    "parametrized": (custom, {}, ValueError, r"head.weight is parametrized by Doubled.* exclude=\['head'\]"),
    "parametrized-twice": (
        twice_parametrized,
        {},
        ValueError,
        "parametrized by Doubled and _WeightNorm",
    ),
    "orthogonal": (orthogonal, {}, ValueError, r"head.weight is parametrized by _Orthogonal.* exclude=\['head'\]"),
    "stock-pruned": (
        stock_pruned,
        {},
        ValueError,
        r"head.weight is already pruned .*prune.remove\(module",
    ),
    "weight-norm-row-emptied": (
        weight_normed,
        {"sparsity": {"head": 0.9, "first": 0.5}},
        ValueError,
        "head.parametrizations.weight.original1 is the direction of a weight_norm.* Choose a lower sparsity",
    ),
    "weight-norm-emptied": (weight_normed_as_a_whole, {"sparsity": 0.99}, ValueError, r"exclude=\['head'\]"),
    "managed": (
        managed,
        {},
        ValueError,
        r"body.0.weight is managed by another RSTScheduler, or held masks. Call remove\(\) on them first",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
@pytest.mark.parametrize("seed", [None, 0], ids=["drawn", "seeded"])
@pytest.mark.filterwarnings("ignore:.*rounds to all")
def test_construction_refuses_and_changes_nothing(case, seed):
    build, arguments, error, message = CONSTRUCTIONS[case]
    model = build()
    modules = [model] if isinstance(model, nn.Module) else []
    before = snapshot(*modules)

    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        RSTScheduler(model, **{"seed": seed, "sparsity": 0.9 if "pattern" not in arguments else None, **arguments})

    assert snapshot(*modules) == before


def test_arguments_without_a_name():
    with pytest.raises(TypeError, match=r"got 3 arguments without a name.*RSTScheduler\(model, 0.5, steps=1000\)"):
        RSTScheduler(plain(), 0.5, 1000)
    with pytest.raises(TypeError, match="missing a required argument: 'model'"):
        RSTScheduler()


def test_the_signature_is_what_it_says():
    names = [*inspect.signature(RSTScheduler).parameters]
    assert names[:3] == ["model", "sparsity", "steps"]


def test_a_warning_of_the_constructor_points_to_its_call():
    with pytest.warns(UserWarning, match="rounds to all") as caught:
        RSTScheduler(nn.Linear(2, 1), 0.9)
    assert caught[0].filename == __file__

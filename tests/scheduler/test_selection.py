"""Which layers a scheduler takes, how much of each, and with which masks."""

import pytest
import torch
from models import cnn, make, mlp, transformer
from torch import nn

from torch_dual_ticket import RSTScheduler


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("build", [mlp, cnn, transformer], ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("ignore:.*rounds to all")
def test_masks_have_the_exact_counts(build, sparsity):
    model = make(build)
    rst = RSTScheduler(model, sparsity, seed=0)
    assert list(rst.masks) == [n for n, p in model.named_parameters() if n.endswith("weight") and is_target(model, n)]
    pruned = 0
    for name, kept in rst.masks.items():
        assert kept.dtype is torch.bool
        assert kept.shape == model.get_parameter(name).shape
        assert int((~kept).sum()) == round(sparsity * kept.numel())
        pruned += int((~kept).sum())
    size = sum(kept.numel() for kept in rst.masks.values())
    assert rst.sparsity == pruned / size
    assert len(rst.masks) == len(list(rst.masks))
    with pytest.raises(KeyError):
        rst.masks["no.such.weight"]


def is_target(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Linear, nn.Conv2d))


def test_the_sparsity_is_0_9_unless_said_otherwise():
    assert RSTScheduler(make(lambda: nn.Linear(40, 50))).sparsity == 0.9


def test_masks_depend_on_the_seed_alone():
    low, high, other = RSTScheduler(make(mlp, 1), 0.5, seed=3), None, None
    same = RSTScheduler(make(mlp, 2, torch.bfloat16), 0.5, seed=3, steps=5, schedule="cubic")
    high = RSTScheduler(make(mlp, 3), 0.9, seed=3)
    other = RSTScheduler(make(mlp, 1), 0.5, seed=4)
    for name, kept in low.masks.items():
        assert torch.equal(kept, same.masks[name])
        assert (high.masks[name] <= kept).all()
        assert not torch.equal(kept, other.masks[name])


def test_without_a_seed_it_comes_from_the_global_generator():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        first, second = (RSTScheduler(make(mlp)) for _ in range(2))
        torch.manual_seed(11)
        again = RSTScheduler(make(mlp))
        state = torch.get_rng_state()
        RSTScheduler(make(mlp), seed=first.seed)
        assert torch.equal(torch.get_rng_state(), state)  # a given seed takes nothing from it
    assert first.seed == again.seed != second.seed


class Compiled(nn.Module):
    """What torch.compile makes of a model, as far as names go."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


Compiled.__name__ = "OptimizedModule"


@pytest.mark.parametrize(
    "wrap", [Compiled, nn.DataParallel, lambda model: Compiled(nn.DataParallel(model))], ids=["compile", "dp", "both"]
)
@pytest.mark.parametrize("level", ["root", "child"])
def test_names_are_those_of_the_unwrapped_model(wrap, level):
    model, plain = make(mlp), RSTScheduler(make(mlp), 0.5, seed=0)
    if level == "root":
        wrapped = wrap(model)
    else:
        model[2] = wrap(model[2])
        wrapped = model
    rst = RSTScheduler(wrapped, {"2": 0.5, "*": 0.5}, seed=0, exclude=["4"])
    assert list(rst.masks) == ["0.weight", "2.weight"]
    assert all(torch.equal(kept, plain.masks[name]) for name, kept in rst.masks.items())


@pytest.mark.parametrize(
    ("kind", "child"),
    [
        ("_FabricModule", "_forward_module"),
        ("AbstractGradSampleModule", "_module"),
        ("DifferentiallyPrivateDistributedDataParallel", "module"),
        ("DeepSpeedEngine", "module"),
        ("SomebodysModel", "_module"),
        ("SomebodysModel", "module"),
    ],
)
def test_wrappers_of_other_libraries(kind, child):
    """A model whose own part has the name that a wrapper gives to what it wraps keeps it."""
    wrapper = type(kind, (nn.Module,), {})()
    wrapper.register_module(child, make(mlp))
    names = RSTScheduler(make(mlp), 0.5).masks
    prefix = f"{child}." if kind == "SomebodysModel" else ""
    assert list(RSTScheduler(wrapper, 0.5).masks) == [f"{prefix}{name}" for name in names]


def test_a_model_that_fabric_has_set_up():
    fabric = pytest.importorskip("lightning.fabric", reason="needs Lightning: pip install lightning").Fabric
    plain = RSTScheduler(make(mlp), 0.5, seed=0)
    wrapped = fabric(accelerator="cpu", devices=1).setup_module(make(mlp))
    rst = RSTScheduler(wrapped, 0.5, seed=0)
    assert all(torch.equal(kept, plain.masks[name]) for name, kept in rst.masks.items())
    rst.load_state_dict(plain.state_dict())
    model = make(mlp)
    rst.apply_masks(model)
    assert int((model[0].weight == 0).sum()) == 120
    rst.remove()
    assert list(RSTScheduler(wrapped, 0.5, exclude=["2"]).masks) == ["0.weight", "4.weight"]


class CustomParallel(nn.DataParallel): ...


class SomethingElse(nn.Sequential): ...


SomethingElse.__name__ = "DataParallel"


def test_wrappers_are_known_by_their_class_and_by_what_they_hold():
    """A class derived from a wrapper is a wrapper; a class that only has the name of one is not."""
    assert list(RSTScheduler(CustomParallel(make(mlp)), 0.5).masks) == ["0.weight", "2.weight", "4.weight"]
    assert list(RSTScheduler(SomethingElse(nn.Linear(4, 4)), 0.5).masks) == ["0.weight"]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_module("shortcut", None)
        self.conv1 = nn.Conv1d(2, 4, 3)
        self.layer = nn.ModuleDict({"a": nn.Linear(10, 10), "b": nn.Linear(10, 20)})
        self.layer_norm = nn.LayerNorm(10)
        self.embedding = nn.Embedding(7, 10)
        self.fc = nn.Linear(20, 7)


ALL = ["conv1.weight", "layer.a.weight", "layer.b.weight", "fc.weight"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ALL),
        ({"exclude": ["conv1", "fc"]}, ALL[1:3]),
        ({"exclude": ["layer"]}, [ALL[0], ALL[3]]),  # a module's name stands for all that is below it
        ({"exclude": ["layer.?"]}, [ALL[0], ALL[3]]),
        ({"exclude": ("*.a",)}, [ALL[0], *ALL[2:]]),
        ({"exclude": ["layer_norm"]}, ALL),  # a module, though none that would be pruned
        ({"targets": (nn.Linear,)}, ALL[1:]),
        ({"targets": [nn.Embedding, nn.Conv1d]}, ["conv1.weight", "embedding.weight"]),
        ({"targets": ((nn.Linear, "weight"), (nn.Conv1d, "bias"))}, ["conv1.bias", *ALL[1:]]),
        (
            {"targets": ((nn.Module, "weight"),), "exclude": ["layer"]},
            [ALL[0], "layer_norm.weight", "embedding.weight", ALL[3]],
        ),
        ({"targets": (nn.Linear, (nn.Embedding, "nothing")), "exclude": ["embedding"]}, ALL[1:]),
        ({"targets": (nn.Linear, (nn.Linear, "*")), "exclude": ["layer.a", "layer.b"]}, ["fc.weight", "fc.bias"]),
    ],
)
def test_targets_and_exclusions(settings, expected):
    assert list(RSTScheduler(Named(), 0.5, seed=0, **settings).masks) == expected


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        ({"fc": 0.5}, {"fc.weight": 70}),  # what is not matched stays dense
        (
            {"layer.*": 0.5, "*": 0.25},
            {"conv1.weight": 6, "layer.a.weight": 50, "layer.b.weight": 100, "fc.weight": 35},
        ),
        ({"*": 0.25, "layer.*": 0.5}, {"conv1.weight": 6, "layer.a.weight": 25, "layer.b.weight": 50, "fc.weight": 35}),
        ({"layer.a": 0, "layer.*": 0.5}, {"layer.b.weight": 100}),  # 0 leaves a layer alone
        ({"conv1": 0.0, "fc": 0.01}, {"fc.weight": 1}),
    ],
)
def test_a_mapping_of_sparsities(sparsity, expected):
    model = Named()
    rst = RSTScheduler(model, sparsity, seed=0)
    assert {name: int((~kept).sum()) for name, kept in rst.masks.items()} == expected
    managed = {name.rpartition(".")[0] for name in expected}
    for name, layer in model.named_modules():
        assert bool(layer._forward_pre_hooks) is (name in managed)

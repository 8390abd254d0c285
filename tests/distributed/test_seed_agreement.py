"""Ranks whose masks or penalties differ would drift apart unnoticed: they agree, or are told why not."""

import random
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from halves import uneven_mlp
from models import make
from ranks import everywhere, on_two_ranks
from torch import distributed as dist
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RandomUnstructured, RSTScheduler, random_unstructured
from torch_dual_ticket._model.targets import find_targets
from torch_dual_ticket._rst.ranks import agree_on_seed
from torch_dual_ticket.baselines import random_ticket
from torch_dual_ticket.masks import make_plan


def refused(build, *named: str) -> None:
    """Both ranks raise the same RuntimeError, with these words in it, and their models stay as they were."""
    model = make(uneven_mlp)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        build(model)
    for words in named:
        assert words in str(error.value), f"{words!r} is not in {str(error.value)!r}"
    assert everywhere(str(error.value))[0] == everywhere(str(error.value))[1]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@on_two_ranks
def test_ranks_agree_although_their_generators_differ():
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    assert everywhere(torch.rand(()).item())[0] != everywhere(torch.rand(()).item())[1]
    rst = RSTScheduler(make(uneven_mlp), sparsity=0.6)
    held = random_ticket(make(uneven_mlp), 0.6)
    assert everywhere(rst.seed)[0] == everywhere(rst.seed)[1]
    for masks in (rst.masks, held.masks):
        ours, theirs = everywhere(dict(masks))
        assert all(torch.equal(ours[name], theirs[name]) for name in masks)
    state = rst.state_dict()
    assert everywhere(state)[0] == everywhere(state)[1]


@on_two_ranks
def test_a_seed_that_all_were_given_is_used():
    assert RSTScheduler(make(uneven_mlp), seed=5).seed == 5


@on_two_ranks
def test_different_seeds():
    rank = dist.get_rank()
    refused(lambda model: RSTScheduler(model, seed=rank), "different values of seed", "{0: 0, 1: 1}")
    refused(lambda model: RSTScheduler(model, seed=rank or None), "different values of seed", "{0: None, 1: 1}")
    refused(lambda model: random_ticket(model, seed=rank), "different values of seed", "{0: 0, 1: 1}")


@on_two_ranks
def test_different_masks():
    rank = dist.get_rank()
    one_more = {"0": 0.5, "2": 0.5, "4": 0.5} | ({"6": 0.5} if rank else {})
    for settings, named in [
        ({"sparsity": (0.5, 0.6)[rank]}, ("0.weight", "120 units", "144 units", "same sparsity")),
        ({"sparsity": one_more}, ("6.weight", "nothing", "2 units")),
        ({"exclude": ["2"] if rank else []}, ("2.weight", "nothing", "126 units")),
        # As many weights, but not the same ones:
        ({"sparsity": 0.5, "exclude": ["2", "4", "6"], "pattern": ("2:4", "unstructured")[rank]}, ("(2:4)",)),
        ({"distribution": ("uniform", "erk")[rank]}, (".weight",)),
    ]:
        refused(lambda model, settings=settings: RSTScheduler(model, **settings), *named)


@on_two_ranks
def test_different_schedules():
    rank = dist.get_rank()
    for setting, (ours, theirs) in {
        "steps": (10, 20),
        "hold": (0, 5),
        "cycles": (1, 2),
        "max_penalty": (1.0, 0.5),
        "schedule": ("linear", "cubic"),
    }.items():
        value = (ours, theirs)[rank]
        refused(
            lambda model, setting=setting, value=value: RSTScheduler(model, **{setting: value}),
            f"different values of {setting}",
            "{0: ",
        )


@on_two_ranks
def test_ranks_may_hold_different_layers():
    """As the stages of a pipeline do."""
    stage = nn.ModuleDict({f"layer{dist.get_rank()}": nn.Linear(6, 4 + dist.get_rank(), bias=False)})
    rst = RSTScheduler(stage, sparsity=0.5)
    assert list(rst.masks) == [f"layer{dist.get_rank()}.weight"]
    # One name, but two shapes:
    rst = RSTScheduler(nn.Sequential(nn.Linear(6, 4 + dist.get_rank())), sparsity=(0.5, 0.7)[dist.get_rank()])
    assert everywhere(rst.seed)[0] == everywhere(rst.seed)[1]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(["cuda:1", "cuda:0"], "cuda:1"), (["cpu"], "cuda:0"), (["meta"], "cuda:0"), ([], "cuda:0"), (["mps"], "cuda:0")],
)
def test_the_seed_is_gathered_on_the_models_device(monkeypatch, devices, expected):
    """Stand-ins for two GPUs, of which the first is the current one, and for NCCL, which uses the current one."""
    current, used = ["cuda:0"], []

    @contextmanager
    def device(chosen):
        current.append(str(chosen))
        yield
        current.pop()

    def all_gather_object(everyone, mine):
        used.append(current[-1])
        everyone[:] = [mine] * len(everyone)

    modules = {"cuda": SimpleNamespace(device=device), "mps": SimpleNamespace()}
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules[device.type])
    monkeypatch.setattr("torch_dual_ticket._rst.ranks.world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    model = nn.Linear(8, 8)
    plan = make_plan(find_targets(model, [nn.Linear], []), 0.5)
    monkeypatch.setattr(
        model, "parameters", lambda: iter([SimpleNamespace(device=torch.device(name)) for name in devices])
    )
    assert agree_on_seed(5, plan, model) == 5
    assert used == [expected]
    assert current == ["cuda:0"]


@on_two_ranks
def test_stock_masks_without_a_seed_are_warned_of():
    """They may differ, but to agree would need a collective call, which torch's own method is not."""
    torch.manual_seed(dist.get_rank())
    with pytest.warns(UserWarning, match=r"each of the 2 ranks draws this mask.*the same seed=") as found:
        alone = random_unstructured(nn.Linear(20, 20), "weight", 0.5)
    assert found[0].filename == __file__
    ours, theirs = everywhere(alone.weight_mask)
    assert not torch.equal(ours, theirs)
    layers = [random_unstructured(nn.Linear(20, 20), "weight", 0.5, seed=4), nn.Linear(20, 20)]
    prune.global_unstructured([(layers[1], "weight")], RandomUnstructured, amount=0.5, seed=4)
    for layer in layers:
        ours, theirs = everywhere(layer.weight_mask)
        assert torch.equal(ours, theirs)


def test_a_torch_that_was_built_without_processes(monkeypatch):
    """Its ``torch.distributed`` has hardly more than ``is_available``."""
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.delattr(dist, "is_initialized")
    monkeypatch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
    monkeypatch.setitem(sys.modules, "torch.distributed._composable_state", None)  # an import of it fails
    model = make(uneven_mlp)
    rst = RSTScheduler(model, sparsity=0.6)
    model(torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    rst.step()
    assert rst.progress > 0


@pytest.mark.parametrize("seed", [None, 3])
@on_two_ranks
def test_a_scheduler_that_is_older_than_the_process_group(seed):
    """A seed drawn alone may be another one on each rank; a given seed is not."""
    model = make(uneven_mlp)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        rst = RSTScheduler(model, sparsity=0.6, seed=seed)
    model(torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    if seed is None:
        with pytest.raises(RuntimeError, match=r"built before torch\.distributed was initialized"):
            rst.step()
    else:
        rst.step()
        assert rst.progress > 0

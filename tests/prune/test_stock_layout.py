"""``finalize(layout="prune")`` and ``to_prune()``: the layout of torch.nn.utils.prune, for others to stack on."""

import copy

import pytest
import torch
from models import INPUT_SHAPES, cnn, finalize_quietly, loss_of, make, mlp, transformer, twins
from reference import ExplicitLoop
from scheduled_loop import train
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler


def pruned(build=mlp, *, by: str = "finalize", updates: int = 3):
    model = make(build)
    rst = RSTScheduler(model, 0.7, steps=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    train(model, optimizer, rst, updates, INPUT_SHAPES[build])
    if by == "finalize":
        finalize_quietly(rst, layout="prune")
    else:
        finalize_quietly(rst)
        rst.to_prune()
    return model, optimizer, rst


@pytest.mark.parametrize("by", ["finalize", "to_prune"])
@pytest.mark.parametrize("build", [mlp, cnn], ids=lambda build: build.__name__)
def test_the_layout_is_torchs(build, by):
    before = {name: (id(p), p.shape) for name, p in make(build).named_parameters()}
    model, optimizer, rst = pruned(build, by=by)
    order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]

    assert [id(parameter) for parameter in model.parameters()] == order  # nothing moved: an optimizer's state fits
    renamed = [f"{name}_orig" if name in rst.masks else name for name in before]
    assert [name for name, _ in model.named_parameters()] == renamed
    for name, kept in rst.masks.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        assert "weight" not in layer._parameters
        assert torch.equal(layer.get_buffer("weight_mask"), kept.to(layer.weight.dtype))
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
        (hook,) = layer._forward_pre_hooks.values()
        assert type(hook) is prune.CustomFromMask
        assert not [value for value in vars(hook).values() if isinstance(value, torch.Tensor)]  # the buffer is enough
    assert prune.is_pruned(model)


@pytest.mark.parametrize("build", [mlp, cnn], ids=lambda build: build.__name__)
def test_the_same_optimizer_goes_on_and_agrees_with_the_explicit_loop(build):
    model, other = twins(build)
    rst = RSTScheduler(model, 0.7, steps=8, seed=0)
    explicit = ExplicitLoop(other, rst.masks, steps=8)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2) for m in (model, other))
    for index in range(24):
        if index == 12:
            finalize_quietly(rst, layout="prune")
            explicit.finalize()
        train(model, mine, rst, 1, INPUT_SHAPES[build], start=index)
        theirs.zero_grad()
        loss_of(other, index, INPUT_SHAPES[build]).backward()
        explicit.before_update()
        theirs.step()
        explicit.after_update()
    x = torch.ones(2, *INPUT_SHAPES[build], dtype=torch.float64)
    assert torch.allclose(model(x), other(x), rtol=1e-11, atol=1e-13)
    for name, kept in rst.masks.items():
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert torch.allclose(weight, other.get_parameter(name), rtol=1e-11, atol=1e-13)
        assert torch.equal(weight != 0, kept)


def test_stock_functions_stack_on_top():
    model, optimizer, rst = pruned()
    zeros = int((model[0].weight == 0).sum())
    prune.l1_unstructured(model[0], "weight", 10)
    prune.random_structured(model[2], "weight", 2, dim=0)
    prune.global_unstructured([(model[0], "weight"), (model[4], "weight")], prune.L1Unstructured, amount=5)
    assert int((model[0].weight == 0).sum() + (model[4].weight == 0).sum()) == zeros + 10 + 5 + round(0.7 * 80)
    train(model, optimizer, rst, 2, (12,), start=3)
    for name, kept in rst.masks.items():
        assert (model.get_submodule(name.rpartition(".")[0]).weight[~kept] == 0).all()
    masked = (model[0].weight_orig * model[0].weight_mask).detach()
    prune.remove(model[0], "weight")
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, masked)


def test_the_scheduler_leaves_it_to_torch():
    model, optimizer, rst = pruned()
    hooks = [list(layer._forward_pre_hooks.values()) for layer in model]
    report = rst.finalize()
    assert rst.finalize(layout="prune") is report  # twice changes nothing
    rst.to_prune()
    rst.step()
    rst.remove()
    assert [list(layer._forward_pre_hooks.values()) for layer in model] == hooks
    assert (rst.phase, rst.penalty, rst.residual()) == ("finetune", 0, 0)
    assert rst.sparsity == (round(0.7 * 240) + round(0.7 * 320) + round(0.7 * 80)) / 640
    assert list(rst.state_dict()["masks"]) == list(rst.masks) == ["0.weight", "2.weight", "4.weight"]
    rst.apply_masks(other := make(mlp, 1))  # an EMA copy in the plain layout
    assert torch.equal(other[0].weight == 0, model[0].weight_mask == 0)
    train(model, optimizer, rst, 2, (12,), start=3)


def test_states_load_into_a_model_pruned_by_torch():
    """The layout is that of a model which torch itself has pruned with the same masks."""
    model, _, rst = pruned(cnn)
    stock = make(cnn, 1)
    for name, kept in rst.masks.items():
        prune.custom_from_mask(stock.get_submodule(name.rpartition(".")[0]), "weight", kept)
    stock.load_state_dict(model.state_dict())
    x = torch.ones(2, *INPUT_SHAPES[cnn], dtype=torch.float64)
    assert torch.equal(stock.eval()(x), model.eval()(x))


def test_masks_keep_the_memory_format():
    model = make(cnn).to(memory_format=torch.channels_last)
    rst = RSTScheduler(model, 0.7, steps=4, seed=0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), rst, 2, INPUT_SHAPES[cnn])
    finalize_quietly(rst, layout="prune")
    assert model[0].weight_mask.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_several_parameters_of_one_module():
    lstm = nn.LSTM(4, 3, num_layers=2, dtype=torch.float64)
    rst = RSTScheduler(lstm, 0.5, steps=2, seed=0, targets=((nn.LSTM, "weight_*"),))
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.05)
    names = [name for name, _ in lstm.named_parameters()]
    for index in range(6):
        if index == 3:
            finalize_quietly(rst, layout="prune")
        optimizer.zero_grad()
        lstm(torch.ones(2, 1, 4, dtype=torch.float64))[0].sum().backward()
        optimizer.step()
        rst.step()
    renamed = [f"{name}_orig" if name in rst.masks else name for name in names]
    assert [name for name, _ in lstm.named_parameters()] == renamed
    for name, kept in rst.masks.items():
        assert torch.equal(getattr(lstm, name) != 0, kept)


def test_one_layer_that_the_layout_cannot_represent_stops_all():
    model = make(mlp)
    nn.utils.parametrizations.weight_norm(model[4])
    rst = RSTScheduler(model, 0.5, steps=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, rst, 3, (12,))
    finalize_quietly(rst)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"4\.parametrizations\.weight\.original1 is parametrized"):
        rst.to_prune()
    assert [name for name, _ in model.named_parameters()] == names
    train(model, optimizer, rst, 2, (12,), start=3)
    assert torch.equal(model[0].weight != 0, rst.masks["0.weight"])  # still held
    prune.remove(model[4], "weight")  # what the message says
    rst.to_prune()
    assert "weight_orig" in model[0]._parameters


@pytest.mark.parametrize("build", [transformer, lambda: nn.ParameterList([torch.ones(3, 4)])], ids=["mha", "list"])
def test_a_parameter_used_without_a_call_of_its_layer_is_refused(build):
    """Torch makes the masked weight in the layer's own forward: the second backward would fail."""
    model = make(build)
    rst = RSTScheduler(model, 0.5, steps=4, seed=0, targets=(nn.Linear, (nn.ParameterList, "*")))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match=r"^(encoder\.self_attn\.out_proj\.weight|0) is used by its parent"):
        rst.finalize(layout="prune")
    assert rst.phase == "transform"


def test_a_deep_copy_goes_on_like_any_of_torchs():
    model, _, rst = pruned()
    with torch.no_grad():
        model(torch.ones(1, 12, dtype=torch.float64))  # torch copies no weight that is in a graph
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, weight_decay=0.1)
    for index in range(3):
        optimizer.zero_grad()
        loss_of(other, index, (12,)).backward()
        optimizer.step()
    other(torch.ones(1, 12, dtype=torch.float64))
    assert torch.equal(other[0].weight != 0, rst.masks["0.weight"])


def with_a_layer_registered_twice():
    layer = nn.Linear(6, 6, dtype=torch.float64)
    return nn.Sequential(layer, nn.Tanh(), layer)


def with_a_forward_of_the_object():
    """As functions of torch.fx and patches of other people make it: the type itself has none."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    layer.forward = lambda x: x @ layer.weight
    return nn.Sequential(layer)


@pytest.mark.parametrize("build", [with_a_layer_registered_twice, with_a_forward_of_the_object])
def test_layers_of_unusual_models(build):
    """One parameter in one layer with a forward that is called, whatever leads to it: torch's layout allows that."""
    model = build()
    rst = RSTScheduler(model, 0.5, steps=2, targets=[(nn.Module, "weight")])
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    rst.step()
    finalize_quietly(rst, layout="prune")
    assert [name for name, _ in model.named_buffers()] == ["0.weight_mask"]
    assert torch.equal(model[0].weight != 0, rst.masks["0.weight"])

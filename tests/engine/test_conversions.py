"""Models that are moved, cast, given other parameters or reparametrized while a scheduler manages them."""

import copy
import re
import weakref
from functools import partial

import models
import pytest
import torch
from models import finalize_quietly, make, mlp
from plain_loop import assert_holds_zeros, loss_of, sgd
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_dual_ticket import RSTScheduler, release
from torch_dual_ticket.report import summary

X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


def scheduler_of(layer: nn.Module) -> RSTScheduler:
    return RSTScheduler(layer, 0.5, steps=2, seed=0)


def update(layer: nn.Module, rst: RSTScheduler, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(layer(X.to(next(layer.parameters()).dtype))).backward()
    optimizer.step()
    rst.step()


def transformed(layer: nn.Module, rst: RSTScheduler, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or sgd(layer)
    for _ in range(3):
        update(layer, rst, optimizer)


@pytest.fixture(params=["set_data", "swap", "overwrite"])
def way(request):
    """The three ways in which torch can put converted parameters into a module."""
    torch.__future__.set_swap_module_params_on_conversion(request.param == "swap")
    torch.__future__.set_overwrite_module_params_on_conversion(request.param == "overwrite")
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("convert", [nn.Module.double, lambda m: m.to("cpu", torch.bfloat16)], ids=["double", "to"])
def test_conversion_in_each_phase(way, convert):
    layer = nn.Linear(6, 4)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    convert(layer)
    transformed(layer, rst)
    assert rst.done
    finalize_quietly(rst)
    transformed(layer, rst)

    layer.float()

    loss_of(layer(X.float())).backward()
    assert_holds_zeros(layer, rst)
    kept = rst.masks["weight"]
    assert torch.equal(layer.weight.grad != 0, kept)  # gradients are masked as they arrive, by a hook on the parameter
    transformed(layer, rst)
    assert_holds_zeros(layer, rst)


def test_state_loaded_by_swapping_after_finalize(way):
    layer = nn.Linear(6, 4)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    dense = copy.deepcopy(layer.state_dict())
    finalize_quietly(rst)
    layer.load_state_dict(dense)
    loss_of(layer(X.float())).backward()
    assert_holds_zeros(layer, rst)
    assert torch.equal(layer.weight.grad != 0, rst.masks["weight"])


def test_a_parameter_that_outlives_its_layer_and_goes_into_another():
    """It still has the gradient hook of a ticket that is gone, and its zeros are not held any more."""
    layer = nn.Linear(6, 4)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    finalize_quietly(rst)
    other = nn.Linear(6, 4)
    other.weight = layer.weight
    del layer, rst
    assert len(other.weight._post_accumulate_grad_hooks) == 1
    optimizer = sgd(other)
    loss_of(other(X.float())).backward()
    optimizer.step()
    assert (other.weight != 0).all()
    rst = scheduler_of(other)
    transformed(other, rst)
    finalize_quietly(rst)
    other.weight.grad = None
    loss_of(other(X.float())).backward()
    assert torch.equal(other.weight.grad != 0, rst.masks["weight"])


def test_memory_exchanged_through_data():
    layer = nn.Linear(6, 4)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    finalize_quietly(rst)
    torch.nn.utils.vector_to_parameters(torch.ones(28), layer.parameters())
    layer(X.float())
    assert_holds_zeros(layer, rst)


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=lambda f: f.__name__
)
def test_parametrization_removed_while_it_is_managed(norm):
    layer = norm(nn.Linear(6, 4, dtype=torch.float64))
    rst = scheduler_of(layer)
    transformed(layer, rst)
    finalize_quietly(rst)
    transformed(layer, rst)
    kept = next(iter(rst.masks.values()))

    parametrize.remove_parametrizations(layer, "weight")

    for model in (layer, copy.deepcopy(layer)):
        optimizer = sgd(model)
        model.weight.grad = torch.ones(4, 6, dtype=torch.float64)
        optimizer.step()
        assert torch.equal(model.weight != 0, kept)


def test_a_copy_of_a_layer_whose_weight_is_gone():
    layer = parametrizations.weight_norm(nn.Linear(6, 4, dtype=torch.float64))
    rst = scheduler_of(layer)
    transformed(layer, rst)
    finalize_quietly(rst)
    parametrize.remove_parametrizations(layer, "weight")
    layer.weight = None
    assert copy.deepcopy(layer).weight is None


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_old_weight_norm_removed_while_it_is_managed():
    layer = nn.utils.weight_norm(nn.Linear(6, 4, dtype=torch.float64))
    rst = scheduler_of(layer)
    transformed(layer, rst)
    finalize_quietly(rst)
    nn.utils.remove_weight_norm(layer)
    transformed(layer, rst)
    assert torch.equal(layer.weight != 0, rst.masks["weight_v"])


@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_parametrization_put_on_while_it_is_managed(phase):
    layer = nn.Linear(6, 4, dtype=torch.float64)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    if phase == "finetune":
        finalize_quietly(rst)
    parametrizations.weight_norm(layer)
    message = "weight is not a parameter of its layer any more: a reparametrization"
    if phase == "transform":
        with pytest.raises(RuntimeError, match=message):
            rst.step()
        with pytest.raises(RuntimeError, match=message):
            rst.finalize()
    else:
        with pytest.raises(RuntimeError, match=message):
            layer(X)
    prune.remove(layer, "weight")  # what the message says
    rst.step()
    layer(X)


def test_a_finetuning_state_for_a_layer_whose_parameter_was_taken_away():
    """The state loads; the forward says what is wrong."""
    layer = nn.Linear(6, 4, dtype=torch.float64)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    parametrizations.weight_norm(layer)
    rst.load_state_dict(rst.state_dict() | {"phase": "finetune"})
    with pytest.raises(RuntimeError, match="weight is not a parameter of its layer any more: a reparametrization"):
        layer(X)


@pytest.mark.parametrize("shape", [(4, 7), (4, 5), (3, 6), (24,)])
def test_parameter_of_another_shape(shape):
    layer = nn.Linear(6, 4)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    layer.weight = nn.Parameter(torch.ones(shape))
    layer.weight.grad = torch.ones(shape)
    message = re.escape(f"weight has shape {shape}, but had (4, 6) when the scheduler was built")
    for _ in range(2):  # it is the same at the second attempt
        with pytest.raises(RuntimeError, match=message):
            sgd(layer).step()


def test_parameter_of_another_shape_in_the_same_memory():
    layer = nn.Linear(6, 1000)
    rst = scheduler_of(layer)
    transformed(layer, rst)
    layer.weight.data = layer.weight.data[:900]
    layer.weight.grad = torch.ones(900, 6)
    with pytest.raises(RuntimeError, match=r"weight has shape \(900, 6\), but had \(1000, 6\) when"):
        sgd(layer).step()


class Fused(nn.Module):
    """Three layers that were given parts of one tensor: to autograd, a change of one is a change of all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6).double()
        self.parts = nn.ModuleList(nn.Linear(6, 5).double() for _ in range(3))
        for layer, part in zip(self.parts, torch.randn(15, 6, dtype=torch.float64).chunk(3), strict=True):
            layer.weight = nn.Parameter(part)

    def forward(self, x):
        x = self.first(x).tanh()
        return sum(layer(x).tanh() for layer in self.parts)


def test_parameters_that_are_parts_of_one_tensor():
    torch.manual_seed(0)
    model = Fused()
    rst = scheduler_of(model)
    optimizer = sgd(model)
    transformed(model, rst, optimizer)
    finalize_quietly(rst)
    transformed(model, rst, optimizer)
    assert_holds_zeros(model, rst)
    with torch.no_grad():
        model.parts[1].weight.add_(1)
    transformed(model, rst, optimizer)
    assert_holds_zeros(model, rst)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def replace(model: nn.Module) -> None:
    model[4] = nn.Linear(6, 3).double()


def drop(model: nn.Module) -> None:
    del model[4]


def clear_hooks(model: nn.Module) -> None:
    model[4]._forward_pre_hooks.clear()


@pytest.mark.parametrize("change", [replace, drop, clear_hooks])
@pytest.mark.parametrize("noticed_by", ["step", "finalize"])
@pytest.mark.parametrize("optimizer", ["a new one", "the same"])
def test_a_layer_that_is_not_in_the_model_any_more(change, noticed_by, optimizer):
    """A head may be exchanged on purpose; the scheduler says that it detaches it, and goes on with the others."""
    model = network()
    rst = scheduler_of(model)
    sgd_of_before = sgd(model)
    transformed(model, rst, sgd_of_before)
    change(model)
    if optimizer == "a new one":
        sgd_of_before = None
    notice = rst.step if noticed_by == "step" else partial(finalize_quietly, rst)
    with pytest.warns(UserWarning, match=r"^4\.weight will not be pruned any more: .* build a new RST") as seen:
        notice()
    assert seen[0].filename == (__file__ if noticed_by == "step" else models.__file__)  # of finalize_quietly
    if noticed_by == "step":
        transformed(model, rst, sgd_of_before)  # and warns no more
        finalize_quietly(rst)
    assert list(rst.masks) == list(rst.state_dict()["masks"]) == ["0.weight", "2.weight"]
    assert rst.sparsity == 0.5
    assert [layer.name for layer in rst.finalize().layers] == ["0.weight", "2.weight"]
    transformed(model, rst, sgd_of_before)
    assert_holds_zeros(model, rst)


@pytest.mark.parametrize("change", [replace, drop])
def test_a_layer_that_is_out_of_the_model_but_still_referenced(change):
    """An optimizer's closure, a list of layers, an old copy of the head: finalize() looks into the model itself."""
    model = network()
    rst = scheduler_of(model)
    transformed(model, rst)
    old = model[4]
    change(model)
    with pytest.warns(UserWarning, match=r"^4\.weight will not be pruned any more"):
        finalize_quietly(rst)
    assert [layer.name for layer in rst.finalize().layers] == ["0.weight", "2.weight"]
    assert not old._forward_pre_hooks
    assert (old.weight != 0).all()


def test_a_layer_of_a_finalized_model_whose_parameter_goes_on_in_another():
    """It is not managed there, which the next step says, and nothing keeps it in memory when that one goes, too."""
    model = network()
    rst = scheduler_of(model)
    optimizer = sgd(model)
    transformed(model, rst, optimizer)
    finalize_quietly(rst)
    new = nn.Linear(6, 4).double()
    new.weight = model[4].weight
    model[4] = new
    with pytest.warns(UserWarning, match=r"^4\.weight will not be pruned any more: .* baselines\.hold\(model\) after"):
        update(model, rst, optimizer)
    update(model, rst, optimizer)  # once
    assert (new.weight != 0).all()
    assert (model[0].weight == 0).any()
    weight = weakref.ref(new.weight)
    model[4] = nn.Linear(6, 4).double()
    del new, optimizer
    update(model, rst, sgd(model))
    assert weight() is None


@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_tied_weights_that_come_apart(phase):
    """``load_state_dict(assign=True)`` gives each layer its own parameter: the first one stays managed."""
    model = network()
    model[2].weight = model[0].weight
    rst = scheduler_of(model)
    transformed(model, rst)
    if phase == "finetune":
        finalize_quietly(rst)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model[2].weight is not model[0].weight
    transformed(model, rst)
    if phase == "transform":
        finalize_quietly(rst)
        transformed(model, rst)
    assert_holds_zeros(model, rst)
    assert list(rst.masks) == ["0.weight", "4.weight"]
    assert (model[2].weight != 0).all()


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2).double()
        self.weights = nn.ParameterList([torch.ones(6, 6, dtype=torch.float64)])

    def forward(self, x):
        return self.attention(x @ self.weights[0], x, x)[0]


@pytest.mark.parametrize("which", ["out_proj", "list"])
@pytest.mark.parametrize("when", ["before finalize", "after finalize"])
def test_the_owner_of_a_parameter_is_gone(which, when):
    model = Attends()
    rst = RSTScheduler(model, 0.5, steps=2, seed=0, targets=(nn.Linear, (nn.ParameterList, "*")))
    optimizer = sgd(model)
    transformed(model, rst, optimizer)
    if when == "after finalize":
        finalize_quietly(rst)
    if which == "out_proj":
        model.attention.out_proj = type(model.attention.out_proj)(6, 6).double()
    else:
        model.weights = nn.ParameterList([torch.ones(6, 6, dtype=torch.float64)])
    if when == "before finalize":
        with pytest.warns(UserWarning, match="will not be pruned any more"):
            rst.step()
        finalize_quietly(rst)
    transformed(model, rst, optimizer)
    transformed(model, rst)


@pytest.mark.parametrize("which", ["out_proj", "list"])
def test_the_owner_of_a_parameter_is_out_of_the_model_but_still_referenced(which):
    """The module that uses it is there, and calls another one from now on."""
    model = Attends()
    rst = RSTScheduler(model, 0.5, steps=2, seed=0, targets=(nn.Linear, (nn.ParameterList, "*")))
    transformed(model, rst)
    if which == "out_proj":
        name, old = "attention.out_proj.weight", model.attention.out_proj
        model.attention.out_proj = type(old)(6, 6).double()
        weight = old.weight
    else:
        name, old = "weights.0", model.weights
        model.weights = nn.ParameterList([torch.ones(6, 6, dtype=torch.float64)])
        weight = old[0]
    with pytest.warns(UserWarning, match=rf"^{re.escape(name)} will not be pruned any more"):
        finalize_quietly(rst)
    assert len(rst.finalize().layers) == 1
    assert (weight != 0).all()


def test_a_parametrization_that_is_removed_but_still_referenced():
    model = network()
    parametrizations.weight_norm(model[0])
    rst = scheduler_of(model)
    transformed(model, rst)
    kept_alive = model[0].parametrizations.weight
    parametrize.remove_parametrizations(model[0], "weight")
    transformed(model, rst)
    assert len(finalize_quietly(rst).layers) == 3
    assert int((model[0].weight == 0).sum()) == 18
    assert (kept_alive.original1 != 0).all()


class Hidden(nn.Sequential):
    def modules(self):
        yield self


def test_a_model_with_a_custom_list_of_modules():
    model = Hidden(*network())
    rst = scheduler_of(model)
    transformed(model, rst)
    assert len(finalize_quietly(rst).layers) == 3


def test_everything_is_out_of_the_model_but_still_referenced():
    model = network()
    rst = scheduler_of(model)
    transformed(model, rst)
    old = list(model)
    for index in range(5):
        model[index] = nn.Identity()
    with (
        pytest.warns(UserWarning, match="will not be pruned any more"),
        pytest.raises(RuntimeError, match="manages no layer"),
    ):
        rst.finalize()
    assert all((layer.weight != 0).all() for layer in old[::2])


def test_weights_that_are_tied_while_they_are_managed():
    model = network()
    rst = scheduler_of(model)
    transformed(model, rst)
    model[2].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"^0\.weight and 2\.weight were tied after .* prune\.remove\(layer, 'weight"
    ):
        rst.finalize()
    assert rst.phase == "transform"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune.remove(model[2], "weight")
    finalize_quietly(rst)
    assert torch.equal(model[2].weight != 0, rst.masks["0.weight"])


def test_weights_that_are_tied_to_the_second_occurrence_of_one_that_was_replaced():
    model = network()
    model[2].weight = model[0].weight
    model.add_module("5", nn.Linear(4, 6).double())
    model.add_module("6", nn.Linear(6, 6).double())
    rst = scheduler_of(model)
    transformed(model, rst)
    old = model[0]
    model[0] = nn.Linear(6, 6).double()
    model[6].weight = model[2].weight
    with pytest.raises(RuntimeError, match=r"^0\.weight and 6\.weight were tied"):
        rst.finalize()
    assert old._forward_pre_hooks, "nothing is changed"


def test_a_finalized_state_where_only_a_replaced_layer_is_tied():
    saved = network()
    rst = scheduler_of(saved)
    transformed(saved, rst)
    finalize_quietly(rst)
    model = network()
    other = scheduler_of(model)
    old = model[2]
    old.weight = model[0].weight
    model[2] = nn.Linear(6, 6).double()
    other.load_state_dict(rst.state_dict())
    assert other.phase == "finetune"


def test_a_finalized_state_for_weights_that_were_tied_while_they_were_managed():
    saved = network()
    rst = scheduler_of(saved)
    transformed(saved, rst)
    finalize_quietly(rst)
    model = network()
    other = scheduler_of(model)
    model[2].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"^0\.weight and 2\.weight were tied after"):
        other.load_state_dict(rst.state_dict())
    assert other.phase == "transform"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_layers_replaced():
    model = network()
    rst = scheduler_of(model)
    for index in (0, 2, 4):
        model[index] = nn.Linear(6, 6).double()
    with pytest.warns(UserWarning, match=r"^0\.weight, 2\.weight, 4\.weight will not be pruned"):
        rst.step()
    with pytest.raises(RuntimeError, match="manages no layer"):
        rst.finalize()


def test_one_of_two_owners_of_a_tied_weight_replaced():
    model = network()
    model[2].weight = model[0].weight
    rst = scheduler_of(model)
    transformed(model, rst)
    kept = rst.masks["0.weight"]
    model[0] = nn.Linear(6, 6).double()
    transformed(model, rst)
    report = finalize_quietly(rst)
    assert [layer.name for layer in report.layers] == ["0.weight", "4.weight"]
    transformed(model, rst)
    assert torch.equal(model[2].weight != 0, kept)
    assert (model[0].weight != 0).all()


def test_hooks_that_a_conversion_has_given_to_the_layer_that_replaces_it():
    """As conversions to quantized layers do."""
    model = network()
    rst = scheduler_of(model)
    transformed(model, rst)
    finalize_quietly(rst)
    model[0], hooks = nn.Linear(6, 6).double(), model[0]._forward_pre_hooks
    for hook in hooks.values():
        model[0].register_forward_pre_hook(hook)
    del hook, hooks
    model[0](X)
    assert (model[0].weight != 0).all()


class Quantized(torch.Tensor):
    """In what matters as the tensors that torchao makes: another type, which has no memory itself."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes * self.scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Quantized(**parts)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].codes, args[0].scale)
        raise NotImplementedError(function)


def quantize(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().max() / 127
            codes = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(Quantized(codes, scale), requires_grad=False)


@pytest.mark.parametrize("copied", [False, True])
def test_weights_that_become_another_kind_of_tensor(copied):
    model = make(mlp)
    rst = RSTScheduler(model, 0.5, steps=2, seed=0, exclude=["4"])
    x = torch.randn(3, 12, dtype=torch.float64)
    model(x).sum().backward()
    sgd(model).step()
    finalize_quietly(rst)
    model = copy.deepcopy(model) if copied else model
    quantize(model)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"0\.weight has become a Quantized, .*Release it first: .*release\(model\)"
        ):
            model(x)
        assert [layer.pattern for layer in summary(model).layers] == [""] * 3  # it can be looked at
    if not copied:
        with pytest.raises(RuntimeError, match="has become a Quantized"):
            rst.residual()
    release(model)
    model(x)
    zeros = [int((model[index].weight.codes == 0).sum()) for index in (0, 2, 4)]
    assert [layer.size - layer.kept for layer in summary(model).layers] == zeros
    assert zeros[0] >= 120

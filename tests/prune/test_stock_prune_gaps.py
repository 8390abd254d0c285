"""What torch.nn.utils.prune cannot do today, and what becomes of it with an RSTScheduler.

Each test runs both. A test whose first half fails has found that torch has filled the gap: then the first half can go.
"""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from models import finalize_quietly, make
from ranks import needs_fsdp2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from torch_dual_ticket import RSTScheduler, random_unstructured

SECOND_BACKWARD = "backward through the graph a second time"
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def stock(layer: nn.Module, name: str = "weight") -> nn.Module:
    return prune.random_unstructured(layer, name, 0.5)


def ours(model: nn.Module, **settings) -> RSTScheduler:
    """One update of transformation; then the masked weights are zero."""
    rst = RSTScheduler(model, 0.5, steps=1, seed=0, **settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    rst.step()
    finalize_quietly(rst)
    model.zero_grad()
    return rst


def linear() -> nn.Module:
    return make(lambda: nn.Linear(6, 6))


def train(model: nn.Module, updates: int = 3, **settings) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})
    for _ in range(updates):
        optimizer.zero_grad()
        output = model(X)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        optimizer.step()
    return optimizer


def assert_sparse(model: nn.Module, rst: RSTScheduler) -> None:
    for name, kept in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, kept)


# ---------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("make_copy", [copy.deepcopy, AveragedModel], ids=["deepcopy", "AveragedModel"])
def test_copies(make_copy):
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        make_copy(stock(linear()))

    model = linear()
    rst = ours(model)
    train(model)
    other = make_copy(model)
    inner = other.module if isinstance(other, AveragedModel) else other
    assert_sparse(inner, rst)
    train(other, weight_decay=0.1, momentum=0.9)
    assert_sparse(inner, rst)


def ema_update(ema: nn.Module, model: nn.Module) -> None:
    """As many people write it; newer releases of torch's own AveragedModel notice and raise."""
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 0.5)


def test_an_average_begun_before():
    """Stock pruning puts the pruned parameter last, and averages are taken with its neighbor."""
    model = make(lambda: nn.LSTM(6, 6, bias=False))
    ema = copy.deepcopy(model)
    stock(model, "weight_ih_l0")
    ema_update(ema, model)
    mixed = torch.lerp(model.weight_ih_l0_orig, model.weight_hh_l0, 0.5)
    assert torch.equal(ema.weight_ih_l0, mixed)  # silently

    model = make(lambda: nn.LSTM(6, 6, bias=False))
    ema = copy.deepcopy(model)
    rst = ours(model, targets=((nn.LSTM, "weight_ih_*"),))
    ema_update(ema, model)
    assert torch.equal(ema.weight_hh_l0, model.weight_hh_l0)
    rst.apply_masks(ema)
    assert torch.allclose(ema.weight_ih_l0[rst.masks["weight_ih_l0"]], model.weight_ih_l0[rst.masks["weight_ih_l0"]])
    assert_sparse(ema, rst)


def resumed(momentum_of: dict, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(momentum_of)
    return optimizer


def test_a_resumed_optimizer():
    """The states of an optimizer go by the order of the parameters, which stock pruning changes."""

    def build():
        return make(lambda: nn.LSTM(6, 6, bias=False))

    model = build()
    optimizer = train(model, momentum=0.9)
    momentum = {name: optimizer.state[parameter]["momentum_buffer"] for name, parameter in model.named_parameters()}
    saved = copy.deepcopy(optimizer.state_dict())

    pruned = stock(build(), "weight_ih_l0")
    state = resumed(copy.deepcopy(saved), pruned).state
    assert torch.equal(state[pruned.weight_ih_l0_orig]["momentum_buffer"], momentum["weight_hh_l0"])  # silently

    for layout in ("plain", "prune"):
        model = build()
        ours(model, targets=((nn.LSTM, "weight_ih_*"),)).finalize(layout=layout)
        state = resumed(copy.deepcopy(saved), model).state
        pruned_parameter = model._parameters["weight_ih_l0" if layout == "plain" else "weight_ih_l0_orig"]
        assert torch.equal(state[pruned_parameter]["momentum_buffer"], momentum["weight_ih_l0"])
        assert torch.equal(state[model.weight_hh_l0]["momentum_buffer"], momentum["weight_hh_l0"])


def test_a_dense_checkpoint_loads_into_the_pruned_model_and_back():
    dense = linear().state_dict()
    pruned = stock(linear())
    with pytest.raises(RuntimeError, match="Missing key"):
        pruned.load_state_dict(dense)
    with pytest.raises(RuntimeError, match="Missing key"):
        linear().load_state_dict(pruned.state_dict())

    model = linear()
    rst = ours(model)
    model.load_state_dict(dense)
    model(X)
    assert_sparse(model, rst)
    other = linear()
    other.load_state_dict(model.state_dict())
    assert_sparse(other, rst)


def test_the_size_of_a_checkpoint():
    def size(model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return len(file.getvalue())

    def build():
        return make(lambda: nn.Linear(100, 100))

    assert size(stock(build())) > 1.9 * size(build())
    model = build()
    ours(model)
    assert size(model) == size(build())


# ---------------------------------------------------------------------------------- weights used without a call


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class UsesTheWeightOfItsChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return functional.linear(x, self.linear.weight)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.rand(6, 6)])

    def forward(self, x):
        return x @ self.weights[0]


@pytest.mark.parametrize(
    ("build", "pruned"),
    [
        (Attends, lambda model: (model.attention.out_proj, "weight")),
        (UsesTheWeightOfItsChild, lambda model: (model.linear, "weight")),
        (Listed, lambda model: (model.weights, "0")),
    ],
)
def test_weights_used_without_a_call_of_their_layer(build, pruned):
    model = make(build)
    stock(*pruned(model))
    with pytest.raises(RuntimeError, match=SECOND_BACKWARD):
        train(model)

    model = make(build)
    rst = ours(model, targets=(nn.Linear, (nn.ParameterList, "*")))
    train(model, weight_decay=0.1, momentum=0.9)
    assert_sparse(model, rst)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_a_tied_weight():
    model = make(Tied)
    stock(model.first)
    stock(model.second)
    assert model.first.weight_orig is model.second.weight_orig
    assert not torch.equal(model.first.weight_mask, model.second.weight_mask)  # two masks: it is two weights in the end

    model = make(Tied)
    rst = ours(model)
    assert list(rst.masks) == ["first.weight"]
    train(model, weight_decay=0.1, momentum=0.9)
    assert model.first.weight is model.second.weight
    assert_sparse(model, rst)


# ---------------------------------------------------------------------------------- formats and reparametrizations


def test_channels_last():
    def build():
        return make(lambda: nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)

    with pytest.raises(RuntimeError, match="view size is not compatible"):
        stock(build())

    assert int((random_unstructured(build(), "weight", 0.5).weight == 0).sum()) == 72
    layer = build()
    assert_sparse(layer, ours(layer))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_complex_weights():
    def build():
        return nn.Linear(6, 6, dtype=torch.complex64)

    with pytest.raises(RuntimeError, match="topk"):
        stock(build())

    assert int((random_unstructured(build(), "weight", 0.5).weight == 0).sum()) == 18
    layer = build()
    assert_sparse(layer, ours(layer))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "reparametrize",
    [nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm, parametrizations.spectral_norm],
    ids=["old-weight-norm", "new-weight-norm", "old-spectral-norm", "new-spectral-norm"],
)
def test_weight_norm_and_spectral_norm(reparametrize):
    with pytest.raises(TypeError, match="cannot assign"):
        stock(reparametrize(linear()))

    layer = reparametrize(linear())
    rst = ours(layer)
    train(layer, weight_decay=0.1, momentum=0.9)
    layer(X)
    assert_sparse(layer, rst)
    (kept,) = rst.masks.values()
    assert torch.equal(layer.weight != 0, kept)


@needs_fsdp2
def test_parameters_that_are_sharded():
    """In a world of one rank; with several, stock pruning fails as well."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = linear()
        fully_shard(layer, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"aten\.index_put_"):
            prune.l1_unstructured(layer, "weight", 0.5)

        layer = linear()
        fully_shard(layer, mesh=mesh)
        rst = ours(layer)
        train(layer, weight_decay=0.1, momentum=0.9)
        assert torch.equal(layer.weight.to_local() != 0, rst.masks["weight"])
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------- what a failed call leaves behind


def test_a_failed_call_leaves_the_layer_as_it_was():
    layer = linear()
    prune.l1_unstructured(layer, "weight", 3)
    with pytest.raises(TypeError):
        prune.random_unstructured(layer, "weight", "half")
    assert not prune.is_pruned(layer)  # the hook is gone, and with it the first pruning: weight is never made anew

    layer = linear()
    rst = ours(layer)
    with pytest.raises(RuntimeError, match="managed by an RSTScheduler"):
        prune.random_unstructured(layer, "weight", 3)
    assert prune.is_pruned(layer)
    assert_sparse(layer, rst)

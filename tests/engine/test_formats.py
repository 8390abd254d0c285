"""Weights in other formats: memory layouts, complex numbers and half precision, and not in memory at all."""

import pytest
import torch
from lives import Explicit, Library, assert_same_life
from models import assert_same, assert_same_states, finalize_quietly, make
from plain_loop import assert_holds_zeros, assert_lives_alike, loss_of, normal, sgd, train_on
from reference import ExplicitLoop
from torch import nn
from torch.nn import functional

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors import kernels

# ---------------------------------------------------------------------------------- memory


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Tanh(), nn.Conv2d(32, 4, 3))


@pytest.mark.parametrize("chunk", [kernels.CHUNK, 1000], ids=["whole", "chunked"])
@pytest.mark.parametrize("of", ["model", "inputs", "both"])
def test_channels_last(of, chunk, monkeypatch):
    """Also where a weight is walked in chunks: through memory, whatever the order of the dimensions is."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    built = []

    def build():
        model = convolutions()
        built.append(model if of == "inputs" else model.to(memory_format=torch.channels_last))
        return built[-1]

    def inputs(index):
        (x,) = normal(3, 16, 6, 6)(index)
        return (x if of == "model" else x.to(memory_format=torch.channels_last),)

    assert_lives_alike(build, inputs, ["0.weight", "3.weight"])
    for model in built:
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) is (of != "inputs")


def test_channels_last_in_three_dimensions():
    def build():
        return nn.Conv3d(4, 5, 2).to(memory_format=torch.channels_last_3d)

    assert_lives_alike(build, normal(2, 4, 3, 3, 3), ["weight"])


def test_the_memory_format_changed_midway():
    model, other = make(convolutions), make(convolutions)
    rst = RSTScheduler(model, 0.6, steps=8, seed=0)
    explicit = ExplicitLoop(other, rst.masks, steps=8)

    def train(chosen, side):
        optimizer = sgd(chosen)
        formats = [torch.channels_last, torch.contiguous_format]
        for index in range(16):
            if index == 8:
                side.finalize()
            if not side.is_explicit and index % 3 == 0:
                chosen.to(memory_format=formats[index % 2])
            optimizer.zero_grad()
            loss_of(chosen(*normal(3, 16, 6, 6)(index))).backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    train(model, Library(model, rst))
    train(other, Explicit(other, explicit))
    assert_same(model, other, tolerance=1e-11)
    assert_holds_zeros(model, rst)


@pytest.mark.parametrize("width", [4, 64], ids=["small", "large"])
def test_a_gradient_in_another_memory_format_than_its_weight(width, monkeypatch):
    """As people assign it, or as buckets are laid out."""
    monkeypatch.setattr(kernels, "CHUNK", 1000)
    layer = make(lambda: nn.Conv2d(width, 16, 3, bias=False))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    rst = RSTScheduler(layer, 0.5, steps=2, seed=0)
    kept, weight = rst.masks["weight"], layer.weight.detach().clone()
    grad = torch.randn_like(weight).contiguous(memory_format=torch.channels_last)
    layer.weight.grad = grad.clone()
    optimizer.step()
    assert torch.allclose(layer.weight, weight - 0.5 * (grad + 0.5 * weight * ~kept), rtol=1e-12)
    finalize_quietly(rst)
    layer.weight.grad = grad.clone()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert torch.equal(layer.weight.grad, grad * kept)


@pytest.mark.parametrize("stride", ["transposed", "sliced"])
def test_weights_that_are_not_contiguous(stride):
    def build():
        layer = nn.Linear(7, 5, dtype=torch.float64)
        whole = torch.randn(10, 9, dtype=torch.float64)
        layer.weight = nn.Parameter(whole[:7, :5].t() if stride == "transposed" else whole[::2, 1:8])
        assert not layer.weight.is_contiguous()
        return layer

    assert_lives_alike(build, normal(4, 7), ["weight"], dtype=None)


# ---------------------------------------------------------------------------------- complex


def complex_inputs(*shape: int):
    return normal(*shape, dtype=torch.complex128)


@pytest.mark.parametrize("width", [5, 900], ids=["small", "large"])
def test_complex_weights(width):
    def build():
        return nn.Linear(7, width, dtype=torch.complex128)

    rst = assert_lives_alike(build, complex_inputs(4, 7), ["weight"], dtype=None)
    assert rst.sparsity == round(0.6 * 7 * width) / (7 * width)


def test_complex_convolution():
    assert_lives_alike(
        lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex128), complex_inputs(2, 3, 5, 5), ["weight"], dtype=None
    )


class Adjoint(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False, dtype=torch.complex128)

    def forward(self, x):
        return x @ self.layer.weight.mH


class Conjugate(Adjoint):
    def forward(self, x):
        return torch.conj(self.layer.weight) + 0 * x


@pytest.mark.parametrize("width", [6, 70], ids=["small", "large"])
@pytest.mark.parametrize("kind", [Adjoint, Conjugate])
def test_gradients_that_autograd_leaves_lazily_conjugated(kind, width):
    model = kind(width)
    loss_of(model(*complex_inputs(width, width)(0))).backward()
    assert model.layer.weight.grad.is_conj(), "torch leaves nothing for later here any more: find another example"

    # torch's own clipping and foreach optimizers refuse such gradients
    def optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)

    train = train_on(complex_inputs(width, width), optimizer, clips=False)
    assert_same_life(train, lambda: kind(width), sparsity=0.6, dtype=None)


# ---------------------------------------------------------------------------------- half precision

EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_half_precision_weights(dtype):
    """To their rounding: what is one operation here is several in the explicit loop."""
    tolerance = 16 * EPSILON[dtype]
    rst = assert_lives_alike(
        network, normal(8, 12, dtype=dtype), ["0.weight", "2.weight"], dtype=dtype, tolerance=tolerance
    )
    wide = RSTScheduler(make(network), 0.6, seed=3)
    assert all(torch.equal(kept, wide.masks[name]) for name, kept in rst.masks.items())


@pytest.mark.parametrize("width", [10, 900], ids=["small", "large"])
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_the_penalty_is_added_with_one_rounding(dtype, width):
    layer = make(lambda: nn.Linear(20, width, bias=False), dtype=dtype)
    rst = RSTScheduler(layer, 0.5, steps=3, seed=0)
    grad = make(lambda: nn.Linear(20, width, bias=False), seed=1, dtype=dtype).weight.detach()
    layer.weight.grad = grad.clone()
    weight = layer.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    exact = grad.double() + (1 / 3) * weight.double() * ~rst.masks["weight"]
    error = (layer.weight.grad.double() - exact).abs()
    assert (error <= EPSILON[dtype] * (grad.double().abs() + weight.double().abs())).all()


@pytest.mark.parametrize("width", [10, 900], ids=["small", "large"])
def test_gradients_of_another_dtype_than_the_weight(width):
    """Where a loop keeps gradients in float32 beside half-precision weights."""
    layer = make(lambda: nn.Linear(20, width, bias=False), dtype=torch.bfloat16)
    if not hasattr(layer.weight, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    layer.weight.grad_dtype = torch.float32
    rst = RSTScheduler(layer, 0.5, steps=3, seed=0)
    kept = rst.masks["weight"]
    layer.weight.grad = torch.zeros(width, 20)
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert torch.allclose(layer.weight.grad, layer.weight.float() * ~kept / 3, rtol=EPSILON[torch.bfloat16])
    rst.step()
    finalize_quietly(rst)
    layer.weight.grad = torch.ones(width, 20)
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert torch.equal(layer.weight != 0, kept)


# ---------------------------------------------------------------------------------- meta


def by_to_empty(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(state)


def by_assignment(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(state, assign=True)


class Attends(nn.Module):
    """With an out_proj, whose forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return functional.tanh(self.norm(self.attention(x, x, x)[0].transpose(1, 2)))


@pytest.mark.parametrize("materialise", [by_to_empty, by_assignment])
def test_a_model_on_the_meta_device_that_gets_its_memory_later(materialise):
    with torch.device("meta"):
        model = Attends().double()
    rst = RSTScheduler(model, 0.6, steps=12, seed=0, targets=(nn.Linear, (nn.MultiheadAttention, "in_proj_weight")))
    assert {name: int((~kept).sum()) for name, kept in rst.masks.items()} == {
        "attention.in_proj_weight": round(0.6 * 192),
        "attention.out_proj.weight": round(0.6 * 64),
    }
    assert rst.residual() == 0
    rst.step()
    assert (rst.progress, "2 layers" in repr(rst)) == (0, True)
    with pytest.raises(RuntimeError, match="no update ever applied the penalty"):
        rst.finalize()

    other = make(Attends)
    explicit = ExplicitLoop(other, rst.masks, steps=12)
    materialise(model, {name: value.clone() for name, value in other.state_dict().items()})
    train = train_on(normal(5, 8, 8))
    library, theirs = Library(model, rst), Explicit(other, explicit)
    train(model, library)
    train(other, theirs)
    assert_same_states(library.transformed, theirs.transformed)
    assert_same(model, other)
    assert_holds_zeros(model, rst)


@pytest.mark.parametrize("materialise", [by_to_empty, by_assignment])
def test_a_finetuning_state_loaded_before_the_weights(materialise):
    first = make(Attends)
    rst = RSTScheduler(first, 0.6, steps=12, seed=0, targets=[nn.Linear])
    train_on(normal(5, 8, 8))(first, Library(first, rst))
    with torch.device("meta"):
        model = Attends().double()
    restarted = RSTScheduler(model, 0.6, steps=12, seed=0, targets=[nn.Linear])
    restarted.load_state_dict(rst.state_dict())
    assert restarted.phase == "finetune"
    materialise(model, {name: value.clone() for name, value in first.state_dict().items()})
    for one in (first, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for index in range(3):
            optimizer.zero_grad()
            loss_of(one(*normal(5, 8, 8)(index))).backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.01)
            optimizer.step()
    assert_holds_zeros(model, restarted)
    assert_same(model, first, tolerance=0)


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.layer(x) * (1 + self.weight)


@pytest.mark.filterwarnings("ignore:.*rounds to all")
def test_a_weight_without_dimensions():
    """One number, in a type of the user's own."""
    model, average = make(Tempered), make(Tempered)
    rst = RSTScheduler(model, 0.6, steps=2, seed=0, targets=(nn.Linear, Tempered))
    assert list(rst.masks) == ["weight", "layer.weight"]
    loss_of(model(*normal(3, 6)(0))).backward()
    sgd(model).step()
    finalize_quietly(rst)
    rst.apply_masks(average)
    assert_holds_zeros(model, rst)
    assert_holds_zeros(average, rst)


def test_large_tensors_are_walked_in_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 1000)
    tensor, mask = torch.randn(6, 1000), torch.ones(6, 1000, dtype=torch.uint8)
    assert [part.shape for part, _ in kernels.chunks(tensor, mask)] == [(1000,)] * 6
    assert [part.shape for part, _ in kernels.chunks(tensor, mask, share=2)] == [(500,)] * 12

"""Finished tickets in torch's sparse formats: the same outputs, the model unchanged, and clear errors."""

import copy
import io
import pickle

import pytest
import torch
from models import finalize_quietly
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import random_ticket
from torch_dual_ticket.deploy import CSRLinear, plain_copy, semi_structured, to_csr, to_semi_structured

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch built with MKL")


def mlp(width=512):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 10)
    )


def finished(model, sparsity=None, *, layout="plain", **settings):
    """A ticket that is finalized after one update."""
    rst = RSTScheduler(model, sparsity, steps=1, seed=0, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.randn(4, model[0].in_features)).square().mean().backward()
    optimizer.step()
    rst.step()
    finalize_quietly(rst, layout=layout)
    return rst


def assert_unchanged(model, before):
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------- CSR


@needs_mkl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(512,), (1, 512), (7, 512), (2, 3, 512), (1, 1, 512), (0, 512), (2, 0, 512)], ids=str
)
def test_csr_computes_what_the_masked_model_does(dtype, shape):
    model = mlp()
    finished(model, 0.9, exclude=["4"])
    model.to(dtype)
    fast = to_csr(model)
    assert [type(layer) for layer in fast[::2]] == [CSRLinear, CSRLinear, nn.Linear]
    x = torch.randn(shape, dtype=dtype)
    scale = float(model(torch.randn(64, 512, dtype=dtype)).detach().abs().max())
    for layers in (slice(0, 1), slice(0, 3), slice(0, 5)):
        output, expected = fast[layers](x), model[layers](x)
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        assert output.is_contiguous(), "a view() that follows needs it"
        torch.testing.assert_close(output, expected, rtol=0, atol=40 * torch.finfo(dtype).eps * scale)


@needs_mkl
def test_csr_leaves_the_model_unchanged_and_managed():
    model = mlp()
    rst = finished(model, 0.9, exclude=["4"])
    before = copy.deepcopy(model.state_dict())
    fast = to_csr(model)
    assert_unchanged(model, before)
    assert not fast.training
    assert model.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 512)).square().mean().backward()
    optimizer.step()
    for name, kept in rst.masks.items():
        assert not model.get_parameter(name)[~kept].any()
        assert model.get_parameter(name)[kept].ne(before[name][kept]).any()
    x = torch.randn(4, 512)
    assert not torch.allclose(fast(x), model(x)), "a copy does not follow"


@needs_mkl
def test_csr_stores_only_the_kept_weights_and_can_be_copied_and_saved():
    model = mlp()
    rst = finished(model, 0.95, exclude=["4"])
    fast = to_csr(model)
    kept = sum(int(mask.sum()) for mask in rst.masks.values())
    assert len(fast[0].values) + len(fast[2].values) == kept
    x = torch.randn(3, 512)
    expected = fast(x)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(fast)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(torch.load(file))
    for again in (other, pickle.loads(pickle.dumps(fast)), to_csr(copy.deepcopy(model))):
        assert torch.equal(again(x), expected)


@needs_mkl
def test_gradients_go_through_csr_layers_to_what_is_before_them():
    model = mlp()
    finished(model, 0.9, exclude=["4"])
    x = torch.randn(3, 512, requires_grad=True)
    mine = torch.autograd.grad(to_csr(model)(x).square().sum(), x)[0]
    theirs = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch.testing.assert_close(mine, theirs)


@needs_mkl
@pytest.mark.parametrize("layout", ["prune", "compiled", "removed"])
def test_csr_of_models_in_other_states(layout):
    model = mlp()
    rst = finished(model, 0.9, exclude=["4"], layout="prune" if layout == "prune" else "plain")
    if layout == "removed":
        rst.remove()
    model(torch.randn(2, 512))  # with gradients: torch's layout cannot be copied now
    given = torch.compile(model, backend="eager") if layout == "compiled" else model
    fast = to_csr(given)
    assert type(fast) is nn.Sequential
    assert not any(layer._forward_pre_hooks for layer in fast.modules())
    x = torch.randn(3, 512)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


@needs_mkl
def test_csr_only_where_it_is_faster():
    model = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, 1024), nn.Linear(1024, 512))
    random_ticket(model, {"0": 0.95, "1": 0.95, "2": 0.9, "3": 0.89}, seed=0)
    assert [type(layer) for layer in to_csr(model)] == [CSRLinear, nn.Linear, CSRLinear, nn.Linear]
    layer = nn.Linear(512, 512)
    random_ticket(layer, 0.9, seed=0)
    assert isinstance(to_csr(layer), CSRLinear)


@needs_mkl
@pytest.mark.parametrize("convert_first", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_csr_layers_of_a_transformer_avoid_its_fast_path(convert_first):
    """In evaluation mode it would pass the weights of these layers to a kernel for dense ones."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 4, dim_feedforward=512, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    random_ticket(model, {"layers.0.linear*" if convert_first else "layers.1.linear*": 0.95}, seed=0)
    fast = to_csr(model)
    assert sum(isinstance(part, CSRLinear) for part in fast.modules()) == 2
    x, padding = torch.randn(2, 5, 512), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for options in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            mine, theirs = fast(x, **options), model(x, **options)
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine[1, :3], theirs[1, :3], rtol=1e-4, atol=1e-5)


@needs_mkl
def test_csr_of_a_layer_that_occurs_twice():
    torch.manual_seed(0)
    layer = nn.Linear(512, 512)
    random_ticket(layer, 0.95, seed=0)
    fast = to_csr(nn.Sequential(layer, nn.ReLU(), layer))
    assert isinstance(fast[0], CSRLinear)
    assert fast[0] is fast[2]


@needs_mkl
def test_the_weight_of_a_csr_layer_can_be_read():
    model = mlp()
    finished(model, 0.9, exclude=["4"])
    weight = to_csr(model)[0].weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), (512, 512))
    assert torch.equal(weight.to_dense(), model[0].weight)


@needs_mkl
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: mlp(64),
            r"Sequential would be faster .* 90% .* 262,144 .* The sparsest, '\d', .* Call finalize\(\) first",
        ),
        (lambda: mlp().bfloat16(), r"The sparsest, '0', has 95\.0% of 262,144, torch\.bfloat16 on cpu"),
        (lambda: nn.ReLU(), "It has no Linear layer"),
        (lambda: nn.MultiheadAttention(512, 2), "It has no Linear layer"),  # it does not call its out_proj
    ],
    ids=["small", "bfloat16", "none", "attention"],
)
def test_csr_is_refused_where_no_layer_gains(build, message):
    model = build()
    if isinstance(model, nn.Sequential) and model[0].in_features == 512:
        random_ticket(model, 0.95, exclude=["4"], seed=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        to_csr(model)
    assert_unchanged(model, before)


def test_csr_without_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="built with MKL"):
        to_csr(mlp())


@pytest.mark.parametrize("function", [to_csr, to_semi_structured])
def test_sharded_models_are_refused(monkeypatch, function):
    monkeypatch.setattr(plain_copy, "is_sharded", lambda parameter: parameter.dim() == 2)
    with pytest.raises(ValueError, match=r"0\.weight is sharded: load the whole state_dict"):
        function(mlp())


@pytest.mark.parametrize("function", [to_csr, to_semi_structured])
def test_other_objects_than_modules_are_refused(function):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got OrderedDict"):
        function(mlp().state_dict())


# ---------------------------------------------------------------------- 2:4


class Compressed(torch.Tensor):
    """Replaces torch's semi-structured tensor, which needs a GPU."""


@pytest.fixture
def stand_in(monkeypatch):
    """Torch's conversion with its checks, but on the CPU; returns the weights it was given."""
    given = []

    def convert(dense):
        rows, columns = dense.shape
        if dense.dtype is not torch.float16:
            raise RuntimeError(f"Error original_tensor.dtype {dense.dtype} is not a supported dtype")
        if rows % 32 or columns % 64:
            raise RuntimeError(f"Error original_tensor.shape {dense.shape} is not supported!")
        assert dense.is_contiguous()
        given.append(dense)
        return dense.clone().as_subclass(Compressed)

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    monkeypatch.setattr(semi_structured, "_DEVICE", "cpu")
    return given


def test_two_of_four_layers_are_converted_and_no_others(stand_in):
    model = mlp()
    rst = finished(model, pattern="2:4", exclude=["4"])
    model.half()
    before = copy.deepcopy(model.state_dict())
    fast = to_semi_structured(model)
    assert_unchanged(model, before)
    assert rst.phase == "finetune"
    assert model[0]._forward_pre_hooks, "the model is still managed"
    assert not fast.training
    assert not any(layer._forward_pre_hooks for layer in fast.modules())
    assert [isinstance(layer.weight.data, Compressed) for layer in fast[::2]] == [True, True, False]
    assert not fast[0].weight.requires_grad
    assert len(stand_in) == 2
    for name, weight in zip(rst.masks, stand_in, strict=True):
        assert torch.equal(weight, before[name])
    x = torch.randn(3, 512).half()
    assert torch.equal(torch.Tensor(fast(x).detach().float()), model(x).detach().float())


def test_weights_that_are_not_contiguous_are_converted(stand_in):
    model = nn.Sequential(nn.Linear(64, 32))
    random_ticket(model, pattern="2:4", seed=0).remove()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    to_semi_structured(model.half())
    assert len(stand_in) == 1


def test_a_layer_that_torch_refuses_is_named_and_can_be_excluded(stand_in):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12), nn.Linear(12, 32))
    random_ticket(model, pattern="2:4", seed=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight, \(64, 64\) in torch\.float32, .*dtype.* as with model\.half\(\)"):
        to_semi_structured(model)
    assert_unchanged(model, before)
    model.half()
    with pytest.raises(ValueError, match=r"2\.weight, \(12, 64\) in torch\.float16, .*shape.* exclude=\['2'\]"):
        to_semi_structured(model)
    assert [type(layer.weight) for layer in (model[0], model[2])] == [nn.Parameter] * 2
    fast = to_semi_structured(model, exclude=["2", "3"])
    assert [isinstance(fast[index].weight.data, Compressed) for index in (0, 2, 3)] == [True, False, False]
    with pytest.raises(ValueError, match=r"the pattern 'head' matches no module; there are: '0', '1', '2', '3'"):
        to_semi_structured(model, exclude=["head"])
    with pytest.raises(TypeError, match="exclude is a sequence of name patterns"):
        to_semi_structured(model, exclude="2")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_two_of_four_layers_of_a_transformer_avoid_its_fast_path(stand_in, monkeypatch):
    """Its kernel for dense weights, used where no gradient is needed, raises for semi-structured ones."""
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).half()
    held = random_ticket(model, {"layers.1.linear1": 0.5}, pattern="2:4", seed=0)
    fast = to_semi_structured(model)
    held.remove()
    monkeypatch.setattr(torch.overrides, "has_torch_function", lambda tensors: False)  # torch's own type has none
    dense, seen = torch._transformer_encoder_layer_fwd, []

    def counted(*arguments):
        seen.append(any(isinstance(argument, Compressed) for argument in arguments))
        return dense(*arguments)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    x, padding = torch.randn(2, 5, 64).half(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        for options in ({}, {"src_key_padding_mask": padding}):
            torch.testing.assert_close(fast(x, **options)[0], model.eval()(x, **options)[0], rtol=1e-2, atol=1e-2)
    assert True not in seen
    assert False in seen


def test_excluding_a_module_excludes_all_below_it(stand_in):
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 32)).half()
    random_ticket(model, pattern="2:4", seed=0)
    fast = to_semi_structured(model, exclude=["0"])
    assert type(fast[0][0].weight) is nn.Parameter
    assert isinstance(fast[1].weight.data, Compressed)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "fits"),
    [
        ("2:4", None, True),
        ("1:4", None, True),
        ("1:2", None, True),
        ("3:4", None, False),
        ("4:8", None, False),
        ("unstructured", 0.5, False),
    ],
)
def test_which_patterns_are_two_of_four(stand_in, pattern, sparsity, fits):
    model = nn.Sequential(nn.Linear(64, 32))
    random_ticket(model, sparsity, pattern=pattern, seed=0)
    model.half()
    if fits:
        to_semi_structured(model)
    else:
        with pytest.raises(ValueError, match=r"no Linear layer of this Sequential is 2:4 .* finalize\(\) a ticket"):
            to_semi_structured(model)
    assert len(stand_in) == fits


def test_float32_is_refused_although_torch_converts_it(monkeypatch):
    """To 1:2, without a word."""
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense.clone().as_subclass(Compressed))
    monkeypatch.setattr(semi_structured, "_DEVICE", "cpu")
    model = nn.Sequential(nn.Linear(64, 32))
    random_ticket(model, pattern="2:4", seed=0)
    with pytest.raises(ValueError, match=r"0\.weight, .* torch\.float32, .*one of each two weights.*model\.half\(\)"):
        to_semi_structured(model)
    to_semi_structured(model.bfloat16())


def test_before_finalize_nothing_is_two_of_four(stand_in):
    model = nn.Sequential(nn.Linear(64, 32))
    RSTScheduler(model, pattern="2:4", seed=0)
    with pytest.raises(ValueError, match=r"finalize\(\) a ticket of pattern=\"2:4\" first"):
        to_semi_structured(model)


def test_a_model_on_the_cpu_is_refused():
    model = mlp().half()
    random_ticket(model, pattern="2:4", exclude=["4"], seed=0)
    with pytest.raises(ValueError, match=r"0\.weight is on cpu, .* CUDA alone .* model\.to\(\"cuda\"\)"):
        to_semi_structured(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_two_of_four_on_cuda():
    model = mlp().half().cuda()
    random_ticket(model, pattern="2:4", exclude=["4"], seed=0)
    before = copy.deepcopy(model.state_dict())
    fast = to_semi_structured(model)
    assert_unchanged(model, before)
    assert [isinstance(layer.weight, torch.sparse.SparseSemiStructuredTensor) for layer in fast[::2]] == [
        True,
        True,
        False,
    ]
    for rows in (1, 7, 64):
        x = torch.randn(rows, 512, dtype=torch.half, device="cuda")
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-3)
    odd = nn.Sequential(nn.Linear(60, 12)).half().cuda()
    random_ticket(odd, pattern="2:4", seed=0)
    with pytest.raises(ValueError, match=r"0\.weight, \(12, 60\) in torch\.float16"):
        to_semi_structured(odd)

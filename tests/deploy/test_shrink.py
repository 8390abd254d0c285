"""Filter tickets as smaller layers: the same outputs as the masked model, and only unused channels removed."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from comparison.flops import FlopCount
from comparison.models import CharTransformer, ResNet, SmallConvNet
from models import finalize_quietly
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import hold, random_ticket
from torch_dual_ticket.deploy import shrink

pytest.importorskip("torch_pruning", reason="needs Torch-Pruning: pip install torch-pruning")

IMAGES = torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def built(build, seed=0):
    """In evaluation mode, with constants that are not zero behind every filter."""
    torch.manual_seed(seed)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model.eval()


def leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


def assert_equal_outputs(small, model, example):
    """Also for inputs that shrink() has not seen."""
    for seed in range(3):
        x = torch.randn(example.shape, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        with torch.no_grad():
            for output, reference in zip(leaves(small(x)), leaves(model(x)), strict=True):
                assert output.shape == reference.shape
                assert float((output - reference).abs().max()) <= 1e-5 * float(reference.abs().max())


def widths(model):
    """Outputs and inputs of each layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    return [
        (layer.out_features, layer.in_features)
        if isinstance(layer, nn.Linear)
        else (layer.out_channels, layer.in_channels)
        for layer in layers
    ]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------- a whole life


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_resnet_20(sparsity):
    """Within each block all but one of the zero filters are removed; it contributes all their constants."""
    torch.manual_seed(0)
    model = ResNet((3, 32, 32), 10, depth=20)
    rst = RSTScheduler(model, sparsity, pattern="filter", steps=4, exclude=["conv", "fc"], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.randint(10, (8,))).backward()
        optimizer.step()
        rst.step()
        if step == 4:
            finalize_quietly(rst)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    example = torch.randn(2, 3, 16, 16)
    small = shrink(model, example)
    assert_equal_outputs(small, model, example)

    zero = {name: int((model.get_parameter(name).flatten(1) == 0).all(1).sum()) for name in rst.masks}
    for index, block in enumerate(small.blocks):
        whole = model.blocks[index]
        kept = whole.conv1.out_channels - zero[f"blocks.{index}.conv1.weight"]
        assert kept == whole.conv1.out_channels * (1 - sparsity)
        assert block.conv1.out_channels in (kept, kept + 1)
        assert block.conv1.out_channels == block.norm1.num_features == block.conv2.in_channels
        # The channels of the residual connections: masks do not coincide, and the first layer is dense.
        assert (block.conv1.in_channels, block.conv2.out_channels) == (
            whole.conv1.in_channels,
            whole.conv2.out_channels,
        )
    assert any(block.conv1.out_channels % 2 for block in small.blocks), "no constant behind a ReLU was kept"
    assert 1 - sparsity < parameters(small) / parameters(model) < 1 - sparsity + 0.04
    flops = [FlopCount(one, example).dense for one in (model, small)]
    assert 1 - sparsity < flops[1] / flops[0] < 1 - sparsity + 0.07

    # The masked model is unchanged, and its zeros are still kept.
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    model.train()
    F.cross_entropy(model(example), torch.tensor([1, 2])).backward()
    optimizer.step()
    assert {name: int((model.get_parameter(name).flatten(1) == 0).all(1).sum()) for name in rst.masks} == zero


def test_the_result_is_a_plain_model():
    model = built(lambda: SmallConvNet((3, 10, 10), 10))
    random_ticket(model, 0.5, pattern="filter", exclude=["14"], seed=0)
    small = shrink(model, IMAGES)
    assert widths(small) == [(17, 3), (17, 17), (33, 17), (32, 33), (10, 32)]
    assert not small.training
    assert not any(module._forward_pre_hooks for module in small.modules())
    assert list(small.state_dict()) == list(model.state_dict())
    expected = small(IMAGES)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(small)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(file))
    for again in (other, pickle.loads(pickle.dumps(small))):
        assert torch.equal(again(IMAGES), expected)
    F.cross_entropy(small.train()(IMAGES), torch.arange(6)).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_second_call_finds_nothing_to_remove():
    model = built(lambda: SmallConvNet((3, 10, 10), 10))
    random_ticket(model, 0.5, pattern="filter", exclude=["14"], seed=0)
    with pytest.raises(ValueError, match="can be removed, although 0 has filters that are zero"):
        shrink(shrink(model, IMAGES), IMAGES)


@pytest.mark.parametrize("layout", ["plain", "prune", "compiled", "frozen", "double"])
def test_models_in_other_states(layout):
    model = built(lambda: SmallConvNet((3, 10, 10), 10)).train()
    example = IMAGES.double() if layout == "double" else IMAGES
    model.to(example.dtype)
    rst = RSTScheduler(model, 0.5, pattern="filter", steps=1, exclude=["14"], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(example), torch.arange(6)).backward()
    optimizer.step()
    finalize_quietly(rst, layout="prune" if layout == "prune" else "plain")
    model(example)  # with gradients: torch's layout cannot be copied now
    if layout == "frozen":
        model.requires_grad_(False)
    given = torch.compile(model, backend="eager") if layout == "compiled" else model
    with torch.inference_mode():
        small = shrink(given, example)
    assert type(small) is SmallConvNet
    assert parameters(small) < 0.4 * parameters(model)
    assert {parameter.requires_grad for parameter in small.parameters()} == {layout != "frozen"}
    model.eval()
    tolerance = {"rtol": 0, "atol": 1e-12} if layout == "double" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(small(example), model(example), **tolerance)


# ---------------------------------------------------------------------- every kind of connection


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.c, self.d = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 4, 3)

    def forward(self, x):
        return self.d(self.c(torch.cat([self.a(x), self.b(x).relu()], 1)).relu())


class ReadThrice(nn.Module):
    """One layer, and three that read it, each with another constant."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c, self.d = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(8, 5, 3), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x):
        y = self.a(x)
        return self.b(y), (self.c(self.norm(y)), {"d": self.d(self.norm(y).sigmoid())})


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=16)
        self.c = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(x)).relu()).relu())


def conv(inputs, outputs, **settings):
    return nn.Conv2d(inputs, outputs, 3, **settings)


CONNECTIONS = {  # builder, dense layers, widths after shrink() at 50 %
    "linear": (
        lambda: nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 30, bias=False), nn.Tanh(), nn.Linear(30, 5)),
        ["4"],
        [(20, 12), (15, 20), (5, 15)],
    ),
    "flattened": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5)),
        ["4"],
        [(4, 3), (5, 64)],
    ),
    "no padding": (
        lambda: nn.Sequential(conv(3, 8, padding=1), nn.Sigmoid(), conv(8, 6, bias=False), nn.Tanh(), conv(6, 4)),
        ["4"],
        [(4, 3), (3, 4), (4, 3)],
    ),
    "padded with zeros": (
        lambda: nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 6, padding="same"), nn.Tanh(), conv(6, 4, padding=1)),
        ["4"],
        [(5, 3), (4, 5), (4, 4)],
    ),
    "padded with itself": (
        lambda: nn.Sequential(
            conv(3, 8), nn.Sigmoid(), conv(8, 6, padding=1, padding_mode="reflect"), nn.Tanh(), conv(6, 4)
        ),
        ["4"],
        [(4, 3), (3, 4), (4, 3)],
    ),
    "transposed": (
        lambda: nn.Sequential(
            conv(3, 8), nn.Sigmoid(), nn.ConvTranspose2d(8, 6, 3, stride=2), nn.Tanh(), nn.ConvTranspose2d(6, 4, 2)
        ),
        ["4"],
        [(5, 3), (4, 5), (4, 4)],
    ),
    "concatenated": (Concatenated, ["d"], [(5, 3), (5, 3), (6, 10), (4, 6)]),
    "read thrice": (ReadThrice, ["b", "c", "d"], [(5, 3), (5, 5), (5, 5), (5, 5)]),
    "depthwise": (Depthwise, ["b", "c"], [(8, 3), (8, 8), (4, 8)]),
}


@pytest.mark.parametrize("name", CONNECTIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_connection(name, seed):
    build, exclude, expected = CONNECTIONS[name]
    model = built(build, seed)
    random_ticket(model, 0.5, pattern="filter", exclude=exclude, seed=seed)
    example = torch.randn(4, 12) if name == "linear" else IMAGES
    small = shrink(model, example)
    assert_equal_outputs(small, model, example)
    assert widths(small) == expected


def test_constants_that_relu_makes_zero_need_no_remaining_channel():
    model = built(lambda: nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4, padding=1)))
    with torch.no_grad():
        model[1].bias.copy_(-model[1].bias.abs())
        model[1].running_mean.zero_()
    random_ticket(model, 0.5, pattern="filter", exclude=["3"], seed=0)
    small = shrink(model, IMAGES)
    assert widths(small) == [(4, 3), (4, 4)]
    assert_equal_outputs(small, model, IMAGES)


def test_channels_that_no_layer_reads_are_removed():
    """Tickets of input channels: the filters before them are removed, whatever they compute."""
    model = built(lambda: SmallConvNet((3, 10, 10), 10))
    random_ticket(model, 0.5, pattern="channel", exclude=["0"], seed=0)
    small = shrink(model, IMAGES)
    assert widths(small) == [(16, 3), (16, 16), (32, 16), (32, 32), (10, 32)]
    assert_equal_outputs(small, model, IMAGES)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (conv(i, o, padding=1) for i, o in ((3, 8), (8, 8), (8, 4)))

    def forward(self, x):
        y = self.a(x).relu()
        return self.c((y + self.b(y)).relu())


def test_added_channels_are_removed_where_both_masks_agree():
    model = built(Residual)
    first, second = torch.arange(8) < 5, torch.arange(8) > 2  # the last three; the first three
    masks = {"a.weight": first, "b.weight": first}
    hold(
        model, {name: kept[:, None, None, None].expand(model.get_parameter(name).shape) for name, kept in masks.items()}
    )
    small = shrink(model, IMAGES)
    assert widths(small) == [(6, 3), (6, 6), (4, 6)]  # with one that contributes the constants
    assert_equal_outputs(small, model, IMAGES)

    model = built(Residual)
    masks = {"a.weight": first, "b.weight": second}
    hold(
        model, {name: kept[:, None, None, None].expand(model.get_parameter(name).shape) for name, kept in masks.items()}
    )
    with pytest.raises(ValueError, match=r"although a has filters that are zero: .* \(residual connections\)"):
        shrink(model, IMAGES)


# ---------------------------------------------------------------------- what cannot be removed


class FixedSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), nn.Linear(8 * 36, 5)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu().view(-1, 8 * 36))


def test_layers_whose_size_the_forward_relies_on_stay_with_a_warning():
    model = built(FixedSize)
    random_ticket(model, 0.5, pattern="filter", exclude=["c"], seed=0)
    with pytest.warns(UserWarning, match=r"without the zero filters of b: left as they are \(mat1 and mat2 shapes"):
        small = shrink(model, IMAGES)
    assert widths(small) == [(4, 3), (8, 4), (5, 288)]
    assert_equal_outputs(small, model, IMAGES)
    random_ticket(alone := built(FixedSize), 0.5, pattern="filter", exclude=["a", "c"], seed=0)
    before = copy.deepcopy(alone.state_dict())
    with pytest.raises(ValueError, match=r"FixedSize can be removed: without the zero filters of b the outputs"):
        shrink(alone, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in alone.state_dict().items())


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.GroupNorm(2, 8), lambda: nn.LayerNorm((8, 8, 8)), lambda: nn.Softmax(1)],
    ids=["GN", "LN", "softmax"],
)
@pytest.mark.parametrize("pattern", ["filter", "channel"])
def test_channels_normalized_together_stay(norm, pattern):
    model = built(lambda: nn.Sequential(conv(3, 8), norm(), conv(8, 8), nn.ReLU(), conv(8, 4)))
    random_ticket(model, 0.5, pattern=pattern, exclude=["4"] if pattern == "filter" else ["0"], seed=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the outputs would not be the same")  # softmax
        small = shrink(model, IMAGES)
    assert widths(small) == [(8, 3), (4, 8), (4, 4)]
    assert_equal_outputs(small, model, IMAGES)


def test_constants_that_are_uneven_at_the_border_stay():
    model = built(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.AvgPool2d(2, padding=1), conv(8, 4)))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, -1.0] * 4))
    kept = torch.arange(8) >= 4  # of the four others two have a constant behind ReLU
    hold(model, {"0.weight": kept[:, None, None, None].expand(8, 3, 3, 3)})
    small = shrink(model, IMAGES)
    assert widths(small) == [(6, 3), (4, 6)]
    assert_equal_outputs(small, model, IMAGES)


def test_attention_keeps_its_size_and_the_mlp_shrinks():
    model = built(lambda: CharTransformer((12,), 20, width=32))
    random_ticket(model, 0.5, pattern="filter", exclude=["head"], seed=0)
    x = torch.randint(20, (4, 12))
    with pytest.warns(UserWarning, match=r"zero filters of .*blocks\.0\.qkv.*: left as they are"):
        small = shrink(model, x)
    for block in small.blocks:
        assert widths(block) == [(96, 32), (32, 32), (64, 32), (32, 64)]
    assert parameters(small) < 0.7 * parameters(model)
    other = torch.randint(20, (4, 12))
    torch.testing.assert_close(small(other), model(other), rtol=1e-5, atol=1e-5)


def test_filters_that_are_not_zero_stay_even_if_constant_on_the_example():
    """Channels that are constant on the example by chance are not removed."""
    model = built(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    with torch.no_grad():
        model[0].bias[:4] = -100
    with pytest.raises(ValueError, match="no filter is zero"):
        shrink(model, IMAGES)


@pytest.mark.filterwarnings("ignore:.*rounds to all")
def test_a_layer_keeps_one_channel():
    model = built(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    random_ticket(model, 0.999, pattern="filter", exclude=["2"], seed=0)
    assert not model[0].weight.any()
    small = shrink(model, IMAGES)
    assert widths(small) == [(1, 3), (4, 1)]
    assert_equal_outputs(small, model, IMAGES)


def test_example_inputs_of_several_kinds():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x, scale=None):
            return {"out": self.b(self.a(x).sigmoid()) * scale}

    model = built(Two)
    random_ticket(model, 0.5, pattern="filter", exclude=["b"], seed=0)
    x, scale = torch.randn(1, 6), torch.randn(1, 3)
    for inputs in ((x, scale), [x, scale], {"x": x, "scale": scale}, (x, torch.tensor(0.5))):
        small = shrink(model, inputs)
        assert widths(small) == [(5, 6), (3, 5)]
        torch.testing.assert_close(small(x, scale)["out"], model(x, scale)["out"])


@pytest.mark.parametrize("given", [None, 3, "x", (), {"x": 1}])
def test_example_inputs_without_a_tensor_are_refused(given):
    with pytest.raises(TypeError, match=r"example_inputs is a tensor, a tuple of .* without any tensor"):
        shrink(nn.Linear(2, 2), given)


def test_bad_input():
    model = built(lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        shrink({}, IMAGES)
    with pytest.raises(ValueError, match=r"no filter is zero\. finalize\(\) a ticket of pattern=\"filter\" first"):
        shrink(model, torch.randn(2, 6))
    random_ticket(model, 0.5, pattern="filter", exclude=["2"], seed=0)
    with pytest.raises(ValueError, match=r"shape \(2, 6\) in which all is 0\.0: .* data, or noise"):
        shrink(model, torch.zeros(2, 6))


def test_recurrent_layers_keep_their_size():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.memory(x)[0])

    model = built(Tagger)
    random_ticket(model, 0.5, pattern="channel", targets=[(nn.LSTM, "weight_*")], seed=0)
    with pytest.raises(ValueError, match=r"no filter is zero\..* Recurrent layers keep their size"):
        shrink(model, torch.randn(4, 5, 6))


def test_only_the_call_needs_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"shrink\(\) needs Torch-Pruning: pip install torch-pruning"):
        shrink(nn.Linear(2, 2), torch.randn(1, 2))
    code = "import sys, torch_dual_ticket.deploy; assert 'torch_pruning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""What the default targets take of real architectures, what is said of the rest, and what leaves frozen layers out."""

import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import hold, random_ticket
from torch_dual_ticket.report import summary

SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
LLAMA = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2}
BERT = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 16}
GPT = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
VIT = {**BERT, "image_size": 16, "patch_size": 4}
del VIT["vocab_size"], VIT["max_position_embeddings"]

# name: config, model, settings; and the sizes of what stays dense, but for parameters of one dimension
ARCHITECTURES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, {"tied to an embedding": 800, "embedding": 256}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA, {"embedding": 800}),
    "llama-tied": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": True},
        {"tied to an embedding": 800},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 4},
        {"embedding": 800, "not a target type": 2 * 4 * (16 * 64 + 32 * 16) + 2 * 4 * 16},
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, {"tied to an embedding": 800, "embedding": 2 * 32 * 2}),
    "bert": ("BertConfig", "BertForMaskedLM", BERT, {"tied to an embedding": 800, "embedding": 18 * 16}),
    "vit": ("ViTConfig", "ViTForImageClassification", VIT, {"not a target type": 18 * 16}),
}


def architecture(name: str) -> tuple[nn.Module, dict[str, int]]:
    transformers = pytest.importorskip("transformers", reason="needs Transformers: pip install transformers")
    config, model, settings, dense = ARCHITECTURES[name]
    tokens = {} if name == "vit" else {"bos_token_id": 1, "eos_token_id": 2}
    return getattr(transformers, model)(getattr(transformers, config)(**settings, **tokens)), dense


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_defaults_leave_dense_is_what_the_summary_says(name):
    model, dense = architecture(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rst = RSTScheduler(model, 0.9, seed=0)
    table = summary(rst)
    sizes: dict[str, int] = {}
    for layer in table.layers:
        assert bool(layer.dense) is (layer.residual is None)
        if layer.dense:
            sizes[layer.dense] = sizes.get(layer.dense, 0) + layer.size
    assert sizes == dense
    size = sum(parameter.numel() for parameter in model.parameters())
    assert sum(dense.values()) + sum(table.others) + sum(mask.numel() for mask in rst.masks.values()) == size
    listed = [f"{count:,} {reason}" for reason, count in {**sizes, "1-D": sum(table.others)}.items() if count]
    assert f"left dense: {', '.join(listed)}" in table._table(200).notes
    assert len(told) == (name == "mixtral")


def test_fused_experts_are_named_with_the_targets_that_take_them():
    model, _ = architecture("mixtral")
    with pytest.warns(UserWarning, match="default targets do not include") as told:
        RSTScheduler(model, 0.9)
    text = str(told[0].message)
    experts = "model.layers.{}.mlp.experts.{} (MixtralExperts, {})".format
    three = experts(0, "gate_up_proj", "27%"), experts(1, "gate_up_proj", "27%"), experts(0, "down_proj", "13%")
    assert ", ".join(three) in text
    advice = re.search(r"targets=(\(.*\)\))", text)[1]
    kind = type(model.model.layers[0].mlp.experts)
    targets = eval(advice, {"nn": nn, kind.__name__: kind})
    assert targets == (nn.Linear, (kind, ["gate_up_proj", "down_proj"]))
    rst = RSTScheduler(model, 0.9, targets=targets)  # explicit ones are not spoken of
    assert sum(mask.numel() for mask in rst.masks.values()) > 2 * 4 * (16 * 64 + 32 * 16)
    rst.remove()
    RSTScheduler(model, 0.9, exclude=["*.experts"])


class Fused(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(shape))


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 9)})
    model["head"].weight = model["tokens"].weight
    return model


def test_a_weight_that_an_embedding_shares_stays_dense_by_default():
    model = tied()
    assert list(random_ticket(model, 0.5).masks) == ["body.weight"]
    assert list(hold(model, {"tokens.weight": torch.ones(9, 8, dtype=torch.bool)}).masks) == ["tokens.weight"]
    assert list(RSTScheduler(tied(), 0.5, targets=[nn.Linear]).masks) == ["tokens.weight", "body.weight"]
    assert list(RSTScheduler(tied(), 0.5, targets=[nn.Embedding]).masks) == ["tokens.weight"]
    with pytest.raises(ValueError, match=r"nothing to prune: .*not shared with an embedding$"):
        RSTScheduler(tied(), 0.5, exclude=["body"])


def test_the_advice_leaves_out_what_an_embedding_shares():
    model = tied()
    model["experts"] = Fused(4, 8, 8)
    told = r"only 20% .*experts.up \(Fused, 80%\)\. .*targets=\(nn.Linear, \(Fused, \['up'\]\)\), exclude=\['tokens'\]"
    with pytest.warns(UserWarning, match=told):
        RSTScheduler(model, 0.5)
    targets = (nn.Linear, (Fused, ["up"]))
    assert list(RSTScheduler(model, 0.5, targets=targets, exclude=["tokens"]).masks) == ["body.weight", "experts.up"]


@pytest.mark.parametrize("size", [7, 8, 9])
def test_half_is_enough(size):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "fused": Fused(8, size), "frozen": Fused(99, 99)})
    model["frozen"].requires_grad_(False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        RSTScheduler(model, 0.5)
    assert len(told) == (size > 8)


class Recurrent(nn.Module):
    """A tagger: most of its weights are its embedding and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.memory, self.head = nn.Embedding(500, 16), nn.LSTM(16, 16), nn.Linear(16, 500)


class Residual(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(size, size, 3, padding=1, bias=False), nn.BatchNorm2d(size)
        self.conv2, self.norm2 = nn.Conv2d(size, size, 3, padding=1, bias=False), nn.BatchNorm2d(size)


class ConvNextBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(size, size, 7, padding=3, groups=size), nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.scale = nn.Parameter(torch.ones(size, 1, 1))


def resnet() -> nn.Module:
    blocks = [Residual(8) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *(ConvNextBlock(8) for _ in range(2)), nn.Linear(8, 10))


def unet() -> nn.Module:
    down, up = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)], [nn.ConvTranspose2d(16, 8, 3), nn.Conv2d(16, 2, 1)]
    return nn.ModuleDict({"down": nn.ModuleList(down), "up": nn.ModuleList(up)})


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64), 2, enable_nested_tensor=False)


@pytest.mark.parametrize("build", [resnet, convnext, unet, encoder, Recurrent], ids=lambda build: build.__name__)
def test_nothing_is_said_of_usual_models(build):
    """Warnings are errors here."""
    RSTScheduler(build(), 0.9, seed=0)


def test_a_model_that_is_mostly_recurrent_is_spoken_of():
    model = nn.ModuleDict({"memory": nn.LSTM(16, 16), "head": nn.Linear(16, 4)})
    names = r"\['weight_ih_l0', 'weight_hh_l0'\]"
    with pytest.warns(
        UserWarning, match=rf"memory\.weight_ih_l0 \(LSTM, .*targets=\(nn\.Linear, \(nn\.LSTM, {names}\)\)"
    ):
        RSTScheduler(model, 0.9)
    RSTScheduler(model, 0.9, targets=(nn.Linear, (nn.LSTM, "weight_*")))


def test_weights_behind_parametrizations_are_named_as_targets_take_them():
    model = nn.ModuleDict(
        {"memory": parametrizations.weight_norm(nn.LSTM(16, 32), "weight_hh_l0"), "head": nn.Linear(32, 4)}
    )
    names = r"\['weight_ih_l0', 'weight_hh_l0'\]"
    with pytest.warns(
        UserWarning, match=rf"memory\.weight_hh_l0 \(LSTM, .*targets=\(nn\.Linear, \(nn\.LSTM, {names}\)\)"
    ):
        RSTScheduler(model, 0.5)
    targets = (nn.Linear, (nn.LSTM, ["weight_ih_l0", "weight_hh_l0"]))
    assert len(RSTScheduler(model, 0.5, targets=targets).masks) == 3


class BiasedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 8))
        self.up_bias = nn.Parameter(torch.randn(4, 8))


def test_biases_are_not_proposed():
    model = nn.ModuleDict({"experts": BiasedExperts(), "head": nn.Linear(8, 4)})
    with pytest.warns(UserWarning, match=re.escape("targets=(nn.Linear, (BiasedExperts, ['up']));")):
        RSTScheduler(model, 0.5)


# ---------------------------------------------------------------------- frozen


class Adapted(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8).requires_grad_(False)
        self.lora_A, self.lora_B = (
            nn.ModuleDict({"default": nn.Linear(8, 2)}),
            nn.ModuleDict({"default": nn.Linear(2, 8)}),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def stages() -> nn.Module:
    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "layer1": nn.Sequential(Residual(8), Residual(8))})
    model.requires_grad_(False)
    model["layer2"] = nn.Sequential(Residual(8))
    model["fc"] = nn.Linear(8, 4)
    return model


def adapted() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": Adapted(), "v": Adapted()}) for _ in range(3))})


@pytest.mark.parametrize(
    ("build", "exclude", "told", "patterns", "rest"),
    [
        (
            stages,
            [],
            "conv1.weight, layer1.0.conv1.weight, layer1.0.conv2.weight and 2 more are",
            ["layer1", "conv1"],
            3,
        ),
        (stages, ["fc"], "conv1.weight, layer1.0", ["fc", "layer1", "conv1"], 2),
        (adapted, [], r"layers.0.q.base_layer.weight, .* and 3 more are", ["*.base_layer"], 12),
    ],
)
def test_frozen_layers_are_left_out_by_what_one_error_says(build, exclude, told, patterns, rest):
    with pytest.raises(
        ValueError, match=rf"{told}.* frozen .*known there\. Unfreeze them, or leave them out"
    ) as caught:
        RSTScheduler(build(), 0.5, exclude=exclude)
    advice = eval(re.search(r"exclude=(\[.*\])\.", str(caught.value))[1])
    assert advice == patterns
    assert len(RSTScheduler(build(), 0.5, exclude=advice).masks) == rest


def test_patterns_for_names_with_wild_letters():
    model = nn.ModuleDict({"a*": nn.Linear(4, 4).requires_grad_(False), "ab": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=re.escape("exclude=['a[*]']")):
        RSTScheduler(model, 0.5)
    assert list(RSTScheduler(model, 0.5, exclude=["a[*]"]).masks) == ["ab.weight", "a.weight"]

"""Layers of PEFT, PyTorch Geometric and torchao; models of sentence-transformers, timm and torchvision."""

import copy

import pytest
import torch
from lives import assert_same_life, updates
from models import finalize_quietly
from plain_loop import assert_holds_zeros, assert_lives_alike, loss_of, normal
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import hold

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def train(model, optimizer, rst, updates, output=None):
    for _ in range(updates):
        optimizer.zero_grad()
        loss_of(model(X) if output is None else output()).backward()
        optimizer.step()
        rst.step()


def assert_a_life(build, output=lambda model: model(X), **options):
    """Trained, transformed and finetuned, and the same without penalty; returns the last model and its scheduler."""
    residuals = []
    for max_penalty in (0.0, 10.0):
        model = build()
        optimizer = sgd(model)
        rst = RSTScheduler(model, 0.8, steps=10, max_penalty=max_penalty, seed=3, **options)
        train(model, optimizer, rst, 15, lambda model=model: output(model))
        residuals.append(rst.residual())
        finalize_quietly(rst)
        train(model, optimizer, rst, 10, lambda model=model: output(model))
        assert_holds_zeros(model, rst)
    assert residuals[1] < residuals[0]
    return model, rst


def test_lora_on_a_sparse_model():
    """``merge_and_unload()`` writes dense products through ``.data``: ``apply_masks()`` makes them sparse again."""
    library = pytest.importorskip("peft")
    model, rst = assert_a_life(network)
    adapted = library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["0"]))
    base = adapted.get_base_model()[0].base_layer.weight
    before = base.detach().clone()
    train(adapted, sgd(adapted), rst, 5)
    assert torch.equal(base, before)
    merged = adapted.merge_and_unload()
    assert (merged[0].weight != 0).all()
    rst.apply_masks(merged)
    assert_holds_zeros(merged, rst)
    assert not torch.equal(merged[0].weight, before)


def test_lora_beside_layers_that_are_pruned():
    """The frozen base weights and the adapters stay dense; the error names the first."""
    library = pytest.importorskip("peft")
    config = library.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    with pytest.raises(
        ValueError, match=r"frozen .* exclude=\['base_model.model.2.original_module', '.*0.base_layer'\]"
    ):
        RSTScheduler(library.get_peft_model(network(), config), 0.8)
    exclude = ["*.base_layer", "*.original_module", "*.lora_*"]
    model, rst = assert_a_life(lambda: library.get_peft_model(network(), config), exclude=exclude)
    assert list(rst.masks) == ["base_model.model.2.modules_to_save.default.weight"]
    (kept,) = rst.masks.values()
    assert torch.equal(model.merge_and_unload()[2].weight != 0, kept)


def test_graph_layers():
    """PyTorch Geometric has its own ``Linear``, and the error tells it from torch's."""
    library = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = library.GCNConv(32, 16), library.SAGEConv(16, 32)

        def forward(self, x):
            return self.second(self.first(x, edges).relu(), edges)

    with pytest.raises(ValueError, match=r"targets=\(torch_geometric.nn.dense.linear.Linear,\) would take them"):
        RSTScheduler(Graph(), 0.8)
    names = ["first.lin.weight", "second.lin_l.weight", "second.lin_r.weight"]
    assert_lives_alike(Graph, normal(5, 32), names, targets=[library.Linear])
    rst = RSTScheduler(Graph(), pattern="2:4", targets=[(library.Linear, "weight", 1)])
    assert rst.sparsity == 0.5


def test_torchao_quantizes_after_release():
    library = pytest.importorskip("torchao.quantization")
    model, rst = assert_a_life(network)
    masks = dict(rst.masks)
    managed = copy.deepcopy(model)
    library.quantize_(managed, library.Int8WeightOnlyConfig())
    with pytest.raises(RuntimeError, match=r"^0\.weight has become a Int8Tensor, .* Release it first"):
        managed(X)
    rst.remove()
    library.quantize_(model, library.Int8WeightOnlyConfig())
    for layer, kept in zip((model[0], model[2]), masks.values(), strict=True):
        assert not layer.weight.dequantize()[~kept].any()


@pytest.mark.parametrize("when", ["before", "after finalize"])
def test_training_that_is_aware_of_quantization(when):
    """torchao replaces layers: do it before the scheduler is built, or between ``remove()`` and ``hold()``."""
    library = pytest.importorskip("torchao.quantization.qat")
    quantize_ = pytest.importorskip("torchao.quantization").quantize_
    weights = library.IntxFakeQuantizeConfig(torch.int8, "per_channel")

    def prepared():
        model = network()
        quantize_(model, library.QATConfig(weight_config=weights, step="prepare"))
        return model

    if when == "before":
        model, rst = assert_a_life(prepared)
    else:
        model, rst = assert_a_life(network)
        rst.remove()
        quantize_(model, library.QATConfig(weight_config=weights, step="prepare"))
        rst = hold(model)
        optimizer = sgd(model)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model(X)).backward()
            optimizer.step()
    assert type(model[0]) is not nn.Linear
    assert_holds_zeros(model, rst)
    masks = dict(rst.masks)
    rst.remove()
    quantize_(model, library.QATConfig(step="convert"))
    assert all(torch.equal(model.get_parameter(name) != 0, kept) for name, kept in masks.items())


def test_sentence_transformers(tmp_path):
    """A sentence encoder with a tiny BERT, of which all but the embeddings are pruned."""
    library = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)

    def output(model):
        return model(dict(model.preprocess(["a b c", "b d"])))["sentence_embedding"]

    def build():
        return library.SentenceTransformer(str(tmp_path), device="cpu").train()

    _, rst = assert_a_life(build, output, exclude=["*pooler*"])
    assert len(rst.masks) == 6


VISION = {
    "resnet": lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "efficientnet": lambda models: models.EfficientNet(
        [models.efficientnet.MBConvConfig(4, 3, 2, 16, 24, 2)], dropout=0.2, stochastic_depth_prob=0.2, num_classes=10
    ),
    "convnext": lambda models: models.ConvNeXt(
        [models.convnext.CNBlockConfig(16, 32, 2), models.convnext.CNBlockConfig(32, None, 2)], 0.2, num_classes=10
    ),
    "vit": lambda models: models.VisionTransformer(32, 8, 2, 4, 32, 64, dropout=0.1, num_classes=10),
    "swin": lambda models: models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10),
    "lraspp": lambda models: models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=4),
}


def train_on_images(model, side):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for index in updates(side, count=24, middle=14):
        torch.manual_seed(index)  # of dropout and stochastic depth
        output = model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        optimizer.zero_grad()
        loss_of(output["out"] if isinstance(output, dict) else output).backward()
        side.after_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        side.before_update()
        optimizer.step()
        side.after_update()


@pytest.mark.parametrize("name", VISION)
def test_torchvision(name):
    """Small ones of its classes, and lraspp with its MobileNetV3, beside the explicit loop."""
    models = pytest.importorskip("torchvision.models")
    assert_same_life(train_on_images, lambda: VISION[name](models), sparsity=0.6)


@pytest.mark.parametrize("name", ["test_byobnet", "test_convnext2", "test_efficientnet", "test_resnet", "test_vit2"])
def test_timm(name):
    """Its models for tests, beside the explicit loop."""
    library = pytest.importorskip("timm")
    size = {"img_size": 32} if "vit" in name else {}
    assert_same_life(train_on_images, lambda: library.create_model(name, drop_path_rate=0.2, **size), sparsity=0.6)

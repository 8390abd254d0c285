"""Attention: in_proj and separate projections, out_proj whose forward never runs, and the fast path of the encoder."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from lives import Library
from models import finalize_quietly, make
from plain_loop import assert_holds_zeros, assert_lives_alike, loss_of, normal, sgd, train_on
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler

PROJECTIONS = (nn.Linear, (nn.MultiheadAttention, "*_proj_weight"))
# what torch says about the conversion of nested tensors
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Attends(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **settings)

    def forward(self, query, key=None):
        key = query if key is None else key
        return self.attention(query, key, key)


@pytest.mark.parametrize("settings", [{}, {"batch_first": True, "bias": False}, {"add_bias_kv": True}])
def test_attention(settings):
    names = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert_lives_alike(lambda: Attends(**settings), normal(5, 3, 8), names, targets=PROJECTIONS)


def test_attention_with_separate_projections():
    def inputs(index):
        return (*normal(5, 3, 8)(index), *normal(4, 3, 6)(index + 100))

    names = [f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
    assert_lives_alike(lambda: Attends(kdim=6, vdim=6), inputs, names, targets=PROJECTIONS)


@pytest.mark.filterwarnings("ignore:only 25% of the weights will be pruned")
def test_out_proj_alone_by_default():
    assert_lives_alike(Attends, normal(5, 3, 8), ["attention.out_proj.weight"])


def finalized(build=Attends) -> tuple[nn.Module, RSTScheduler, dict[str, torch.Tensor]]:
    """A model, and its state from before."""
    model = make(build)
    rst = RSTScheduler(model, 0.6, steps=12, seed=0, targets=PROJECTIONS)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    train_on(normal(5, 3, 8))(model, Library(model, rst))
    return model, rst, dense


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_dense_state_is_masked_at_the_first_forward(assign, training):
    """Of the attention that uses out_proj; and the gradients from the first backward on."""
    model, rst, dense = finalized()
    model.load_state_dict(dense, assign=assign)
    model.train(training).requires_grad_(training)
    with nullcontext() if training else pytest.warns(UserWarning, match="attention.*weight was given weights with"):
        loss = loss_of(model(*normal(5, 3, 8)(0)))
    assert_holds_zeros(model, rst)
    if training:
        loss.backward()
        for name, kept in rst.masks.items():
            assert torch.equal(model.get_parameter(name).grad != 0, kept)


def test_detaching_out_proj_leaves_no_hook_on_the_attention():
    model, rst, _ = finalized()
    assert prune.remove(model.attention.out_proj, "weight") is model.attention.out_proj
    assert list(rst.masks) == ["attention.in_proj_weight"]
    assert [hook.managed.name for hook in model.attention._forward_pre_hooks.values()] == ["attention.in_proj_weight"]
    rst.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def encoder_layer(**settings) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **settings)


LAYER_NAMES = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]


@pytest.mark.parametrize("settings", [{}, {"norm_first": True, "activation": "gelu"}], ids=["post", "pre"])
def test_encoder_layer(settings):
    assert_lives_alike(lambda: encoder_layer(**settings), normal(3, 5, 8), LAYER_NAMES, targets=PROJECTIONS)


def test_encoder_and_decoder():
    class Translates(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(encoder_layer(), 2)
            self.decoder = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.decoder(x, self.encoder(x))

    names = [f"encoder.layers.{index}.{name}" for index in range(2) for name in LAYER_NAMES]
    names += [f"decoder.{name}" for name in LAYER_NAMES[:2]]
    names += [f"decoder.{name.replace('self', 'multihead')}" for name in LAYER_NAMES[:2]]
    names += [f"decoder.{name}" for name in LAYER_NAMES[2:]]
    assert_lives_alike(Translates, normal(3, 5, 8), names, targets=PROJECTIONS)


# ---------------------------------------------------------------------------------- the fast path in evaluation


class PathsTaken:
    """Counts the calls of the fused kernels that evaluation may take instead of the modules' code."""

    KERNELS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")

    def __init__(self) -> None:
        self.taken: list[str] = []

    def __enter__(self) -> "PathsTaken":
        self.patches = [mock.patch.object(torch, name, self._counting(name)) for name in self.KERNELS]
        for patch in self.patches:
            patch.start()
        return self

    def _counting(self, name):
        kernel = getattr(torch, name)

        def counting(*args, **kwargs):
            self.taken.append(name)
            return kernel(*args, **kwargs)

        return counting

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()


def evaluate(model: nn.Module) -> tuple[torch.Tensor, list[str]]:
    model.eval()
    with torch.no_grad(), PathsTaken() as paths:
        output = model(*normal(3, 5, 8)(0))
    model.train()
    return output, paths.taken


def test_the_encoders_fast_path_is_off_until_remove_and_computes_the_same():
    """torch takes it only where no module below has a hook."""
    model = make(encoder_layer)
    assert evaluate(model)[1] == ["_transformer_encoder_layer_fwd"]
    rst = RSTScheduler(model, 0.5, steps=2, seed=0, targets=PROJECTIONS)
    assert "_transformer_encoder_layer_fwd" not in evaluate(model)[1]
    optimizer = sgd(model)
    for index in range(4):
        loss_of(model(*normal(3, 5, 8)(index))).backward()
        optimizer.step()
        optimizer.zero_grad()
        rst.step()
    finalize_quietly(rst)
    slow, paths = evaluate(model)
    assert "_transformer_encoder_layer_fwd" not in paths

    rst.remove()

    fast, paths = evaluate(model)
    assert paths == ["_transformer_encoder_layer_fwd"]
    assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("phase", ["transform", "finetune"])
def test_the_fast_path_of_attention_reads_the_managed_weights(phase):
    """Attention alone goes on to take it: the weights that it reads are the masked ones themselves."""
    model = make(lambda: Attends(batch_first=True))
    rst = RSTScheduler(model, 0.5, steps=2, seed=0, targets=[nn.Linear])
    model(*normal(3, 5, 8)(0))[0].sum().backward()
    sgd(model).step()
    rst.step()
    if phase == "finetune":
        finalize_quietly(rst)
    model.eval()
    with torch.no_grad(), PathsTaken() as paths:
        fast = model(*normal(3, 5, 8)(0))[0]
    slow = model(*normal(3, 5, 8)(0))[0]
    assert paths.taken == ["_native_multi_head_attention"]
    assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-12)
    assert prune.is_pruned(model.attention.out_proj)

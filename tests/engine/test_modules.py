"""The module types that people prune, each through a whole life beside the explicit loop."""

import pytest
import torch
from lives import Library, assert_same_life, updates
from models import finalize_quietly, make
from plain_loop import assert_holds_zeros, assert_lives_alike, loss_of, normal, sgd, train_on
from torch import nn
from torch.nn import functional

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._engine import enforcement

LAYERS = {
    "Linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "Conv1d": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, padding_mode="circular", padding=1), (2, 4, 8, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 5, 3), (2, 3, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 4, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_taken_by_default(name):
    build, shape = LAYERS[name]
    assert_lives_alike(build, normal(*shape), ["weight"])


def test_bilinear():
    def inputs(index):
        return (*normal(4, 3)(index), *normal(4, 5)(index + 100))

    assert_lives_alike(lambda: nn.Bilinear(3, 5, 4), inputs, ["weight"], targets=(nn.Bilinear,))


def test_custom_types():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(4, 6))

        def forward(self, x):
            return x * self.weight + self.shift

    assert_lives_alike(Scale, normal(4, 6), ["weight"], targets=(Scale,))
    assert_lives_alike(Scale, normal(4, 6), ["weight", "shift"], targets=((Scale, "*"),))
    assert_lives_alike(Scale, normal(4, 6), ["shift"], targets=((Scale, "s*"),))


# ---------------------------------------------------------------------------------- embeddings


def tokens(*shape: int):
    return lambda index: (torch.randint(10, shape, generator=torch.Generator().manual_seed(index)),)


@pytest.mark.parametrize(
    "settings", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=lambda s: str(*s)
)
def test_embedding(settings):
    assert_lives_alike(lambda: nn.Embedding(10, 6, **settings), tokens(4, 5), ["weight"], targets=(nn.Embedding,))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode):
    assert_lives_alike(lambda: nn.EmbeddingBag(10, 6, mode=mode), tokens(4, 5), ["weight"], targets=(nn.EmbeddingBag,))


def test_embedding_bag_with_sparse_gradients():
    """The penalty reaches the rows that a gradient holds."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model(*tokens(2, 3)(index))).backward()
            if side.is_explicit:
                with torch.no_grad():  # the same update, with a dense gradient whose other rows are zero
                    weight, kept = side.reference.targets[0]
                    rows = weight.grad.coalesce().indices()[0]
                    dense = weight.grad.to_dense()
                    if not side.finalized:
                        dense[rows] += side.reference.penalty * weight[rows] * ~kept[rows]
                    weight.sub_(0.05 * dense)
            else:
                optimizer.step()
            side.after_update()

    assert_same_life(
        train, lambda: nn.EmbeddingBag(10, 6, mode="sum", sparse=True), sparsity=0.6, targets=(nn.EmbeddingBag,)
    )


# ---------------------------------------------------------------------------------- unusual uses of weights


class UsesTheWeightsOfItsChildren(nn.Module):
    """As nn.MultiheadAttention does with its out_proj: no forward of the children ever runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return functional.linear(functional.linear(x, self.first.weight).tanh(), self.second.weight, self.second.bias)


def test_weights_used_by_a_parent():
    def build():
        model = UsesTheWeightsOfItsChildren()
        model.first.bias = None
        return model

    assert_lives_alike(build, normal(4, 6), ["first.weight", "second.weight"])


def test_zeros_of_weights_used_by_a_parent_come_back_at_the_next_update():
    """A stated limit: no forward of the child tells that something else than an optimizer has changed its weight."""
    model = make(UsesTheWeightsOfItsChildren)
    model.first.bias = None
    rst = RSTScheduler(model, 0.6, steps=12, seed=0)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    train_on(normal(4, 6))(model, Library(model, rst))
    model.load_state_dict(dense)
    loss_of(model(*normal(4, 6)(0))).backward()
    assert (model.first.weight != 0).all()
    assert torch.equal(model.first.weight.grad != 0, rst.masks["first.weight"])
    sgd(model).step()
    assert_holds_zeros(model, rst)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.ParameterList([torch.rand(6, 5), torch.rand(5, 4)])
        self.named = nn.ParameterDict({"scale": torch.rand(4), "shift": torch.rand(3, 4)})

    def forward(self, x):
        return (x @ self.items[0]).tanh() @ self.items[1] * self.named["scale"] + self.named["shift"]


def test_parameter_list_and_dict():
    targets = ((nn.ParameterList, "*"), (nn.ParameterDict, "scale"))
    names = ["items.0", "items.1", "named.scale"]
    assert_lives_alike(Listed, normal(3, 6), names, targets=targets)


class ListedDeeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ParameterList([torch.rand(6, 5), torch.rand(5, 4)])])

    def forward(self, x):
        return (x @ self.blocks[0][0]).tanh() @ self.blocks[0][1]


@pytest.mark.parametrize("build", [Listed, ListedDeeper])
def test_a_dense_state_is_masked_at_the_forward_of_the_module_that_uses_it(build):
    """A ParameterList has no forward, and a ModuleList around it neither."""
    model = make(build)
    rst = RSTScheduler(model, 0.6, steps=12, seed=0, targets=((nn.ParameterList, "*"), (nn.ParameterDict, "scale")))
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    train_on(normal(3, 6))(model, Library(model, rst))
    model.load_state_dict(dense)
    model(*normal(3, 6)(0))
    assert_holds_zeros(model, rst)
    rst.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(3):  # the weight of all calls but the first is saved for the backward
            x = self.layer(x).tanh()
        return x


def test_a_module_called_repeatedly_in_one_forward():
    assert_lives_alike(Repeated, normal(4, 6), ["layer.weight"])


def test_a_module_registered_twice():
    def build():
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.Tanh(), layer)

    rst = assert_lives_alike(build, normal(4, 6), ["0.weight"])
    assert rst.sparsity == round(0.6 * 36) / 36


class Tied(nn.Module):
    """Token embedding and output layer share a weight, as language models have it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x)).tanh())


@pytest.mark.parametrize("targets", [(nn.Linear,), (nn.Linear, nn.Embedding), (nn.Embedding, nn.Linear)])
def test_a_tied_weight_has_one_mask_and_one_penalty(targets):
    rst = assert_lives_alike(Tied, tokens(4, 3), ["embedding.weight", "body.weight"], targets=targets)
    assert rst.sparsity == (round(0.6 * 60) + round(0.6 * 36)) / 96


@pytest.mark.parametrize("build", [Tied, lambda: nn.MultiheadAttention(4, 2)], ids=["tied", "attention"])
def test_a_weight_with_several_places_is_worked_on_once_an_update(build, monkeypatch):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rst = RSTScheduler(model, 0.5, steps=1, targets=(nn.Linear, nn.Embedding))
    worked_on = []
    clear, clear_all = enforcement.clear_, enforcement.clear_all_

    def counted(pieces):
        pieces = list(pieces)
        worked_on.extend(pieces)
        clear(pieces)

    def all_counted(tensors, masks):
        worked_on.extend(tensors)
        clear_all(tensors, masks)

    monkeypatch.setattr(enforcement, "clear_", counted)
    monkeypatch.setattr(enforcement, "clear_all_", all_counted)

    def update():
        optimizer.zero_grad()
        inputs = [torch.randn(3, 4)] * 3 if isinstance(model, nn.MultiheadAttention) else tokens(4, 3)(0)
        output = model(*inputs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        optimizer.step()
        rst.step()

    update()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    finalize_quietly(rst)
    model.load_state_dict(dense)  # the forward of any of its occurrences puts the zeros back
    update()
    worked_on.clear()
    update()
    assert len(worked_on) == 2 * len(rst.masks), "the gradient and the weight"


@pytest.mark.parametrize("owner", ["embedding", "head"])
@pytest.mark.parametrize("targets", [(nn.Linear,), (nn.Linear, nn.Embedding)])
def test_excluding_any_owner_of_a_tied_weight_excludes_it(targets, owner):
    rst = RSTScheduler(make(Tied), 0.5, targets=targets, exclude=[owner])
    assert list(rst.masks) == ["body.weight"]


@pytest.mark.parametrize("pattern", ["embedding", "head"])
def test_any_owner_of_a_tied_weight_can_give_its_sparsity(pattern):
    rst = RSTScheduler(make(Tied), {pattern: 0.25}, targets=(nn.Linear, nn.Embedding))
    assert {name: int((~kept).sum()) for name, kept in rst.masks.items()} == {"embedding.weight": 15}


# ---------------------------------------------------------------------------------- lazy modules


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv1d(4, 3), nn.Flatten(), nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))


def test_lazy_modules_after_their_first_forward():
    def build():
        model = lazy().double()
        model(*normal(2, 3, 6)(0))
        return model

    assert_lives_alike(build, normal(2, 3, 6), ["0.weight", "2.weight", "4.weight"])


def test_lazy_modules_before_it():
    model = lazy().double()
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run one forward pass"):
        RSTScheduler(model, 0.5)
    rst = RSTScheduler(model, 0.5, exclude=["0", "2"], steps=2, seed=0)  # those that stay dense may get theirs later
    optimizer = None
    for index in range(4):
        loss = loss_of(model(*normal(2, 3, 6)(index)))
        optimizer = optimizer or sgd(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rst.step()
    finalize_quietly(rst)
    assert_holds_zeros(model, rst)
    assert list(rst.masks) == ["4.weight"]

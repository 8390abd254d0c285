"""Embeddings with ``sparse=True``: the penalty is on the rows that the gradient holds, as the update is."""

import pytest
import torch
from lives import assert_same_life, updates
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, about the tensors it makes
TARGETS = (nn.Embedding, nn.EmbeddingBag)


class Words(nn.Module):
    """Words, and bags of other words; the rest of the model is dense and not pruned.

    The table of words is large: the library does not work on it in one call with the other one.
    """

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(900, 6, sparse=True)
        self.bags = nn.EmbeddingBag(30, 6, mode="sum", sparse=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.words(30 * x).sum(1) + self.bags(x)))


def loss_at(model, index):
    generator = torch.Generator().manual_seed(index)
    x = torch.randint(30, (4, 3), generator=generator)  # rows may come twice, and most do not come
    return nn.functional.cross_entropy(model(x), torch.randint(5, (4,), generator=generator))


def embeddings_of(model):
    return [model.words.weight, model.bags.weight]


@torch.no_grad()
def penalize_rows(side):
    """In the explicit loop: in the rows that the gradient holds."""
    for parameter, kept in side.reference.targets:
        grad = parameter.grad = parameter.grad.coalesce()
        rows = grad.indices()[0]
        if side.finalized:
            grad.values().mul_(kept[rows])
        else:
            grad.values().add_(side.reference.penalty * parameter[rows] * ~kept[rows])


OPTIMIZERS = {
    "sparse-adam": lambda parameters: torch.optim.SparseAdam(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


@pytest.mark.parametrize("zeroing", ["to-none", "in-place"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients(name, zeroing):
    def train(model, side):
        optimizers = [OPTIMIZERS[name](embeddings_of(model)), torch.optim.AdamW(model.head.parameters(), lr=1e-2)]
        for index in updates(side, count=60, middle=30):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=zeroing == "to-none")
            loss_at(model, 2 * index).backward()
            loss_at(model, 2 * index + 1).backward()
            if side.is_explicit:
                penalize_rows(side)
            for optimizer in optimizers:
                optimizer.step()
            side.after_update()

    assert_same_life(train, Words, targets=TARGETS, steps=20)


def test_maximized_sparse_gradients():
    def train(model, side):
        optimizer = torch.optim.SparseAdam(embeddings_of(model), lr=1e-2, maximize=True)
        for index in updates(side, count=60, middle=30):
            optimizer.zero_grad()
            (-loss_at(model, index)).backward()
            if side.is_explicit:
                for parameter in embeddings_of(model):
                    parameter.grad.neg_()
                penalize_rows(side)
                for parameter in embeddings_of(model):
                    parameter.grad.neg_()
            optimizer.step()
            side.after_update()

    assert_same_life(train, Words, targets=TARGETS, steps=20)


def test_a_sparse_gradient_without_rows():
    """No word was looked up: there is nothing to penalize, and the update counts all the same."""

    def train(model, side):
        optimizer = OPTIMIZERS["sparse-adam"](embeddings_of(model))
        for index in updates(side, count=60, middle=30):
            optimizer.zero_grad()
            if index % 7 == 3:
                for parameter in embeddings_of(model):
                    parameter.grad = torch.sparse_coo_tensor(
                        torch.empty(1, 0, dtype=torch.long), torch.empty(0, 6, dtype=torch.float64), parameter.shape
                    )
            else:
                loss_at(model, index).backward()
            if side.is_explicit:
                penalize_rows(side)
            optimizer.step()
            side.after_update()

    assert_same_life(train, Words, targets=TARGETS, steps=20)


def test_nan_in_the_sparse_gradient_of_a_masked_weight():
    """It is gone before an optimizer remembers it."""
    poisoned = []

    def train(model, side):
        optimizer = OPTIMIZERS["sparse-adam"](embeddings_of(model))

        def poison(grad):
            if side.is_explicit or side.rst.phase == "transform":
                return None
            grad = grad.coalesce()
            masked = ~side.rst.masks["words.weight"][grad.indices()[0]]
            poisoned.append(int(masked.sum()))
            return torch.sparse_coo_tensor(grad.indices(), grad.values().masked_fill(masked, torch.nan), grad.shape)

        model.words.weight.register_hook(poison)
        for index in updates(side, count=60, middle=30):
            optimizer.zero_grad()
            loss_at(model, index).backward()
            if side.is_explicit:
                penalize_rows(side)
            optimizer.step()
            side.after_update()
        assert not optimizer.state[model.words.weight]["exp_avg"].isnan().any()

    assert_same_life(train, Words, targets=TARGETS, steps=20)
    assert sum(poisoned) > 100

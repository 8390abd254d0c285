"""Gradients that are missing, not finite, or of an unusual kind."""

import functools

import pytest
import torch
from lives import assert_same_life, is_plus_zero, updates
from models import INPUT_SHAPES, finalize_quietly, loss_of, make, mlp, wide
from torch import nn

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_layers_that_have_no_gradient_now_and_then(kind):
    """They get no penalty and no update; the others do."""

    def train(model, side):
        optimizer = kind(model.parameters(), lr=0.02)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            model[2 * (index % 3)].weight.grad = None
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_an_update_without_any_gradient():
    """It does not count."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for index in updates(side):
            optimizer.zero_grad()
            if index % 4 != 1:
                loss_of(model, index, SHAPE).backward()
            side.before_update()
            optimizer.step()
            if index % 4 != 1 or not side.is_explicit:
                side.after_update()

    assert_same_life(train)


def test_gradients_of_other_tensors():
    """Assigned, from ``autograd.grad`` or a custom reduction: a new tensor each time."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for index in updates(side):
            gradients = torch.autograd.grad(loss_of(model, index, SHAPE), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            side.after_backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_gradients_that_do_not_lie_as_the_weights_do():
    """Transposed in memory, or with gaps."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            weight = model[2].weight
            weight.grad = weight.grad.t().contiguous().t()
            weight = model[4].weight
            weight.grad = weight.grad.repeat_interleave(2, dim=1)[:, ::2]
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
def test_gradients_of_masked_weights_that_are_not_finite(build, kind, value):
    """A product with zero would leave NaN, and clipping or a momentum would spread it."""

    def train(model, side):
        optimizer = kind(model.parameters(), lr=0.02)
        for index in updates(side):
            optimizer.zero_grad()
            loss = loss_of(model, index, SHAPE)
            if not side.is_explicit and side.rst.phase == "finetune":
                masked = ~side.rst.masks["0.weight"]
                handle = model[0].weight.register_hook(lambda grad, masked=masked: grad.masked_fill(masked, value))
                loss.backward()
                handle.remove()
            else:
                loss.backward()
            side.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train, build)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("size", [12, 100], ids=["small", "large"])
def test_what_finalize_leaves(size, dtype):
    """Masked weights are +0, be they negative, NaN or infinite before; kept ones are not touched."""
    model = nn.Linear(size, size, bias=False, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rst = RSTScheduler(model, sparsity=0.5, seed=0)
    model(torch.ones(1, size, dtype=dtype)).abs().sum().backward()
    optimizer.step()
    rst.step()
    with torch.no_grad():
        specials = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, -1.0], dtype=dtype)
        model.weight.copy_(specials.repeat(size * size // 5 + 1)[: size * size].view(size, size))
    before = model.weight.detach().clone()
    report = finalize_quietly(rst)
    kept = rst.masks["weight"]
    assert is_plus_zero(model.weight[~kept])
    assert torch.equal(bits(model.weight[kept]), bits(before[kept]))
    assert report.total.pruned == int((~kept).sum())


def bits(values):
    return values.detach().contiguous().view(torch.uint8)


def test_negative_zero_does_not_come_back():
    """Weight decay and momentum of both signs leave +0 in the masked weights, as everything else that is zero."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    rst = RSTScheduler(model, sparsity=0.5, steps=3)
    for index in range(30):
        if index == 15:
            finalize_quietly(rst)
        optimizer.zero_grad()
        loss_of(model, index, SHAPE).backward()
        optimizer.step()
        rst.step()
        for name, kept in rst.masks.items() if index >= 15 else ():
            assert is_plus_zero(model.get_parameter(name)[~kept])
            assert is_plus_zero(model.get_parameter(name).grad[~kept])


class Normalized(torch.optim.Optimizer):
    """Steps of one length: gradients at masked weights would shorten those of the others."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])


def by_assignment(parameter, gradient):
    parameter.grad = gradient.clone()


def by_copying(parameter, gradient):
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.data.copy_(gradient)


def after_backward(parameter, gradient):
    parameter.grad = parameter.grad + gradient


@pytest.mark.parametrize("give", [by_assignment, by_copying, after_backward])
def test_gradients_that_do_not_come_from_backward(give):
    """They meet no hook of autograd, and are masked before the optimizer looks at them nevertheless."""

    def train(model, side):
        optimizer = Normalized(model.parameters(), lr=0.05)
        for index in updates(side):
            loss = loss_of(model, index, SHAPE)
            if give is after_backward:
                optimizer.zero_grad()
                loss.backward(retain_graph=True)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                give(parameter, gradient)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


def test_clipping_of_gradients_that_do_not_come_from_backward():
    """No hook sees them before the clipping does; ``apply_penalty()`` before it masks them."""

    def train(model, side, masks_first):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for index in updates(side):
            gradients = torch.autograd.grad(loss_of(model, index, SHAPE), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            side.after_backward()
            if masks_first and not side.is_explicit and side.rst.phase == "finetune":
                side.rst.apply_penalty()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(functools.partial(train, masks_first=True))
    with pytest.raises(AssertionError):
        assert_same_life(functools.partial(train, masks_first=False))


def test_gradients_written_over_those_of_an_earlier_backward():
    """Autograd's hooks have met the tensor, but not these values."""

    def train(model, side):
        optimizer = Normalized(model.parameters(), lr=0.05)
        for index in updates(side):
            loss = loss_of(model, index, SHAPE)
            if index % 2:
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad.data.copy_(gradient)
            else:
                model.zero_grad()
                loss.backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_gradients_changed_in_place_after_backward(kind):
    """Noise, say: what it puts on masked weights stays with them where the optimizer takes each weight by itself."""

    def train(model, side):
        optimizer = kind(model.parameters(), lr=0.02)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            noise = torch.Generator().manual_seed(index)
            for parameter in model.parameters():
                parameter.grad.add_(torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype), alpha=1e-3)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)

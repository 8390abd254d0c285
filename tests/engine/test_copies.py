"""Copies of a model, at every moment of a ticket's life: plain before finalize(), holding their zeros after it."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from models import INPUT_SHAPES, assert_same, batch, finalize_quietly, loss_of, make, mlp
from reference import ExplicitLoop
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._engine.layer_hook import LayerHook
from torch_dual_ticket.baselines import random_ticket

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the weights will be pruned")  # attention, and little else
SHAPE = INPUT_SHAPES[mlp]


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


WAYS = [copy.deepcopy, by_pickle, by_torch_save]


class Attention(nn.Module):
    """With torch's own example of a module that uses the weight of a child, out_proj, itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class Borrowing(nn.Module):
    """A module that uses the weight of a child whose forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lender, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, self.lender.weight, self.lender.bias).tanh())


def attention() -> nn.Module:
    return Attention()


def borrowing() -> nn.Module:
    return Borrowing()


SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {**INPUT_SHAPES, attention: (4, 8), borrowing: SHAPE}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def train(
    model: nn.Module,
    updates: range,
    *,
    shape: tuple[int, ...] = SHAPE,
    rst: RSTScheduler | None = None,
    explicit: ExplicitLoop | None = None,
    clip: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    check: Callable[[], None] = lambda: None,
) -> torch.optim.Optimizer:
    """A plain loop; the reference masks the gradients before clipping, and penalizes them after it."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for index in updates:
        optimizer.zero_grad()
        loss_of(model, index, shape).backward()
        check()
        if explicit is not None and explicit.finalized:
            explicit.before_update()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if explicit is not None and not explicit.finalized:
            explicit.before_update()
        optimizer.step()
        if explicit is not None:
            explicit.after_update()
        if rst is not None:
            rst.step()
        check()
    return optimizer


def finalized(build: Callable[[], nn.Module] = mlp, **settings: object) -> tuple[nn.Module, RSTScheduler]:
    """A model after a short transformation, masked."""
    model = make(build)
    rst = RSTScheduler(model, sparsity=0.7, steps=5, seed=1, **settings)
    train(model, range(5), shape=SHAPES[build], rst=rst)
    finalize_quietly(rst)
    return model, rst


# -- every moment of a life --------------------------------------------------------------------------------------------


def fresh() -> tuple[nn.Module, RSTScheduler]:
    model = make(mlp)
    return model, RSTScheduler(model, sparsity=0.7, steps=5, seed=1)


def midway() -> tuple[nn.Module, RSTScheduler]:
    """With gradients that are not used yet."""
    model, rst = fresh()
    train(model, range(3), rst=rst)
    loss_of(model, 3, SHAPE).backward()
    return model, rst


def done() -> tuple[nn.Module, RSTScheduler]:
    model, rst = fresh()
    train(model, range(5), rst=rst)
    assert rst.done
    return model, rst


def in_stock_layout() -> tuple[nn.Module, RSTScheduler]:
    model, rst = finalized()
    rst.to_prune()
    return model, rst


def removed() -> tuple[nn.Module, RSTScheduler]:
    model, rst = finalized()
    rst.remove()
    return model, rst


@pytest.mark.parametrize("make_copy", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("moment", [fresh, midway, done, finalized, in_stock_layout, removed], ids=lambda m: m.__name__)
def test_a_copy_at_every_moment_computes_the_same(moment, make_copy):
    model, rst = moment()
    if moment is in_stock_layout:
        with torch.no_grad():  # a layout of torch's own, with its rule for deepcopy
            model(batch(0, SHAPE)[0])
    duplicate = make_copy(model)
    assert_same(model, duplicate, 0)
    x, _ = batch(7, SHAPE)
    assert torch.equal(model(x), duplicate(x))
    held = moment in (finalized, in_stock_layout)
    assert prune.is_pruned(duplicate) is held
    before = copy.deepcopy(model.state_dict())
    train(duplicate, range(10, 13))
    for name, kept in rst.masks.items() if moment is not in_stock_layout else ():
        zeros = (duplicate.get_parameter(name)[~kept] == 0).all()
        assert bool(zeros) is held
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"training the copy changed {name} of the original"


@pytest.mark.parametrize("moment", [fresh, midway, done], ids=lambda m: m.__name__)
def test_the_original_goes_on_with_its_life_as_if_it_had_not_been_copied(moment):
    model, rst = moment()
    start = rst._steps
    twin, twin_rst = moment()
    duplicate = copy.deepcopy(model)
    train(duplicate, range(3))
    optimizer, twin_optimizer = train(model, range(start, 9), rst=rst), train(twin, range(start, 9), rst=twin_rst)
    finalize_quietly(rst)
    finalize_quietly(twin_rst)
    train(model, range(9, 12), rst=rst, optimizer=optimizer)
    train(twin, range(9, 12), rst=twin_rst, optimizer=twin_optimizer)
    assert_same(model, twin, 0)


def test_the_stock_layout_deep_copies_by_the_rule_of_torch():
    model, _ = in_stock_layout()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    with torch.no_grad():
        model(batch(0, SHAPE)[0])
    copy.deepcopy(model)


# -- during the transformation: a plain model --------------------------------------------------------------------------


@pytest.mark.parametrize("make_copy", WAYS, ids=lambda way: way.__name__)
def test_a_copy_made_during_the_transformation_is_not_penalized(make_copy):
    model, rst = midway()
    duplicate, plain = make_copy(model), make(mlp)
    plain.load_state_dict(model.state_dict())
    assert not prune.is_pruned(duplicate)
    assert rst.penalty > 0
    train(duplicate, range(5))
    train(plain, range(5))
    assert_same(duplicate, plain, 0)
    assert not any(isinstance(hook, LayerHook) for layer in duplicate for hook in layer._forward_pre_hooks.values())
    assert hooks(model) == 3


def test_a_copy_made_during_the_transformation_takes_its_own_scheduler():
    model, _ = midway()
    duplicate = copy.deepcopy(model)
    plain = make(mlp)
    plain.load_state_dict(model.state_dict())
    rst = RSTScheduler(duplicate, sparsity=0.5, steps=4, seed=9)
    explicit = ExplicitLoop(plain, rst.masks, steps=4)
    optimizer, plain_optimizer = train(duplicate, range(6), rst=rst), train(plain, range(6), explicit=explicit)
    finalize_quietly(rst)
    explicit.finalize()
    train(duplicate, range(6, 12), rst=rst, optimizer=optimizer)
    train(plain, range(6, 12), explicit=explicit, optimizer=plain_optimizer)
    assert_same(duplicate, plain)


# -- after finalize(): the copy holds its zeros ------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("clip", [None, 0.05], ids=["", "clipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make_copy", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("build", [mlp, attention, borrowing], ids=lambda build: build.__name__)
def test_a_copy_of_a_finalized_model_lives_on_its_own(build, make_copy, optimizer, clip):
    model, rst = finalized(build)
    masks = dict(rst.masks)
    duplicate = make_copy(model)
    del model, rst  # nothing of the original is needed
    plain = make(build)
    plain.load_state_dict(duplicate.state_dict())
    explicit = ExplicitLoop(plain, masks, steps=1)
    explicit.finalize()

    def check() -> None:
        for name, kept in masks.items():
            assert (duplicate.get_parameter(name)[~kept] == 0).all()
            assert (duplicate.get_parameter(name).grad[~kept] == 0).all()

    start = copy.deepcopy(duplicate)
    mine = OPTIMIZERS[optimizer](duplicate.parameters())
    theirs = OPTIMIZERS[optimizer](plain.parameters())
    train(duplicate, range(8), shape=SHAPES[build], optimizer=mine, clip=clip, check=check)
    train(plain, range(8), shape=SHAPES[build], optimizer=theirs, clip=clip, explicit=explicit)
    assert_same(duplicate, plain)
    assert all(not torch.equal(a, b) for a, b in zip(start.parameters(), duplicate.parameters(), strict=True))


def test_a_saved_model_holds_its_zeros_in_a_process_that_knows_of_no_scheduler(tmp_path):
    for _ in range(1000):  # hooks are numbered; here the number is higher than in the other process
        nn.Identity().register_forward_pre_hook(print)
    model, rst = finalized(attention)
    torch.save((model, dict(rst.masks)), tmp_path / "model.pt")
    script = """
import sys, torch
from torch.utils.hooks import RemovableHandle
model, masks = torch.load(sys.argv[1], weights_only=False)
held = {number: module for module in model.modules() for number in module._forward_pre_hooks}
for number in sorted(held):  # later hooks, until one would have got the number of the layer's own
    while RemovableHandle.next_id < number:
        torch.nn.Identity().register_forward_pre_hook(print)
    held[number].register_forward_pre_hook(lambda *_: None)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 4, 8, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model(torch.randn(8, 4, 8, dtype=torch.float64))
    assert all((model.get_parameter(name)[~kept] == 0).all() for name, kept in masks.items())
    assert not any((model.get_parameter(name)[kept] == 0).any() for name, kept in masks.items())
"""
    here = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], env=environment, check=True)


def test_a_copy_of_a_copy_holds_its_zeros():
    model, rst = finalized(attention)
    masks = dict(rst.masks)
    third = by_torch_save(copy.deepcopy(by_pickle(model)))
    train(third, range(4), shape=SHAPES[attention], clip=0.1)
    for name, kept in masks.items():
        assert (third.get_parameter(name)[~kept] == 0).all()


@pytest.mark.parametrize("make_copy", WAYS, ids=lambda way: way.__name__)
def test_a_copy_of_a_part_holds_the_zeros_of_that_part(make_copy):
    model, rst = finalized(attention)
    kept = rst.masks["attention.out_proj.weight"]
    part = make_copy(model.attention)
    plain = nn.MultiheadAttention(8, 2, batch_first=True).double()
    plain.load_state_dict(part.state_dict())
    explicit = ExplicitLoop(plain, {"out_proj.weight": kept}, steps=1)
    explicit.finalize()
    for module in (part, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for index in range(5):
            x, _ = batch(index, (4, 8))
            optimizer.zero_grad()
            module(x, x, x)[0].square().mean().backward()
            if module is plain:
                explicit.before_update()
            nn.utils.clip_grad_norm_(module.parameters(), 0.01)
            optimizer.step()
            if module is plain:
                explicit.after_update()
    assert_same(part, plain)
    assert (part.out_proj.weight[~kept] == 0).all()


def test_a_copy_zeroes_at_its_forward_what_no_optimizer_has_changed():
    model, rst = finalized()
    duplicate = copy.deepcopy(model)
    dense = make(mlp, seed=5)
    duplicate.load_state_dict(dense.state_dict())
    rst.apply_masks(dense)
    x, _ = batch(0, SHAPE)
    assert torch.equal(duplicate(x), dense(x))
    assert_same(duplicate, dense, 0)


def test_a_copy_of_a_model_that_is_updated_manually_zeroes_at_each_forward():
    """Such updates may leave no trace, in the copy's loop as in the original's."""
    model = make(mlp)
    rst = RSTScheduler(model, 0.6, steps=2, seed=0)
    loss_of(model, 0, SHAPE).backward()
    rst.apply_penalty()
    rst.step()
    finalize_quietly(rst)
    duplicate = copy.deepcopy(model)
    x, _ = batch(0, SHAPE)
    duplicate(x)
    for name in rst.masks:
        duplicate.get_parameter(name).data.add_(1)
    duplicate(x)
    for name, kept in rst.masks.items():
        assert not duplicate.get_parameter(name)[~kept].any()


def test_original_and_copy_are_independent():
    model, rst = finalized()
    duplicate = copy.deepcopy(model)
    rst.remove()
    train(model, range(3))
    train(duplicate, range(3))
    for name, kept in rst.masks.items():
        assert not (model.get_parameter(name)[~kept] == 0).any(), "nothing holds the original any more"
        assert (duplicate.get_parameter(name)[~kept] == 0).all()


def test_a_tied_weight_is_tied_and_managed_in_the_copy():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model = Tied().double()
    rst = RSTScheduler(model, sparsity=0.6, steps=3, seed=2)
    train(model, range(3), rst=rst)
    finalize_quietly(rst)
    kept = rst.masks["first.weight"]
    for part in (copy.deepcopy(model), by_copied_second(model)):
        layer = getattr(part, "second", part)
        train(part, range(3))
        assert (layer.weight[~kept] == 0).all()
        assert not (layer.weight[kept] == 0).any()


def by_copied_second(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model.second)


def test_stock_prune_detaches_a_layer_of_a_copy():
    model, rst = finalized()
    duplicate = copy.deepcopy(model)
    for layer in (duplicate[0], duplicate[2], duplicate[4]):
        prune.remove(layer, "weight")
    assert not prune.is_pruned(duplicate)
    assert hooks(duplicate) == 0
    assert prune.is_pruned(model)
    assert len(rst.masks) == 3, "the copy's layers are not the scheduler's"
    RSTScheduler(duplicate, sparsity=0.5)


def test_a_scheduler_on_a_managed_copy_is_refused_with_the_way_out():
    model, rst = finalized()
    duplicate = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"torch_dual_ticket\.release"):
        RSTScheduler(duplicate, sparsity=0.5)
    assert prune.is_pruned(duplicate)
    del rst


# -- the scheduler in the copy -----------------------------------------------------------------------------------------


def test_a_scheduler_copied_with_its_finalized_model_speaks_of_the_copy():
    model, rst = finalized()
    duplicate, its_rst = copy.deepcopy((model, rst))
    assert its_rst.phase == "finetune"
    assert its_rst.sparsity == rst.sparsity
    train(duplicate, range(3), rst=its_rst)
    its_rst.remove()
    assert hooks(duplicate) == 0
    assert hooks(model) == 3


def test_a_scheduler_copied_after_a_layer_has_left_speaks_of_the_others():
    model, rst = finalized()
    prune.remove(model[2], "weight")
    _, its_rst = copy.deepcopy((model, rst))
    assert list(its_rst.masks) == ["0.weight", "4.weight"]


def test_a_copied_scheduler_that_goes_back_and_is_dropped_leaves_nothing():
    before, its_rst = midway()
    state = its_rst.state_dict()
    del before
    model, rst = copy.deepcopy(finalized())
    rst.load_state_dict(state)
    assert (rst.phase, hooks(model)) == ("transform", 3)
    del rst
    plain = make(mlp)
    plain.load_state_dict(model.state_dict())
    train(model, range(3))
    train(plain, range(3))
    assert_same(model, plain, 0)


@pytest.mark.parametrize("detached", [0, 1])
def test_a_scheduler_copied_during_the_transformation_says_that_it_manages_nothing(detached):
    model, rst = midway()
    for layer in model[2 : 2 + detached]:
        prune.remove(layer, "weight")
    duplicate, its_rst = copy.deepcopy((model, rst))
    train(duplicate, range(3))
    for call in (its_rst.step, its_rst.finalize):  # a loop that waits for done would never end
        with pytest.raises(RuntimeError, match=r"copy made during the transformation.*Build a new RSTScheduler"):
            call()
    train(model, range(3, 5), rst=rst)
    assert rst.done


# -- functional_call ---------------------------------------------------------------------------------------------------


def test_functional_call_during_the_transformation_is_that_of_a_plain_model():
    model, rst = midway()
    plain = make(mlp, seed=4)
    x, _ = batch(0, SHAPE)
    assert torch.equal(torch.func.functional_call(model, dict(plain.named_parameters()), (x,)), plain(x))
    assert rst.phase == "transform"


@pytest.mark.parametrize("kind", ["parameters", "tensors"])
@pytest.mark.parametrize("target", ["the model", "a copy"])
def test_functional_call_computes_with_what_it_is_given_and_leaves_it_alone(kind, target):
    """The tensors given are the caller's, as a teacher's or an EMA's are; the model's own stay managed."""
    model, rst = finalized()
    callee = model if target == "the model" else copy.deepcopy(model)
    teacher = make(mlp, seed=4)
    given = {n: p if kind == "parameters" else p.detach().clone() for n, p in teacher.named_parameters()}
    before = copy.deepcopy(given)
    x, _ = batch(0, SHAPE)
    assert torch.equal(torch.func.functional_call(callee, given, (x,)), teacher(x))
    for name, value in given.items():
        assert torch.equal(value, before[name])
    train(callee, range(3), clip=0.1)
    for name, kept in rst.masks.items():
        assert (callee.get_parameter(name)[~kept] == 0).all()
        assert (callee.get_parameter(name).grad[~kept] == 0).all()


def test_functional_call_with_the_models_own_parameters_keeps_zeros():
    model, rst = finalized()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    x, _ = batch(0, SHAPE)
    torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    for name, kept in rst.masks.items():
        assert (model.get_parameter(name)[~kept] == 0).all()


def test_functional_call_with_one_tensor_after_another_weight_has_changed():
    """As noise on a weight, and gradients of each example: what is lent has no zeros, and perhaps no storage."""
    model, rst = finalized()
    x, y = batch(0, SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, {"0.weight": weight}, (x,)), y)

    for _ in range(3):
        optimizer.zero_grad()
        loss(model[0].weight + 0.01, x, y).backward()
        for name, kept in rst.masks.items():
            assert (model.get_parameter(name).grad[~kept] == 0).all()
        optimizer.step()
        with torch.no_grad():
            model[2].weight.add_(1)
        each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(model[0].weight.detach(), x[:, None], y[:, None])
        assert each.shape == (len(x), *model[0].weight.shape)
        assert (model[2].weight[~rst.masks["2.weight"]] == 0).all()
        with torch.no_grad():
            model[2].weight.add_(1)  # before the call with noise


def test_gradients_of_functions_of_the_parameters():
    """``torch.func`` on a finalized model: gradients and an ensemble, over tensors that are the caller's."""
    model, _ = finalized()
    x, y = batch(0, SHAPE)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    gradients = torch.func.grad(loss)(parameters)
    plain = make(mlp)
    plain.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(plain(x), y).backward()
    for name, value in plain.named_parameters():
        assert torch.allclose(gradients[name], value.grad, rtol=1e-12, atol=1e-15)

    models = [copy.deepcopy(model) for _ in range(3)]
    stacked, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(model).to("meta")
    outputs = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(stacked, buffers)
    for output in outputs:
        assert torch.allclose(output, model(x), rtol=1e-12)


def test_a_copy_made_in_inference_mode_evaluates():
    model = make(mlp)
    random_ticket(model, 0.5, seed=0)
    x = torch.randn(2, *INPUT_SHAPES[mlp], dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(x), model(x))

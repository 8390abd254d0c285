"""Mixed precision: autocast and GradScaler, in float32 and bit for bit.

λ and the scale are powers of two here, so that nothing is rounded in another order than in the explicit loop.
"""

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, cnn, finalize_quietly, loss_of, make, mlp, transformer, wide
from torch import nn

from torch_dual_ticket import RSTScheduler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EXACT = {"dtype": torch.float32, "tolerance": 0.0, "schedule": lambda progress: 2.0 ** round(4 * progress - 4)}


def loss_at(model, index, build=mlp):
    return loss_of(model, index, INPUT_SHAPES[build], dtype=torch.float32)


@pytest.mark.parametrize("build", [mlp, wide, cnn, transformer], ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype, build):
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for index in updates(side):
            optimizer.zero_grad()
            with torch.autocast("cpu", DTYPES[dtype]):
                loss = loss_at(model, index, build)
            loss.backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train, build, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_autocast_region_that_spans_finalize(dtype):
    """It keeps the casts of the weights that it has made, of before the zeros."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", DTYPES[dtype]):
                if index == 15:
                    loss_at(model, index)
                    side.finalize()
                    if side.is_explicit:
                        torch.clear_autocast_cache()
                loss = loss_at(model, index)
            loss.backward()
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train, **EXACT)


SCALED_OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "sgd-fused": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
}
INFINITE = {3, 4, 11, 25, 31}  # the updates that GradScaler skips


def update_with(scaler, optimizers):
    """Let the scaler update; whether it did, as it tells."""
    scale = scaler.get_scale()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
@pytest.mark.parametrize("handling", ["plain", "unscaled-and-clipped"])
@pytest.mark.parametrize("name", SCALED_OPTIMIZERS)
def test_grad_scaler(name, handling, build):
    """The penalty is that of the unscaled gradient, and λ advances only on updates that took place."""

    def train(model, side):
        optimizer = SCALED_OPTIMIZERS[name](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6)
        skipped = 0
        for index in updates(side):
            optimizer.zero_grad()
            scaler.scale(loss_at(model, index, build)).backward()
            if index in INFINITE:
                model[2].bias.grad[1] = float("inf")
            if side.is_explicit or handling != "plain":
                scaler.unscale_(optimizer)
            if handling != "plain":
                side.after_backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            side.before_update()
            happened = update_with(scaler, [optimizer])
            skipped += not happened
            if happened or not side.is_explicit:
                side.after_update()
        assert skipped == len(INFINITE)

    assert_same_life(train, build, **EXACT)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_scaler_of_two_optimizers(fused):
    """One of them is skipped now and then: the other one's update is made, and counts."""

    def train(model, side):
        optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2, fused=fused) for part in (model[0], model[2:])]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6)
        for index in updates(side):
            model.zero_grad()
            scaler.scale(loss_at(model, index)).backward()
            if index in INFINITE:
                model[0].bias.grad[1] = float("inf")
            if side.is_explicit:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            side.before_update()
            update_with(scaler, optimizers)
            side.after_update()

    assert_same_life(train, **EXACT)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_scaled_accumulation_with_a_scheduler_step_for_several_updates(fused):
    """A scheduler step counts if any update since the last one took place."""

    def train(model, side):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6)
        happened = False
        for index in updates(side):
            optimizer.zero_grad()
            for part in range(3):
                scaler.scale(loss_at(model, 3 * index + part) / 4).backward()
            if index in INFINITE or index in (8, 9):
                model[2].bias.grad[1] = float("inf")
            if side.is_explicit:
                scaler.unscale_(optimizer)
            side.before_update()
            happened |= update_with(scaler, [optimizer])
            side.updated()
            if index % 2:
                if happened or not side.is_explicit:
                    side.scheduler_step()
                happened = False

    rst = assert_same_life(train, **{**EXACT, "steps": 20})
    assert rst.state_dict()["ticks"] == 9  # of 10: both updates 8 and 9 were skipped


def test_a_scaler_that_is_switched_off():
    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for index in updates(side):
            optimizer.zero_grad()
            scaler.scale(loss_at(model, index)).backward()
            scaler.unscale_(optimizer)
            side.before_update()
            scaler.step(optimizer)
            scaler.update()
            side.after_update()

    assert_same_life(train, **EXACT)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_nothing_counts_while_everything_is_skipped(fused):
    model = make(mlp, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    rst = RSTScheduler(model, sparsity=0.5, steps=10)
    for index in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_at(model, index) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        rst.step()
    assert rst.progress == 0.0
    with pytest.raises(RuntimeError, match="no update ever applied the penalty"):
        finalize_quietly(rst)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def scaled_update(times=1.0):
    """One by a fused optimizer, whose success is known to the device alone until somebody asks."""
    model = make(mlp, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu")
    rst = RSTScheduler(model, sparsity=0.5, steps=10)
    state = rst.state_dict()
    scaler.scale(loss_at(model, 0) * times).backward()
    scaler.step(optimizer)
    scaler.update()
    return optimizer, rst, state


def test_finalize_after_one_update_without_a_scheduler_step():
    _, rst, _ = scaled_update()
    finalize_quietly(rst)
    assert rst.phase == "finetune"


def test_going_back_after_an_update_without_a_scheduler_step():
    _, rst, state = scaled_update()
    rst.load_state_dict(state)
    rst.step()
    assert rst.progress == 0.0


def test_a_step_without_gradients_after_one_that_was_skipped():
    optimizer, rst, _ = scaled_update(times=float("inf"))
    optimizer.zero_grad()
    optimizer.step()
    rst.step()
    assert rst.progress == 0.0


@pytest.mark.parametrize("build", [mlp, wide], ids=lambda build: build.__name__)
def test_a_scale_that_half_precision_does_not_hold(build):
    """float16 can hold the penalty λ·scale·w on scaled gradients, but not λ·scale; λ is 1 here."""
    model = make(build, dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)  # which undoes the scale in the gradients
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    rst = RSTScheduler(model, 0.5, steps=1, seed=0)
    expected = {name: model.get_parameter(name) * ~mask for name, mask in rst.masks.items()}
    (0 * scaler.scale(loss_of(model, 0, INPUT_SHAPES[build], dtype=torch.float16))).backward()
    scaler.step(optimizer)
    for name, penalty in expected.items():
        assert torch.equal(model.get_parameter(name).grad, penalty)

"""KeptParameters: the updates of an optimizer that sees the kept weights alone are those of one that sees all."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from models import INPUT_SHAPES, assert_same, batch, cnn, finalize_quietly, loss_of, make, mlp, transformer, wide
from torch import nn
from torch.nn.utils import clip_grad_norm_, prune

from torch_dual_ticket import RSTScheduler, release
from torch_dual_ticket._engine.enforcement import Enforcement
from torch_dual_ticket.baselines import hold, random_ticket
from torch_dual_ticket.kept import KeptParameters
from torch_dual_ticket.kept.gradient import KeptGradient
from torch_dual_ticket.kept.weight import KeptWeight

OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "SGD momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, dampening=0.1),
    "SGD nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD maximize": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, maximize=True),
    "SGD fused": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-2),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2),
    "AdamW foreach": functools.partial(torch.optim.AdamW, lr=1e-2, foreach=True, amsgrad=True),
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    "Adadelta": functools.partial(torch.optim.Adadelta, lr=1.0),
    "Adamax": functools.partial(torch.optim.Adamax, lr=1e-2),
    "ASGD": functools.partial(torch.optim.ASGD, lr=1e-2),
    "NAdam": functools.partial(torch.optim.NAdam, lr=1e-2),
    "RAdam": functools.partial(torch.optim.RAdam, lr=1e-2),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9, centered=True),
    "Rprop": functools.partial(torch.optim.Rprop, lr=1e-2),
}
ADAMW, MOMENTUM = OPTIMIZERS["AdamW"], OPTIMIZERS["SGD momentum"]


class Training:
    """A loop on a random ticket, with all weights or the kept ones, and what its tests do to it."""

    def __init__(self, optimizer, kept, build=mlp, masks=None, **ticket):
        self.model, self.shape = make(build), INPUT_SHAPES[build]
        self.held = random_ticket(self.model, ticket.pop("sparsity", 0.6), seed=1, **ticket)
        self.kept = KeptParameters(self.held) if kept else None
        self.optimizer = optimizer(self.parameters())

    def parameters(self):
        return list((self.kept or self.model).parameters())

    def backward(self, index, factor=1.0):
        (factor * loss_of(self.model, index, self.shape)).backward()

    def updates(self, *indices, micro_batches=1, clip=None):
        for index in indices:
            self.optimizer.zero_grad()
            for micro in range(micro_batches):
                self.backward(10 * index + micro)
            if clip:
                clip_grad_norm_(self.parameters(), clip)
            self.optimizer.step()


def both(optimizer, live, tolerance=1e-12, **settings):
    """The same life with all weights and with the kept ones ends with the same model."""
    dense, kept = Training(optimizer, kept=False, **settings), Training(optimizer, kept=True, **settings)
    live(dense)
    live(kept)
    assert_same(kept.model, dense.model, tolerance)
    for name, mask in kept.held.masks.items():
        assert not kept.model.get_parameter(name)[~mask].any(), name
    assert any(parameter.dim() == 1 and parameter.numel() > 20 for parameter in kept.parameters())
    return kept


@pytest.mark.parametrize("build", [mlp, wide, cnn, transformer])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, build):
    # A bias before BatchNorm has rounding errors for gradients, and Adam makes them larger.
    both(OPTIMIZERS[name], lambda training: training.updates(*range(6)), 1e-9 if build is cnn else 1e-12, build=build)


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW fused"])
def test_accumulation_and_clipping(name):
    both(OPTIMIZERS[name], lambda training: training.updates(*range(6), micro_batches=3, clip=0.05))


@pytest.mark.parametrize("pattern", ["2:4", "filter", "channel", "block:4x4"])
def test_patterns(pattern):
    sparsity = None if pattern == "2:4" else 0.5
    both(ADAMW, lambda training: training.updates(*range(6)), pattern=pattern, sparsity=sparsity, exclude=["4"])


def test_after_a_transformation():
    models = []
    for kept in (False, True):
        model = make(mlp)
        rst = RSTScheduler(model, 0.6, steps=3, seed=1)
        optimizer = ADAMW(model.parameters())
        for index in range(8):
            if index == 4:
                finalize_quietly(rst)
                optimizer = ADAMW((KeptParameters(rst) if kept else model).parameters())
            optimizer.zero_grad()
            loss_of(model, index, (12,)).backward()
            optimizer.step()
            rst.step()
        models.append(model)
    assert_same(*models)


def test_the_model_and_its_names_stay():
    model = make(mlp)
    before = dict(model.named_parameters())
    kept = KeptParameters(random_ticket(model, 0.6, exclude=["2"], seed=1))
    named = dict(kept.named_parameters())
    assert list(named) == list(before)
    assert named["2.weight"] is before["2.weight"]
    assert named["0.weight"].shape == (96,)
    assert torch.equal(named["0.weight"].sort()[0], before["0.weight"][before["0.weight"] != 0].sort()[0])
    assert dict(model.named_parameters()).items() >= before.items()


@pytest.mark.filterwarnings("ignore:the mask keeps no weight")
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 96])
def test_every_kept_weight_has_one_place(count):
    model = make(mlp)
    mask = (torch.arange(240) < count).view(20, 12)
    kept = KeptParameters(hold(model, {"0.weight": mask}))
    assert sorted(next(kept.parameters()).tolist()) == sorted(model[0].weight[mask].tolist())


def test_groups():
    def live(training):
        named = (training.kept or training.model).named_parameters()
        decayed = {True: [], False: []}
        for name, parameter in named:
            decayed[name.endswith("weight")].append(parameter)
        groups = [{"params": decayed[True], "weight_decay": 0.1}, {"params": decayed[False], "weight_decay": 0.0}]
        training.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, 6)
        for index in range(6):
            training.updates(index)
            schedule.step()

    both(ADAMW, live)


def test_a_closure():
    def live(training):
        def closure():
            training.optimizer.zero_grad()
            loss = loss_of(training.model, index, training.shape)
            loss.backward()
            return loss

        for index in range(6):  # noqa: B007 - the closure reads it
            training.optimizer.step(closure)

    both(MOMENTUM, live)
    # Its line search evaluates the closure at weights that no hook has seen.
    both(functools.partial(torch.optim.LBFGS, max_iter=5, line_search_fn="strong_wolfe"), live)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of_model", [True, False])
def test_zero_grad(of_model, set_to_none):
    """Also of gradients that no update has used."""

    def live(training):
        zeroed = training.model if of_model else training.optimizer
        for index in range(8):
            zeroed.zero_grad(set_to_none=set_to_none)
            training.backward(index)
            if index % 3 == 2:
                continue
            clip_grad_norm_(training.parameters(), 0.05)
            training.optimizer.step()
            if index == 4:  # an update of gradients that are there no more, or zero
                zeroed.zero_grad(set_to_none=set_to_none)
                training.optimizer.step()

    both(MOMENTUM, live)


def test_gradients_that_are_never_zeroed():
    def live(training):
        for index in range(4):
            training.backward(index)
            training.optimizer.step()

    both(MOMENTUM, live)


def test_a_gradient_that_is_there_moves_over():
    results = []
    for kept in (False, True):
        model = make(mlp)
        held = random_ticket(model, 0.6, seed=1)
        loss_of(model, 0, (12,)).backward()
        optimizer = ADAMW((KeptParameters(held) if kept else model).parameters())
        loss_of(model, 1, (12,)).backward()
        optimizer.step()
        results.append(model)
    assert_same(*results)


def test_gradients_that_are_assigned():
    def live(training):
        training.updates(0)
        training.optimizer.zero_grad()
        for name, parameter in training.model.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
            if name in training.held.masks:
                parameter.grad.mul_(training.held.masks[name])
        training.optimizer.step()
        training.model.zero_grad()
        for parameter in training.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        training.optimizer.step()

    both(MOMENTUM, live)


def test_dense_gradients_do_not_live_together():
    model = make(mlp)
    kept = KeptParameters(random_ticket(model, 0.6, seed=1))
    alive = []

    def note(parameter):
        others = (p for p in model.parameters() if p.dim() > 1 and p is not parameter)
        alive.append(sum(type(p.grad) is torch.Tensor for p in others))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    for index in range(2):
        loss_of(model, index, (12,)).backward()
    assert max(alive) == 0
    assert all(type(p.grad) is KeptGradient for p in model.parameters() if p.dim() > 1)
    assert all(parameter.grad is not None and parameter.grad.dim() == 1 for parameter in kept.parameters())


def test_masks_do_not_stay_in_memory():
    model = make(wide)
    held = random_ticket(model, 0.6, seed=1)
    kept = KeptParameters(held)
    optimizer = ADAMW(kept.parameters())
    for index in range(2):
        loss_of(model, index, (12,)).backward()
        optimizer.step()
    assert [one.cache._cached for one in held._ticket.parameters] == [None, None]
    model.load_state_dict(make(wide, seed=1).state_dict())
    loss_of(model, 2, (12,)).backward()
    optimizer.step()
    assert all(int(model.get_parameter(name).count_nonzero()) == mask.sum() for name, mask in held.masks.items())


@pytest.mark.parametrize("change", ["in_place", "assign", "data", "load", "dtype", "swap", "channels_last"])
def test_weights_that_something_else_changes(change):
    def live(training):
        training.updates(0, 1)
        other = make(cnn, seed=5)
        with torch.no_grad():
            if change == "in_place":
                for parameter in training.model.parameters():
                    parameter.mul_(0.5)
            elif change == "load":
                training.model.load_state_dict(other.state_dict())
            elif change == "data":
                for parameter, theirs in zip(training.model.parameters(), other.parameters(), strict=True):
                    parameter.data = theirs.data
            elif change == "channels_last":
                training.model.to(memory_format=torch.channels_last)
            elif change == "dtype":
                before = [parameter.data for parameter in training.model.parameters()]  # their memory is not used again
                training.model.float().double()
                del before
            else:
                if change == "assign":
                    training.model.load_state_dict(other.state_dict(), assign=True)
                else:
                    for parameter, theirs in zip(training.model.parameters(), other.parameters(), strict=True):
                        torch.utils.swap_tensors(parameter, theirs)
                training.optimizer = MOMENTUM(training.parameters())
        training.updates(2, 3, 4, clip=0.05, micro_batches=2)

    both(MOMENTUM, live, build=cnn)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resume(memory_format):
    """In another memory format, too: the order of the kept weights does not depend on it."""

    def live(training):
        training.updates(0, 1, 2)
        saved = copy.deepcopy([training.model.state_dict(), training.optimizer.state_dict()])
        training.__init__(ADAMW, training.kept is not None, build=cnn)
        training.model.to(memory_format=memory_format)
        training.model.load_state_dict(saved[0])
        training.optimizer.load_state_dict(saved[1])
        training.updates(3, 4, 5)

    both(ADAMW, live, build=cnn)


def test_an_average_of_the_model():
    averages = []

    def live(training):
        average = torch.optim.swa_utils.AveragedModel(training.model)
        training.optimizer.register_step_post_hook(lambda *_: average.update_parameters(training.model))
        training.updates(*range(5))
        averages.append(average)

    both(ADAMW, live)
    assert_same(*averages)


@pytest.mark.parametrize("is_fused", [False, True])
def test_grad_scaler(is_fused):
    def live(training):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for index in range(6):
            training.optimizer.zero_grad()
            scaler.scale((torch.inf if index == 2 else 1.0) * loss_of(training.model, index, training.shape)).backward()
            if index % 2:
                scaler.unscale_(training.optimizer)
                clip_grad_norm_(training.parameters(), 0.05)
            scaler.step(training.optimizer)
            scaler.update()

    both(functools.partial(torch.optim.AdamW, lr=1e-2, fused=is_fused), live)


def test_autocast():
    def live(training):
        training.model.float()
        training.optimizer = MOMENTUM(training.parameters())
        for index in range(4):
            training.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                x, y = batch(index, training.shape, dtype=torch.float32)
                nn.functional.cross_entropy(training.model(x), y).backward()
            training.optimizer.step()

    both(MOMENTUM, live)


def test_checkpointing():
    """Reentrant: a backward pass within another."""

    def live(training):
        for index in range(4):
            training.optimizer.zero_grad()
            for micro in range(2):
                x, y = batch(10 * index + micro, training.shape)
                first, *rest = training.model
                h = torch.utils.checkpoint.checkpoint(nn.Sequential(*rest[:3]), first(x), use_reentrant=True)
                nn.functional.cross_entropy(rest[3](h), y).backward()
            training.optimizer.step()

    both(MOMENTUM, live)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def test_tied_weights(monkeypatch):
    monkeypatch.setitem(INPUT_SHAPES, Tied, (12,))
    kept = both(ADAMW, lambda training: training.updates(*range(5), micro_batches=2), build=Tied)
    assert [name for name, _ in kept.kept.named_parameters()] == [name for name, _ in kept.model.named_parameters()]


def test_a_layer_without_a_gradient_now_and_then():
    def live(training):
        for index in range(6):
            training.model[2].requires_grad_(index % 2 == 0)
            training.updates(index)

    both(ADAMW, live)


def test_a_copy_of_the_model_is_trained_as_a_whole():
    training = Training(MOMENTUM, kept=True)
    training.updates(0)
    twin = copy.deepcopy(training.model)
    optimizer = MOMENTUM(twin.parameters())
    loss_of(twin, 1, (12,)).backward()
    optimizer.step()
    assert not torch.equal(twin[0].weight, training.model[0].weight)
    assert torch.equal(twin[0].weight == 0, training.model[0].weight == 0)
    assert all(parameter.grad.dim() == 2 for name, parameter in twin.named_parameters() if "weight" in name)


def test_it_works_without_its_handle_and_is_freed_with_the_model():
    training, reference = Training(MOMENTUM, kept=True), Training(MOMENTUM, kept=False)
    training.kept = training.held = None
    gc.collect()
    training.updates(0, 1)
    reference.updates(0, 1)
    assert_same(training.model, reference.model)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(training.model)
        del training
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:the mask keeps no weight")
def test_held_zeros_of_a_mask_that_keeps_nothing():
    model = make(mlp)
    held = hold(model, {"2.weight": torch.zeros(16, 20, dtype=torch.bool)})
    kept = KeptParameters(held)
    optimizer = ADAMW(kept.parameters())
    loss_of(model, 0, (12,)).backward()
    optimizer.step()
    assert not model[2].weight.any()


# -- the end, and moving between all weights and the kept ones


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW foreach", "AdamW fused", "RMSprop", "RAdam"])
def test_move_state(name):
    """All weights, then the kept ones, then all: in the middle of an accumulation, too."""
    dense, training = Training(OPTIMIZERS[name], kept=False), Training(OPTIMIZERS[name], kept=False)
    for each in (dense, training):
        each.updates(0, 1, 2)
        each.optimizer.zero_grad()
        each.backward(100)
    first, kept = training.optimizer, KeptParameters(training.held)
    training.optimizer = OPTIMIZERS[name](kept.parameters())
    kept.move_state(first, training.optimizer)
    before = copy.deepcopy(first.state_dict())
    for each in (dense, training):
        each.backward(101)
        each.optimizer.step()
        each.updates(3, 4)
        each.backward(102)
    assert_same(training.model, dense.model)
    for key, state in first.state_dict()["state"].items():  # nothing is shared
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(v)) for k, v in before["state"][key].items())
    second = OPTIMIZERS[name](training.model.parameters())
    kept.move_state(training.optimizer, second)
    kept.remove()
    training.optimizer = second
    for each in (dense, training):
        each.backward(103)
        each.optimizer.step()
        each.updates(5, 6)
    assert_same(training.model, dense.model)


def test_states_that_do_not_fit():
    training = Training(ADAMW, kept=True)
    with pytest.raises(ValueError, match="the state of SGD does not fit AdamW"):
        training.kept.move_state(MOMENTUM(training.model.parameters()), training.optimizer)
    with pytest.raises(ValueError, match=r"no counterpart of a parameter of shape \(20,\)"):
        training.kept.move_state(ADAMW([training.model[0].weight]), training.optimizer)
    assert not training.optimizer.state


def test_after_remove():
    training = Training(MOMENTUM, kept=True)
    training.updates(0)
    training.kept.remove()
    training.kept.remove()
    with pytest.raises(RuntimeError, match="this SGD updates kept weights that are in no model any more"):
        training.optimizer.step()
    training.optimizer.zero_grad()
    training.model.zero_grad()
    training.backward(1)
    assert training.model[0].weight.grad.shape == (20, 12)
    assert not training.model[0].weight.grad[training.model[0].weight == 0].any()
    MOMENTUM(training.model.parameters()).step()
    KeptParameters(training.held)


@pytest.mark.parametrize("end", [lambda training: training.held.remove(), lambda training: release(training.model)])
def test_it_ends_with_the_masks(end):
    training = Training(MOMENTUM, kept=True)
    training.updates(0)
    training.optimizer.zero_grad()
    training.backward(1)
    end(training)
    assert int(training.model[0].weight.grad.count_nonzero()) == 96
    assert not training.model[0].weight._backward_hooks
    assert not training.model[0].weight._post_accumulate_grad_hooks
    with pytest.raises(RuntimeError, match="no model any more"):
        training.optimizer.step()


@pytest.mark.filterwarnings("ignore:the masked weights still held", "ignore:a transformation ended")
def test_it_ends_where_a_state_of_the_transformation_is_loaded():
    """Masked weights are trained again, and need their gradients."""
    model = make(mlp)
    rst = RSTScheduler(model, 0.6, steps=4, seed=1)
    optimizer = MOMENTUM(model.parameters())
    loss_of(model, 0, INPUT_SHAPES[mlp]).backward()
    optimizer.step()
    rst.step()
    states = copy.deepcopy((model.state_dict(), rst.state_dict()))
    rst.finalize()
    kept = KeptParameters(rst)
    of_kept = MOMENTUM(kept.parameters())
    model.load_state_dict(states[0])
    rst.load_state_dict(states[1])
    model.zero_grad()
    loss_of(model, 1, INPUT_SHAPES[mlp]).backward()
    assert all(
        parameter.grad[~rst.masks[name]].any() for name, parameter in model.named_parameters() if name in rst.masks
    )
    optimizer.step()
    with pytest.raises(RuntimeError, match="no model any more"):
        of_kept.step()


def test_one_that_was_removed_leaves_another_its_gradients():
    training = Training(MOMENTUM, kept=True)
    earlier = training.kept
    earlier.remove()
    training.kept = KeptParameters(training.held)
    training.backward(0)
    earlier.remove()
    assert all(parameter.grad is not None for parameter in training.kept.parameters())
    assert type(training.model[0].weight.grad) is KeptGradient


# -- what is refused


def test_no_masks_in_force():
    model = make(mlp)
    rst = RSTScheduler(model, 0.6, seed=1)
    with pytest.raises(RuntimeError, match=r"in the transformation, which needs all weights.*after finalize\(\)"):
        KeptParameters(rst)
    rst.remove()
    with pytest.raises(RuntimeError, match="this RSTScheduler was removed"):
        KeptParameters(rst)
    with pytest.raises(TypeError, match=r"takes an RSTScheduler, .* got Sequential"):
        KeptParameters(model)


def test_a_second_one():
    training = Training(ADAMW, kept=True)
    with pytest.raises(RuntimeError, match=r"this HeldMasks has a KeptParameters already.* call remove\(\)"):
        KeptParameters(training.held)


@pytest.mark.parametrize("at", ["connect", "take_gradient"])
def test_an_interrupted_construction(monkeypatch, at):
    training = Training(MOMENTUM, kept=False)
    training.backward(0)
    before = [parameter.grad.clone() for parameter in training.model.parameters()]
    method, calls = getattr(KeptWeight, at), []

    def second_is_interrupted(self, parameter):
        calls.append(self)
        return interrupted() if len(calls) == 2 else method(self, parameter)

    with monkeypatch.context() as patched:
        patched.setattr(KeptWeight, at, second_is_interrupted)
        with pytest.raises(KeyboardInterrupt):
            KeptParameters(training.held)
    assert all(map(torch.equal, before, (parameter.grad for parameter in training.model.parameters())))
    training.optimizer.step()
    KeptParameters(training.held)


def test_an_interrupted_end(monkeypatch):
    training, reference = Training(MOMENTUM, kept=True), Training(MOMENTUM, kept=False)
    for each in (training, reference):
        each.backward(0)
    give_back, calls = KeptWeight.give_back, []

    def second_is_interrupted(self, parameter):
        calls.append(self)
        return interrupted() if len(calls) == 2 else give_back(self, parameter)

    monkeypatch.setattr(KeptWeight, "give_back", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.kept.remove()
    for each in (training, reference):  # it goes on
        each.backward(1)
        each.optimizer.step()
        each.updates(2)
    assert_same(training.model, reference.model)
    training.kept.remove()
    MOMENTUM(training.model.parameters()).step()


def interrupted(*_):
    raise KeyboardInterrupt


def test_copies():
    training = Training(MOMENTUM, kept=True)
    with pytest.raises(TypeError, match=r"cannot be copied or saved.*build a new one"):
        copy.deepcopy([training.model, training.kept])


def test_the_optimizer_of_before():
    training = Training(ADAMW, kept=True)
    training.backward(0)
    before = copy.deepcopy(training.model.state_dict())
    with pytest.raises(RuntimeError, match=r"this SGD has 0\.weight, whose gradients KeptParameters takes"):
        MOMENTUM(training.model.parameters()).step()
    assert all(torch.equal(before[name], value) for name, value in training.model.state_dict().items())


def test_optimizers_that_look_at_shapes():
    training = Training(torch.optim.Adafactor, kept=True)
    training.backward(0)
    with pytest.raises(RuntimeError, match=r"Adafactor looks at the shape of a weight.*such as AdamW"):
        training.optimizer.step()
    assert not training.optimizer.state
    if hasattr(torch.optim, "Muon"):  # of torch 2.9 and newer
        with pytest.raises(ValueError, match="Muon only supports 2D parameters"):  # torch says so itself
            torch.optim.Muon(training.parameters())


def test_masks_that_change():
    training = Training(ADAMW, kept=True)
    training.updates(0)
    ticket = training.held._ticket
    other = random_ticket(make(mlp), 0.6, seed=2)._ticket.stage.masks
    same = random_ticket(make(mlp), 0.6, seed=1)._ticket.stage.masks
    ticket.hold_zeros(same)
    training.updates(1)
    ticket.hold_zeros(other)
    with pytest.raises(RuntimeError, match=r"the mask of 0\.weight has changed since KeptParameters was built"):
        training.updates(2)


def test_a_weight_with_gaps_in_memory():
    model = make(mlp)
    model[0].weight = nn.Parameter(torch.randn(20, 24, dtype=torch.float64)[:, ::2])
    held = random_ticket(model, 0.6, seed=1)
    with pytest.raises(RuntimeError, match=r"0\.weight has gaps in its memory .*contiguous"):
        KeptParameters(held)
    assert type(held._ticket.enforcement) is Enforcement


def test_stock_pruning_takes_a_layer():
    training = Training(MOMENTUM, kept=True)
    prune.remove(training.model[0], "weight")
    training.updates(0)
    assert int(training.model[0].weight.count_nonzero()) == 96


def test_a_state_of_a_part_of_the_model_is_not_moved():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    dense = MOMENTUM(model[0].parameters())
    kept = KeptParameters(random_ticket(model, 0.5, seed=1))
    optimizer = MOMENTUM(kept.parameters())
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="the source has no counterpart of a parameter of shape"):
        kept.move_state(dense, optimizer)
    assert optimizer.state_dict() == before

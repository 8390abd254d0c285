"""Updates that no optimizer of torch makes: ``apply_penalty()``, and the warnings where its call is missing."""

import copy

import pytest
import torch
from lives import assert_same_life, updates
from models import INPUT_SHAPES, finalize_quietly, loss_of, make, mlp
from torch import Tensor, nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._engine.enforcement import Enforcement

SHAPE = INPUT_SHAPES[mlp]


class Momentum:
    """An optimizer of another library: torch does not know it."""

    def __init__(self, parameters, lr=0.05, through_data=False):
        self.parameters, self.lr, self.through_data = list(parameters), lr, through_data
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self):
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            if parameter.grad is not None:
                velocity.mul_(0.9).add_(parameter.grad)
                (parameter.data if self.through_data else parameter).sub_(velocity, alpha=self.lr)


class MasterWeights:
    """Updates a copy in another precision, and copies it back."""

    def __init__(self, parameters, through_data=False):
        self.parameters, self.through_data = list(parameters), through_data
        self.masters = [nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        self.optimizer = torch.optim.SGD(self.masters, lr=0.05)

    @torch.no_grad()
    def step(self):
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = parameter.grad.clone()
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            (parameter.data if self.through_data else parameter).copy_(master)


@pytest.mark.parametrize("through_data", [False, True], ids=["in-place", "through-data"])
@pytest.mark.parametrize("position", ["step-after", "step-before"])
def test_apply_penalty(position, through_data):
    def train(model, side):
        optimizer = Momentum(model.parameters(), through_data=through_data)
        for index in updates(side):
            model.zero_grad()
            for part in range(2):
                loss_of(model, 2 * index + part, SHAPE).backward()
            side.before_update()
            if not side.is_explicit:
                side.rst.apply_penalty()
                side.rst.apply_penalty()  # a second time does nothing
                if position == "step-before":
                    side.scheduler_step()
            optimizer.step()
            side.updated()
            if side.is_explicit or position == "step-after":
                side.scheduler_step()
        loss_of(model, 0, SHAPE)  # what the last update has moved is zero again at the next forward

    assert_same_life(train)


def test_apply_penalty_on_master_weights():
    def train(model, side):
        optimizer = MasterWeights(model.parameters())
        for index in updates(side):
            model.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            if not side.is_explicit:
                side.rst.apply_penalty()
            optimizer.step()
            side.after_update()
            if side.is_explicit and side.finalized:
                loss_of(model, index, SHAPE)
        loss_of(model, 0, SHAPE)

    assert_same_life(train)


@pytest.mark.parametrize("position", ["step-after", "step-before"])
def test_apply_penalty_silences_the_optimizer(position):
    """Called in a loop that has an optimizer of torch after all, the penalty comes once."""

    def train(model, side):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            if not side.is_explicit:
                side.rst.apply_penalty()
                if position == "step-before":
                    side.scheduler_step()
            if position == "step-after":
                model[2].weight.grad.mul_(0.5)  # the gradient does not look as if it had its penalty
            optimizer.step()
            side.updated()
            if side.is_explicit or position == "step-after":
                side.scheduler_step()

    assert_same_life(train)


def test_manual_for_a_part_of_the_updates():
    """A scheduler step ends the silence: the next update by an optimizer of torch applies its penalty again."""

    def train(model, side):
        ours, theirs = torch.optim.SGD(model.parameters(), lr=0.05), Momentum(model.parameters())
        for index in updates(side):
            model.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            if index % 3 == 0:
                if not side.is_explicit:
                    side.rst.apply_penalty()
                theirs.step()
            else:
                ours.step()
            side.after_update()
        loss_of(model, 0, SHAPE)

    assert_same_life(train)


def test_apply_penalty_to_gradients_that_leave_no_trace():
    """Evolution strategies and numpy write to ``.data``: each gradient looks as if it were the one before."""
    layer = nn.Linear(4, 3, bias=False)
    rst = RSTScheduler(layer, sparsity=0.5, steps=4, seed=0)
    pruned = ~rst.masks["weight"]
    layer.weight.grad = torch.zeros_like(layer.weight)
    for penalty in (0.25, 0.5, 0.75, 1.0):
        layer.weight.grad.data.fill_(2)
        rst.apply_penalty()
        torch.testing.assert_close(layer.weight.grad, 2 + penalty * pruned * layer.weight.detach())
        rst.step()
    assert rst.done


def test_apply_penalty_to_a_first_gradient_without_a_trace():
    """The optimizer of torch that goes on from there applies the penalty again, an update later at the most."""
    layer = nn.Linear(4, 3, bias=False)
    rst = RSTScheduler(layer, sparsity=0.5, steps=4, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    rst.apply_penalty()
    rst.step()
    for _ in range(2):
        layer.weight.grad.data.fill_(2)
        optimizer.step()
        rst.step()
    assert rst.progress == 0.75
    torch.testing.assert_close(layer.weight.grad, 2 + 0.75 * ~rst.masks["weight"] * layer.weight.detach())


def test_apply_penalty_without_a_gradient():
    rst = RSTScheduler(make(mlp), sparsity=0.5)
    with pytest.raises(RuntimeError, match=r"apply_penalty\(\) found no gradient .* after loss\.backward\(\)"):
        rst.apply_penalty()


def test_apply_penalty_without_a_gradient_silences_nothing():
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5, steps=10)
    with pytest.raises(RuntimeError, match="found no gradient"):
        rst.apply_penalty()
    train_without_apply_penalty(model, torch.optim.SGD(model.parameters(), lr=0.05), rst, 1)
    assert rst.progress == 0.1


def test_weights_that_are_frozen_and_loaded_are_not_updates():
    """An average that is swapped in and out for an evaluation, say."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5, steps=10)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        train_without_apply_penalty(model, optimizer, rst, 1)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert rst.progress == 0.3


def test_apply_penalty_after_remove():
    """There is nothing to penalize any more, and a loop may go on calling it."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5)
    rst.remove()
    rst.apply_penalty()
    assert all(parameter.grad is None for parameter in model.parameters())


OTHER_OPTIMIZERS = {
    "in-place": lambda model: Momentum(model.parameters()),
    "master-weights": lambda model: MasterWeights(model.parameters()),
}


def train_without_apply_penalty(model, optimizer, rst, count):
    for index in range(count):
        model.zero_grad()
        loss_of(model, index, SHAPE).backward()
        optimizer.step()
        rst.step()


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_a_missing_penalty_is_noticed_at_once(name):
    """At the second scheduler step: the weights have changed, and no update applied the penalty."""
    model = make(mlp)
    optimizer = OTHER_OPTIMIZERS[name](model)
    rst = RSTScheduler(model, sparsity=0.5)
    train_without_apply_penalty(model, optimizer, rst, 1)
    with pytest.warns(
        UserWarning, match=r"0\.weight.* changed, but no .* penalty: the updates come from .*rst\.apply_penalty\(\)"
    ) as caught:
        train_without_apply_penalty(model, optimizer, rst, 1)
    assert caught[0].filename == __file__
    train_without_apply_penalty(model, optimizer, rst, 1)  # it is said once
    assert rst.progress == 0.0
    with pytest.raises(RuntimeError, match=r"no update ever applied .* rst\.apply_penalty\(\)"):
        rst.finalize()


class SlowStart:
    """Accumulates gradients, or skips updates for infinities, before the first update through ``.data``."""

    def __init__(self, optimizer, idle):
        self.optimizer, self.idle, self.calls = optimizer, idle, 0

    def step(self):
        self.calls += 1
        if self.calls > self.idle:
            self.optimizer.step()


@pytest.mark.parametrize(
    ("make_optimizer", "noticed_at"),
    [
        (lambda model: Momentum(model.parameters(), through_data=True), 5),
        (lambda model: MasterWeights(model.parameters(), through_data=True), 5),
        (lambda model: SlowStart(Momentum(model[2:].parameters(), through_data=True), 7), 20),
        (lambda model: SlowStart(Momentum(model.parameters(), through_data=True), 70), 100),
    ],
    ids=["in-place", "master-weights", "later and in one layer", "much later"],
)
def test_a_missing_penalty_that_leaves_no_trace_is_noticed_by_its_weights(make_optimizer, noticed_at):
    """Through ``.data``, not even the versions of the weights change."""
    model = make(mlp)
    optimizer = make_optimizer(model)
    rst = RSTScheduler(model, sparsity=0.5)
    train_without_apply_penalty(model, optimizer, rst, noticed_at - 1)
    with pytest.warns(UserWarning, match=r"2\.weight.* changed, but no update applied the penalty: the updates come"):
        train_without_apply_penalty(model, optimizer, rst, 1)
    train_without_apply_penalty(model, optimizer, rst, 120)  # it is said once


def test_an_optimizer_of_another_copy_is_noticed():
    """Nothing changes in this one."""
    model, other = make(mlp), make(mlp)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    rst = RSTScheduler(model, sparsity=0.5)

    def train(count):
        for index in range(count):
            loss_of(other, index, SHAPE).backward()
            optimizer.step()
            rst.step()

    train(99)
    with pytest.warns(UserWarning, match=r"step\(\) was called 100 times, but .* on the model that is updated"):
        train(1)


def test_steps_without_any_update_are_noticed_after_a_while():
    rst = RSTScheduler(make(mlp), sparsity=0.5)
    for _ in range(999):
        rst.step()
    with pytest.warns(UserWarning, match=r"step\(\) was called 1,000 times, but no .*: if there were any, the updates"):
        rst.step()


@pytest.mark.parametrize("accumulated", [7, 30, 90])
def test_nothing_is_said_where_the_first_update_is_late(accumulated):
    """With a scheduler step for each batch: the weights are as they were."""
    model = make(mlp)
    optimizer = SlowStart(torch.optim.SGD(model.parameters(), lr=0.05), accumulated)
    rst = RSTScheduler(model, sparsity=0.5)
    train_without_apply_penalty(model, optimizer, rst, accumulated + 3)
    assert rst.progress == 3 / 10_000


def test_nothing_is_said_of_weights_that_an_evaluation_exchanges_and_puts_back():
    """Averaged ones, say, in the midst of accumulation: versions grow, and no update has applied the penalty since."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rst = RSTScheduler(model, sparsity=0.5)
    for index in range(1, 25):
        loss_of(model, index, SHAPE).backward()
        if index % 6 == 0:
            optimizer.step()
            optimizer.zero_grad()
        rst.step()
        if index % 6 in (2, 4):
            own = copy.deepcopy(model.state_dict())
            model.load_state_dict({name: 0.5 * value for name, value in own.items()})
            model.load_state_dict(own)
    assert rst.progress == 4 / 10_000


def test_a_loop_that_is_fine_reads_no_weights(monkeypatch):
    """Not even one, as the host would wait for the device."""
    monkeypatch.setattr(torch, "equal", None)
    monkeypatch.setattr(Tensor, "clone", None)
    model = make(mlp)
    train_without_apply_penalty(model, torch.optim.SGD(model.parameters(), lr=0.05), RSTScheduler(model, 0.5), 101)


def test_an_optimizer_of_another_library_that_takes_over_is_noticed():
    """Penalties that torch's own has applied before do not hide it."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5)
    train_without_apply_penalty(model, torch.optim.SGD(model.parameters(), lr=0.05), rst, 3)
    with pytest.warns(UserWarning, match=r"0\.weight.* changed, but no update applied the penalty"):
        train_without_apply_penalty(model, Momentum(model.parameters()), rst, 3)


@pytest.mark.filterwarnings("ignore:the masked weights still held")
def test_a_missing_scheduler_step_is_noticed():
    """Without it λ never grows, and a loop that waits for rst.done would end with a dense network."""
    layer = nn.Linear(2, 2)
    rst = RSTScheduler(layer, sparsity=0.5, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    layer.weight.grad = torch.ones_like(layer.weight)

    def updates(count):
        for _ in range(count):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()

    updates(999)
    with pytest.raises(UserWarning, match="1,000 updates applied"):  # warnings are errors here
        updates(1)
    updates(500)  # and no more
    rst.step()
    rst.remove()
    rst = RSTScheduler(layer, sparsity=0.5, seed=0)
    updates(999)
    own = optimizer.register_step_post_hook(lambda *_: None)  # with which the end of a step is seen twice
    said = r"1,000 updates applied .* rst\.step\(\) has not .* stays at 0\.0001, and"
    with pytest.warns(UserWarning, match=said) as warned:
        updates(1)
    assert len(warned) == 1
    own.remove()
    layer.weight.grad = None
    optimizer.step()  # not an update
    updates(1000)
    rst.remove()
    rst = RSTScheduler(layer, sparsity=0.5, seed=0, steps=10)  # epochs, probably
    updates(2000)
    rst.step()
    updates(1100)  # an epoch may be long
    resumed = RSTScheduler(copy.deepcopy(layer), sparsity=0.5, seed=0)
    resumed.load_state_dict(rst.state_dict())
    rst.remove()
    layer, optimizer = resumed._model, torch.optim.SGD(resumed._model.parameters(), lr=1e-3)
    updates(1100)


def test_another_optimizer_than_the_one_that_was_given_is_noticed():
    model = make(mlp)
    given, used = (torch.optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    rst = RSTScheduler(model, sparsity=0.5, optimizer=given)
    with pytest.warns(UserWarning, match=r"penalty: the updates come from something else than the opt"):
        train_without_apply_penalty(model, used, rst, 2)


def test_a_layer_that_is_updated_elsewhere_is_noticed():
    """One layer is updated by another library, the others by torch."""
    model = make(mlp)
    ours, theirs = torch.optim.SGD(model[2:].parameters(), lr=0.05), Momentum(model[0].parameters())
    rst = RSTScheduler(model, sparsity=0.5)

    class Both:
        def step(self):
            ours.step()
            theirs.step()

    with pytest.warns(UserWarning, match=r"^0\.weight changed, but no update applied the penalty"):
        train_without_apply_penalty(model, Both(), rst, 3)


def test_zeros_without_apply_penalty_in_finetuning():
    """Where it is not called any more after ``finalize()``, each forward restores the zeros all the same."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rst = RSTScheduler(model, sparsity=0.5, steps=2)
    train_without_apply_penalty(model, optimizer, rst, 3)
    finalize_quietly(rst)
    train_without_apply_penalty(model, Momentum(model.parameters()), rst, 5)
    loss_of(model, 0, SHAPE)
    for name, kept in rst.masks.items():
        assert (model.get_parameter(name)[~kept] == 0).all()


def test_apply_penalty_with_a_layer_that_is_used_twice_in_one_graph():
    """The zeros of the second forward are not a change that would take the first one's weights from backward()."""

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(self.layer(x.requires_grad_()).tanh())

    def train(model, side):
        optimizer = Momentum(model.parameters(), through_data=True)
        for index in updates(side):
            model.zero_grad()
            loss_of(model, index, SHAPE).backward()
            side.before_update()
            if not side.is_explicit:
                side.rst.apply_penalty()
            optimizer.step()
            side.after_update()
        loss_of(model, 0, SHAPE)

    assert_same_life(train, Repeated)


def test_apply_penalty_puts_zeros_and_gradients_right_in_finetuning():
    """At once, for weights whose layer is never called and for gradients that do not come from ``backward()``."""
    model = make(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rst = RSTScheduler(model, sparsity=0.5, steps=2)
    train_without_apply_penalty(model, optimizer, rst, 3)
    finalize_quietly(rst)
    for name in rst.masks:
        weight = model.get_parameter(name)
        weight.data.fill_(1)
        weight.grad = torch.ones_like(weight)
    rst.apply_penalty()
    for name, kept in rst.masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, kept)
        assert torch.equal(weight.grad != 0, kept)


def test_weights_that_were_changed_in_place_are_masked_together(monkeypatch):
    """The first forward puts the zeros of all of them back, and no hook is registered anew: that would be slow."""
    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.5, seed=0, steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0, SHAPE).backward()
    optimizer.step()
    finalize_quietly(rst)
    hooks = [list(model.get_parameter(name)._post_accumulate_grad_hooks) for name in rst.masks]
    *changed, _ = rst.masks
    with torch.no_grad():
        for name in changed:
            model.get_parameter(name).add_(1.0)
    batches = []
    clear = Enforcement.clear

    def recorded(self, batch, masks):
        batches.append([managed.name for managed, _ in batch])
        clear(self, batch, masks)

    monkeypatch.setattr(Enforcement, "clear", recorded)
    loss_of(model, 0, SHAPE)
    assert batches == [changed]
    for name, mask in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    assert hooks == [list(model.get_parameter(name)._post_accumulate_grad_hooks) for name in rst.masks]

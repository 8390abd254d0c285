"""One family of masks in force: exchanged on the way, saved and loaded, and taken by all that takes a scheduler."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from models import INPUT_SHAPES, cnn, loss_of, make, mlp, twins
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import LotteryTicket, hold, magnitude_masks, random_ticket
from torch_dual_ticket.export import load_ticket, read_ticket, save_ticket
from torch_dual_ticket.report import History, summary


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def masks_of(model, seed=0, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


def update(model, optimizer, index, shape):
    optimizer.zero_grad()
    loss_of(model, index, shape).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


@pytest.mark.parametrize("build", [mlp, cnn])
def test_exchanged_masks_are_those_of_a_manual_loop(build):
    """Between two updates, and in the middle of one: what comes back starts from zero, and trains from then on."""
    model, manual = twins(build)
    shape = INPUT_SHAPES[build]
    masks = masks_of(model)
    held = hold(model, masks)
    optimizer, other = sgd(model), sgd(manual)
    parameters = {name: parameter for name, parameter in manual.named_parameters() if name in masks}

    @torch.no_grad()
    def zero():
        for name, mask in masks.items():
            parameters[name].mul_(mask)

    zero()
    for index in range(24):
        if index in (6, 12):
            masks = masks_of(model, seed=index)
            held.set_masks({name: mask.int() for name, mask in masks.items()})
            zero()
            assert all(torch.equal(model.get_parameter(name), parameters[name]) for name in masks)
        update(model, optimizer, index, shape)
        other.zero_grad()
        loss_of(manual, index, shape).backward()
        for name, mask in masks.items():
            parameters[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(manual.parameters(), 0.5)
        other.step()
        zero()
    assert all(map(torch.equal, model.state_dict().values(), manual.state_dict().values()))
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_gradients_that_are_there_are_masked_by_the_new_masks():
    model = make(mlp)
    held = hold(model, masks_of(model))
    loss_of(model, 0, (12,)).backward()
    before = {name: model.get_parameter(name).grad.clone() for name in held.masks}
    masks = masks_of(model, seed=1)
    held.set_masks(masks)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name).grad, before[name] * mask)


@pytest.mark.parametrize("build", [lambda model: hold(model, masks_of(model)), lambda model: random_ticket(model, 0.8)])
def test_masks_that_do_not_fit_leave_the_ones_before(build):
    model = make(mlp)
    held = build(model)
    before, weights = dict(held.masks), copy.deepcopy(model.state_dict())
    for masks in (
        {"0.weight": before["0.weight"]},
        before | {"2.weight": torch.ones(3)},
        before | {"4.weight": torch.full((5, 16), 0.1)},
        before | {"4.bias": torch.ones(5)},
    ):
        with pytest.raises(ValueError, match=r"a mask is missing|not managed here|the mask of"):
            held.set_masks(masks)
    assert all(torch.equal(held.masks[name], mask) for name, mask in before.items())
    assert all(map(torch.equal, model.state_dict().values(), weights.values()))


@pytest.mark.parametrize("masks", [None, [("0.weight", 1)], torch.ones(3)], ids=["None", "list", "tensor"])
def test_masks_without_names_are_refused(masks):
    held = random_ticket(make(mlp), 0.5)
    with pytest.raises(TypeError, match="masks is a mapping from parameter names to masks, got"):
        held.set_masks(masks)


@pytest.mark.parametrize(
    "build",
    [lambda model: hold(model, masks_of(model)), lambda model: RSTScheduler(model, masks=masks_of(model))],
    ids=["held", "transformed"],
)
def test_masks_that_empty_a_layer_are_spoken_of_once(build):
    model = make(mlp)
    managed = build(model)
    emptied = dict(managed.masks) | {"2.weight": torch.zeros(16, 20)}
    with pytest.warns(UserWarning, match=r"the mask keeps no weight of 2\.weight") as caught:
        managed.set_masks(emptied)
    assert caught[0].filename == __file__
    managed.set_masks(emptied)


def test_a_layer_that_was_replaced_is_left_alone():
    model = make(mlp)
    held = hold(model, masks_of(model))
    model[4] = nn.Linear(16, 7, dtype=torch.float64)
    masks = masks_of(model, seed=1)
    with (
        pytest.warns(UserWarning, match=r"4\.weight will not be pruned any more"),
        pytest.raises(ValueError, match=r"'4\.weight': it is not managed here"),
    ):
        held.set_masks(masks)
    del masks["4.weight"]
    held.set_masks(masks)
    assert all(torch.equal(held.masks[name], mask) for name, mask in masks.items())
    assert model[4].weight.all()


# ---------------------------------------------------------------------- the zeros that there are


def sparse(build=mlp):
    model = make(build)
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            model.get_parameter(name).mul_(mask)
    return model


def test_the_zeros_that_there_are():
    """Layers without zeros stay dense; frozen ones may be held, and are held when they thaw."""
    model = sparse()
    with torch.no_grad():
        model[2].weight.fill_(1.0)
        model[0].weight[0, 0] = -0.0
    model[4].requires_grad_(False)
    masks = {name: model.get_parameter(name) != 0 for name in ("0.weight", "4.weight")}
    held = hold(model)
    assert list(held.masks) == ["0.weight", "4.weight"]
    assert all(torch.equal(held.masks[name], mask) for name, mask in masks.items())
    optimizer = sgd(model)
    for index in range(4):
        model[4].requires_grad_(index > 1)
        update(model, optimizer, index, (12,))
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) == 0, ~mask)


def test_the_zeros_of_a_model_whose_other_layers_cannot_be_held():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4, padding_idx=0)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.orthogonal = parametrizations.orthogonal(nn.Linear(4, 4))
            self.pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
            self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
            self.lazy = nn.LazyLinear(3)
            self.meta = nn.Linear(4, 4, device="meta")

    model = Model()
    with torch.no_grad():
        model.normed.parametrizations.weight.original1[:, 0] = 0
    assert list(hold(model).masks) == ["normed.parametrizations.weight.original1"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(6, 4))  # nothing but zeros: where it begins
        self.memory, self.head = nn.LSTM(4, 8), nn.Linear(8, 2)


def test_the_zeros_of_layers_that_are_no_default_targets():
    """Such as those of a ticket file, whatever its targets were."""
    model = Recurrent()
    masks = {"memory.weight_ih_l0": torch.rand(32, 4) < 0.5, "head.weight": torch.rand(2, 8) < 0.5}
    hold(model, masks).remove()
    held = hold(model)
    assert held.masks.keys() == masks.keys()
    assert all(torch.equal(held.masks[name], mask) for name, mask in masks.items())


def test_a_model_without_zeros_and_one_with_a_layer_of_zeros():
    with pytest.raises(ValueError, match=r"nothing to hold: no weight .* is zero\..*magnitude_masks"):
        hold(make(mlp))
    model = make(mlp)
    nn.init.zeros_(model[4].weight)
    with pytest.warns(UserWarning, match=r"keeps no weight of 4\.weight: nothing will go .* begins with zeros"):
        held = hold(model)
    assert list(held.masks) == ["4.weight"]


def test_frozen_parameters_may_be_held_and_integers_not():
    model = make(mlp).requires_grad_(False)
    held = hold(model, masks_of(model))
    masks = masks_of(model, seed=1, density=0.3)
    held.set_masks(masks)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).add_(mask)
    assert all(torch.equal(model.get_parameter(name) == 0, ~mask) for name, mask in masks.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    quantized = nn.Linear(2, 2)
    quantized.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.int8"):
        hold(quantized, {"weight": torch.eye(2)})


# ---------------------------------------------------------------------- states


def test_a_state_has_the_masks():
    """Saved at any time, loaded into masks that were others."""
    model, other = twins(mlp)
    held = hold(model, masks_of(model))
    optimizer = sgd(model)
    update(model, optimizer, 0, (12,))
    held.set_masks(masks_of(model, seed=1))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), held.state_dict()))
    assert all(
        record["bits"].numel() == -(-held.masks[name].numel() // 8) for name, record in saved[2]["masks"].items()
    )

    again, other_optimizer = hold(other, masks_of(other, seed=2)), sgd(other)
    for thing, state in zip((other, other_optimizer, again), saved, strict=True):
        thing.load_state_dict(state)
    for index in range(1, 4):
        update(model, optimizer, index, (12,))
        update(other, other_optimizer, index, (12,))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert all(torch.equal(again.masks[name], mask) for name, mask in held.masks.items())


def test_the_state_of_a_random_ticket_is_its_seed():
    model, other = twins(mlp)
    state = random_ticket(model, 0.8, seed=3).state_dict()
    assert json.loads(json.dumps(state)) == state | {"masks": json.loads(json.dumps(state["masks"]))}
    again = random_ticket(other, 0.5, seed=4)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.state_dict() == state
    assert [layer.pattern for layer in summary(other).layers] == ["unstructured"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"ticks": 3}, "not a state of masks: KeyError"),
        (lambda state: state | {"version": 9}, "version is 9"),
        (lambda state: state | {"masks": {"0.weight": state["masks"]["0.weight"]}}, "'2.weight': a mask is missing"),
        (lambda state: state["masks"]["2.weight"].update(fingerprint="0" * 16), "another fingerprint"),
        (lambda state: state["masks"]["2.weight"].update(bits=torch.zeros(3)), "are 40 bytes, got"),
        (lambda state: state["masks"]["2.weight"].update(bits=None), "not a state of masks"),
    ],
)
def test_a_wrong_state_is_refused_and_nothing_is_changed(change, message):
    model = make(mlp)
    held = hold(model, masks_of(model))
    state = held.state_dict()
    held.set_masks(masks_of(model, seed=1))
    before, weights = dict(held.masks), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        held.load_state_dict(change(state) or state)
    assert all(torch.equal(held.masks[name], mask) for name, mask in before.items())
    assert all(map(torch.equal, model.state_dict().values(), weights.values()))


@pytest.mark.parametrize("rounds_before", [0, 1, 2])
def test_a_lottery_ticket_goes_on_where_it_was(rounds_before):
    """Also one that is further than the state that it loads, and in either order with the model's."""

    def round_of(model, ticket, optimizer):
        for index in range(3):
            update(model, optimizer, index, (12,))
        if not ticket.done:
            ticket.prune_and_rewind()

    model, other = twins(mlp)
    ticket = LotteryTicket(model, 0.8, rounds=2)
    for _ in range(rounds_before):
        round_of(model, ticket, sgd(model))
    optimizer = sgd(model)
    update(model, optimizer, 7, (12,))
    saved = copy.deepcopy((ticket.state_dict(), model.state_dict(), optimizer.state_dict()))

    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    again = LotteryTicket(other, 0.8, rounds=2)
    round_of(other, again, sgd(other))
    other_optimizer = sgd(other)
    for thing, state in zip((again, other, other_optimizer), saved, strict=True):
        thing.load_state_dict(state)
    for value in saved[0]["origin"].values():
        value.zero_()  # it is the caller's
    assert again.round == rounds_before
    for trained, its, its_optimizer in ((model, ticket, optimizer), (other, again, other_optimizer)):
        round_of(trained, its, its_optimizer)
        while not its.done:
            round_of(trained, its, sgd(trained))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert all(torch.equal(again.masks[name], mask) for name, mask in ticket.masks.items())
    assert again.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_wrong_state_of_a_lottery_ticket_is_refused():
    ticket = LotteryTicket(make(mlp), 0.8)
    ticket.prune_and_rewind()
    state = ticket.state_dict()
    for wrong, message in (
        ({}, "not a state_dict"),
        (state | {"round": 2}, "of round 2, and this ticket has 1"),
        (state | {"origin": make(cnn).state_dict()}, "of another model"),
        (state | {"held": {"version": 1}}, "not a state_dict"),
        (state | {"held": random_ticket(make(cnn), 0.5).state_dict()}, "of other layers"),
    ):
        model = make(mlp)
        fresh = LotteryTicket(model, 0.8)
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(wrong)
        assert fresh.round == 0
        assert not prune.is_pruned(model)


@pytest.mark.parametrize("rounds_before", [0, 1])
def test_a_lottery_ticket_on_layers_that_something_else_manages_changes_nothing(rounds_before):
    model = make(mlp)
    ticket = LotteryTicket(model, 0.8, rounds=2)
    for _ in range(rounds_before):
        ticket.prune_and_rewind()
        ticket.held.remove()
    state, before = ticket.state_dict(), copy.deepcopy(masks_of(model))
    other = hold(model, before)
    update(model, sgd(model), 0, (12,))
    weights = copy.deepcopy(model.state_dict())
    for call in (ticket.prune_and_rewind, lambda: ticket.load_state_dict(state))[: 1 + rounds_before]:
        with pytest.raises(ValueError, match="is managed by another"):
            call()
        assert all(map(torch.equal, model.state_dict().values(), weights.values()))
        assert ticket.round == rounds_before
    assert all(torch.equal(other.masks[name], mask) for name, mask in before.items())


def test_one_threshold_for_the_layers_that_are_left_of_a_lottery_ticket():
    model = make(mlp)
    ticket = LotteryTicket(model, 0.8, rounds=2, distribution="global")
    ticket.prune_and_rewind()
    prune.remove(model[2], "weight")
    ticket.prune_and_rewind()
    assert list(ticket.masks) == ["0.weight", "4.weight"]
    assert sum(int((~mask).sum()) for mask in ticket.masks.values()) == 256


def test_a_pickled_lottery_ticket_has_the_same_targets():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(8, 2))
    model[1].weight = model[0].weight
    ticket = LotteryTicket(model, 0.5, rounds=2)
    ticket = pickle.loads(pickle.dumps(ticket))
    ticket.prune_and_rewind()
    assert list(ticket.masks) == ["2.weight"]


class Versioned(nn.Linear):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def test_a_lottery_ticket_of_a_model_with_extra_state():
    model = nn.Sequential(Versioned(8, 4), nn.Linear(4, 2))
    ticket = LotteryTicket(model, 0.5)
    ticket.prune_and_rewind()
    ticket.load_state_dict(ticket.state_dict())
    assert ticket.sparsity == 0.5


# ---------------------------------------------------------------------- taken like a scheduler


def test_to_prune():
    model = make(mlp)
    masks = masks_of(model)
    held = hold(model, masks)
    held.to_prune()
    assert all(torch.equal(model[index].weight_mask, masks[f"{index}.weight"].double()) for index in (0, 2, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)


@pytest.mark.parametrize("layout", ["plain", "prune"])
@pytest.mark.parametrize("kind", ["given", "random", "zeros"])
def test_a_ticket_file_has_the_masks(tmp_path, kind, layout):
    path = tmp_path / "ticket.safetensors"
    model = sparse()
    held = {
        "given": lambda: hold(model, masks_of(model)),
        "random": lambda: random_ticket(model, 0.8, seed=0),
        "zeros": lambda: hold(model),
    }[kind]()
    update(model, sgd(model), 0, (12,))
    with torch.no_grad():
        model[0].weight[:7] = 0  # kept weights may be zero, too
    masks, weights = dict(held.masks), copy.deepcopy(model.state_dict())
    if layout == "prune":
        held.to_prune()
        weights = copy.deepcopy(model.state_dict())
    save_ticket(held, path)
    assert all(torch.equal(value, weights[name]) for name, value in read_ticket(path).items())
    if layout == "prune":
        return
    other = make(mlp, seed=1)
    state = load_ticket(path, other)
    assert all(map(torch.equal, other.state_dict().values(), weights.values()))
    again = hold(other)
    again.load_state_dict(state)
    assert all(torch.equal(again.masks[name], mask) for name, mask in masks.items())
    assert again.masks["0.weight"][:7].any()


def test_a_file_of_explicit_masks_is_smaller_by_what_they_remove(tmp_path):
    model = nn.Linear(500, 400)
    held = hold(model, magnitude_masks(model, 0.9))
    save_ticket(held, path := tmp_path / "ticket")
    size = path.stat().st_size
    assert size < 4 * 400 * 500 * 0.1 + 400 * 500 / 8 + 4 * 400 + 3_000


def test_summary_and_history():
    model = make(mlp)
    held = hold(model, masks_of(model))
    table = summary(held)
    assert [layer.pattern for layer in table.layers] == ["explicit"] * 3
    history, optimizer = History(held), sgd(model)
    for index in range(3):
        update(model, optimizer, index, (12,))
        if index == 1:
            held.set_masks(masks_of(model, seed=1, density=0.25))
        history.record()
    assert [(record.step, record.phase) for record in history.records] == [(n, "finetune") for n in (1, 2, 3)]
    assert history.records[0].sparsity > 0.4
    assert history.records[-1].sparsity == held.sparsity > 0.7
    assert (held.phase, held.penalty, history.records[-1].residual) == ("finetune", 0.0, 0.0)


def test_it_says_what_is_held():
    model = make(mlp)
    held = random_ticket(model, 0.75, exclude=["4"])
    assert repr(held) == "HeldMasks(2 layers at 75.00% sparsity)"
    assert "HeldMasks(2 layers at 75.00% sparsity)</p>" in held._repr_html_()
    assert held._repr_html_().count("75.00 %") == 3  # both layers, and together

"""Weights that do not store (outputs, inputs, …): which dimension a pattern runs along, and what is refused."""

import pytest
import torch
from models import finalize_quietly
from torch import Tensor, nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.baselines import magnitude_masks, random_ticket
from torch_dual_ticket.export import load_ticket, save_ticket
from torch_dual_ticket.masks import SeededMask
from torch_dual_ticket.masks.records import as_record


class InOut(nn.Module):
    """As transformers' Conv1D, which stores (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Conv1D(InOut): ...


Conv1D.__module__ = "transformers.pytorch_utils"  # known by its name, so that transformers need not be installed


class Experts(nn.Module):
    """Fused, as in mixtures of experts: (expert, outputs, inputs), and (expert, inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 8, 12))


def kept_of_four(mask: Tensor, dim: int) -> set[int]:
    return set(mask.movedim(dim, -1).reshape(-1, 4).sum(-1).tolist())


@pytest.mark.parametrize("masks_of", [random_ticket, magnitude_masks])
def test_n_of_m_runs_along_the_inputs(masks_of):
    def masks(model, **arguments):
        found = masks_of(model, pattern="2:4", **arguments)
        return found if isinstance(found, dict) else dict(found.masks)

    assert kept_of_four(masks(nn.Sequential(Conv1D(8, 12)))["0.weight"], 0) == {2}
    experts = (Experts, "up", 2), (Experts, "down", -2)
    fused = masks(Experts(), targets=experts)
    assert kept_of_four(fused["up"], 2) == kept_of_four(fused["down"], 1) == {2}
    assert kept_of_four(fused["up"], 1) != {2} != kept_of_four(fused["down"], 2)
    assert kept_of_four(masks(InOut(8, 12), targets=[(InOut, "weight", 0)])["weight"], 0) == {2}
    # What is said of a layer of torch counts, too.
    assert kept_of_four(masks(nn.Linear(8, 12), targets=[(nn.Linear, "weight", 0)])["weight"], 0) == {2}


def test_any_block_of_such_a_mask_can_be_drawn_alone():
    mask = SeededMask(3, "up", (4, 8, 12), 192, "2:4", input_dim=2)
    whole = mask.draw()
    assert kept_of_four(whole, 2) == {2}
    assert torch.equal(mask.draw(offset=(1, 2, 5), size=(2, 3, 6)), whole[1:3, 2:5, 5:11])
    assert mask.fingerprint != SeededMask(3, "up", (4, 8, 12), 192, "2:4").fingerprint


def test_filters_are_outputs_and_channels_inputs():
    model = nn.Sequential(Conv1D(8, 12), nn.ReLU(), Conv1D(4, 8))
    filters = random_ticket(model, {"0": 0.5}, pattern="filter").masks["0.weight"]
    assert sorted(filters.sum(0).tolist()) == [0] * 4 + [12] * 4
    channels = random_ticket(InOut(8, 12), 0.25, pattern="channel", targets=[(InOut, "*", 0)]).masks["weight"]
    assert sorted(channels.sum(1).tolist()) == [0] * 3 + [8] * 9


def test_unstructured_masks_do_not_depend_on_the_layout():
    """Those of releases that knew of no layouts, with their fingerprints: states and ticket files stay valid."""
    for rst in (
        RSTScheduler(Conv1D(8, 12), 0.5, seed=0),
        RSTScheduler(InOut(8, 12), 0.5, seed=0, targets=[InOut]),
        RSTScheduler(InOut(8, 12), 0.5, seed=0, targets=[(InOut, ["weight"], 0)]),
    ):
        expected = SeededMask(0, "weight", (12, 8), 48)
        assert torch.equal(rst.masks["weight"], expected.draw())
        assert rst.state_dict()["masks"] == {"weight": expected.fingerprint}


def test_ticket_files_say_the_layout(tmp_path):
    model, again = Experts(), Experts()
    rst = RSTScheduler(model, pattern="2:4", steps=1, targets=[(Experts, "*", 2)])
    (model.up.sum() + model.down.sum()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    finalize_quietly(rst)
    save_ticket(rst, tmp_path / "ticket.safetensors")
    load_ticket(tmp_path / "ticket.safetensors", again)
    assert torch.equal(again.up, model.up)
    assert kept_of_four(again.up != 0, 2) == {2}
    assert as_record(SeededMask(0, "up", (3, 8, 12), 144, "2:4", input_dim=2))["input_dim"] == 2
    record = as_record(SeededMask(0, "up", (3, 8, 12), 144, "2:4"))
    assert "input_dim" not in record  # so that earlier releases read the files of layers that they know


@pytest.mark.parametrize("pattern", ["2:4", "filter", "channel"])
def test_types_of_unknown_layout_are_refused_with_the_way_out(pattern):
    told = r"weight: pattern '.*' is not defined for InOut, .* which dimension holds the inputs.*\(InOut, 'weight', 1\)"
    with pytest.raises(ValueError, match=told):
        RSTScheduler(InOut(8, 12), None if pattern == "2:4" else 0.5, pattern=pattern, targets=[InOut])
    parameters = nn.ParameterList([torch.randn(4, 4)])  # a type of torch's, but not a layer
    with pytest.raises(ValueError, match=r"not defined for nn.ParameterList.*\(nn\.ParameterList, '0', 1\)"):
        random_ticket(parameters, None if pattern == "2:4" else 0.5, pattern=pattern, targets=[(nn.ParameterList, "*")])


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:4x4"])
def test_of_more_dimensions_the_inputs_alone_are_known(pattern):
    with pytest.raises(ValueError, match=r"up: .*Experts: of the 3 dimensions .* only that of the inputs.*exclude="):
        random_ticket(Experts(), 0.5, pattern=pattern, targets=[(Experts, "*", 2)])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_gates_are_not_filters(kind):
    model = nn.ModuleDict({"memory": kind(8, 8)})
    with pytest.raises(
        ValueError, match=rf"memory\.weight_ih.*{kind.__name__}: a row .* one gate.*exclude=\['memory'\]"
    ):
        random_ticket(model, 0.5, pattern="filter", targets=[(kind, "weight_*")])
    channels = random_ticket(model, 0.5, pattern="channel", targets=[(kind, "weight_*")])
    assert all(set(mask.sum(0).tolist()) == {0, len(mask)} for mask in channels.masks.values())


def test_several_names_of_one_type():
    model = nn.ModuleDict({"experts": Experts(), "out": nn.Linear(4, 4)})
    assert list(RSTScheduler(model, 0.5, targets=[(Experts, ["up", "down"])]).masks) == ["experts.up", "experts.down"]

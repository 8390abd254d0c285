"""Recurrent layers, whose weights have other names: ``targets=((nn.LSTM, "weight_*"),)``."""

import pytest
import torch
from models import make
from plain_loop import assert_lives_alike, loss_of, normal
from torch import nn
from torch.nn.utils import parametrizations

from torch_dual_ticket import RSTScheduler

LAYERS = {
    "LSTM": lambda: nn.LSTM(5, 4),
    "LSTM-deep-bidirectional": lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM-projected": lambda: nn.LSTM(5, 4, proj_size=2),
    "GRU": lambda: nn.GRU(5, 4, num_layers=2, bias=False),
    "RNN": lambda: nn.RNN(5, 4, nonlinearity="relu", bidirectional=True),
}


def weights_of(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_parameters() if name.startswith("weight_")]


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers(name):
    build = LAYERS[name]
    kind = type(build())
    names = weights_of(build())
    assert len(names) >= 2
    assert_lives_alike(build, normal(6, 3, 5), names, targets=((kind, "weight_*"),))


def test_the_base_class_stands_for_all_of_them():
    def build():
        return nn.ModuleDict({"a": nn.LSTM(2, 3), "b": nn.GRU(2, 3), "c": nn.RNN(2, 3), "d": nn.Linear(3, 2)})

    rst = RSTScheduler(make(build), 0.5, targets=(nn.Linear, (nn.RNNBase, "weight_hh_*")))
    assert list(rst.masks) == ["a.weight_hh_l0", "b.weight_hh_l0", "c.weight_hh_l0", "d.weight"]


def test_a_sparsity_is_one_for_all_weights_of_a_module():
    rst = RSTScheduler(make(lambda: nn.Sequential(nn.LSTM(2, 3))), {"0": 0.25}, targets=((nn.LSTM, "weight_*"),))
    assert {name: int((~kept).sum()) for name, kept in rst.masks.items()} == {"0.weight_ih_l0": 6, "0.weight_hh_l0": 9}


class Unrolled(nn.Module):
    """A cell called at each time step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda kind: kind.__name__)
def test_cells(kind):
    names = ["cell.weight_ih", "cell.weight_hh"]
    assert_lives_alike(lambda: Unrolled(kind(5, 4)), normal(6, 3, 5), names, targets=((kind, "weight_*"),))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["old", "new"])
def test_one_weight_of_a_layer_reparametrized(norm):
    def build():
        return norm(nn.LSTM(5, 4), "weight_hh_l0")

    (leaf,) = [name for name, _ in build().named_parameters() if name.endswith(("weight_hh_l0_v", "original1"))]
    names = [name for name, _ in build().named_parameters() if name in ("weight_ih_l0", leaf)]
    assert_lives_alike(build, normal(6, 3, 5), names, targets=((nn.LSTM, "weight_*"),), sparsity=0.2)


def test_packed_sequences():
    def build():
        class Packed(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(5, 4)

            def forward(self, x):
                packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 2]))
                return self.lstm(packed)[0].data

        return Packed()

    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert_lives_alike(build, normal(6, 3, 5), names, targets=((nn.LSTM, "weight_*"),))
    assert loss_of(make(build)(*normal(6, 3, 5)(0))).isfinite()

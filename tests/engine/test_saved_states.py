"""What is saved of a model whose masks are in force has its zeros, whatever has written to the weights before."""

import copy
import io
import pickle

import pytest
import torch
from models import INPUT_SHAPES, batch, finalize_quietly, loss_of, make, mlp
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from torch_dual_ticket import RSTScheduler, release
from torch_dual_ticket.baselines import hold, magnitude_masks, random_ticket

SHAPE = INPUT_SHAPES[mlp]


def finalized(build=mlp, **options):
    model = make(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rst = RSTScheduler(model, 0.7, steps=2, seed=1, **options)
    for index in range(3):
        update(model, optimizer, index)
        rst.step()
    finalize_quietly(rst)
    return model, rst, optimizer


def update(model, optimizer, index):
    optimizer.zero_grad()
    (loss_of(model, index, SHAPE) if isinstance(model, nn.Sequential) else model(INPUTS)).backward()
    optimizer.step()


def evaluates_an_average_of_the_past(model):
    """schedulefree's ``optimizer.eval()``: weights move towards a dense buffer."""
    for parameter in model.parameters():
        parameter.data.lerp_(end=torch.ones_like(parameter), weight=0.3)


def merges_an_adapter(model):
    """LoRA's ``merge()``."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            rows, columns = parameter.shape
            parameter.data += torch.ones(rows, 2, dtype=parameter.dtype) @ torch.ones(2, columns, dtype=parameter.dtype)


def swaps_in_an_average(model):
    for parameter in model.parameters():
        parameter.data.copy_(torch.ones_like(parameter))


WRITES = [evaluates_an_average_of_the_past, merges_an_adapter, swaps_in_an_average]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


SAVES = {
    "state_dict": lambda model: model.state_dict(),
    "to a file": lambda model: through_a_file(model.state_dict()),
    "with its variables": lambda model: model.state_dict(keep_vars=True),
    "of a module around it": lambda model: {k[2:]: v for k, v in nn.Sequential(model).state_dict().items()},
    "of a compiled model": lambda model: {
        name.removeprefix("_orig_mod."): value
        for name, value in torch.compile(model, backend="eager").state_dict().items()
    },
    "of each layer": lambda model: {
        f"{index}.{name}": value for index, layer in enumerate(model) for name, value in layer.state_dict().items()
    },
}


def assert_has_zeros(state, masks):
    assert masks
    for name, kept in masks.items():
        assert torch.equal(state[name] != 0, kept), name


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("write", WRITES)
def test_a_saved_state_has_zeros(write, save):
    model, rst, optimizer = finalized()
    write(model)
    assert any((model.get_parameter(name)[~kept] != 0).any() for name, kept in rst.masks.items()), "or nothing is shown"
    assert_has_zeros(SAVES[save](model), rst.masks)
    update(model, optimizer, 4)
    assert_has_zeros(model.state_dict(), rst.masks)


@pytest.mark.parametrize("write", WRITES)
def test_a_forward_in_the_other_mode_computes_with_zeros(write):
    """So is an average or a merged adapter tried before it is saved."""
    model, rst, _ = finalized()
    write(model)
    written = copy.deepcopy(model)
    release(written)
    rst.apply_masks(written)
    x, _ = batch(0, SHAPE)
    for module in (model, written):
        module.eval()
    assert torch.equal(model(x), written(x))
    assert_has_zeros(dict(model.named_parameters()), rst.masks)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("clean", ["the other mode", "state_dict", "apply_masks"])
def test_what_is_written_through_data_into_a_model_in_eval_mode_counts_until_it_is_looked_at(write, clean):
    """To see it at each forward would be to read all weights each time."""
    model, rst, _ = finalized()
    model.eval()
    x, _ = batch(0, SHAPE)
    model(x)
    write(model)
    model(x)
    assert any((model.get_parameter(name)[~kept] != 0).any() for name, kept in rst.masks.items())
    if clean == "the other mode":
        model.train()
        model(x)
    elif clean == "state_dict":
        model.state_dict()
    else:
        rst.apply_masks(model)
    assert_has_zeros(dict(model.named_parameters()), rst.masks)


def test_held_masks():
    model = make(mlp)
    held = random_ticket(model, 0.7, seed=0)
    merges_an_adapter(model)
    assert_has_zeros(model.state_dict(), held.masks)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), AveragedModel])
def test_a_copy_of_a_finalized_model(duplicate):
    model, rst, _ = finalized()
    masks = dict(rst.masks)
    copied = duplicate(model)
    rst.remove()
    merges_an_adapter(copied)
    state = {name.removeprefix("module."): value for name, value in copied.state_dict().items()}
    assert_has_zeros(state, masks)


INPUTS = torch.ones(3, 2, 8, dtype=torch.float64)


class Attention(nn.Module):
    """Whose out_proj is never called."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0].square().mean()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x)).square().mean()


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        return self.layer(x).square().mean()


@pytest.mark.filterwarnings("ignore:only 25% of the weights will be pruned")  # the attention's projections are not
@pytest.mark.parametrize("build", [Attention, Tied, Normalized])
def test_weights_that_no_layer_of_their_own_is_called_with(build):
    targets = (nn.Linear, (nn.MultiheadAttention, "in_proj_weight"))
    model, rst, _ = finalized(build, targets=targets)
    swaps_in_an_average(model)
    assert_has_zeros(model.state_dict(), rst.masks)


def test_a_state_that_is_taken_between_forward_and_backward_disturbs_nothing():
    (model, _, optimizer), (other, _, other_optimizer) = finalized(), finalized()
    for index in range(3):
        for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
            its_optimizer.zero_grad()
            loss = loss_of(each, index, SHAPE)
            if each is model:
                each.state_dict()
            loss.backward()
            its_optimizer.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def in_transformation():
    model = make(mlp)
    return model, RSTScheduler(model, 0.7, seed=1)


def removed():
    model, rst, _ = finalized()
    rst.remove()
    return model, rst


def detached():
    model, rst, _ = finalized()
    for index in (0, 2, 4):
        prune.remove(model[index], "weight")
    return model, rst


def dropped():
    model, rst = in_transformation()
    del rst
    return model, RSTScheduler(make(mlp))


@pytest.mark.parametrize("make_model", [in_transformation, removed, detached, dropped])
def test_where_no_mask_is_in_force_a_state_is_what_the_weights_are(make_model):
    model, rst = make_model()
    swaps_in_an_average(model)
    assert all((value == 1).all() for value in model.state_dict().values())
    del rst
    release(model)
    assert not any(module._state_dict_pre_hooks for module in model.modules())


def test_to_prune_leaves_states_to_torch():
    model, rst, _ = finalized()
    rst.to_prune()
    assert not any(module._state_dict_pre_hooks for module in model.modules())


@pytest.mark.parametrize("make_model", [finalized, in_transformation, lambda: (m := make(mlp), random_ticket(m, 0.7))])
def test_a_whole_model_loads_with_weights_only(make_model):
    """With the classes of the model itself allowed, as without a scheduler; its zeros are held."""
    model, rst = make_model()[:2]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh]):
        loaded = torch.load(file, weights_only=True)
    for mine, its in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, its)
    if getattr(rst, "phase", "finetune") == "finetune":
        update(loaded, torch.optim.SGD(loaded.parameters(), lr=0.05), 0)
        assert_has_zeros(loaded.state_dict(), rst.masks)


def test_a_model_with_explicit_masks_loads_with_weights_only():
    model = make(mlp)
    held = hold(model, magnitude_masks(model, 0.7))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh]):
        loaded = torch.load(file, weights_only=True)
    swaps_in_an_average(loaded)
    assert_has_zeros(loaded.state_dict(), held.masks)

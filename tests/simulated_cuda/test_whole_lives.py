"""What is trained on the device ends as what is trained on the CPU: every form of optimizer, precision and ticket."""

import copy
import functools
import io

import pytest
import torch
from lives import is_plus_zero
from models import assert_same_states, finalize_quietly
from torch import nn

from torch_dual_ticket import RSTScheduler, baselines

from .process import on_simulated_cuda
from .training import (
    STEPS,
    assert_holds_zeros,
    assert_same_life,
    loss_of,
    network,
    new_network,
    on_host,
    sgd,
    train,
    update,
)

OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "SGD one by one": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=False),
    "SGD foreach": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam foreach": functools.partial(torch.optim.Adam, lr=1e-2, foreach=True),
    "Adam maximize": functools.partial(torch.optim.Adam, lr=1e-3, maximize=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2),
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
    "NAdam": functools.partial(torch.optim.NAdam, lr=1e-3),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3),
}


def optimizer_named(name):
    return lambda model: OPTIMIZERS[name](model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
@on_simulated_cuda
def test_optimizer(name):
    assert_same_life(optimizer_named(name))


@on_simulated_cuda
def test_capturable_optimizer():
    def capturable(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=model[0].weight.is_cuda)

    assert_same_life(capturable, tolerance=1e-3)  # it computes its bias corrections in float32


@on_simulated_cuda
def test_learning_rate_on_the_device():
    def with_tensor(model):
        lr = torch.tensor(1e-2, device=model[0].weight.device)
        return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    assert_same_life(with_tensor)


# ------------------------------------------------------------- precision


@pytest.mark.parametrize("name", ["SGD", "SGD fused", "AdamW", "AdamW fused"])
@pytest.mark.parametrize("infinite_at", [(), (2, 9)], ids=["finite", "with infinities"])
@on_simulated_cuda
def test_grad_scaler(name, infinite_at):
    """One update is skipped in the transformation, one in finetuning.

    With a fused optimizer the host learns of it later: it counts at first, and a later one does not in its place. So λ
    is a scheduler step ahead for a while, but the schedule has as many updates as ever.
    """
    if "fused" in name and infinite_at:
        assert_holds_zeros(*train("cuda", optimizer_named(name), is_scaled=True, infinite_at=infinite_at))
    else:
        assert_same_life(optimizer_named(name), is_scaled=True, infinite_at=infinite_at)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_simulated_cuda
def test_autocast(dtype):
    assert_same_life(autocast=dtype, tolerance=5e-2)


@on_simulated_cuda
def test_autocast_with_grad_scaler():
    assert_same_life(optimizer_named("SGD fused"), tolerance=5e-2, autocast=torch.float16, is_scaled=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2), (torch.float64, 1e-12)], ids=str
)
@on_simulated_cuda
def test_weights_of(dtype, tolerance):
    assert_same_life(tolerance=tolerance, build=lambda: network().to(dtype))


@on_simulated_cuda
def test_complex_weights():
    assert_same_life(build=lambda: nn.Linear(80, 80, dtype=torch.complex64), shape=(2, 80))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@on_simulated_cuda
def test_masked_weights_become_plus_zero(dtype):
    """Whatever they were, in layers of less and of more than 4,096 weights."""
    model = new_network("cuda", lambda: nn.Sequential(*(nn.Linear(n, n, dtype=dtype) for n in (32, 80))))
    masks, before = {}, {}
    for name in ("0.weight", "1.weight"):
        weight = model.get_parameter(name).detach()
        for column, value in enumerate((float("nan"), float("inf"), -0.0, -1.0)):
            weight[:, column] = value
        masks[name] = torch.rand(weight.shape) < 0.5
        masks[name][:, :4] = False
        before[name] = weight.cpu()
    baselines.hold(model, masks)
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach().cpu()
        assert is_plus_zero(weight[~mask]), name
        assert torch.equal(weight[mask], before[name][mask]), name


# --------------------------------------------------------------- tickets


SETTINGS = {
    "filters": {"pattern": "filter", "exclude": ["8"]},
    "2:4": {"pattern": "2:4", "sparsity": None, "exclude": ["0"]},
    "blocks": {"pattern": "block:2x2", "targets": (nn.Linear,), "exclude": ["8"]},
    "erk": {"distribution": "erk"},
    "cycles": {"cycles": 2},
    "masks that are not stored": {"store_masks": False},
}


@pytest.mark.parametrize("name", SETTINGS)
@on_simulated_cuda
def test_ticket_of(name):
    assert_same_life(**SETTINGS[name])


@on_simulated_cuda
def test_channels_last():
    assert_same_life(build=lambda: network().to(memory_format=torch.channels_last))


@on_simulated_cuda
def test_transformer_layer():
    def layer():
        return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    targets = (nn.Linear, (nn.MultiheadAttention, "in_proj_weight"))
    assert_same_life(build=layer, shape=(2, 5, 16), targets=targets)


# --------------------------------------------------------------- devices


class Spread(nn.Module):
    """Its layers lie on several devices."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 300), nn.Linear(300, 300), nn.Linear(300, 5)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.device)).tanh()
        return x

    def place(self, devices):
        for layer, device in zip(self.layers, devices, strict=True):
            layer.to(device)


@pytest.mark.parametrize("is_scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("name", ["SGD", "Adam foreach", "AdamW fused"])
@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1", "cuda:0"), ("cpu", "cuda:1", "cuda:0")], ids=", ".join)
@on_simulated_cuda
def test_layers_on_several_devices(devices, name, is_scaled):
    place = {"place": lambda model: model.place(devices)}
    assert_same_life(optimizer_named(name), build=Spread, shape=(4, 12), is_scaled=is_scaled, on_cuda=place)


@on_simulated_cuda
def test_a_model_that_moves_after_the_scheduler_was_built():
    assert_same_life(on_cuda={"built_on": "cpu"})


@pytest.mark.parametrize("store_masks", [True, False])
@on_simulated_cuda
def test_a_model_that_moves_between_updates(store_masks):
    """From device to device, in both phases, with the same optimizer: one without state, which would stay behind."""
    moves = {1: "cpu", 2: "cuda:0", 4: "cuda:1", 5: "cpu", 7: "cuda:1", 8: "cuda:0", 9: "cpu"}

    def without_state(model):
        return torch.optim.SGD(model.parameters(), lr=0.05)

    assert_same_life(without_state, store_masks=store_masks, on_cuda={"moves": moves})


@on_simulated_cuda
def test_default_device():
    """Everything that torch makes is on the device then, unless it is told otherwise."""
    expected, _ = train("cpu")
    with torch.device("cuda"):
        torch.manual_seed(0)
        model, rst = train("cuda")
    assert_same_states(on_host(model), on_host(expected), 1e-5)
    assert_holds_zeros(model, rst)


# ----------------------------------------------------- copies and restarts


@pytest.mark.parametrize("updates", [3, 8], ids=["transformation", "finetuning"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@on_simulated_cuda
def test_resumed_from_a_checkpoint(device, updates):
    """Saved on the device after some updates, and gone on with on either."""

    def begin(where):
        model = new_network(where)
        return model, RSTScheduler(model, 0.75, steps=STEPS, max_penalty=5, seed=3), sgd(model)

    def go_on(model, rst, optimizer, indices):
        for index in indices:
            update(model, optimizer, functools.partial(loss_of, model, index))
            rst.step()
            if rst.done:
                finalize_quietly(rst)

    expected, rst, optimizer = begin("cuda")
    go_on(expected, rst, optimizer, range(updates))
    checkpoint = io.BytesIO()
    of_optimizer = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.state_dict())
    torch.save({"model": on_host(expected), "rst": rst.state_dict(), "optimizer": of_optimizer}, checkpoint)
    go_on(expected, rst, optimizer, range(updates, 10))

    checkpoint.seek(0)
    saved = torch.load(checkpoint)
    model, rst, optimizer = begin(device)
    model.load_state_dict(saved["model"])
    rst.load_state_dict(saved["rst"])
    optimizer.load_state_dict(saved["optimizer"])
    go_on(model, rst, optimizer, range(updates, 10))
    assert_same_states(on_host(model), on_host(expected), 1e-5)
    assert_holds_zeros(model, rst)


@on_simulated_cuda
def test_a_copy_keeps_its_zeros():
    model, rst = train("cuda")
    other = copy.deepcopy(model)
    before = on_host(other)
    update(other, sgd(other), lambda: loss_of(other, 0))
    assert other[6].weight.is_cuda
    assert not torch.equal(other[6].weight.cpu(), before["6.weight"])
    for name, mask in rst.masks.items():
        assert not other.get_parameter(name)[~mask].count_nonzero()

"""Masks, tickets in files, baselines, other layouts and agreement between ranks, where the model is on the device."""

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import assert_same_states, finalize_quietly
from torch import nn
from torch._C._distributed_c10d import _create_work_from_future
from torch.nn.utils import prune

from torch_dual_ticket import RSTScheduler, baselines, random_unstructured
from torch_dual_ticket.deploy import to_semi_structured
from torch_dual_ticket.export import load_ticket, read_ticket, save_ticket
from torch_dual_ticket.masks.seeded import SeededMask
from torch_dual_ticket.report import History, summary

from .device import without_float64
from .process import on_simulated_cuda
from .training import STEPS, assert_holds_zeros, loss_of, new_network, on_host, sgd, train, update

GOLDEN = json.loads((Path(__file__).parents[1] / "masks" / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['name']}-{case['shape']}-{case['pattern']}")
@on_simulated_cuda
def test_masks_drawn_on_the_device_are_the_golden_ones(case):
    fields = {key: case[key] for key in ("seed", "name", "shape", "pruned", "pattern", "transposed")}
    mask = SeededMask(**fields).draw(offset=case["offset"], size=case["size"], device="cuda:1")
    assert mask.device == torch.device("cuda:1")
    bits = "".join("1" if kept else "0" for kept in reversed(mask.flatten().tolist()))
    packed = int(bits, 2).to_bytes(-(-len(bits) // 8), "little")
    assert hashlib.sha256(packed).hexdigest() == case["sha256"]


# ------------------------------------------------------- without float64


@on_simulated_cuda
def test_measuring_on_a_device_without_float64():
    """Such as GPUs of Apple and some of Intel: the norms are summed in float32 there."""
    measured = []
    for device in ("cpu", "cuda"):
        model = new_network(device)
        rst = RSTScheduler(model, 0.75, steps=3, seed=3)
        history = History(rst, every=1)
        for index in range(3):
            update(model, sgd(model), lambda: loss_of(model, index))  # noqa: B023
            rst.step()
            with without_float64():
                history.record()
        with without_float64():
            residual = rst.residual()
            report = finalize_quietly(rst)
            history.record()
        recorded = [record.residual for record in history.records]
        measured.append([residual, *recorded, *(layer.residual for layer in report.layers)])
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


# --------------------------------------------------------------- tickets


@on_simulated_cuda
def test_ticket_files(tmp_path):
    """Saved from the device, they are what the CPU saves, and are loaded on either to train on."""
    model, rst = train("cuda")
    save_ticket(rst, tmp_path / "ticket.safetensors")
    assert_same_states(read_ticket(tmp_path / "ticket.safetensors"), on_host(model), 0)
    for device in ("cpu", "cuda:1"):
        other = new_network(device)
        state = load_ticket(tmp_path / "ticket.safetensors", other)
        assert other[0].weight.device == torch.device(device)
        assert_same_states(on_host(other), on_host(model), 0)
        gone_on = RSTScheduler(other, 0.75, steps=STEPS, max_penalty=5, seed=3)
        gone_on.load_state_dict(state)
        update(other, sgd(other), lambda: loss_of(other, 0))  # noqa: B023
        assert_holds_zeros(other, gone_on)
        assert not torch.equal(other[6].weight.cpu(), model[6].weight.cpu())


@on_simulated_cuda
def test_masks_for_another_model():
    """As for an EMA copy that was begun before finalize(): on the device of the ticket, or another."""
    _, rst = train("cuda")
    for device in ("cpu", "cuda:0", "cuda:1"):
        other = new_network(device)
        rst.apply_masks(other)
        assert other[0].weight.device == torch.device(device)
        assert_holds_zeros(other, rst)


@on_simulated_cuda
def test_layout_of_torch():
    model, rst = train("cuda")
    expected = model(torch.ones(1, 3, 8, 8, device="cuda")).cpu()
    rst.to_prune()
    assert model[6].weight_mask.is_cuda
    prune.l1_unstructured(model[8], "weight", 0.1)
    prune.remove(model[8], "weight")
    assert model[8].weight.is_cuda
    random_unstructured(model[6], "weight", 0.5, seed=1)
    assert not torch.equal(model(torch.ones(1, 3, 8, 8, device="cuda")).cpu(), expected)


@on_simulated_cuda
def test_summary_and_residual():
    assert str(summary(train("cuda")[0])) == str(summary(train("cpu")[0]))
    residuals = []
    for device in ("cpu", "cuda"):
        rst = RSTScheduler(new_network(device), 0.75, seed=3)
        residuals.append(rst.residual())
    assert residuals[0] == pytest.approx(residuals[1], rel=1e-6)


@on_simulated_cuda
def test_shrunk_copy():
    from torch_dual_ticket.deploy import shrink

    def filters():
        first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5))

    model = new_network("cuda", filters)
    baselines.random_ticket(model, 0.5, pattern="filter", exclude=["5"], seed=0)
    x = torch.randn(2, 3, 8, 8).cuda()
    small = shrink(model, (x,))
    assert small[0].weight.shape[0] < 16
    torch.testing.assert_close(small(x).cpu(), model(x).cpu())


@on_simulated_cuda
def test_semi_structured_copy():
    """As far as the conversion: the kernels that multiply with it are the GPU's."""
    from torch.sparse import SparseSemiStructuredTensor

    model = new_network("cuda", lambda: nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))).half()
    baselines.random_ticket(model, pattern="2:4", exclude=["2"])
    before = SparseSemiStructuredTensor._FORCE_CUTLASS
    SparseSemiStructuredTensor._FORCE_CUTLASS = True  # its other library is not in this build of torch
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
            fast = to_semi_structured(model)
    finally:
        SparseSemiStructuredTensor._FORCE_CUTLASS = before
    assert isinstance(fast[0].weight.data, SparseSemiStructuredTensor)
    assert fast[0].weight.is_cuda


# ------------------------------------------------------------- baselines


@pytest.mark.parametrize(
    "settings",
    [{}, {"distribution": "global"}, {"sparsity": None, "pattern": "2:4", "exclude": ["0"]}],
    ids=["uniform", "global", "2:4"],
)
@on_simulated_cuda
def test_magnitude_masks(settings):
    settings = {"sparsity": 0.5, **settings}
    masks = baselines.magnitude_masks(new_network(), **settings)
    expected = baselines.magnitude_masks(new_network("cpu"), **settings)
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), expected[name])


@pytest.mark.parametrize("device_of_masks", ["cpu", "cuda:0", "cuda:1"])
@on_simulated_cuda
def test_masks_of_hold(device_of_masks):
    model = new_network()
    held = baselines.hold(model, baselines.magnitude_masks(new_network(device_of_masks), 0.5))
    for index in range(3):
        update(model, sgd(model), lambda: loss_of(model, index))  # noqa: B023
    assert_holds_zeros(model, held)


@on_simulated_cuda
def test_lottery_ticket():
    weights = []
    for device in ("cpu", "cuda"):
        model = new_network(device)
        ticket = baselines.LotteryTicket(model, 0.75, rounds=2)
        for index in range(4):
            if index in (1, 2):
                ticket.prune_and_rewind()
            update(model, sgd(model), lambda: loss_of(model, index))  # noqa: B023
        assert_holds_zeros(model, ticket)
        weights.append(on_host(model))
    assert_same_states(weights[1], weights[0], 1e-5)


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("default_device", ["cpu", "cuda"])
@on_simulated_cuda
def test_a_seed_that_is_drawn_is_the_same_on_the_device(default_device):
    torch.manual_seed(5)
    expected = RSTScheduler(nn.Linear(80, 80), 0.5).masks["weight"]
    with torch.device(default_device):
        torch.manual_seed(5)
        assert torch.equal(RSTScheduler(nn.Linear(80, 80).cuda(), 0.5).masks["weight"].cpu(), expected)


class Echo(dist.ProcessGroup):
    """Two ranks of which the second is always given what the first gives; on devices alone, as NCCL."""

    _device_types = (torch.device("cuda"),)

    def __init__(self):
        super().__init__(0, 2)
        self.devices = set()

    def _done(self, *tensors):
        self.devices |= {tensor.device for tensor in tensors}
        future = torch.futures.Future()
        future.set_result(list(tensors))
        return _create_work_from_future(future)

    def getBackendName(self):  # noqa: N802
        return "echo"

    def allgather(self, outputs, inputs, options=None):
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self._done(*outputs[0], *inputs)

    def broadcast(self, tensors, options=None):
        return self._done(*tensors)

    def allreduce(self, tensors, options=None):
        return self._done(*tensors)


@on_simulated_cuda
def test_ranks_agree_on_the_seed_on_the_device_of_the_model():
    """The current device may be another one, where a rank has not set it, and another rank's GPU."""
    echo = Echo()
    dist.Backend.register_backend("echo", lambda *args: echo, devices=["cuda"])
    dist.init_process_group("echo", store=dist.HashStore(), rank=0, world_size=2)
    try:
        assert torch.cuda.current_device() == 0
        RSTScheduler(nn.Linear(80, 80).to("cuda:1"), 0.5)
        assert echo.devices == {torch.device("cuda:1")}, echo.devices
        assert torch.cuda.current_device() == 0
    finally:
        dist.destroy_process_group()

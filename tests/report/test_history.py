"""The history of λ, residual and norms: the right numbers at the right steps, without waiting for a device."""

import copy
import gc
import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from device_tape import NoReading
from models import INPUT_SHAPES, batch, finalize_quietly, loss_of, make, mlp
from ranks import everywhere, needs_fsdp2, on_two_ranks
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.report import History

SHAPE = INPUT_SHAPES[mlp]


class Loop:
    """A user's training loop."""

    def __init__(self, model, **arguments):
        self.model = model
        self.rst = RSTScheduler(model, **{"sparsity": 0.7, "steps": 10, "seed": 0, **arguments})
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.updates = 0

    def run(self, updates, history=None, *, finalize_at=None):
        for _ in range(updates):
            self.optimizer.zero_grad()
            loss_of(self.model, self.updates, SHAPE).backward()
            self.optimizer.step()
            self.rst.step()
            self.updates += 1
            if self.updates == finalize_at:
                finalize_quietly(self.rst)
            if history is not None:
                history.record()


def steps(history):
    return [(record.step, record.phase) for record in history.records]


@torch.no_grad()
def norms(model, masks):
    """‖masked weights‖ and ‖kept weights‖, computed in another way."""
    masked = sum(float((model.get_parameter(name) * ~kept).square().sum()) for name, kept in masks.items())
    stays = sum(float((model.get_parameter(name) * kept).square().sum()) for name, kept in masks.items())
    return math.sqrt(masked), math.sqrt(stays)


# ---------------------------------------------------------------------- numbers


def test_the_numbers_are_those_of_the_model():
    loop = Loop(make(mlp), schedule="quadratic", exclude=["4"])
    history = History(loop.rst, every=1)
    masks = dict(loop.rst.masks)
    expected = []
    for _ in range(6):
        loop.run(1, history)
        expected.append(
            (loop.rst.penalty, norms(loop.model, masks), norms(loop.model, {"2.weight": masks["2.weight"]}))
        )
    assert steps(history) == [(step, "transform") for step in range(1, 7)]
    for record, (penalty, (masked, kept), (masked_2, kept_2)) in zip(history.records, expected, strict=True):
        assert record.penalty == penalty
        assert record.report.total.sparsity == loop.rst.sparsity
        assert record.sparsity == 0.0  # the model is dense
        assert record.residual == pytest.approx(masked / math.hypot(masked, kept), rel=1e-12)
        assert record.report.total.masked_norm == pytest.approx(masked, rel=1e-12)
        assert record.report.total.kept_norm == pytest.approx(kept, rel=1e-9)
        layer = record.report.layers[1]
        assert (layer.name, layer.pruned, layer.size) == ("2.weight", 224, 320)
        assert (layer.masked_norm, layer.kept_norm) == pytest.approx((masked_2, kept_2), rel=1e-9)


def test_the_end_of_the_transformation_is_recorded_before_and_after_the_masks():
    loop = Loop(make(mlp))
    history = History(loop.rst, every=4)
    loop.run(14, history, finalize_at=11)
    assert steps(history) == [
        (1, "transform"), (4, "transform"), (8, "transform"), (11, "transform"), (11, "finetune"), (12, "finetune")
    ]  # fmt: skip
    before, after = history.records[3:5]
    assert before.report == loop.rst.finalize()
    assert before.penalty == 1.0
    assert before.residual > 0
    assert (after.residual, after.penalty) == (0.0, 0.0)
    assert after.report.total.norm == pytest.approx(before.report.total.kept_norm, rel=1e-9)


@pytest.mark.filterwarnings(r"ignore:finalize\(\) in cycle 1 of 2")
def test_how_often_it_records():
    loop = Loop(make(mlp), steps=500, hold=100, cycles=2)
    assert History(loop.rst).every == 6
    assert History(Loop(make(mlp)).rst).every == 1
    rarely = History(loop.rst, every=2)  # called once in five updates
    for _ in range(3):
        loop.run(5)
        rarely.record()
    finalize_quietly(loop.rst)
    rarely.record()
    rarely.record()
    assert steps(rarely) == [
        (5, "transform"), (10, "transform"), (15, "transform"), (16, "transform"), (16, "finetune")
    ]  # fmt: skip


def test_cycles_record_growing_sparsities():
    loop = Loop(make(mlp), steps=3, hold=1, cycles=3, sparsity=0.875)
    history = History(loop.rst, every=1)
    loop.run(14, history, finalize_at=12)
    sparsities = [record.report.total.sparsity for record in history.records]
    assert sparsities == pytest.approx([0.5] * 3 + [0.75] * 4 + [0.875] * 8, abs=1e-3)
    assert [round(record.sparsity, 3) for record in history.records if record.sparsity] == [0.875] * 3
    assert history.records[-1].sparsity == loop.rst.sparsity


def test_detached_layers_are_not_recorded():
    loop = Loop(make(mlp))
    history = History(loop.rst, every=1)
    loop.run(2, history)
    prune.remove(loop.model[2], "weight")
    loop.run(2, history)
    assert [[layer.name[0] for layer in record.report.layers] for record in history.records] == [
        ["0", "2", "4"], ["0", "2", "4"], ["0", "4"], ["0", "4"]
    ]  # fmt: skip
    loop.rst.remove()
    loop.run(2, history)
    assert len(history.records) == 4


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize("sparsity", [0.5, {"0": 0.5}])
def test_recording_reads_no_device_value_on_the_host(sparsity):
    loop = Loop(nn.Sequential(nn.Linear(12, 500), nn.Linear(500, 5)).double(), sparsity=sparsity)
    history = History(loop.rst, every=1)
    loop.run(1, history)
    with pytest.raises(AssertionError, match="waits"), NoReading():
        loop.rst.residual()
    with NoReading():
        for _ in range(3):
            stage = loop.rst._ticket.stage
            loop.rst._ticket.stage = replace(stage, steps=stage.steps + 1)
            history.record()
        loop.rst._ticket.hold_zeros(loop.rst._ticket.stage.masks)
        history.record()
    assert len(history.records) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_recording_does_not_wait_for_a_gpu():
    model = nn.Sequential(nn.Linear(12, 500), nn.Tanh(), nn.Linear(500, 5)).cuda()
    rst = RSTScheduler(model, sparsity=0.5, steps=4)
    history = History(rst, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def update(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(8, 12, device="cuda")).square().mean().backward()
            optimizer.step()
            rst.step()
            history.record()

    update(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finalize_quietly(rst)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record.residual == 0 for record in history.records] == [False] * 7 + [True] * 2


def test_calls_that_do_not_record_run_no_operation():
    loop = Loop(make(mlp))
    history = History(loop.rst, every=100)
    loop.run(1, history)

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            raise AssertionError(f"{operator} was called")

    loop.rst.step()
    with Nothing():
        history.record()


def test_it_does_not_keep_the_scheduler_alive():
    loop = Loop(make(mlp))
    history = History(loop.rst, every=1)
    loop.run(3, history)
    rst = weakref.ref(loop.rst)
    del loop
    gc.collect()
    assert rst() is None
    assert len(history.records) == 3
    with pytest.raises(RuntimeError, match="does not exist any more"):
        history.record()


# ---------------------------------------------------------------------- restarts and ranks


@pytest.mark.parametrize("interrupted_at", [3, 4, 7, 12])
def test_a_resumed_history_equals_an_uninterrupted_one(interrupted_at, tmp_path):
    whole = Loop(make(mlp))
    undisturbed = History(whole.rst, every=4)
    whole.run(20, undisturbed, finalize_at=10)

    first = Loop(make(mlp))
    history = History(first.rst, every=4)
    first.run(interrupted_at, history, finalize_at=10)
    parts = {"model": first.model, "optimizer": first.optimizer, "rst": first.rst, "history": history}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint")
    first.run(3, history)  # what is not in the checkpoint is lost

    second = Loop(make(mlp, seed=1))
    resumed = History(second.rst, every=4)
    parts = {"model": second.model, "optimizer": second.optimizer, "rst": second.rst, "history": resumed}
    for name, state in torch.load(tmp_path / "checkpoint", weights_only=True).items():
        parts[name].load_state_dict(state)
    second.updates = interrupted_at
    second.run(20 - interrupted_at, resumed, finalize_at=10)
    assert resumed.records == undisturbed.records
    assert json.loads(json.dumps(history.state_dict())) == history.state_dict()
    assert list(history.state_dict()) == ["version", "tick", "logged", "records"]  # as earlier releases wrote it


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        {"version": 2, "tick": 0, "logged": 0, "records": []},
        {"version": 1, "tick": 0, "logged": 0, "records": [[1, "transform", 0.5]]},
    ],
)
def test_another_state_is_refused_and_nothing_is_changed(state):
    loop = Loop(make(mlp))
    history = History(loop.rst, every=1)
    loop.run(2, history)
    before = history.records
    with pytest.raises(ValueError, match="not a state_dict\\(\\) of a History"):
        history.load_state_dict(state)
    assert history.records == before


@needs_fsdp2
@on_two_ranks
def test_sharded_weights():
    from torch.distributed.fsdp import fully_shard

    alone = Loop(make(mlp))
    model = make(mlp)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    loop = Loop(model)
    histories = [History(loop.rst, every=2), History(alone.rst, every=2)]
    for part, history in zip((loop, alone), histories, strict=True):
        part.run(4, history)
        with torch.no_grad():
            part.model(batch(0, SHAPE)[0])  # leaves the root of FSDP2 whole
        part.run(10, history, finalize_at=10)
    found, expected = (history.records for history in histories)
    assert steps(histories[0]) == steps(histories[1])
    assert len(expected) > 6
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine.report.layers, theirs.report.layers, strict=True):
            assert (a.name, a.pruned, a.size) == (b.name, b.pruned, b.size)
            assert (a.residual, a.norm) == pytest.approx((b.residual, b.norm), rel=1e-9)
    ours, others = everywhere(histories[0].state_dict())
    assert ours == others


# ---------------------------------------------------------------------- TensorBoard


class Lines:
    """Anything with add_scalar."""

    def __init__(self):
        self.written = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.written.append((tag, scalar_value, global_step))


def test_each_record_is_logged_once():
    loop = Loop(make(mlp), exclude=["4"])
    history = History(loop.rst, every=2)
    writer = Lines()
    history.log_to(writer)
    assert writer.written == []
    loop.run(3, history)
    history.log_to(writer)
    first = list(writer.written)
    record = history.records[1]
    assert [line for line in first if line[2] == 2] == [
        ("rst/penalty", record.penalty, 2),
        ("rst/residual", record.residual, 2),
        ("rst/sparsity", 0.0, 2),
        ("rst/masked_norm", record.report.total.masked_norm, 2),
        ("rst/kept_norm", record.report.total.kept_norm, 2),
        ("rst_residual/0.weight", record.report.layers[0].residual, 2),
        ("rst_residual/2.weight", record.report.layers[1].residual, 2),
    ]
    history.log_to(writer)
    assert writer.written == first
    saved = copy.deepcopy(history.state_dict())
    loop.run(1, history)
    history.log_to(writer)
    assert [line[2] for line in writer.written[len(first) :]] == [4] * 7
    resumed = History(loop.rst, every=2)
    resumed.load_state_dict(saved)
    again = Lines()
    resumed.log_to(again)
    assert again.written == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what TensorBoard imports
def test_the_writer_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    loop = Loop(make(mlp))
    history = History(loop.rst, every=5)
    loop.run(12, history, finalize_at=12)
    with SummaryWriter(tmp_path) as writer:
        history.log_to(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    penalties = [(event.step, event.value) for event in events.Scalars("rst/penalty")]
    assert [step for step, _ in penalties] == [1, 5, 10, 12, 12]
    assert [value for _, value in penalties] == pytest.approx([0.2, 0.6, 1.0, 1.0, 0.0])
    assert set(events.Tags()["scalars"]) == {
        *(f"rst/{what}" for what in ("penalty", "residual", "sparsity", "masked_norm", "kept_norm")),
        *(f"rst_residual/{name}" for name in loop.rst.masks),
    }


# ---------------------------------------------------------------------- bad calls


def test_bad_arguments():
    loop = Loop(make(mlp))
    with pytest.raises(TypeError, match=r"takes an RSTScheduler, or what .* got Sequential"):
        History(loop.model)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        History(loop.rst, every=0)
    with pytest.raises(TypeError, match=r"every must be an integer of at least 1, got 0\.5"):
        History(loop.rst, every=0.5)
    with pytest.raises(TypeError, match=r"add_scalar.*SummaryWriter; got str"):
        History(loop.rst).log_to("runs")

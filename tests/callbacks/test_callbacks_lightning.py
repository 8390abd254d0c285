"""A Lightning Trainer trains the weights that the plain loop trains, in one go or resumed."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_dual_ticket import RSTScheduler

L = pytest.importorskip("lightning.pytorch", reason="needs Lightning: pip install lightning")
from torch_dual_ticket.callbacks.lightning import RSTCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:the masked weights still held"),  # schedules as short as these leave more
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # of torch, used by Lightning
]

BATCHES, EPOCHS = 8, 4
TICKET = {"sparsity": 0.8, "seed": 3, "exclude": ["*.4"]}
HALF = {"steps": BATCHES * EPOCHS // 2}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)).double()


def loader(batch_size=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * 4, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x[:, :3].sin()), batch_size=batch_size)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, index):
        return self.loss(batch)

    def test_step(self, batch, index):
        self.loss(batch)

    def configure_optimizers(self):
        return sgd(self.parameters())


def fit(callback, module=None, *, data=None, ckpt_path=None, callbacks=(), epochs=EPOCHS, **options):
    module = module or Module()
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": bool(callbacks), **options}
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[callback, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return module, trainer


def plain_loop(updates=EPOCHS * BATCHES, *, batch_size=4, accumulate=1, clip=None, **settings):
    """The loop as a user of the scheduler writes it, on a module of the same names."""
    module = nn.Module()
    module.net = network()
    optimizer = sgd(module.parameters())
    rst = RSTScheduler(module, **{**TICKET, **HALF, **settings})
    batches = [batch for _ in range(EPOCHS) for batch in loader(batch_size)]
    for update in range(updates):
        optimizer.zero_grad()
        for x, y in batches[accumulate * update : accumulate * (update + 1)]:
            (nn.functional.mse_loss(module.net(x), y) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        rst.step()
        if rst.done:
            rst.finalize()
    return module.net, rst


def assert_same(model, other, tolerance=1e-12):
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()), msg=name)


def assert_sparse(module, callback):
    assert callback.scheduler.phase == "finetune"
    assert list(callback.scheduler.masks) == ["net.0.weight", "net.2.weight"]
    for name, kept in callback.scheduler.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, kept), name


@pytest.mark.parametrize("when", [{}, {"finalize_at": 0.5}, HALF], ids=["default", "fraction", "steps"])
def test_trains_what_the_plain_loop_trains(when):
    callback = RSTCallback(**TICKET, **when)
    module, _ = fit(callback)
    expected, rst = plain_loop()
    assert_sparse(module, callback)
    assert_same(module.net, expected)
    assert callback.report.total.residual == pytest.approx(rst.finalize().total.residual)
    assert callback.report.total.residual > 0


def test_one_scheduler_step_for_each_update_under_accumulation_and_clipping():
    callback = RSTCallback(**TICKET)
    module, _ = fit(callback, accumulate_grad_batches=2, gradient_clip_val=0.1)
    expected, _ = plain_loop(EPOCHS * BATCHES // 2, accumulate=2, clip=0.1, steps=EPOCHS * BATCHES // 4)
    assert_sparse(module, callback)
    assert_same(module.net, expected)


class Manual(Module):
    """The module itself makes an update at every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_steps_the_scheduler_at_its_updates():
    callback = RSTCallback(**TICKET, steps=EPOCHS * BATCHES // 4)
    module, _ = fit(callback, Manual())
    expected, _ = plain_loop(EPOCHS * BATCHES // 2, accumulate=2, steps=EPOCHS * BATCHES // 4)
    assert_sparse(module, callback)
    assert_same(module.net, expected)


class InterruptionError(Exception):
    pass


class Interrupt(L.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise InterruptionError


@pytest.mark.parametrize("epoch", [1, 3], ids=["transform", "finetune"])
@pytest.mark.parametrize("seed", [3, None])
def test_resumes_from_a_checkpoint(tmp_path, epoch, seed):
    torch.manual_seed(11)
    callback = RSTCallback(**{**TICKET, "seed": seed})
    saving = L.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_last=True)
    with pytest.raises(InterruptionError):
        fit(callback, callbacks=[saving, Interrupt(epoch)])
    assert callback.scheduler.progress == min(1, epoch / 2)
    first_seed = callback.scheduler.seed

    torch.manual_seed(12)  # another process would draw another seed
    resumed = RSTCallback(**{**TICKET, "seed": seed})
    module = Module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()  # all weights must come from the checkpoint
    fit(resumed, module, ckpt_path=tmp_path / "last.ckpt")
    expected, _ = plain_loop(seed=first_seed)
    assert resumed.scheduler.seed == first_seed
    if epoch == 3:
        assert resumed.report == callback.report
        assert resumed.report.total.residual > 0
    assert_sparse(module, resumed)
    assert_same(module.net, expected)


def test_masks_that_were_chosen(tmp_path):
    """Also resumed, where they are given again."""
    expected, rst = plain_loop()
    masks = {name: mask.int() for name, mask in rst.masks.items()}
    saving = L.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_last=True)
    with pytest.raises(InterruptionError):
        fit(RSTCallback(masks=masks), callbacks=[saving, Interrupt(1)])
    resumed = RSTCallback(masks=masks)
    module, _ = fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    assert_sparse(module, resumed)
    assert_same(module.net, expected)


def test_an_earlier_checkpoint_brings_back_the_transformation(tmp_path):
    """In one process: masks are in force when the dense weights are loaded."""
    saving = L.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    callback = RSTCallback(**TICKET)
    module, trainer = fit(callback, callbacks=[saving])
    finished = copy.deepcopy(module.net.state_dict())
    trainer.fit(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_sparse(module, callback)
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, finished[name], rtol=0, atol=0)


def test_a_callback_used_for_a_second_module(tmp_path):
    """As in a notebook: the state of the checkpoint is not for the module of the cell before."""
    saving = L.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    callback = RSTCallback(**TICKET)
    first, _ = fit(callback, callbacks=[saving])
    before, finished = callback.scheduler, copy.deepcopy(first.net.state_dict())
    second, _ = fit(callback, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert before.phase == "finetune"
    assert callback.scheduler is not before
    assert_sparse(second, callback)
    for name, value in second.net.state_dict().items():
        torch.testing.assert_close(value, finished[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:this checkpoint is from before")
def test_states_restored_for_testing_another_module_are_ignored(tmp_path):
    """Lightning restores callbacks for tests and validations too."""
    saving = L.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    callback = RSTCallback(**TICKET)
    module, trainer = fit(callback, callbacks=[saving])
    trainer.test(Module(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert_sparse(module, callback)
    trainer.test(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)  # dense, as it was then
    assert callback.scheduler.phase == "transform"

    fresh = RSTCallback(**TICKET)
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[fresh]).test(
        Module(), loader(), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False
    )
    assert fresh.scheduler is None
    trained, _ = fit(fresh)
    assert_same(trained.net, plain_loop()[0])


class Rows(L.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


def test_logs_through_the_logger_of_the_trainer():
    callback = RSTCallback(**TICKET)
    logger = Rows()
    _, trainer = fit(callback, logger=logger, log_every_n_steps=1)
    rows = logger.rows
    penalties = [row["rst/penalty"] for row in rows if "rst/penalty" in row]
    expected = [(k + 1) / 16 for k in range(16)] + [0.0] * 16
    assert penalties == pytest.approx(expected)
    residuals = [row["rst/residual"] for row in rows if "rst/residual" in row]
    assert len(residuals) == EPOCHS
    assert residuals[0] > callback.report.total.residual
    assert residuals[1:] == [0, 0, 0]
    assert [row["rst/sparsity"] for row in rows if "rst/sparsity" in row] == pytest.approx([0, 0.8, 0.8, 0.8])
    assert "rst/penalty" in trainer.progress_bar_metrics


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_agrees_with_the_plain_loop(precision):
    """float16 with GradScaler, whose first steps are skipped for infinities and do not count."""
    kind = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**40) for _ in range(2)]
    scaled = precision == "16-mixed"
    plugin = L.plugins.MixedPrecision(precision, "cpu", scaler=scalers[0] if scaled else None)
    callback = RSTCallback(**TICKET, steps=8)
    data = DataLoader(TensorDataset(*(tensor.float() for tensor in loader().dataset.tensors)), batch_size=4)
    module, _ = fit(callback, Module().float(), data=data, plugins=[plugin], epochs=EPOCHS * 2)

    other = nn.Module()
    other.net = network().float()
    rst = RSTScheduler(other, **TICKET, steps=8)
    optimizer = sgd(other.parameters())
    skipped = 0
    for x, y in [batch for _ in range(EPOCHS * 2) for batch in data]:
        optimizer.zero_grad()
        with torch.autocast("cpu", kind):
            loss = nn.functional.mse_loss(other.net(x), y)
        if scaled:
            scalers[1].scale(loss).backward()
            scalers[1].step(optimizer)
            before = scalers[1].get_scale()
            scalers[1].update()
            skipped += scalers[1].get_scale() < before
        else:
            loss.backward()
            optimizer.step()
        rst.step()
        if rst.done:
            rst.finalize()
    assert bool(skipped) == scaled
    assert_sparse(module, callback)
    assert_same(module, other, tolerance=1e-6)


RANKS = """
import gc, os, sys, torch, warnings

warnings.simplefilter("ignore")
torch.set_num_threads(1)
from test_callbacks_lightning import TICKET, DataLoader, TensorDataset, fit, loader
from torch_dual_ticket.callbacks.lightning import RSTCallback

if __name__ == "__main__":
    callback = RSTCallback(**{**TICKET, "seed": None})  # drawn, and agreed on by the ranks
    rank = int(os.environ.get("LOCAL_RANK", 0))
    data = DataLoader(TensorDataset(*(tensor[rank::2] for tensor in loader().dataset.tensors)), batch_size=4)
    module, trainer = fit(callback, data=data, strategy="ddp", devices=2, use_distributed_sampler=False)
    assert callback.scheduler.phase == "finetune"
    if trainer.is_global_zero:
        torch.save([callback.scheduler.seed, module.net.state_dict()], sys.argv[1])
    torch.distributed.barrier()  # a rank that ends while the other still needs its connection can abort
    del callback, module, trainer  # they refer to the group
    gc.collect()
    torch.distributed.destroy_process_group()
"""


def test_two_ranks_agree_with_one_process(tmp_path):
    """Each rank has every second example: together the batches of 8 of one process."""
    script, end = tmp_path / "ranks.py", tmp_path / "end.pt"
    script.write_text(RANKS)
    folders = [str(Path(__file__).parents[level]) for level in range(3)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, script, end], env=environment, check=True, timeout=300, capture_output=True)
    seed, state = torch.load(end)
    expected, _ = plain_loop(EPOCHS * BATCHES // 2, batch_size=8, steps=EPOCHS * BATCHES // 4, seed=seed)
    trained = network()
    trained.load_state_dict(state)
    assert_same(trained, expected)


AVERAGES = {
    "average": lambda: L.callbacks.WeightAveraging(),
    "ema": lambda: L.callbacks.EMAWeightAveraging(decay=0.9),
    "swa": lambda: L.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
}


@pytest.mark.parametrize("ticket_is_first", [True, False])
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_averages_of_the_weights_end_with_zeros(kind, ticket_is_first, tmp_path):
    """Begun before ``finalize()``, written back through ``.data`` at the end: in the module, and in checkpoints."""
    callback, average = RSTCallback(**TICKET), AVERAGES[kind]()
    first, second = (callback, average) if ticket_is_first else (average, callback)
    module, trainer = fit(first, callbacks=[second], default_root_dir=tmp_path, enable_checkpointing=False)
    assert_sparse(module, callback)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"]
    for name, kept in callback.scheduler.masks.items():
        assert torch.equal(saved[name] != 0, kept)


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_best_checkpoint_from_before_finalize_is_noticed(stage, tmp_path):
    callback = RSTCallback(**TICKET)
    checkpoints = L.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    module, trainer = fit(callback, callbacks=[checkpoints])
    evaluate = getattr(trainer, stage)
    Module.validation_step = Module.test_step
    try:
        evaluate(module, loader(), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False, weights_only=False)
        assert_sparse(module, callback)
        with pytest.warns(UserWarning, match="from before the masked weights were set to zero: the module is dense"):
            evaluate(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=False)
    finally:
        del Module.validation_step


# ---------------------------------------------------------------------- errors and warnings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sparcity": 0.9}, TypeError, "unexpected keyword argument 'sparcity'"),
        ({"finalize_at": 0}, ValueError, r"fraction of the training in \(0, 1\], got 0"),
        ({"finalize_at": True}, ValueError, "got True"),
        ({"finalize_at": "half"}, ValueError, "got 'half'"),
        ({"finalize_at": 0.5, "steps": 10}, ValueError, "give one"),
        ({"cycles": 0}, ValueError, "cycles must be an integer of at least 1 and at most 1,000, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer of at least 1, got 1.5"),
        ({"sparsity": 2}, ValueError, r"sparsity must lie in \[0, 1\), got 2"),
        ({"sparsity": {"net.0": "half"}}, TypeError, "sparsity must be a number"),
        ({"pattern": "2-4"}, ValueError, "unknown pattern '2-4'"),
        ({"distribution": "erdos"}, ValueError, "unknown distribution 'erdos'"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
        ({"updates": 100}, ValueError, "give finalize_at in place of updates"),
        ({"schedule": "quadratik"}, ValueError, "did you mean 'quadratic'"),
        ({"exclude": "head"}, TypeError, r"exclude is a sequence of name patterns.*got 'head'"),
        ({"exclude": [1]}, TypeError, "exclude is a sequence of name patterns"),
        ({"targets": torch.nn.Linear}, TypeError, "targets"),
        ({"targets": ["Linear"]}, TypeError, "got 'Linear' among them"),
        ({"optimizer": [torch.nn.Linear(2, 2)]}, TypeError, r"optimizer must be a torch\.optim\.Optimizer, got list"),
        ({"masks": [torch.ones(2)]}, TypeError, "masks is a mapping"),
    ],
)
def test_bad_arguments_are_refused_at_construction(settings, error, message):
    with pytest.raises(error, match=message):
        RSTCallback(**settings)


def test_a_hold_that_leaves_no_steps_is_refused():
    with pytest.raises(ValueError, match="hold=16 leaves no updates for λ to rise: 50% of 32 updates"):
        fit(RSTCallback(**TICKET, hold=16))


def test_a_trainer_without_an_end_needs_steps():
    with pytest.raises(ValueError, match="give steps or limit its training"):
        fit(RSTCallback(**TICKET), epochs=-1)


def test_a_schedule_longer_than_the_training_warns():
    with pytest.warns(UserWarning, match="takes 40|ended at 80%") as warned:
        fit(RSTCallback(**TICKET, steps=40))
    messages = " ".join(str(warning.message) for warning in warned)
    assert "takes 40 updates, but this training makes 32" in messages
    assert "ended at 80% of the transformation" in messages


def test_cycles_and_hold_share_the_fraction():
    callback = RSTCallback(**TICKET, finalize_at=0.75, cycles=2, hold=4)
    module, _ = fit(callback)
    expected, _ = plain_loop(steps=8, cycles=2, hold=4)
    assert_sparse(module, callback)
    assert_same(module.net, expected)


SOLE_NAME = """
import importlib.util, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {hidden} else find_spec(name, package)
import torch_dual_ticket.callbacks
assert not {{"lightning", "pytorch_lightning", "transformers"}} & set(sys.modules)
try:
    from torch_dual_ticket.callbacks.lightning import RSTCallback
except ImportError as error:
    print(error)
else:
    import pytorch_lightning, torch

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(10, 10)

        def training_step(self, batch, index):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = RSTCallback(0.5)
    quiet = {{"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}}
    trainer = pytorch_lightning.Trainer(max_steps=8, accelerator="cpu", callbacks=[callback], logger=False, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(32, 10), batch_size=4))
    print(callback.scheduler.phase, int((trainer.model.layer.weight == 0).sum()))
"""


@pytest.mark.parametrize(
    ("hidden", "printed"),
    [
        ({"lightning", "pytorch_lightning"}, "pip install lightning"),
        ({"lightning"}, "finetune 50"),
    ],
)
def test_works_with_either_name_of_lightning(hidden, printed):
    command = [sys.executable, "-W", "ignore", "-c", SOLE_NAME.format(hidden=hidden)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert printed in result.stdout

"""A Transformers Trainer trains the weights that the plain loop trains, in one go or resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_dual_ticket import RSTScheduler

transformers = pytest.importorskip("transformers", reason="needs Transformers: pip install 'transformers[torch]'")
pytest.importorskip("accelerate", reason="the Trainer needs Accelerate: pip install accelerate")
from torch_dual_ticket.callbacks.transformers import RSTCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the masked weights still held"),  # schedules as short as these leave more
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator"),
]

UPDATES, BATCH = 24, 4
TICKET = {"sparsity": 0.8, "seed": 3, "exclude": ["*embeddings*", "classifier"], "max_penalty": 5.0}


def network():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).double()


def examples():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (UPDATES * BATCH, 8), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *unused):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(folder, callbacks, model=None, *, optimizer=sgd, **options):
    model = model or network()
    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": UPDATES,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "disable_tqdm": True,
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return InOrder(
        model,
        arguments,
        train_dataset=examples(),
        eval_dataset=examples()[:BATCH],
        callbacks=callbacks,
        optimizers=(optimizer(model), None),
    )


def plain_loop(updates=UPDATES, *, model=None, optimizer=sgd, accumulate=1, autocast=None, **settings):
    """The loop as a user of the scheduler writes it."""
    model = (model or network()).train()
    optimizer = optimizer(model)
    rst = RSTScheduler(model, **{**TICKET, "steps": UPDATES // 2, **settings})
    data = examples()
    batches = [data[start : start + BATCH] for start in range(0, len(data), BATCH)]
    for update in range(updates):
        optimizer.zero_grad()
        for batch in batches[accumulate * update : accumulate * (update + 1)]:
            inputs = {name: torch.stack([example[name] for example in batch]) for name in batch[0]}
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(**inputs).loss / accumulate
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        rst.step()
        if rst.done:
            rst.finalize()
    return model, rst


def assert_same(model, other, tolerance=1e-12):
    largest = max(float(parameter.detach().abs().max()) for parameter in other.parameters())
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * largest, msg=name)


def assert_sparse(model, rst):
    assert rst.phase == "finetune"
    assert len(rst.masks) == 13
    for name, kept in rst.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, kept), name


@pytest.mark.parametrize("when", [{}, {"finalize_at": 0.5}, {"steps": UPDATES // 2}], ids=["default", "at", "steps"])
def test_trains_what_the_plain_loop_trains(tmp_path, when):
    callback = RSTCallback(**TICKET, **when)
    trainer = trainer_of(tmp_path, [callback])
    trainer.train()
    expected, rst = plain_loop()
    assert_sparse(trainer.model, callback.scheduler)
    assert_same(trainer.model, expected)
    assert callback.report.total.residual == pytest.approx(rst.finalize().total.residual)
    assert callback.report.total.residual > 0


def test_masks_that_were_chosen(tmp_path):
    expected, rst = plain_loop()
    callback = RSTCallback(masks=dict(rst.masks), max_penalty=5.0)
    trainer = trainer_of(tmp_path, [callback], save_strategy="steps", save_steps=12)
    trainer.train()
    assert_sparse(trainer.model, callback.scheduler)
    assert_same(trainer.model, expected)


def test_one_scheduler_step_for_each_update_under_accumulation(tmp_path):
    callback = RSTCallback(**TICKET)
    trainer = trainer_of(tmp_path, [callback], gradient_accumulation_steps=2, max_steps=UPDATES // 2)
    trainer.model_accepts_loss_kwargs = False  # or it takes this model to divide its loss by the number of examples
    trainer.train()
    expected, _ = plain_loop(UPDATES // 2, accumulate=2, steps=UPDATES // 4)
    assert_sparse(trainer.model, callback.scheduler)
    assert_same(trainer.model, expected)


def test_bf16_with_the_fused_adamw_of_the_trainer(tmp_path):
    callback = RSTCallback(**TICKET)
    options = {"bf16": True, "learning_rate": 1e-3, "optim": "adamw_torch_fused"}
    trainer = trainer_of(tmp_path, [callback], network().float(), optimizer=lambda model: None, **options)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0, fused=True)

    expected, _ = plain_loop(model=network().float(), optimizer=adamw, autocast=torch.bfloat16)
    assert_sparse(trainer.model, callback.scheduler)
    assert_same(trainer.model, expected, tolerance=1e-5)


class InterruptionError(Exception):
    pass


class Interrupt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **unused):
        if state.global_step == self.step:
            raise InterruptionError


@pytest.mark.parametrize(
    ("step", "seed", "restore"), [(5, 3, False), (20, 3, False), (5, None, False), (20, None, True)]
)
def test_resumes_from_a_checkpoint(tmp_path, step, seed, restore):
    options = {
        "save_strategy": "steps",
        "save_steps": 5,
        "restore_callback_states_from_checkpoint": restore,
    }
    callback = RSTCallback(**{**TICKET, "seed": seed})
    torch.manual_seed(11)
    with pytest.raises(InterruptionError):
        trainer_of(tmp_path, [callback, Interrupt(step)], **options).train()
    assert callback.scheduler.progress == min(1, step / (UPDATES // 2))
    first_seed, of_before = callback.scheduler.seed, callback

    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all weights must come from the checkpoint
    resumed = trainer_of(tmp_path, [RSTCallback(**{**TICKET, "seed": seed})], model, **options)
    torch.manual_seed(12)  # another process would draw another seed
    resumed.train(resume_from_checkpoint=True)
    (callback,) = [callback for callback in resumed.callback_handler.callbacks if isinstance(callback, RSTCallback)]
    expected, _ = plain_loop(seed=first_seed)
    assert callback.scheduler.seed == first_seed
    if step == 20:
        assert callback.report == of_before.report
        assert callback.report.total.residual > 0
    assert_sparse(resumed.model, callback.scheduler)
    assert_same(resumed.model, expected)


def test_two_in_one_trainer_are_refused(tmp_path):
    """The trainer saves their states under one name."""
    pair = [RSTCallback({"*encoder*": 0.9}), RSTCallback({"classifier": 0.5})]
    with pytest.raises(ValueError, match="keeps the state of one RSTCallback: give one, with a mapping"):
        trainer_of(tmp_path, pair).train()


def test_a_callback_used_for_a_second_model(tmp_path):
    callback = RSTCallback(**TICKET)
    trainer_of(tmp_path, [callback]).train()
    trainer = trainer_of(tmp_path, [callback])
    trainer.train()
    assert_sparse(trainer.model, callback.scheduler)
    assert_same(trainer.model, plain_loop()[0])


def test_resumes_a_checkpoint_without_a_callback(tmp_path):
    trainer_of(tmp_path, [], save_strategy="steps", save_steps=5, max_steps=5).train()
    callback = RSTCallback(**TICKET, steps=10)
    trainer = trainer_of(tmp_path, [callback], save_strategy="steps", save_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert_sparse(trainer.model, callback.scheduler)
    saved = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["RSTCallback"]["attributes"]["saved_scheduler"]["ticks"] == 10


class Reporter(transformers.TrainerCallback):
    """In place of TensorBoard's."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs, **unused):
        self.rows.append(dict(logs))


def test_logs_with_the_loss(tmp_path, capsys):
    callback, reporter = RSTCallback(**TICKET), Reporter()
    trainer = trainer_of(tmp_path, [reporter])
    trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in history] == [4, 8, 12, 16, 20, 24]
    assert [row["rst/penalty"] for row in history] == pytest.approx([5 / 3, 10 / 3, 5, 0, 0, 0])
    assert [row["rst/sparsity"] for row in history] == pytest.approx([0] * 2 + [0.8] * 4, abs=1e-3)
    residuals = [row["rst/residual"] for row in history]
    assert residuals[0] > residuals[1] > residuals[2] == residuals[5] == 0
    names = {"rst/penalty", "rst/sparsity", "rst/residual"}
    assert [names <= row.keys() for row in reporter.rows] == ["loss" in row for row in reporter.rows]
    assert "rst/penalty" in capsys.readouterr().out


def test_the_best_model_is_masked_even_if_it_is_from_the_transformation(tmp_path):
    """The best weights are dense ones of step 4."""
    callback = RSTCallback(**TICKET)
    trainer = trainer_of(
        tmp_path,
        [callback],
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,  # the first is the best: the penalty is high
    )
    with pytest.warns(UserWarning, match=r"the best model was loaded, which is from before .* \(eval_delay\)"):
        trainer.train()
    assert trainer.state.best_global_step < UPDATES // 2
    assert_sparse(trainer.model, callback.scheduler)


RANKS = """
import gc, sys, torch, warnings

warnings.simplefilter("ignore")
torch.set_num_threads(1)
from test_callbacks_transformers import TICKET, UPDATES, trainer_of
from torch_dual_ticket.callbacks.transformers import RSTCallback

callback = RSTCallback(**{**TICKET, "seed": None})  # drawn, and agreed on by the ranks
trainer = trainer_of(sys.argv[1], [callback], max_steps=UPDATES // 2, ddp_backend="gloo")
trainer.model_accepts_loss_kwargs = False
assert trainer.args.world_size == 2
trainer.train()
assert callback.scheduler.phase == "finetune"
if trainer.args.process_index == 0:
    torch.save([callback.scheduler.seed, trainer.model.state_dict()], f"{sys.argv[1]}/end.pt")
torch.distributed.barrier()  # a rank that ends while the other still needs its connection can abort
del callback, trainer  # they refer to the group
gc.collect()
torch.distributed.destroy_process_group()
"""


def test_two_ranks_agree_with_one_process(tmp_path):
    """Every second batch goes to each rank: together they are the accumulated batches of one process."""
    (tmp_path / "ranks.py").write_text(RANKS)
    folders = [str(Path(__file__).parents[level]) for level in range(3)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, tmp_path / "ranks.py", tmp_path], env=environment, check=True, timeout=300, capture_output=True
    )
    seed, state = torch.load(tmp_path / "end.pt")
    expected, _ = plain_loop(UPDATES // 2, accumulate=2, steps=UPDATES // 4, seed=seed)
    trained = network()
    trained.load_state_dict(state)
    assert_same(trained, expected)


# ---------------------------------------------------------------------- errors and warnings


def test_bad_arguments_are_refused_at_construction():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparcity'"):
        RSTCallback(sparcity=0.9)
    with pytest.raises(ValueError, match="and steps=10 both say"):
        RSTCallback(finalize_at=0.5, steps=10)
    with pytest.raises(TypeError, match="exclude is a sequence of name patterns"):
        RSTCallback(exclude="classifier")


def test_restoring_settings_that_json_cannot_hold_is_refused(tmp_path):
    callback = RSTCallback(**TICKET, schedule=lambda progress: progress)
    with pytest.raises(ValueError, match="rebuild this RSTCallback without its schedule"):
        trainer_of(tmp_path, [callback], restore_callback_states_from_checkpoint=True)
    trainer_of(tmp_path, [callback], save_strategy="steps", save_steps=4).train()
    assert (tmp_path / "checkpoint-24" / "trainer_state.json").exists()


def test_a_schedule_longer_than_the_training_warns(tmp_path):
    with pytest.warns(UserWarning, match="takes 48 updates|ended at 50%") as warned:
        trainer_of(tmp_path, [RSTCallback(**TICKET, steps=48)]).train()
    messages = " ".join(str(warning.message) for warning in warned)
    assert "takes 48 updates, but this training makes 24" in messages
    assert "ended at 50% of the transformation" in messages


WITHOUT = """
import importlib.util

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "transformers" else find_spec(name, package)
import torch_dual_ticket.callbacks.transformers
"""


def test_says_how_to_install_transformers():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 1
    assert "ImportError: torch_dual_ticket.callbacks.transformers needs Transformers: pip install" in result.stderr

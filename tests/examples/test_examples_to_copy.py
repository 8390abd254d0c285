"""The short examples, which people copy from: each runs to its end, and the model is as sparse and good as it says."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import needs_fsdp2

from torch_dual_ticket.export import read_ticket

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DIGITS_LAYERS = {"0.weight": 19_200, "2.weight": 30_000}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example as a program would, in its own folder; returns its variables and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        variables = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
        assert_ends_as_it_says(name, printed)
        return variables, printed

    return run


def assert_ends_as_it_says(name, printed):
    promised = re.search("^It ends with: (.*)$", (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.sub(r"\d[\d.]*", "…", promised[1]) in re.sub(r"\d[\d.]*", "…", printed).splitlines()


def accuracy_in(printed):
    return float(re.findall(r"([\d.]+)% of (?:the test|1,000)", printed)[-1])


def assert_pruned(state, sizes, sparsity):
    for name, size in sizes.items():
        assert int((state[name] == 0).sum()) == round(sparsity * size), name


@pytest.mark.parametrize("name", ["amp_accumulation_clipping", "accelerate_loop"])
def test_loop(run, name):
    if name == "accelerate_loop":
        pytest.importorskip("accelerate", reason="needs Accelerate: pip install accelerate")
    variables, printed = run(name)
    assert variables["rst"].phase == "finetune"
    assert_pruned(variables["model"].state_dict(), DIGITS_LAYERS, 0.8)
    assert accuracy_in(printed) > 88


@pytest.mark.parametrize("saves_before", [10, 45])  # in the transformation, and in the finetuning
def test_training_that_is_stopped_ends_like_one_that_is_not(run, monkeypatch, saves_before):
    save, saved = torch.save, []

    def save_until_stopped(state, path):
        if "best" not in str(path):
            saved.append(path)
        if len(saved) == saves_before:
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_stopped)
        with pytest.raises(KeyboardInterrupt):
            run("train", "stopped")
    resumed, printed = run("train", "stopped")
    assert "resumed: RSTScheduler(" + ("transform" if saves_before == 10 else "finetune") in printed
    assert_pruned(resumed["model"].state_dict(), DIGITS_LAYERS, 0.8)
    assert accuracy_in(printed) > 88

    never_stopped, printed = run("train", "whole")
    assert "resumed" not in printed
    assert never_stopped["best"] == resumed["best"]
    for name, value in never_stopped["model"].state_dict().items():
        torch.testing.assert_close(resumed["model"].state_dict()[name], value, rtol=0, atol=0)


def test_the_best_checkpoint_is_sparse(run, tmp_path):
    variables, _ = run("train", "run")
    assert_pruned(torch.load(tmp_path / "run-best.pt"), DIGITS_LAYERS, 0.8)
    last = torch.load(tmp_path / "run.pt")
    assert last["epoch"] == variables["EPOCHS"]
    assert 0.8 < variables["best"] <= 1


def test_shrink(run):
    pytest.importorskip("torch_pruning", reason="needs Torch-Pruning: pip install torch-pruning")
    variables, printed = run("shrink_digits")
    assert_pruned(variables["model"].state_dict(), {"2.weight": 18_432, "6.weight": 131_072}, 0.5)
    assert variables["small"][2].out_channels < 40
    assert accuracy_in(printed) > 88


def test_two_to_four(run):
    variables, printed = run("two_to_four")
    sizes = {name: variables["model"].state_dict()[name].numel() for name in ("0.weight", "2.weight")}
    assert_pruned(variables["model"].state_dict(), sizes, 0.5)
    assert accuracy_in(printed) > 88
    assert ("no CUDA device" in printed) != torch.cuda.is_available()


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # of torch, used by Lightning
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_lightning(run, tmp_path):
    pytest.importorskip("lightning", reason="needs Lightning: pip install lightning")
    variables, printed = run("lightning_trainer")
    assert_pruned(variables["module"].net.state_dict(), DIGITS_LAYERS, 0.8)
    assert variables["trainer"].callback_metrics["accuracy"] > 0.88
    assert "net.2.weight  24,000" in printed
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=False)["callbacks"]["RSTCallback"]["phase"] == "finetune"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_huggingface(run):
    pytest.importorskip("transformers", reason="needs Transformers: pip install 'transformers[torch]'")
    pytest.importorskip("accelerate", reason="the Trainer needs Accelerate: pip install accelerate")
    variables, printed = run("huggingface_trainer")
    rst, model = variables["ticket"].scheduler, variables["trainer"].model
    assert len(rst.masks) == 12
    assert_pruned(model.state_dict(), {name: mask.numel() for name, mask in rst.masks.items()}, 0.8)
    assert accuracy_in(printed) > 80


ON_RANK = """
import os, pathlib, runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
names = [thread.read_text() for thread in pathlib.Path("/proc/self/task").glob("*/comm")]
pathlib.Path("left" + os.environ["RANK"]).write_text(str(sum("gloo_runloop" in name for name in names)))
"""


def run_on_ranks(name, tmp_path, threads_left=(0,)):
    """What an example prints; a thread of gloo that is left at the end can abort the rank while Python shuts down."""
    (tmp_path / "on_rank.py").write_text(ON_RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [*launch, str(tmp_path / "on_rank.py"), str(EXAMPLES / f"{name}.py")]
    result = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert {int((tmp_path / f"left{rank}").read_text()) for rank in range(2)} <= set(threads_left)
    assert "still held" not in result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_two_processes(tmp_path, name):
    printed = run_on_ranks(name, tmp_path, threads_left=(0, 2) if name == "fsdp2" else (0,))  # torch keeps its mesh
    assert_pruned(read_ticket(tmp_path / f"{name}.safetensors"), DIGITS_LAYERS, 0.8)
    assert_ends_as_it_says(name, printed)
    assert accuracy_in(printed) > 88
    assert printed.count("2.weight") == 1, "one rank prints"


def test_kept_weights_on_two_processes(tmp_path):
    printed = run_on_ranks("kept_transformer", tmp_path)
    before, after = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{6,}(?= )", printed)[-2:])
    assert 0.1 < after / before < 0.2
    assert accuracy_in(printed) > 80

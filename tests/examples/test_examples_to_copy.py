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
SHORT = [
    "accelerate_loop",
    "amp_accumulation_clipping",
    "ddp",
    "fsdp2",
    "huggingface_trainer",
    "kept_transformer",
    "lightning_trainer",
    "resume",
    "transformer_adamw",
    "two_to_four",
]
DIGITS_LAYERS = {"0.weight": 19_200, "2.weight": 30_000}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example as a program would, in its own folder; returns its variables and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        variables = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return variables, capsys.readouterr().out

    return run


def accuracy_in(printed):
    return float(re.findall(r"([\d.]+)% of (?:the test|1,000)", printed)[-1])


def assert_pruned(state, sizes, sparsity):
    for name, size in sizes.items():
        assert int((state[name] == 0).sum()) == round(sparsity * size), name


def test_they_are_short():
    lengths = {name: len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in SHORT}
    assert [name for name, length in lengths.items() if length >= 80] == []


@pytest.mark.parametrize("name", ["amp_accumulation_clipping", "accelerate_loop"])
def test_loop(run, name):
    if name == "accelerate_loop":
        pytest.importorskip("accelerate", reason="needs Accelerate: pip install accelerate")
    variables, printed = run(name)
    assert variables["rst"].phase == "finetune"
    assert_pruned(variables["model"].state_dict(), DIGITS_LAYERS, 0.8)
    assert accuracy_in(printed) > 88


def test_resumed_run_ends_like_one_that_was_never_stopped(run):
    stopped, printed = run("resume", "checkpoint.pt")
    assert stopped["rst"].phase == "transform"
    assert "saved: RSTScheduler(transform: 50%" in printed
    seed = stopped["rst"].seed
    del stopped
    resumed, printed = run("resume", "checkpoint.pt")
    assert "resumed: RSTScheduler(transform: 50%" in printed
    assert resumed["rst"].seed == seed
    assert_pruned(resumed["model"].state_dict(), DIGITS_LAYERS, 0.8)
    assert accuracy_in(printed) > 88

    code = (EXAMPLES / "resume.py").read_text(encoding="utf-8").replace("epoch == STOP_AFTER", "False")
    never_stopped = {}
    sys.argv[1] = "no_such_file.pt"
    exec(compile(code, "resume.py", "exec"), never_stopped)
    for name, value in never_stopped["model"].state_dict().items():
        torch.testing.assert_close(resumed["model"].state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of SequentialLR about torch's own schedules
def test_transformer(run):
    variables, printed = run("transformer_adamw")
    sizes = {name: parameter.numel() for name, parameter in variables["model"].named_parameters() if "layers" in name}
    sizes = {name: size for name, size in sizes.items() if re.search(r"(linear\d\.|proj[._])weight$", name)}
    assert len(sizes) == 8
    assert_pruned(variables["model"].state_dict(), sizes, 0.8)
    assert accuracy_in(printed) > 90


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


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_two_processes(tmp_path, name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, str(EXAMPLES / f"{name}.py")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert_pruned(read_ticket(tmp_path / f"{name}.safetensors"), DIGITS_LAYERS, 0.8)
    assert accuracy_in(result.stdout) > 88
    assert result.stdout.count("2.weight") == 1, "one rank prints"
    assert "still held" not in result.stderr


def test_kept_weights_on_two_processes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [*launch, str(EXAMPLES / "kept_transformer.py")]
    result = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    before, after = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{6,}(?= )", result.stdout)[-2:])
    assert 0.1 < after / before < 0.2
    assert accuracy_in(result.stdout) > 80
    assert "still held" not in result.stderr

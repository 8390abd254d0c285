"""Tickets as files: every bit comes back, wrong files are refused, and a model is loaded completely or not at all."""

import base64
import copy
import json
import os
import pickle
import random
import stat
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import INPUT_SHAPES, cnn, finalize_quietly, loss_of, make, mlp, transformer
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_dual_ticket import RSTScheduler, release
from torch_dual_ticket.baselines import hold
from torch_dual_ticket.export import checksum, load_ticket, read_ticket, save_ticket
from torch_dual_ticket.masks.seeded import SeededMask

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
complex_modules_are_meant = pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
pytestmark = pytest.mark.filterwarnings("ignore:pattern='filter' masks")  # of the last layer, too
PATTERNS = [("unstructured", 0.9), ("2:4", None), ("1:4", None), ("block:4x2", 0.5), ("filter", 0.5), ("channel", 0.5)]


def convolutional():
    """Shapes that every pattern divides, both orders of the dimensions, and buffers of two dtypes."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(16, 12)
    )


def finalized(model, sparsity=None, *, fill=True, layout="plain", **arguments):
    """A scheduler finalized after one update, and its model full of random bits."""
    rst = RSTScheduler(model, sparsity, steps=1, seed=7, **arguments)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    rst.step()
    finalize_quietly(rst)
    if layout == "prune":
        rst.to_prune()
    if fill:
        fill_with_bits(model, rst)
    return rst


def bits(tensor):
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).view(torch.uint8)


@torch.no_grad()
def fill_with_bits(model, rst=None, seed=3):
    """Any bits: NaNs of every payload, infinities, -0.0, denormals. The masked weights of a scheduler are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not name.endswith("_mask"):
            noise = torch.randint(256, bits(tensor).shape, dtype=torch.uint8, generator=generator)
            real = tensor.real.dtype if tensor.is_complex() else tensor.dtype
            noise = noise.view(real).clone()
            if real.is_floating_point and noise.numel() > 3:
                noise[:3] = torch.tensor([-0.0, float("nan"), float("-inf")], dtype=real)
            tensor.copy_(
                (torch.view_as_complex(noise.view(-1, 2)) if tensor.is_complex() else noise).view(tensor.shape)
            )
    if rst is not None:
        state = model.state_dict()
        for name, kept in rst.masks.items():
            state[name if name in state else f"{name}_orig"].masked_fill_(~kept, 0)


def assert_same_bits(mine, theirs):
    """Two models or state_dicts."""
    mine, theirs = (x.state_dict() if isinstance(x, nn.Module) else x for x in (mine, theirs))
    assert list(mine) == list(theirs)
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert mine[name].shape == theirs[name].shape, name
        assert torch.equal(bits(mine[name]), bits(theirs[name])), name


def another(model):
    """The same structure, other values."""
    model = copy.deepcopy(model)
    fill_with_bits(model, seed=99)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ticket.safetensors"


# ---------------------------------------------------------------------- round trips


@complex_modules_are_meant
@pytest.mark.filterwarnings("ignore:pattern='filter' masks 6 of the 12 outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_every_bit_comes_back(pattern, sparsity, dtype, path):
    model = make(convolutional, dtype=dtype)
    rst = finalized(model, sparsity, pattern=pattern)
    zeros = {name: int((model.get_parameter(name) == 0).sum()) for name in rst.masks}
    save_ticket(rst, path)
    other = make(convolutional, seed=1, dtype=dtype)
    pointers = [tensor.data_ptr() for tensor in other.state_dict().values()]
    load_ticket(path, other)
    assert_same_bits(other, model)
    assert [tensor.data_ptr() for tensor in other.state_dict().values()] == pointers
    assert all(zeros[name] >= mask.numel() - mask.sum() > 0 for name, mask in rst.masks.items())
    assert_same_bits(read_ticket(path), model)


@complex_modules_are_meant
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    name=st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1).filter(str.isprintable),
    dtype=st.sampled_from([*DTYPES, torch.complex32]),
    seed=st.integers(),
    sparsity=st.floats(0.3, 0.99),
)
@example(sizes=[9, 6], name="one kept weight, a NaN", dtype=torch.float16, seed=237, sparsity=0.988)
@pytest.mark.filterwarnings("ignore:.*rounds to all")
def test_any_shapes_names_and_seeds(sizes, name, dtype, seed, sparsity, path):
    layers = {f"{name}{i}": nn.Linear(a, b) for i, (a, b) in enumerate(pairwise(sizes))}
    model = nn.ModuleDict(layers | {"zz": nn.Linear(10, 10)}).to(dtype)
    rst = RSTScheduler(model, sparsity, steps=1, seed=seed)
    rst.load_state_dict(rst.state_dict() | {"phase": "finetune"})
    fill_with_bits(model, rst)
    save_ticket(rst, path)
    other = another(model)
    assert load_ticket(path, other) == rst.state_dict()
    assert_same_bits(other, model)


@pytest.mark.parametrize("build", [mlp, cnn, transformer], ids=lambda build: build.__name__)
def test_training_resumed_from_a_file_equals_training_without_interruption(build, path):
    def train(model, indices):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-3)
        for index in indices:
            optimizer.zero_grad()
            loss_of(model, index, INPUT_SHAPES[build]).backward()
            optimizer.step()
            rst.step()

    model = make(build)
    rst = RSTScheduler(model, 0.7, steps=5, seed=4)
    train(model, range(5))
    finalize_quietly(rst)
    train(model, range(5, 10))
    save_ticket(rst, path)
    other = make(build, seed=1)
    resumed = RSTScheduler(other, 0.7, steps=5)
    resumed.load_state_dict(load_ticket(path, other))
    assert (resumed.phase, resumed.seed, resumed.sparsity) == ("finetune", 4, rst.sparsity)
    train(model, range(10, 15))
    train(other, range(10, 15))
    assert_same_bits(other, model)
    assert all((other.get_parameter(name)[~kept] == 0).all() for name, kept in rst.masks.items())


def test_conversion_to_and_from_dense_state_dicts(path, tmp_path):
    model = make(cnn)
    rst = finalized(model, 0.8, fill=False)
    save_ticket(rst, path)
    dense = read_ticket(path)
    assert all(tensor.device.type == "cpu" for tensor in dense.values())
    torch.save(dense, tmp_path / "dense.pt")
    other = make(cnn, seed=1)
    other.load_state_dict(torch.load(tmp_path / "dense.pt"))
    assert_same_bits(other, model)
    # Back: an ordinary checkpoint of the model and the scheduler's state.
    again = RSTScheduler(other, 0.8, steps=1)
    again.load_state_dict(rst.state_dict())
    save_ticket(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "filter", "1:10"])
def test_a_tenth_of_the_weights_is_a_tenth_of_the_file(pattern, dtype, path):
    from safetensors.torch import save

    model = nn.Sequential(*[nn.Linear(640, 640) for _ in range(4)], nn.LayerNorm(640)).to(dtype)
    save_ticket(finalized(model, None if ":" in pattern and "x" not in pattern else 0.9, pattern=pattern), path)
    assert path.stat().st_size <= 0.105 * len(save(model.state_dict()))


def test_the_file_is_an_ordinary_safetensors_file(path):
    from safetensors import safe_open

    model = make(mlp, dtype=torch.float32)
    rst = finalized(model, 0.75)
    save_ticket(rst, path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(model.state_dict())
        description = json.loads(file.metadata()["torch_dual_ticket"])
        for name, kept in rst.masks.items():
            assert torch.equal(bits(file.get_tensor(name)), bits(model.get_parameter(name)[kept]))
    assert description["masks"]["0.weight"].items() >= {"seed": 7, "shape": [20, 12], "pruned": 180}.items()
    assert description["scheduler"] == rst.state_dict()


def test_saving_twice_gives_identical_files(path, tmp_path):
    rst = finalized(make(cnn), 0.75)
    save_ticket(rst, path)
    for copied in (rst, copy.deepcopy(rst)):
        save_ticket(copied, str(tmp_path / "again"))
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_nothing_is_pickled(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickled")

    model = make(mlp)
    rst = finalized(model, 0.75)
    other = another(model)
    for module, names in {pickle: ("dump", "dumps", "load", "loads"), torch: ("save", "load")}.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    save_ticket(rst, path)
    load_ticket(path, other)
    assert_same_bits(other, model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_cuda_and_cpu_write_and_read_the_same(pattern, sparsity, path, tmp_path):
    model = make(convolutional)
    rst = finalized(model, sparsity, pattern=pattern)
    save_ticket(rst, path)
    on_cuda = another(model).cuda()
    resumed = RSTScheduler(on_cuda, sparsity, steps=1, pattern=pattern)
    resumed.load_state_dict(load_ticket(path, on_cuda))
    assert_same_bits(on_cuda.cpu(), model)
    on_cuda.cuda()
    save_ticket(resumed, tmp_path / "cuda")
    assert (tmp_path / "cuda").read_bytes() == path.read_bytes()


# ---------------------------------------------------------------------- layouts, tied weights, wrappers


def test_the_layout_of_torch_prune(path):
    model = make(convolutional)
    plain_model = copy.deepcopy(model)
    rst = finalized(model, 0.75, layout="prune")
    save_ticket(rst, path)
    tensors, description = checksum.read(path)
    assert "0.weight_mask" not in tensors  # it is drawn from the seed
    assert description["state_dict"]["0.weight_mask"] == {
        "dtype": "float64",
        "shape": [8, 4, 3, 3],
        "equals_mask": "0.weight",
    }
    other = make(convolutional, seed=1)
    finalized(other, 0.3, layout="prune")
    load_ticket(path, other)
    assert_same_bits(other, model)
    # A model that was never managed gets the layout from torch's own function.
    with pytest.raises(ValueError, match=r"0\.weight is in the model, but not in the file.*prune\.identity"):
        load_ticket(path, plain_model)
    for layer in (plain_model[0], plain_model[2], plain_model[4]):
        prune.identity(layer, "weight")
    load_ticket(path, plain_model)
    assert {*plain_model.state_dict()} == {*model.state_dict()}
    assert_same_bits({name: plain_model.state_dict()[name] for name in model.state_dict()}, model)


def test_the_layout_of_torch_prune_with_more_pruned_and_momentum_under_the_mask(path):
    def pruned_twice(seed):
        model = make(mlp, seed)
        rst = finalized(model, 0.5, layout="prune", fill=False)
        prune.random_unstructured(model[0], "weight", 0.5)  # in a container, with the ticket's mask
        prune.l1_unstructured(model[2], "bias", 3)
        return model, rst

    (model, rst), (other, _) = pruned_twice(0), pruned_twice(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)  # as momentum moves masked entries of weight_orig: without effect
    save_ticket(rst, path)
    load_ticket(path, other)
    expected = model.state_dict()
    for name, kept in rst.masks.items():
        expected[f"{name}_orig"] = expected[f"{name}_orig"] * kept
    assert_same_bits(other, expected)
    x = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
    # Stock prune made permanent: plain names again.
    for layer, name in ((0, "weight"), (2, "weight"), (2, "bias"), (4, "weight")):
        prune.remove(model[layer], name)
    save_ticket(rst, path)
    assert_same_bits(read_ticket(path), model)


def test_a_stock_mask_that_keeps_what_the_ticket_masks_is_refused(path):
    model = make(mlp)
    rst = finalized(model, 0.5, layout="prune")
    model[2].weight_mask.fill_(1)
    with pytest.raises(ValueError, match=r"2\.weight_mask: 160 masked entries are not zero"):
        save_ticket(rst, path)


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.embedding = nn.Embedding(4, 8)
        self.decoder = nn.Linear(8, 4)
        self.second = nn.Linear(8, 4)
        if tie:
            self.decoder.weight = self.embedding.weight
            self.second.weight = self.decoder.weight
            self.second.bias = self.decoder.bias
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("same", self.scale if tie else torch.ones(3))
        whole = torch.arange(6.0)
        self.register_buffer("left", whole[:3])  # parts of one memory
        self.register_buffer("right", whole[3:])


def test_tied_weights_are_stored_once_and_stay_tied(path):
    model = Tied()
    rst = finalized(model, 0.5, targets=[nn.Linear])
    assert list(rst.masks) == ["encoder.weight", "embedding.weight"]
    save_ticket(rst, path)
    tensors, _ = checksum.read(path)
    assert sorted(tensors) == sorted(
        ["encoder.weight", "encoder.bias", "embedding.weight", "decoder.bias", "scale", "left", "right"]
    )
    dense = read_ticket(path)
    assert dense["second.weight"] is dense["embedding.weight"]
    other = another(model)
    load_ticket(path, other)
    assert other.second.weight is other.embedding.weight
    assert_same_bits(other, model)


@pytest.mark.parametrize("tie", [True, False])
def test_other_ties_are_another_architecture(tie, path):
    model, other = Tied(tie), Tied(not tie)
    save_ticket(finalized(model, 0.5), path)
    before = copy.deepcopy(other.state_dict())
    tie_there = "tied to scale" if tie else "a separate tensor"
    with pytest.raises(ValueError, match=f"does not fit this Tied: same is {tie_there} in the file, .* here"):
        load_ticket(path, other)
    assert_same_bits(other, before)


def parametrized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's older weight_norm is deprecated, and still in use
        older = nn.utils.weight_norm(nn.Linear(8, 6))
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        older,
        nn.utils.spectral_norm(nn.Linear(6, 6)),
    )


def test_parametrized_weights_go_by_their_names_in_the_state_dict(path):
    model = make(parametrized)
    rst = finalized(model, 0.5, fill=False)
    assert "0.parametrizations.weight.original1" in rst.masks
    assert "2.weight_v" in rst.masks
    model(torch.randn(3, 8, dtype=torch.float64))  # the power iterations of spectral_norm
    save_ticket(rst, path)
    other = make(parametrized, seed=1)
    load_ticket(path, other)
    assert_same_bits(other, model)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_names_are_those_of_the_unwrapped_model(path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make(mlp)
    rst = finalized(model, 0.75)
    save_ticket(rst, path)

    inner = make(mlp, seed=1)
    inner[0] = torch.compile(inner[0], backend="eager")
    inner[2] = checkpoint_wrapper(inner[2])
    inner[4] = torch.compile(checkpoint_wrapper(inner[4]), backend="eager")
    other = torch.optim.swa_utils.AveragedModel(torch.compile(inner, backend="eager"))
    load_ticket(path, other)
    _, *loaded = other.state_dict().values()  # the first counts the averaged models
    assert_same_bits(dict(zip(model.state_dict(), loaded, strict=True)), model)
    resumed = RSTScheduler(other, 0.75, steps=1)
    resumed.load_state_dict(rst.state_dict())
    before = path.read_bytes()
    save_ticket(resumed, path)
    assert path.read_bytes() == before


def test_after_remove_and_with_a_detached_layer(path):
    model = make(mlp)
    rst = finalized(model, 0.5, fill=False)
    prune.remove(model[2], "weight")
    with torch.no_grad():
        model[2].weight.add_(1)  # it is dense again, and stored as such
    rst.remove()
    save_ticket(rst, path)
    assert list(checksum.read(path)[1]["masks"]) == ["0.weight", "4.weight"]
    other = another(model)
    load_ticket(path, other)
    assert_same_bits(other, model)
    with torch.no_grad():
        model[0].weight.add_(1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"0\.weight: 120 masked entries are not zero.*rst\.masks\['0\.weight'\]"):
        save_ticket(rst, path)
    assert path.read_bytes() == before


@complex_modules_are_meant
def test_channels_last_and_conjugate_memory(path):
    model = make(convolutional, dtype=torch.complex64).to(memory_format=torch.channels_last)
    rst = finalized(model, 0.75)
    model.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
    assert not model[0].weight.is_contiguous()
    save_ticket(rst, path)
    other = another(model)
    load_ticket(path, other)
    assert other[0].weight.stride() == model[0].weight.stride()
    assert_same_bits(other.state_dict(), {k: v.resolve_conj() for k, v in model.state_dict().items()})


def test_buffers_of_every_dtype(path):
    model = make(mlp)
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn):
        model.register_buffer(str(dtype).partition(".")[2], torch.tensor([0, 1, 1]).to(dtype))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("no_complex", torch.empty(0, dtype=torch.complex128))
    model.register_buffer("scalar", torch.tensor(2 + 1j, dtype=torch.complex128))
    rst = finalized(model, 0.75, fill=False)
    save_ticket(rst, path)
    other = copy.deepcopy(model)
    for buffer in other.buffers():
        buffer.copy_(torch.ones_like(buffer, dtype=torch.float32))
    load_ticket(path, other)
    assert_same_bits(other, model)


# ---------------------------------------------------------------------- what cannot be saved


def test_only_finalized_schedulers_are_saved(path):
    model = make(mlp)
    with pytest.raises(RuntimeError, match=r"call finalize\(\) first"):
        save_ticket(RSTScheduler(model, 0.5, seed=0), path)
    for wrong in (model, str(path)):
        with pytest.raises(TypeError, match=f"takes the RSTScheduler .* got {type(wrong).__name__}"):
            save_ticket(wrong, path)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module .* got PosixPath"):
        load_ticket(model, path)
    assert not path.exists()


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state): ...


def with_buffer(tensor):
    model = make(mlp)
    model.register_buffer("odd", tensor)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(WithExtraState(4, 4)), r"0\._extra_state is a dict \(extra state\)"),
        (lambda: with_buffer(torch.eye(3).to_sparse()), r"odd is not an ordinary dense tensor \(torch\.sparse_coo"),
        (lambda: with_buffer(torch.empty(3, dtype=torch.bits8)), r"odd has dtype torch\.bits8"),
        (lambda: with_buffer(torch.zeros(3, device="meta")), r"odd is on the meta device.*to_empty"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()), r"1\.weight has no shape yet"),
    ],
)
def test_what_a_file_cannot_hold_is_named(build, message, path):
    model = build()
    if isinstance(model[-1], nn.LazyBatchNorm1d):
        rst = RSTScheduler(model, 0.5, steps=1, seed=0)
        rst.load_state_dict(rst.state_dict() | {"phase": "finetune"})
    else:
        rst = finalized(model, 0.5, fill=False)
    with pytest.raises(ValueError, match=message):
        save_ticket(rst, path)
    assert not path.exists()


def test_a_changed_structure_is_named(path):
    model = make(mlp)
    rst = finalized(model, 0.5)
    model[2] = nn.Identity()
    with pytest.raises(ValueError, match=r"2\.weight has a mask, but is not in the model's state_dict any more"):
        save_ticket(rst, path)
    model[2] = nn.Linear(20, 17)
    with pytest.raises(ValueError, match=r"2\.weight has shape \(17, 20\), and its mask \(16, 20\)"):
        save_ticket(rst, path)


# ---------------------------------------------------------------------- all or nothing


def test_an_interrupted_save_leaves_the_earlier_file(path, monkeypatch):
    rst = finalized(make(mlp), 0.75)
    path.write_bytes(b"precious")

    def fail(*args):
        raise OSError("disk full")

    for broken in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, fail)
            with pytest.raises(OSError, match="disk full"):
                save_ticket(rst, path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        assert path.read_bytes() == b"precious"
    save_ticket(rst, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    read_ticket(path)


def test_links_stay_links_and_permissions_are_the_usual_ones(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "usual").touch()
    save_ticket(finalized(make(mlp), 0.75), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_paths_that_do_not_exist(tmp_path):
    model = make(mlp)
    with pytest.raises(FileNotFoundError):
        save_ticket(finalized(model, 0.75), tmp_path / "nowhere" / "ticket")
    with pytest.raises(FileNotFoundError):
        load_ticket(tmp_path / "ticket", model)


def test_a_loading_that_fails_midway_is_undone(path):
    class FailsToLoad(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            super()._load_from_state_dict(state_dict, prefix, *args)
            if getattr(self, "fails", False):
                raise RuntimeError("not today")

    model = make(lambda: nn.Sequential(nn.Linear(4, 4), FailsToLoad(4, 4)))
    rst = finalized(model, 0.5)
    save_ticket(rst, path)
    other = another(model)
    other[1].fails = True
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"the model is as it was: not today"):
        load_ticket(path, other)
    assert_same_bits(other, before)
    # A buffer that torch cannot write to: all its elements share one number in memory.
    model.register_buffer("flat", torch.zeros(4))
    save_ticket(rst, path)
    other[1].fails = False
    other.register_buffer("flat", torch.zeros(1).expand(4))
    before = {"flat": other.flat, **before}
    with pytest.raises(ValueError, match=r"the model is as it was"):
        load_ticket(path, other)
    assert_same_bits(other, before)


def test_other_masks_in_force_are_refused_before_they_cut_what_is_loaded(path):
    model, other = make(mlp), make(mlp)
    rst = finalized(model, 0.5)
    save_ticket(rst, path)
    other_ticket = RSTScheduler(other, 0.5, steps=1, seed=8)
    load_ticket(path, other)  # not in force yet
    assert_same_bits(other, model)
    masks = dict(other_ticket.masks)
    release(other)
    hold(other, masks)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"weights of 0\.weight to zero which the file keeps.*release\(model\) first"):
        load_ticket(path, other)
    assert_same_bits(other, before)
    release(other)
    load_ticket(path, other)
    assert_same_bits(other, model)
    hold(other, {"0.weight": rst.masks["0.weight"]})  # it keeps all that the file does
    load_ticket(path, other)
    assert_same_bits(other, model)


# ---------------------------------------------------------------------- files of another architecture


def changed(change):
    model = make(cnn)
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "3", nn.Identity()), r"3\.weight is in the file, but not in the model"),
        (lambda m: m.append(nn.Linear(5, 5)), r"9\.weight is in the model, but not in the file"),
        (lambda m: setattr(m[8], "bias", None), r"8\.bias is in the file, but not in the model"),
        (lambda m: setattr(m, "8", nn.Linear(32, 6)), r"8\.weight has shape \(5, 32\) in the file, \(6, 32\) here"),
        (lambda m: m.float(), r"0\.weight has dtype torch\.float64 in the file, torch\.float32 here\. Convert"),
        (lambda m: m[4].half(), r"4\.weight has dtype torch\.float64 in the file, torch\.float16 here"),
        (lambda m: m.register_buffer("steps", torch.zeros(2)), r"steps is in the model, but not in the file"),
        (lambda m: m.to("meta"), r"0\.weight is on the meta device"),
        (lambda m: m.append(nn.LazyLinear(3)), r"9\.weight has no shape yet"),
        (lambda m: parametrizations.weight_norm(m[8]), r"8\.parametrizations\.weight\.original0 is in the model"),
        (lambda m: prune.identity(m[8], "weight"), r"8\.weight_orig is in the model.*prune\.remove"),
    ],
)
def test_the_first_difference_is_named_and_the_model_left_alone(change, message, path):
    save_ticket(finalized(make(cnn), 0.75), path)
    model = changed(change)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not is_lazy(tensor)}
    with pytest.raises(ValueError, match=message):
        load_ticket(path, model)
    after = {name: tensor for name, tensor in model.state_dict().items() if not is_lazy(tensor)}
    if not any(tensor.is_meta for tensor in after.values()):
        assert_same_bits(after, before)


def is_lazy(tensor):
    return nn.parameter.is_lazy(tensor)


# ---------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a small ticket, and of another one, and the model of the first."""
    path = tmp_path_factory.mktemp("tickets") / "ticket"
    model = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), dtype=torch.float32)
    rst = finalized(model, 0.5)
    save_ticket(rst, path)
    first = path.read_bytes()
    fill_with_bits(model, rst, seed=5)
    save_ticket(rst, path)
    return first, path.read_bytes(), model


def corruptions(data, other):
    size = len(data)
    positions = st.integers(0, size - 1)
    lengths = st.integers(1, 64)
    header = 8 + int.from_bytes(data[:8], "little")
    return st.one_of(
        st.tuples(st.one_of(positions, st.integers(0, header)), st.integers(0, 7)).map(
            lambda a: data[: a[0]] + bytes([data[a[0]] ^ 1 << a[1]]) + data[a[0] + 1 :]
        ),
        st.tuples(positions, st.binary(min_size=1, max_size=64)).map(
            lambda a: (data[: a[0]] + a[1] + data[a[0] + len(a[1]) :])[:size]
        ),
        positions.map(lambda a: data[:a]),
        st.binary(min_size=1, max_size=64).map(lambda a: data + a),
        st.tuples(positions, st.binary(min_size=1, max_size=64)).map(lambda a: data[: a[0]] + a[1] + data[a[0] :]),
        st.tuples(positions, lengths).map(lambda a: data[: a[0]] + data[a[0] + a[1] :]),
        st.tuples(positions, lengths).map(lambda a: data[: a[0]] + bytes(a[1]) + data[a[0] + a[1] :]),
        st.tuples(positions, positions).map(lambda a: swap(data, *sorted(a))),
        positions.map(lambda a: data[:a] + other[a:]),
        st.tuples(positions, lengths).map(lambda a: data[: a[0]] + other[a[0] : a[0] + a[1]] + data[a[0] + a[1] :]),
        st.binary(max_size=200),
    ).filter(lambda corrupted: corrupted not in (data, other))


def swap(data, a, b):
    return data[:a] + data[b : b + 8] + data[a + 8 : b] + data[a : a + 8] + data[b + 8 :] if b - a >= 8 else data


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_corrupted_files_are_refused(choice, saved, path):
    data, other, model = saved
    path.write_bytes(choice.draw(corruptions(data, other)))
    before = copy.deepcopy(model.state_dict())
    for read in (read_ticket, lambda path: load_ticket(path, model)):
        with pytest.raises(ValueError, match=r"ticket\.safetensors (is|cannot)"):
            read(path)
    assert_same_bits(model, before)


def test_a_changed_bit_in_any_byte_is_noticed(saved, path):
    data = saved[0]
    bit = random.Random(0)
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit.randrange(8)]) + data[position + 1 :])
        with pytest.raises(ValueError):
            checksum.read(path)


def test_errors_of_damaged_files_say_what_to_do(saved, path):
    data, _, _ = saved
    start = 8 + int.from_bytes(data[:8], "little")

    def refused(corrupted, message):
        path.write_bytes(corrupted)
        with pytest.raises(ValueError, match=message):
            read_ticket(path)

    for corrupted in (
        data[:-1] + bytes([data[-1] ^ 4]),
        data[:-3],
        data + b"\0",
        data.replace(b'pruned\\": 15', b'pruned\\": 14'),
        data[:start].replace(b"  ", b"\t ") + data[start:],
    ):
        assert corrupted != data
        refused(corrupted, rf"is damaged: its checksum .* the {len(corrupted):,} bytes .* Copy or save it again")
    refused(data[:200], r"not a ticket, or its header is damaged or cut off \(200 bytes are there\)")
    refused(b"", r"\(0 bytes are there\)")
    refused(b"PK\x03\x04" + bytes(100), r"is not a ticket, but looks like a file for torch\.load\(\)")
    refused((4).to_bytes(8, "little") + b"[  ]", "not a ticket, or its header is damaged")
    refused((10**5).to_bytes(8, "little") + b"[" * 10**5, "not a ticket, or its header is damaged")


# Written by the first release, which stored a CRC-32 of each tensor after the SHA-256.
WITH_CRCS = (
    "c-oCqQEuBX3=Oag><ERv{Sn!+Bj;z^PcIP%1}#ysQAZXexkF(X=*@byNpd=%?E=hzK#=0&d!(uF-*)L+NZVe~g9Hz4OO6ZilNEg{XBb;Qh$r;qN"
    "S1~;gs~yVhlVIlIqNz}Ygut6p#W9$qT)Gag3+$4QB{%)DuJ^Kv1D8wpw4Mk?payW1C?Bsm>04V9R$;mEL43)>xM~33L1SUdX)2sHb$1O_feaR-"
    "adM>2@POtP|HDIVpzfGFkYD+9Nv@<8vU$sV|0iz#t+fCg4@aks^2(VdcQ$<RdPVgm5{V3E8dVbrdu?VO)01IdLO@hV$pEDNqNsnLV7SMe9E&2c2"
    "1&gkeP5Sx!^roy+LQ~yq$%gE#7A5Eof&Zw;}#^9@@R2HFnVVn@QrGkHeFL@c-&S`WN#)z;Oa!<acF1q490^^0CE4(GB4KzutLW*MLi?xRVJI_VB"
    "UDNwy`DV@S(L+S^GfhdyMU_8AZV<3@cS$-W|ama{+`p2UxE-gdj!XnzJ9&hFPAC9C(N"
)


def test_files_of_the_first_release_are_read_and_checked(path):
    data = zlib.decompress(base64.b85decode(WITH_CRCS))
    path.write_bytes(data)
    expected = {"weight": torch.tensor([[1.0, 2, 0, 4], [0, 0, 0, 8]]), "bias": torch.tensor([0.5, -0.5])}
    assert_same_bits(read_ticket(path), expected)
    model = nn.Linear(4, 2)
    rst = RSTScheduler(model, 0.5, steps=1)
    rst.load_state_dict(load_ticket(path, model))
    assert_same_bits(model, expected)
    assert (rst.seed, rst.phase) == (7, "finetune")
    assert torch.equal(rst.masks["weight"], model.weight != 0)
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError):
            read_ticket(path)


def test_other_safetensors_files_are_refused(path):
    from safetensors.torch import save_file

    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.ones(3)}, path, metadata)
        with pytest.raises(ValueError, match="is a safetensors file, but not a ticket of torch_dual_ticket"):
            read_ticket(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.update(version=2), "its version is 2"),
        (lambda d, t: d["masks"]["0.weight"].update(seed=8), "another fingerprint"),
        (lambda d, t: d["masks"]["0.weight"].update(pruned="x"), "TypeError"),
        (lambda d, t: d["masks"]["0.weight"].update(pattern="3:2"), "unknown pattern"),
        (lambda d, t: d["masks"].pop("2.weight"), "2.weight"),
        (lambda d, t: d["state_dict"].pop("2.bias"), "2.bias is stored but not described"),
        (lambda d, t: d["state_dict"]["2.bias"].update(dtype="load"), "AttributeError"),
        (lambda d, t: d["state_dict"]["2.bias"].update(dtype="float64"), "stored as torch.float32"),
        (lambda d, t: d["state_dict"]["2.bias"].update(shape=[3]), "2.bias is stored as"),
        (lambda d, t: d["state_dict"]["0.weight"].update(shape=[6, 5]), "and its mask"),
        (lambda d, t: d["state_dict"].update(tied={"same_as": "nothing"}), "KeyError"),
        (lambda d, t: d.pop("scheduler"), "KeyError"),
        (lambda d, t: t.update({"0.weight": t["0.weight"][:1]}), "0.weight is stored as"),
        (lambda d, t: t.pop("2.bias"), "2.bias"),
        (lambda d, t: t.update(more=torch.ones(1)), "more is stored but not described"),
    ],
)
def test_a_valid_checksum_over_inconsistent_contents_is_refused(change, message, saved, path):
    path.write_bytes(saved[0])
    tensors, description = checksum.read(path)
    del description["seal"]
    change(description, tensors)
    checksum.write(path, {name: tensor.clone() for name, tensor in tensors.items()}, description)
    with pytest.raises(ValueError, match="is not a ticket that this release can read") as error:
        read_ticket(path)
    assert message in str(error.value)


def test_the_default_device_does_not_matter(tmp_path):
    """As ``torch.set_default_device("cuda")`` makes new tensors elsewhere; nothing can be read from "meta"."""
    model = make(mlp)
    with torch.device("meta"):
        rst = RSTScheduler(model, 0.8, steps=1)
    loss_of(model, 0, INPUT_SHAPES[mlp]).backward()
    with torch.device("meta"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        rst.step()
        finalize_quietly(rst)
        save_ticket(rst, tmp_path / "ticket")
        found = read_ticket(tmp_path / "ticket")
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value)


# ---------------------------------------------------------------------- without safetensors


WITHOUT = """
import sys
sys.modules["safetensors"] = None
import torch_dual_ticket.export
assert not any(name.startswith("safetensors.") for name in sys.modules)
for call in (torch_dual_ticket.export.read_ticket, lambda path: torch_dual_ticket.export.checksum.write(path, {}, {})):
    try:
        call("ticket")
    except ImportError as error:
        assert "pip install numpy safetensors" in str(error), error
    else:
        raise AssertionError
"""


def test_only_calls_need_safetensors_and_say_how_to_install_it():
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], check=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_device_or_a_pipe_is_written_to_and_not_replaced(path):
    rst = finalized(make(mlp))
    save_ticket(rst, os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = path.with_suffix(".pipe")
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        received = pool.submit(pipe.read_bytes)
        save_ticket(rst, pipe)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    save_ticket(rst, path)
    assert received.result() == path.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_a_file_that_is_replaced_keeps_its_mode(path):
    rst = finalized(make(mlp))
    for mode in (0o600, 0o664):
        path.write_bytes(b"before")
        path.chmod(mode)
        save_ticket(rst, path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.unlink()


def test_other_shapes_are_refused_before_a_mask_is_drawn(path, monkeypatch):
    """A few hundred bytes can describe a tensor of any size."""
    save_ticket(finalized(make(mlp)), path)
    monkeypatch.setattr(SeededMask, "draw", None)
    with pytest.raises(ValueError, match=r"0.weight has shape \(20, 12\) in the file, \(2, 3\) here"):
        load_ticket(path, nn.Sequential(nn.Linear(3, 2)))

"""One run: an ordinary training loop, with whatever a method does between its stretches."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .data import DATA, Tensors, Text, accuracy
from .flops import FlopCount
from .methods import METHODS
from .models import MODELS, OPTIMIZERS
from .recipe import read_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from .cells import Cell

WARM_UP = 0.05  # part of each stretch in which its learning rate rises, before it falls along a cosine
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What decides, with its length and its rate, how a stretch of plain training from initialization ends.
DECISIVE = ("data", "contents", "pixels", "model", "seed", "batch", "optimizer", "decay", "weight_decay")
DECISIVE += ("autocast", "compile", "ranks")
REMEMBERED = 8  # ends of such stretches, in each process
_ends: dict[tuple[Any, ...], dict[str, Any]] = {}  # the one that was used last is the last


@functools.lru_cache(maxsize=1)
def load(name: str, folder: Path | None, device: torch.device, pixels: int = 0) -> Tensors | Text:
    if name not in DATA:  # a recipe, in a process that has not read it yet
        read_recipe(folder)
    data = DATA[name](folder)
    return (data.averaged(pixels) if pixels else data).to(device)


def forget() -> None:
    """Read and train anew what an earlier recipe of the same name has left in memory."""
    load.cache_clear()
    _ends.clear()


class Job:
    """What a method works on: a model, its budget, and the loop."""

    def __init__(self, cell: Cell, data: Tensors | Text, device: torch.device, advance: Callable[[int], None]) -> None:
        torch.manual_seed(cell.seed)
        self.cell, self.data, self.device, self.advance = cell, data, device, advance
        self.recipe = MODELS[cell.model]
        self.model = self.recipe.build(data.example_shape, data.classes).to(device)
        self.ticket: Any = None  # whatever has `masks` of what it holds at zero
        self.residual: float | None = None  # of RST, when its transformation ended
        self.masked: float | None = None  # validation accuracy just after the mask, where weights survive it
        self.search = round(cell.search * cell.updates)
        self.done = {"dense": 0, "sparse": 0}
        self.forgone = 0  # updates of the budget that the method does not make
        self.training_flops = 0.0
        self._optimizer: torch.optim.Optimizer | None = None
        self._flops = FlopCount(self.model, data.example())
        self._forward: nn.Module = self.model
        self._rank, self._ranks = 0, 1
        if dist.is_initialized():
            self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
            self._forward = nn.parallel.DistributedDataParallel(self.model)
        if cell.compile:
            torch.compiler.reset()  # every run has its own model, and only so many are kept
            self._forward = torch.compile(self._forward)
        self._batches = data.batches(cell.batch, cell.seed, self._rank, self._ranks)

    @property
    def left(self) -> int:
        return self.cell.updates - self.forgone - sum(self.done.values())

    @property
    def same_mask(self) -> dict[str, Any]:
        """With these, all random tickets of one seed, pattern and sparsity are one ticket."""
        return {"exclude": self.recipe.dense_layers, "seed": self.cell.seed, "pattern": self.cell.pattern}

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """What is held at zero now: nothing while RST is in its transformation."""
        return {} if self.ticket is None or getattr(self.ticket, "phase", "") == "transform" else self.ticket.masks

    @property
    def search_rate(self) -> float:
        """Of what comes between the plain training and the mask."""
        return self.cell.rate if self.cell.rate_from == "delay" else self.cell.dense_rate

    def train_delay(self) -> None:
        """The plain training before a method's own way to its mask begins."""
        if updates := round(self.cell.delay * self.search):
            self.train(updates, self.cell.dense_rate)

    def look_at_masked(self) -> None:
        """What the mask leaves of what was learnt before it."""
        if self.cell.recalibrate:
            batches = self.data.batches(self.cell.batch, self.cell.seed, self._rank, self._ranks)
            recalibrate(self.model, (x for x, _ in itertools.islice(batches, self.cell.recalibrate)))
        self.masked = accuracy(self.model, self.data, "validation")

    def train(self, updates: int, rate: float, after_update: Callable[[], None] | None = None) -> None:
        """A stretch of training, with its own optimizer and learning-rate schedule unless all share one.

        Many runs begin with the same plain training: where it was made before, its end is taken from memory.
        """
        masks = dict(self.masks)
        is_plain = self.ticket is None and after_update is None and not any(self.done.values())
        first, last = 0, updates
        if self.cell.anneal == "once":
            first, last, rate = sum(self.done.values()), self.cell.updates, self.cell.rate
        self.done["sparse" if masks else "dense"] += updates
        self.training_flops += self._flops.training(updates, self.cell.batch, masks)
        is_kept = first > 0 if self.cell.optimizer_state == "" else self.cell.optimizer_state == "kept"
        if self._optimizer is None or not is_kept:
            chosen, decay = OPTIMIZERS[self.cell.optimizer or self.recipe.optimizer], self.cell.weight_decay
            decay = chosen.weight_decay if decay is None else decay
            self._optimizer = chosen.build(self.model.parameters(), lr=rate, weight_decay=decay)
        optimizer = self._optimizer
        key = (*(getattr(self.cell, name) for name in DECISIVE), self.device, updates, last, rate)
        if is_plain and self._goes_on_from(key, updates):
            return
        half = DTYPES.get(self.cell.autocast)
        scaler = torch.amp.GradScaler(self.device.type, enabled=half is torch.float16)
        for update in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_rate((first + update + 1) / (last + 1), self.cell.decay)
            x, y = next(self._batches)
            optimizer.zero_grad()
            with torch.autocast(self.device.type, half) if half else contextlib.nullcontext():
                logits = self._forward(x)
            scaler.scale(F.cross_entropy(logits.float().flatten(0, -2), y.flatten())).backward()
            scaler.step(optimizer)
            scaler.update()
            if after_update is not None:
                after_update()
            if update % 50 == 49:
                self.advance(50)
        self.advance(updates % 50)
        if is_plain:
            self._remember(key)

    @property
    def _random(self) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
        """How the states of torch's generators are read and put back: a recipe's dropout draws from them."""
        cuda = [(torch.cuda.get_rng_state, torch.cuda.set_rng_state)] if self.device.type == "cuda" else []
        return [(torch.get_rng_state, torch.set_rng_state), *cuda]

    def _remember(self, key: tuple[Any, ...]) -> None:
        end = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        _ends[key] = copy.deepcopy(end) | {"random": [draw() for draw, _ in self._random]}
        while len(_ends) > REMEMBERED:
            del _ends[next(iter(_ends))]

    def _goes_on_from(self, key: tuple[Any, ...], updates: int) -> bool:
        """Put everything where it was at the end of that stretch, if one is remembered."""
        if key not in _ends:
            return False
        end = _ends[key] = _ends.pop(key)
        self.model.load_state_dict(end["model"])
        self._optimizer.load_state_dict(copy.deepcopy(end["optimizer"]))  # which else would share its tensors
        for _ in range(updates):
            next(self._batches)
        for (_, put), state in zip(self._random, end["random"], strict=True):
            put(state)
        self.advance(updates)
        return True


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure BatchNorm's statistics anew: their means over these batches."""
    layers = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no BatchNorm whose statistics could be measured anew")
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean
    was_training = model.training
    model.train()
    for x in batches:
        model(x)
    model.train(was_training)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def share_of_rate(progress: float, decay: str = "cosine") -> float:
    if decay == "steps":  # He et al., 2016: after a half and three quarters of the updates
        return 1.0 if progress <= 0.5 else 0.1 if progress <= 0.75 else 0.01
    return min(1.0, progress / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def run_cell(
    cell: Cell, folder: Path | None, device: torch.device, advance: Callable[[int], None] = lambda updates: None
) -> dict[str, Any]:
    """Train and measure; the test set is looked at once, after the last update, and not at all in tuning runs."""
    started = time.perf_counter()
    data = load(cell.data, folder, device, cell.pixels)
    if cell.data == cell.model and cell.contents != data.checksum:
        raise RuntimeError(
            f"{cell.data} is not what it was when the comparison began: it was edited, or data() draws anew in every"
            " process. Draw with a seed, and start again."
        )
    job = Job(cell, data, device, advance)
    METHODS[cell.method](job)
    assert job.left == 0
    masks = dict(job.masks)
    held = [int((~mask).sum()) for mask in masks.values()]
    parameters = dict(job.model.named_parameters())
    assert all(not parameters[name][~mask].any() for name, mask in masks.items())
    return {
        "validation": accuracy(job.model, data, "validation"),
        "test": None if cell.tuning else accuracy(job.model, data, "test"),
        "achieved_sparsity": sum(held) / max(1, sum(mask.numel() for mask in masks.values())),
        "residual": job.residual,
        "masked": job.masked,
        "dense_updates": job.done["dense"],
        "sparse_updates": job.done["sparse"],
        "training_flops": job.training_flops,
        "seconds": round(time.perf_counter() - started, 2),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }

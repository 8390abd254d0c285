"""The comparison: equal budgets, choices made on validation data, nothing finished is lost, honest statistics."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import compare_tickets
import numpy as np
import pytest
import search_transformation
import torch
from comparison import engines, methods, training
from comparison.cells import Cell
from comparison.colors import COLORS
from comparison.data import DATA, Images, Text, accuracy, cifar10, crop_and_flip, fashion_mnist, read_idx
from comparison.flops import FlopCount
from comparison.methods import ANNEALED_ONCE, DELAYED, METHODS, PENALIZED, SEARCHES, WITH_PATTERN, with_its_own
from comparison.models import MODELS
from comparison.options import make_parser, parse
from comparison.records import Records
from comparison.report import Report
from comparison.training import share_of_rate
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")
# A dozen updates leave weights that say little: compared across layers, a small layer may lose all.
pytestmark = pytest.mark.filterwarnings("ignore:the mask keeps no weight")
CELL = Cell(
    data="digits",
    model="lenet-300-100",
    method="dense",
    seed=0,
    updates=40,
    batch=16,
    dense_rate=0.05,
    rate=0.1,
    sparsity=0.8,
    search=0.5,
    cycles=2,
    magnitude="global",
)
PENALTY = {"schedule": "linear", "max_penalty": 1.0, "hold": 0.2}


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    """Updates are counted here: none is to be left out because an earlier run has made it."""
    monkeypatch.setattr(training, "REMEMBERED", 0)


def cell(method, **changes):
    fields = {"method": method, **(PENALTY if method in PENALIZED else {}), **changes}
    return Cell(**{**CELL.__dict__, **fields})


def run_command(out, *arguments):
    options = ["--updates", "40", "--seeds", "2", "--sparsity", "0.8", "--rates", "0.1", "--out", str(out)]
    compare_tickets.main([*options, *map(str, arguments)])
    return (out / "table.md").read_text().partition("\n\n")[2].partition("- Budget")[2]  # without the command


def rows_of(text):
    """The rows of tables by title; what was split is one row again."""
    rows = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        titles, _, *lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        seen = Counter()
        for line in lines:
            key = tuple(line[:2])
            seen[key] += 1
            rows.setdefault((*key, seen[key]), {}).update(zip(titles, line, strict=True))
    return list(rows.values())


# ---------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_the_same_number_of_updates(method, monkeypatch):
    steps, parts = [], []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    monkeypatch.setattr(training, "accuracy", lambda *a: parts.append(a[-1]) or accuracy(*a))
    try:
        result = training.run_cell(cell(method), None, CPU)
    finally:
        handle.remove()
    made = CELL.updates / 2 if method == "scratch-short" else CELL.updates
    assert len(steps) == made == result["dense_updates"] + result["sparse_updates"]
    looks_at_masked = method in ANNEALED_ONCE
    assert parts == ["validation"] * (1 + looks_at_masked) + ["test"]
    assert (result["masked"] is not None) == looks_at_masked
    assert result["achieved_sparsity"] == (0 if method == "dense" else pytest.approx(0.8, abs=1e-4))
    assert (result["residual"] is not None) == (method in PENALIZED)
    if method in SEARCHES - {"LTH-iter"}:
        assert result["dense_updates"] == CELL.updates / 2


def test_scaled_weights_keep_the_size_that_signals_have_in_the_dense_network():
    job = training.Job(cell("scratch-scaled", sparsity=0.75, updates=0), training.load("digits", None, CPU), CPU, int)
    x = torch.randn(1000, job.model[1].in_features)
    before = {name: weight.detach().clone() for name, weight in job.model.named_parameters()}
    size = (x @ job.model[1].weight.T).std().item()
    methods.scratch_scaled(job)
    assert list(job.masks) == ["1.weight", "3.weight"]
    for name, weight in job.model.named_parameters():
        expected = before[name] * (2 * job.masks[name] if name in job.masks else 1)  # a quarter is left
        torch.testing.assert_close(weight, torch.nn.Parameter(expected), rtol=1e-3, atol=0)
    assert (x @ job.model[1].weight.T).std().item() == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("method", sorted(ANNEALED_ONCE))
def test_the_rate_falls_in_each_stretch_or_once_over_all(method, monkeypatch):
    rates, optimizers = [], []

    def note(optimizer, args, kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        if optimizer not in optimizers:
            optimizers.append(optimizer)

    handle = register_optimizer_step_post_hook(note)
    try:
        for anneal in ("each", "once"):
            training.run_cell(cell(method, anneal=anneal), None, CPU)
    finally:
        handle.remove()
    each, once = rates[: CELL.updates], rates[CELL.updates :]
    peaks = [index for index in range(1, CELL.updates - 1) if each[index - 1] < each[index] > each[index + 1]]
    assert len(peaks) == 2
    assert max(each[:20]) < 0.05 < max(each[20:]) < CELL.rate  # dense_rate before the mask
    assert once == [CELL.rate * share_of_rate((update + 1) / (CELL.updates + 1)) for update in range(CELL.updates)]
    assert len(optimizers) == 3


def test_the_usual_recipe_of_resnets():
    seen = []

    def note(optimizer, *_):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))

    handle = register_optimizer_step_post_hook(note)
    try:
        training.run_cell(cell("dense", decay="steps", weight_decay=1e-4), None, CPU)
        training.run_cell(cell("dense"), None, CPU)
    finally:
        handle.remove()
    rates = [rate for rate, _ in seen[: CELL.updates]]
    assert rates == pytest.approx([0.1] * 20 + [0.01] * 10 + [0.001] * 10)
    assert [decay for _, decay in seen] == [1e-4] * CELL.updates + [5e-4] * CELL.updates


def test_the_weight_decay_that_an_optimizer_has_anyway_is_no_other_run():
    assert parse("", ["--weight-decay", "5e-4"]).weight_decay is None
    assert parse("", ["--weight-decay", "0.05"]).weight_decay == 0.05
    assert parse("", ["--weight-decay", "0"]).weight_decay == 0


def test_the_penalty_may_begin_later(monkeypatch):
    began = []
    build = methods.RSTScheduler.__init__

    def note(self, *args, **keywords):
        began.append(len(steps))
        assert keywords["steps"] + keywords["hold"] == 10
        build(self, *args, **keywords)

    steps = []
    monkeypatch.setattr(methods.RSTScheduler, "__init__", note)
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        result = training.run_cell(cell("RST", delay=0.5), None, CPU)
    finally:
        handle.remove()
    assert began == [10]
    assert (result["dense_updates"], result["sparse_updates"]) == (20, 20)


@pytest.mark.parametrize("method", sorted(DELAYED - {"RST-iter"}))
def test_the_chosen_rate_may_begin_after_the_delay(method):
    rates = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        for rate_from in ("mask", "delay"):
            training.run_cell(cell(method, delay=0.5, rate_from=rate_from), None, CPU)
    finally:
        handle.remove()
    ten = [share_of_rate((update + 1) / 11) for update in range(10)]
    twenty = [share_of_rate((update + 1) / 21) for update in range(20)]
    for first, second in ((0, CELL.dense_rate), (CELL.updates, CELL.rate)):
        expected = [share * CELL.dense_rate for share in ten] + [share * second for share in ten]
        assert rates[first : first + CELL.updates] == expected + [share * CELL.rate for share in twenty]
    assert with_its_own(cell("L1", delay=0.5, rate_from="delay")) == with_its_own(cell("L1"))


def test_gradual_pruning_takes_more_and_more_of_the_smallest_and_holds_them(monkeypatch):
    zeros, lefts = [], []

    def note(optimizer, *_):
        zeros.append([p == 0 for group in optimizer.param_groups for p in group["params"] if p.dim() == 2][:2])

    hold = methods.hold

    def note_weights(model, masks):
        lefts.extend((model.get_parameter(name).abs(), mask) for name, mask in masks.items())
        return hold(model, masks)

    monkeypatch.setattr(methods, "hold", note_weights)
    handle = register_optimizer_step_pre_hook(note)
    try:
        training.run_cell(cell("GMP", updates=200, search=0.7, delay=3 / 7, magnitude="uniform"), None, CPU)
    finally:
        handle.remove()
    sparsities = [float(torch.cat([z.flatten() for z in now]).float().mean()) for now in zeros]
    # 60 updates of plain training, and then a mask after every fourth of 80; an update shows the mask before it.
    for update, sparsity in enumerate(sparsities, 1):
        progress = min(1, max(0, update - 61) // 4 * 4 / 80)
        assert sparsity == pytest.approx(0.8 * (1 - (1 - progress) ** 3), abs=1e-3), update
    assert all(bool((z[i] | ~before[i]).all()) for before, z in itertools.pairwise(zeros) for i in (0, 1))
    assert len(lefts) == 2 * 20
    assert all(weights[mask].min() >= weights[~mask].max() for weights, mask in lefts)


def test_what_is_chosen_by_magnitude_is_chosen_after_the_plain_training(monkeypatch):
    """And is penalized from then on: L1-RST at once, GMP-RST as it grows."""
    lefts = {}

    def note(name):
        build = getattr(methods, name).__init__

        def init(self, model, *args, **keywords):
            build(self, model, *args, **keywords)
            lefts[name] = (
                [model.get_parameter(key).abs() for key in self.masks],
                list(self.masks.values()),
                len(steps),
            )

        monkeypatch.setattr(getattr(methods, name), "__init__", init)

    steps = []
    note("GradualPruning")
    note("RSTScheduler")
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        at_once = training.run_cell(cell("L1-RST", delay=0.5), None, CPU)
        [(weights, masks, began)] = [lefts.pop("RSTScheduler")]
        assert began == 10
        assert sum(int((~mask).sum()) for mask in masks) == pytest.approx(
            0.8 * sum(mask.numel() for mask in masks), abs=2
        )
        kept = torch.cat([weight[mask] for weight, mask in zip(weights, masks, strict=True)])
        gone = torch.cat([weight[~mask] for weight, mask in zip(weights, masks, strict=True)])
        assert kept.min() >= gone.max()  # "global" compares across layers
        gradual = training.run_cell(cell("GMP-RST", delay=0.5), None, CPU)
        [(_, masks, began)] = [lefts.pop("GradualPruning")]
        assert began == CELL.updates + 10
        assert all(bool(mask.all()) for mask in masks)
    finally:
        handle.remove()
    assert at_once["residual"] > 0 < gradual["residual"]


@pytest.mark.parametrize("pattern", ["2:4", "filter"])
@pytest.mark.parametrize("method", sorted(WITH_PATTERN - {"dense"}))
def test_masks_of_a_pattern_leave_half(method, pattern, monkeypatch):
    models = []
    monkeypatch.setattr(training, "accuracy", lambda model, *_: models.append(model) or 50.0)
    run = cell(method, pattern=pattern, sparsity=0.5, magnitude="uniform", model="convnet", pixels=4, updates=20)
    assert training.run_cell(run, None, CPU)["achieved_sparsity"] == 0.5
    for layer in (models[-1][3], models[-1][6], models[-1][9]):
        kept = layer.weight != 0
        if pattern == "2:4":
            assert (kept.float().unflatten(1, (-1, 4)).sum(2) == 2).all()
        else:
            assert kept.all((1, 2, 3)).sum() == (~kept).all((1, 2, 3)).sum() == len(kept) / 2


@pytest.mark.parametrize(("model", "layers"), [("convnet", 3), ("resnet8", 6)])
def test_norms_behind_masked_filters_are_penalized_with_them(model, layers, monkeypatch):
    built = []
    build = methods.RSTScheduler.__init__
    monkeypatch.setattr(methods.RSTScheduler, "__init__", lambda *a, **k: built.append(a) or build(*a, **k))
    run = cell("L1-RST-norm", pattern="filter", sparsity=0.5, magnitude="uniform", model=model, pixels=4, updates=20)
    training.run_cell(run, None, CPU)
    [(rst, network)] = built
    assert len(rst.masks) == 3 * layers
    for name, mask in rst.masks.items():
        if mask.dim() == 4:
            layer = name.removesuffix(".weight")
            norm = str(int(layer) + 1) if model == "convnet" else layer.replace("conv", "norm")
            for key in ("weight", "bias"):
                parameter = f"{norm}.{key}"
                assert torch.equal(rst.masks[parameter], mask.flatten(1).any(1))
                assert not network.get_parameter(parameter)[~rst.masks[parameter]].any()


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("filter", 0.75)])
def test_gradual_pruning_of_a_pattern_grows_until_the_search_ends(pattern, sparsity):
    zeros = []

    def note(optimizer, *_):
        zeros.append([p == 0 for group in optimizer.param_groups for p in group["params"] if p.dim() == 4][1:])

    run = cell("GMP", pattern=pattern, sparsity=sparsity, magnitude="uniform", model="convnet", pixels=4)
    handle = register_optimizer_step_pre_hook(note)
    try:
        result = training.run_cell(replace(run, updates=200, search=0.7, delay=3 / 7), None, CPU)
    finally:
        handle.remove()
    sparsities = [float(torch.cat([z.flatten() for z in now]).float().mean()) for now in zeros]
    # 60 updates of plain training, and then a mask after every fourth of 80; an update shows the mask before it.
    for update, now in enumerate(sparsities, 1):
        progress = min(1, max(0, update - 61) // 4 * 4 / 80)
        assert now == pytest.approx(sparsity * (1 - (1 - progress) ** 3), abs=0.02), update
    assert all(bool((z[i] | ~before[i]).all()) for before, z in itertools.pairwise(zeros) for i in range(3))
    assert (result["dense_updates"], result["sparse_updates"]) == (140, 60)


@pytest.mark.parametrize("method", ["GMP", "GMP-RST"])
@pytest.mark.parametrize(("curve", "part", "pattern"), [("linear", 0.6, "unstructured"), ("quadratic", 0.8, "filter")])
def test_a_mask_may_grow_otherwise(method, curve, part, pattern, monkeypatch):
    seen, last = [], []
    train = training.Job.train

    def watched(self, updates, rate, after_update=None):
        def note():
            after_update()
            seen.append(self.ticket and torch.cat([(~mask).flatten() for mask in self.ticket.masks.values()]))

        train(self, updates, rate, after_update and note)
        last.append(self.masks)

    monkeypatch.setattr(training.Job, "train", watched)
    model = {"model": "convnet", "pixels": 4} if pattern == "filter" else {}
    run = {"updates": 200, "search": 0.5, "growth": f"{curve}-{part:g}", "pattern": pattern, "magnitude": "uniform"}
    training.run_cell(cell(method, **run, **model), None, CPU)
    over = part * (100 if method == "GMP" else 80)  # λ rises for 80 updates, and stays for 20
    power = {"linear": 1, "quadratic": 2}[curve]
    for update, gone in enumerate(seen, 1):
        grown = [end / over for end in (int(over * number / 20) for number in range(21)) if end <= update][-1]
        sparsity = 0.0 if gone is None else float(gone.float().mean())
        assert sparsity == pytest.approx(0.8 * (1 - (1 - grown) ** power), abs=0.02), update
    assert len(seen) == 100
    gone = [now for now in seen if now is not None]
    assert all(bool((after | ~before).all()) for before, after in itertools.pairwise(gone))
    assert torch.equal(torch.cat([(~mask).flatten() for mask in last[-1].values()]), gone[-1])


def test_gradual_pruning_may_be_complete_as_early_as_under_the_penalty(monkeypatch):
    masks = {"GMP-early": [], "GMP-RST": []}
    for method, seen in masks.items():
        step = methods.GradualPruning.step
        monkeypatch.setattr(
            methods.GradualPruning, "step", lambda self, seen=seen, step=step: (step(self), seen.append(self.sparsity))
        )
        run = with_its_own(cell(method, updates=200, delay=0.2, hold=0.25, magnitude="uniform"))
        assert run.hold == 0.25
        result = training.run_cell(run, None, CPU)
        monkeypatch.setattr(methods.GradualPruning, "step", step)
        assert (result["dense_updates"], result["sparse_updates"]) == (100, 100)
    assert masks["GMP-early"] == masks["GMP-RST"]
    assert len(masks["GMP-early"]) == 80
    assert masks["GMP-early"].index(max(masks["GMP-early"])) == 35  # 60 % of the 60 updates before the hold


def test_the_usual_growth_has_a_name():
    usual, named = (
        training.run_cell(cell("GMP", growth=growth, magnitude="uniform"), None, CPU) for growth in ("", "cubic-1")
    )
    assert usual | {"seconds": 0} == named | {"seconds": 0}
    assert with_its_own(cell("L1", growth="cubic-1")).growth == ""


def test_other_scores_are_those_computed_explicitly():
    run = cell("L1", batch=8, model="convnet", pixels=4)
    job = training.Job(run, training.load(run.data, None, CPU, run.pixels), CPU, lambda updates: None)
    before = copy.deepcopy(job.model.state_dict())
    scores = methods.taylor(job)
    assert job.model.training
    assert all(p.grad is None for p in job.model.parameters())
    assert all(torch.equal(now, before[name]) for name, now in job.model.state_dict().items())
    explicit = {name: torch.zeros_like(p) for name, p in job.model.eval().named_parameters()}
    for x, y in itertools.islice(job.data.batches(8, run.seed), 10):
        job.model.zero_grad()
        torch.nn.functional.cross_entropy(job.model(x), y).backward()
        for name, p in job.model.named_parameters():
            explicit[name] += (p.grad * p.detach()).abs()
    for name, score in scores.items():
        torch.testing.assert_close(score, explicit[name])
    weight = job.model[3].weight.detach().square()
    score = methods.lamp(job)["3.weight"]
    for at in ((0, 0, 0, 0), (5, 7, 1, 2), (31, 31, 2, 2)):
        torch.testing.assert_close(score[at], weight[at] / weight[weight >= weight[at]].sum())


@pytest.mark.parametrize("method", ["L1", "GMP", "L1-RST", "GMP-RST"])
@pytest.mark.parametrize("magnitude", ["taylor", "taylor-global", "lamp"])
def test_masks_by_other_scores(method, magnitude, monkeypatch):
    given = []
    for name in ("magnitude_masks", "GradualPruning"):
        build = getattr(methods, name)
        monkeypatch.setattr(methods, name, lambda *a, build=build, **k: given.append(k) or build(*a, **k))
    result = training.run_cell(cell(method, magnitude=magnitude), None, CPU)
    assert result["achieved_sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert given
    assert all(keywords["scores"] is not None for keywords in given)
    assert {keywords["distribution"] for keywords in given} == {"uniform" if magnitude == "taylor" else "global"}


def test_an_optimizer_other_than_the_recipes_can_be_chosen(monkeypatch):
    used = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: used.append(type(optimizer)))
    try:
        for name in ("", "sgd", "adamw"):
            training.run_cell(cell("scratch", optimizer=name), None, CPU)
    finally:
        handle.remove()
    assert used == [torch.optim.SGD] * 80 + [torch.optim.AdamW] * 40
    assert with_its_own(cell("RST", optimizer="sgd")) == with_its_own(cell("RST"))
    assert with_its_own(cell("RST", optimizer="adamw")) != with_its_own(cell("RST"))


@pytest.mark.parametrize(("anneal", "usual", "other"), [("each", "new", "kept"), ("once", "kept", "new")])
def test_the_optimizer_is_new_or_kept_where_a_stretch_begins(anneal, usual, other):
    optimizers, rates = [], []

    def note(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])
        if not any(optimizer is known for known in optimizers):
            optimizers.append(optimizer)

    handle = register_optimizer_step_post_hook(note)
    try:
        training.run_cell(cell("RST", anneal=anneal, optimizer_state=other), None, CPU)
        assert len(optimizers) == (2 if other == "new" else 1)
        training.run_cell(cell("RST", anneal=anneal), None, CPU)
    finally:
        handle.remove()
    assert rates[: CELL.updates] == rates[CELL.updates :]
    assert with_its_own(cell("RST", anneal=anneal, optimizer_state=usual)) == with_its_own(cell("RST", anneal=anneal))
    assert with_its_own(cell("RST", anneal=anneal, optimizer_state=other)).optimizer_state == other


def test_statistics_are_measured_anew_just_after_the_mask(monkeypatch):
    seen = []

    def note(model, data, part):
        batches = data.batches(CELL.batch, CELL.seed)
        with torch.no_grad():
            first = [model[0](next(batches)[0]) for _ in range(3)]
        mean = torch.stack([x.mean((0, 2, 3)) for x in first]).mean(0)
        variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in first]).mean(0)
        norm = model[1]
        close = torch.allclose(norm.running_mean, mean, atol=1e-5) and torch.allclose(norm.running_var, variance)
        seen.append((part, close, norm.momentum, model.training))
        return 50.0

    monkeypatch.setattr(training, "accuracy", note)
    run = cell("random-after-dense", model="convnet", pixels=4, updates=20)
    training.run_cell(replace(run, recalibrate=3), None, CPU)
    training.run_cell(run, None, CPU)
    assert [close for _, close, _, _ in seen] == [True, False, False, False, False, False]
    assert all((momentum, in_training) == (0.1, True) for _, _, momentum, in_training in seen)


def test_a_model_without_batch_normalization_has_nothing_to_measure_anew():
    with pytest.raises(ValueError, match="has no BatchNorm"):
        training.run_cell(cell("L1", recalibrate=3), None, CPU)


def test_rst_may_keep_more_in_small_layers(monkeypatch):
    masks = {}
    finalize = methods.RSTScheduler.finalize
    monkeypatch.setattr(
        methods.RSTScheduler, "finalize", lambda rst: masks.update(rst=dict(rst.masks)) or finalize(rst)
    )
    random_ticket = methods.random_ticket

    def note(*arguments, **keywords):
        held = random_ticket(*arguments, **keywords)
        masks["scratch"] = dict(held.masks)
        return held

    monkeypatch.setattr(methods, "random_ticket", note)
    training.run_cell(cell("RST-ERK"), None, CPU)
    training.run_cell(cell("scratch-ERK"), None, CPU)
    assert all(torch.equal(mask, masks["rst"][name]) for name, mask in masks["scratch"].items())


def test_a_tuning_run_does_not_look_at_the_test_part(monkeypatch):
    parts = []
    monkeypatch.setattr(training, "accuracy", lambda *a: parts.append(a[-1]) or 50.0)
    assert training.run_cell(cell("scratch", tuning=True), None, CPU)["test"] is None
    assert parts == ["validation"]


def test_runs_of_one_seed_share_initial_weights_batches_and_random_mask(monkeypatch):
    starts, batches, masks = {}, {}, {}

    class Spy(training.Job):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            starts[self.cell.method] = copy.deepcopy(self.model.state_dict())
            source = self._batches
            taken = batches[self.cell.method] = []
            self._batches = (taken.append(batch) or batch for batch in source)

        def train(self, *arguments, **keywords):
            super().train(*arguments, **keywords)
            masks[self.cell.method] = dict(self.masks)

    monkeypatch.setattr(training, "Job", Spy)
    for method in METHODS:
        training.run_cell(cell(method), None, CPU)
    for method in METHODS:
        assert all(map(torch.equal, starts[method].values(), starts["dense"].values()))
        assert len(batches[method]) == CELL.updates / (2 if method == "scratch-short" else 1)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[method], batches["dense"], strict=False))
    for method in ("scratch-scaled", "scratch-short", "random-after-dense", "RST", "RST-iter"):
        assert all(torch.equal(masks[method][name], mask) for name, mask in masks["scratch"].items())
        assert list(masks[method]) == ["1.weight", "3.weight"]


def test_a_run_is_reproducible():
    first, second = (training.run_cell(cell("RST-iter"), None, CPU) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.parametrize(("anneal", "optimizer"), [("each", "sgd"), ("once", "adamw")])
def test_a_remembered_beginning_changes_no_result(anneal, optimizer, monkeypatch):
    steps, ends = [], []

    def note(model, data, part):
        if part == "test":
            ends.append(copy.deepcopy(model.state_dict()))
        return accuracy(model, data, part)

    monkeypatch.setattr(training, "accuracy", note)
    usual = {"anneal": anneal, "optimizer": optimizer, "rate": 0.01, "dense_rate": 0.02}
    convnet = {**usual, "model": "convnet", "pixels": 4, "magnitude": "uniform", "delay": 0.5}  # BatchNorm has buffers
    runs = [cell(method, **convnet, seed=seed) for seed in (0, 1) for method in ("RST", "GMP", "L1-RST", "GMP-RST")]
    runs += [cell(method, **usual) for method in ("L1", "dense", "random-after-dense", "RST", "LTH")]
    runs += [cell("dense", **usual | {"rate": 0.03}), cell("L1", **usual | {"updates": 42})]  # which begin otherwise

    def run_all():
        steps.clear()
        results = [{**training.run_cell(run, None, CPU), "seconds": 0} for run in runs]
        return results, len(steps)

    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        results, count = run_all()
        monkeypatch.setattr(training, "REMEMBERED", 3)
        again, fewer = run_all()
    finally:
        handle.remove()
        training._ends.clear()
    assert again == results
    assert len(ends) == 2 * len(runs)
    for end, same in zip(ends, ends[len(runs) :], strict=False):
        assert all(map(torch.equal, end.values(), same.values()))
    assert count - fewer == 2 * 3 * 10 + 20  # three of four go on from the first's delay, one ticket from L1's training


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_mixed_precision_trains(autocast):
    result = training.run_cell(cell("RST", autocast=autocast), None, CPU)
    assert result["achieved_sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert result["test"] > 30


# ---------------------------------------------------------------------- models and data


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 0.27e6), ("resnet32", 0.46e6), ("resnet56", 0.85e6)])
def test_resnets_have_the_published_sizes(name, parameters):
    model = MODELS[name].build((3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) + 1 == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", MODELS)
def test_models_train_sparse(name):
    recipe = MODELS[name]
    x = torch.randn(2, 3, 16, 16) if recipe.reads == "images" else torch.randint(7, (2, 8))
    model = recipe.build(tuple(x.shape[1:]), 7)
    assert model(x).shape == ((2, 7) if recipe.reads == "images" else (2, 8, 7))
    for layer in recipe.dense_layers:
        assert model.get_submodule(layer).weight.dim() in (2, 4)
    first = next(m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    if isinstance(first, torch.nn.Conv2d):
        assert first is model.get_submodule(recipe.dense_layers[0])


def test_the_transformer_does_not_see_what_follows():
    model = MODELS["char-transformer"].build((8,), 5).eval()
    x = torch.randint(5, (1, 8))
    later = x.clone()
    later[0, 5:] = (later[0, 5:] + 1) % 5
    torch.testing.assert_close(model(x)[0, :5], model(later)[0, :5])


def test_digits_are_split_into_parts_that_do_not_overlap():
    data = DATA["digits"](None)
    assert data.sizes == {"validation": 270, "train": 1077, "test": 450}
    seen = [{x.numpy().tobytes() for x in images} for images, _ in data.parts.values()]
    assert not any(a & b for a, b in itertools.combinations(seen, 2))


def test_batches_are_whole_and_shared_out_between_ranks():
    data = DATA["digits"](None)
    whole, *ranks = (data.batches(64, 0, *who) for who in ((), (0, 2), (1, 2)))
    for _ in range(40):
        x, y = next(whole)
        assert len(x) == 64
        parts = [next(rank) for rank in ranks]
        assert torch.equal(torch.stack([part[0] for part in parts], 1).flatten(0, 1), x)
        assert torch.equal(torch.stack([part[1] for part in parts], 1).flatten(), y)


def test_batches_are_drawn_one_after_the_other():
    """So that seeds mean the runs that were recorded."""
    data = DATA["digits"](None)
    data.augment = True
    x, y = data.parts["train"]
    batches, generator = data.batches(64, 3), torch.Generator().manual_seed(3)
    for _ in range(2):
        for chosen in torch.randperm(len(x), generator=generator)[: len(x) // 64 * 64].split(64):
            offsets = torch.randint(2 * data.border + 1, (64, 2), generator=generator)
            flips = torch.rand(64, generator=generator) < 0.5
            images, labels = next(batches)
            assert torch.equal(images, crop_and_flip(data._scale(x[chosen]), data.border, offsets, flips))
            assert torch.equal(labels, y[chosen])


def test_augmentation_crops_and_flips():
    images = torch.randn(3, 2, 5, 5)
    offsets = torch.tensor([[4, 4], [0, 8], [3, 5]])
    flips = torch.tensor([False, True, True])
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for made, image, (row, column), flip in zip(
        crop_and_flip(images, 4, offsets, flips), padded, offsets, flips, strict=True
    ):
        crop = image[:, row : row + 5, column : column + 5]
        assert torch.equal(made, crop.flip(-1) if flip else crop)


def test_images_are_averaged_to_fewer_pixels():
    data = training.load("digits", None, CPU, 4)
    whole = DATA["digits"](None)
    for part, (x, y) in data.parts.items():
        expected = whole.parts[part][0].float().unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
        assert (x.float() - expected).abs().max() <= 0.5
        assert torch.equal(y, whole.parts[part][1])
    assert data.example_shape == (1, 4, 4)
    assert data.example().shape == (1, 1, 4, 4)
    assert data.border == 0
    small, large = (training.run_cell(cell("dense", pixels=n), None, CPU)["training_flops"] for n in (4, 0))
    assert large - small == 3 * CELL.updates * CELL.batch * 2 * 300 * (64 - 16)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, ending):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 5020), ("t10k", 30)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = arrays[part, kind] = generator.integers(0, 10, shape, dtype=np.uint8)
            content = bytes([0, 0, 8, array.ndim]) + np.array(shape, ">u4").tobytes() + array.tobytes()
            path = tmp_path / f"{part}-{kind}-ubyte{ending}"
            path.write_bytes(gzip.compress(content) if ending else content)
    data = fashion_mnist(tmp_path)
    assert data.sizes == {"validation": 5000, "train": 20, "test": 30}
    assert np.array_equal(data.parts["test"][0][:, 0], arrays["t10k", "images-idx3"])
    assert np.array_equal(data.parts["test"][1], arrays["t10k", "labels-idx1"])


def test_what_is_not_an_idx_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(tmp_path / "file")


def write_cifar10(folder):
    """Noise in the layout of the binary version; the records of the test part."""
    folder = folder / "cifar-10-batches-bin"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        records = generator.integers(0, 256, (1010, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
    return records


def test_cifar10_is_read_from_its_binary_version(tmp_path):
    records = write_cifar10(tmp_path)
    data = cifar10(tmp_path)
    assert data.sizes == {"validation": 5000, "train": 50, "test": 1010}
    assert data.augment
    assert np.array_equal(data.parts["test"][0].flatten(1), records[:, 1:])
    assert np.array_equal(data.parts["test"][1], records[:, 0])


def test_resnet20_on_cifar10_in_its_usual_recipe(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr(training, "accuracy", lambda *_: 50.0)  # on thousands of images
    arguments = ["--data", "cifar10", "--data-dir", tmp_path, "--model", "resnet20", "--methods", "dense", "RST"]
    arguments += [
        "--updates",
        "20",
        "--batch",
        "4",
        "--cycles",
        "2",
        "--decay",
        "steps",
        "--weight-decay",
        "1e-4",
        "--seeds",
        "1",
    ]
    table = run_command(tmp_path / "out", *arguments)
    assert "Learning rates fall to a tenth after a half and after three quarters, in each stretch of training" in table
    assert "Optimizer: sgd, weight decay 0.0001." in table
    assert "train 50" in table
    for run in Records(tmp_path / "out" / "records.jsonl").results:
        assert (run.pixels, run.decay, run.weight_decay) == (0, "steps", 1e-4)


def test_text_is_split_in_order_and_asks_for_the_next_character():
    data = Text("hello there, " * 100)
    assert sum(data.sizes.values()) == 1300
    for x, y in (next(data.batches(4, 0)), next(data.evaluation_batches("validation"))):
        assert torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(ValueError, match="too short"):
        Text("short")


def test_a_transformer_is_compared_on_text(tmp_path):
    path = tmp_path / "text"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    run = cell("RST", data="text", model="char-transformer", rate=2e-3, dense_rate=2e-3, updates=20)
    assert 0 < training.run_cell(run, path, CPU)["test"] <= 100


def test_flops_are_those_counted_explicitly():
    model = MODELS["lenet-300-100"].build((1, 28, 28), 10)
    count = FlopCount(model, torch.zeros(1, 1, 28, 28))
    layers = [784 * 300, 300 * 100, 100 * 10]
    assert count.forward({}) == 2 * sum(layers)
    masks = {"1.weight": torch.zeros(300, 784, dtype=torch.bool), "3.weight": torch.arange(30000).view(100, 300) < 3000}
    assert count.forward(masks) == pytest.approx(2 * (3000 + 1000))
    assert count.training(10, 64, {}) == 3 * 10 * 64 * count.forward({})

    conv = MODELS["convnet"].build((3, 8, 8), 10)
    count = FlopCount(conv, torch.zeros(1, 3, 8, 8))
    half = torch.zeros(64, 32, 3, 3, dtype=torch.bool)
    assert count.forward({}) - count.forward({"6.weight": half}) == 2 * 64 * 32 * 9 * 16


# ---------------------------------------------------------------------- records and choices


@pytest.mark.parametrize(
    "cut", [b'{"cell": {"data": "dig', '{"cell": {"data": "λ'.encode()[:-1]], ids=["", "in a letter"]
)
def test_a_line_that_was_being_written_is_dropped_and_what_is_broken_is_not_overlooked(cut, tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    records = Records(path)
    records.add(cell("dense"), {"test": 1.0})
    with path.open("ab") as file:
        file.write(cut)
    records = Records(path)
    assert "made again" in capsys.readouterr().out
    assert list(records.results) == [cell("dense")]
    records.add(cell("scratch"), {"test": 2.0})
    assert Records(path).results == {cell("dense"): {"test": 1.0}, cell("scratch"): {"test": 2.0}}
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1"):
        Records(path)


def test_a_run_without_a_result_is_made_again(tmp_path, capsys):
    records = Records(tmp_path / "records.jsonl")
    for result in (None, {"test": 2.0}):
        records.add(cell("dense"), result)
        expected = {} if result is None else {cell("dense"): result}
        assert Records(tmp_path / "records.jsonl").results == expected
        assert "line 1 has no result: that run is made again" in capsys.readouterr().out


def test_runs_on_another_text_are_other_runs(tmp_path):
    for number, letters in enumerate(("ab ba ", "abc cba ")):
        (tmp_path / str(number)).write_text(letters * 300)
        arguments = f"--data text --data-dir {tmp_path / str(number)} --model char-transformer --batch 4".split()
        run_command(tmp_path / "out", *arguments, "--methods", "scratch", "--seeds", "1", "--cycles", "1")
    assert len(Records(tmp_path / "out" / "records.jsonl").results) == 2
    assert len({cell.contents for cell in Records(tmp_path / "out" / "records.jsonl").results} - {""}) == 2


def test_an_interrupted_comparison_goes_on_and_ends_with_the_same_table(tmp_path, monkeypatch):
    made = []

    def interrupted(cell, *arguments):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(cell)
        return training.run_cell(cell, *arguments)

    arguments = ("--methods", "dense", "scratch", "RST", "--rates", "0.05", "0.1")
    monkeypatch.setattr(engines, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_command(tmp_path / "twice", *arguments)
    first = made.copy()
    made.clear()
    monkeypatch.setattr(engines, "run_cell", lambda cell, *a: made.append(cell) or training.run_cell(cell, *a))
    resumed = run_command(tmp_path / "twice", *arguments)
    assert len(first) == 5
    assert len(made) == 3 * 2 + 3 * 2 - 5
    assert not set(first) & set(made)

    assert run_command(tmp_path / "once", *arguments) == resumed
    for name in ("table.csv", "picture.png"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    made.clear()
    assert run_command(tmp_path / "once", *arguments) == resumed
    assert not made


@pytest.mark.parametrize(("jobs", "made"), [(1, 1), (2, 3)])
def test_no_run_begins_when_the_time_is_over(tmp_path, monkeypatch, capsys, jobs, made):
    """Runs of two processes end one after the other: the third begins while the first result is still on its way."""
    arguments = ("--methods", "dense", "scratch")
    path = tmp_path / "records.jsonl"
    clock = SimpleNamespace(monotonic=lambda: path.read_text().count("\n") if path.exists() else 0)  # a second each
    monkeypatch.setattr(compare_tickets, "time", clock)
    with pytest.raises(FileNotFoundError, match=r"table\.md"):
        run_command(tmp_path, *arguments, "--minutes", 1 / 60, "--jobs", jobs)
    assert "minutes are over; the same command makes the other runs" in capsys.readouterr().out
    records = Records(path).results
    assert len(records) == made
    monkeypatch.undo()
    run_command(tmp_path, *arguments)
    finished = Records(path).results
    assert len(finished) == 4
    assert records.items() <= finished.items()


def test_learning_rates_are_chosen_on_validation_data_with_separate_seeds(tmp_path, monkeypatch):
    best = {"dense": 0.05, "scratch": 0.2, "LTH": 0.1}
    made = []

    def pretend(cell, *_):
        made.append(cell)
        result = training.run_cell(cell, None, CPU) if len(made) == 1 else dict(pretend.result)
        pretend.result = result
        good = cell.rate == best[cell.method]
        test = None if cell.tuning else 1.0 if good else 99.0
        return {**result, "validation": 90.0 if good else 80.0, "test": test}

    monkeypatch.setattr(engines, "run_cell", pretend)
    run_command(tmp_path, "--methods", *best, "--rates", "0.05", "0.1", "0.2", "--tuning-seeds", "2")
    final = [cell for cell in made if not cell.tuning]
    trials = [cell for cell in made if cell.tuning]
    assert {cell.method: cell.rate for cell in final} == best
    assert {cell.seed for cell in final} == {0, 1}
    assert not {cell.seed for cell in trials} & {0, 1}
    assert {m: sum(cell.method == m for cell in trials) for m in best} == dict.fromkeys(best, 3 * 2)
    assert {cell.dense_rate for cell in made if cell.method == "LTH"} == {0.05}


def test_several_penalties_make_a_row_each(tmp_path):
    arguments = ("--methods", "scratch", "RST", "--schedules", "linear", "cubic", "--max-penalties", "1", "10")
    table = run_command(tmp_path, *arguments)
    labels = [row["method"] for row in rows_of(table) if row["sparsity"] == "80 %"]
    variants = ["linear, λ≤1", "linear, λ≤10", "cubic, λ≤1", "cubic, λ≤10"]
    assert labels == ["scratch", *(f"RST ({variant})" for variant in variants)]


def test_a_penalty_is_chosen_with_the_learning_rate_on_validation_data(tmp_path):
    arguments = ("--methods", "L1", "RST", "L1-RST", "--max-penalties", "0.1", "50", "--choose-penalty")
    table = run_command(tmp_path, *arguments, "--rates", "0.01", "0.1")
    labels = [row["method"] for row in rows_of(table) if row["sparsity"] == "80 %"]
    assert [label.partition(" ")[0] for label in labels] == ["L1", "RST", "L1-RST"]
    records = Records(tmp_path / "records.jsonl").results
    for method in ("RST", "L1-RST"):
        tried = {
            (cell.max_penalty, cell.rate): result["validation"]
            for cell, result in records.items()
            if cell.method == method and cell.tuning
        }
        assert tried.keys() == {(ceiling, rate) for ceiling in (0.1, 50) for rate in (0.01, 0.1)}
        made = {(c.max_penalty, c.rate) for c in records if c.method == method and not c.tuning}
        assert made == {max(tried, key=tried.get)}


def test_methods_without_a_penalty_may_try_as_many_rates_as_others_have_rates_and_ceilings(tmp_path):
    arguments = ("--methods", "L1", "RST", "--max-penalties", "0.1", "1", "--choose-penalty", "--seeds", "1")
    rates = ("--rates", "0.01", "0.1", "--rates-without-penalty", "0.01", "0.03", "0.1", "0.2")
    table = run_command(tmp_path, *arguments, *rates)
    text = "rates 0.01, 0.1 (methods without a penalty: 0.01, 0.03, 0.1, 0.2), tried with 1 separate seed on"
    assert text in " ".join(table.split())
    tried = [cell for cell in Records(tmp_path / "records.jsonl").results if cell.tuning]
    assert sorted(cell.rate for cell in tried if cell.method == "L1") == [0.01, 0.03, 0.1, 0.2]
    assert sorted((cell.rate, cell.max_penalty) for cell in tried if cell.method == "RST") == [
        *((0.01, 0.1), (0.01, 1.0), (0.1, 0.1), (0.1, 1.0)),
    ]


def test_settings_are_searched_on_validation_data(tmp_path, monkeypatch, capsys):
    arguments = [
        "--methods",
        "scratch",
        "L1",
        "RST",
        "--sparsity",
        "0.8",
        "--updates",
        "40",
        "--searches",
        "0.25",
        "0.5",
    ]
    arguments += ["--rates", "0.05", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["search_transformation.py", *arguments])
    search_transformation.main()
    records = Records(tmp_path / "records.jsonl").results
    # scratch; L1 by search and fall of the rate; RST by these and the penalty; each by rate and seed.
    assert len(records) == (1 + 2 * 2 + 2 * 2 * 2) * 2 * 2
    assert all(cell.tuning and cell.seed >= 1000 and result["test"] is None for cell, result in records.items())
    rows = rows_of((tmp_path / "table.md").read_text())
    assert len(rows) == 1 + 4 + 8
    scratch = next(row for row in rows if row["method"] == "scratch")
    means = {
        rate: sum(r["validation"] for c, r in records.items() if (c.method, c.rate) == ("scratch", rate)) / 2
        for rate in (0.05, 0.1)
    }
    best = max(means, key=means.get)
    assert scratch["validation, %"].startswith(f"{means[best]:.2f}")
    assert scratch.get("rate", f"{best:g}") == f"{best:g}"
    written = (tmp_path / "table.md").read_text()
    monkeypatch.setattr(training, "run_cell", None)
    search_transformation.main()  # nothing is missing
    assert (tmp_path / "table.md").read_text() == written
    capsys.readouterr()


def test_a_search_asks_what_else_may_matter(tmp_path, monkeypatch, capsys):
    def table(*arguments):
        fixed = ["--updates", "20", "--seeds", "1", "--model", "convnet", "--pixels", "4", "--methods", "scratch", "L1"]
        fixed += ["GMP", "RST", "--searches", "0.5", "--rates", "0.001", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["search_transformation.py", *fixed, "--schedules", "linear", *arguments])
        search_transformation.main()
        text = (tmp_path / "table.md").read_text()
        assert max(len(line) for line in text.splitlines()[2:]) <= 100
        return rows_of(text)

    def column(rows, method, name):
        return sorted(row[name] for row in rows if row["method"] == method)

    rows = table("--sparsity", "0.8", "--anneals", "once", "--delays", "0", "0.5", "--optimizer-states", "new", "kept")
    assert column(rows, "RST", "delay") == column(rows, "GMP", "delay") == ["0", "0", "0.5", "0.5"]
    assert column(rows, "L1", "optimizer at the mask") == ["kept", "new"]
    assert column(rows, "scratch", "optimizer at the mask") == [""]
    rows = table("--sparsity", "0.8", "--anneals", "once", "--optimizer", "adamw", "--recalibrations", "0", "2")
    assert column(rows, "L1", "BatchNorm") == ["0", "2"]
    rows = table("--sparsity", "0.8", "--anneals", "each", "--magnitudes", "uniform", "taylor")
    assert column(rows, "GMP", "scores") == column(rows, "L1", "scores") == ["taylor", "uniform"]
    rows = table("--sparsity", "0.8", "--anneals", "each", "--growths", "cubic-1", "linear-0.6")
    assert column(rows, "GMP", "growth") == ["cubic-1", "linear-0.6"]
    first, second = (next(row for row in rows if row.get("growth") == name) for name in ("cubic-1", "linear-0.6"))
    assert first["− first"] == ""
    ahead = float(second["validation, %"]) - float(first["validation, %"])
    assert float(second["− first"].replace("−", "-")) == pytest.approx(ahead, abs=0.011)
    rows = table("--pattern", "1:4", "--methods", "scratch", "RST", "--anneals", "each")
    assert [row["sparsity"] for row in rows] == ["75 %"] * 2
    records = Records(tmp_path / "records.jsonl").results
    assert {(cell.pattern, cell.optimizer) for cell in records} == {
        ("unstructured", ""),
        ("unstructured", "adamw"),
        ("1:4", ""),
    }
    capsys.readouterr()


def test_a_comparison_says_what_is_not_usual(tmp_path):
    arguments = ["--methods", "L1", "GMP", "RST", "--optimizer", "adamw", "--delay", "0.5", "--seeds", "1"]
    arguments += ["--model", "convnet", "--pixels", "4", "--recalibrate", "2", "--rates", "0.001"]
    arguments += ["--rate-from", "delay"]
    table = run_command(tmp_path, *arguments)
    assert "Optimizer: adamw. BatchNorm after a mask: statistics on 2 training batches" in table
    assert "GMP prunes 20 times, after the first 50% of the search" in table
    assert "last stretch of training, and of the one before it" in " ".join(table.split())
    for cell in Records(tmp_path / "records.jsonl").results:
        assert (cell.optimizer, cell.recalibrate, cell.delay) == ("adamw", 2, 0.5 if cell.method in DELAYED else 0)
    arguments = ["--methods", "L1", "RST", "--pattern", "2:4", "--seeds", "1", "--rates", "0.1", "--updates", "40"]
    compare_tickets.main([*arguments, "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert "that are pruned, 2:4 along the input dimension" in table
    assert [row["sparsity"] for row in rows_of(table)] == ["50 %"] * 2
    arguments = ["--methods", "L1", "GMP", "--pattern", "filter", "--seeds", "1", "--rates", "0.1", "--updates", "40"]
    compare_tickets.main([*arguments, "--sparsity", "0.25", "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert "that are pruned, whole filters" in " ".join(table.split())
    assert [row["sparsity"] for row in rows_of(table)] == ["25 %"] * 2


def test_records_from_before_the_newer_fields_are_still_known():
    for path in sorted((EXAMPLES / "results").rglob("records.jsonl")):
        assert Records(path).results
    old = '{"data": "digits", "model": "convnet", "method": "dense", "seed": 0, "updates": 40, "batch": 16'
    old += ', "dense_rate": 0.0, "rate": 0.1}'
    known = Cell(**json.loads(old))
    assert (known.pattern, known.optimizer, known.optimizer_state, known.recalibrate) == ("unstructured", "", "", 0)


# ---------------------------------------------------------------------- the report


def test_means_intervals_and_paired_differences_are_those_computed_explicitly(tmp_path):
    tests = {
        "dense": [90.0, 92.0, 94.0],
        "scratch": [80.0, 84.0, 82.0],
        "LTH": [83.0, 84.0, 85.0],
        "RST": [84.0, 88.0, 89.0],
    }
    common = {"residual": None, "dense_updates": 20, "sparse_updates": 20, "training_flops": 5e9, "validation": 90.0}
    results = {
        cell(method, seed=seed, sparsity=0.0 if method == "dense" else 0.8): {
            **common,
            "test": test,
            "achieved_sparsity": 0.8,
            "residual": 0.25 if method == "RST" else None,
            "masked": test - 7 if method == "RST" else None,
        }
        for method, values in tests.items()
        for seed, test in enumerate(values)
    }
    report = Report(results)
    assert max(map(len, report.markdown().splitlines())) <= 100
    cells = {row["method"]: row for row in rows_of(report.markdown())}
    # Student's t for 2 degrees of freedom is 4.3027; the differences of RST from scratch are 4, 4 and 7.
    assert cells["dense"]["test accuracy, %"] == f"92.00 ± {4.3027 * 2 / math.sqrt(3):.2f}"
    assert cells["RST"]["just masked, %"].startswith("80.00 ± ")
    assert cells["RST"]["− scratch"] == f"+5.00 ± {4.3027 * math.sqrt(3) / math.sqrt(3):.2f}"
    assert cells["scratch"]["− LTH"].startswith("−2.00 ± ")
    assert cells["scratch"]["− scratch"] == cells["dense"]["just masked, %"] == ""
    assert "− scratch" not in cells["dense"]
    assert cells["RST"]["residual"] == "25.00%"

    report.write_csv(tmp_path / "table.csv")
    header, *rows = [line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines()]
    row = dict(zip(header, rows[-1], strict=True))
    assert (row["method"], float(row["test_mean"]), float(row["minus_scratch_mean"])) == ("RST", 87.0, 5.0)
    report.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_has_its_own_color_in_all_pictures():
    assert COLORS.keys() == METHODS.keys()
    assert len(set(COLORS.values())) == len(COLORS)


def test_rows_whose_penalty_was_chosen_are_one_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    common = {"residual": 0.1, "dense_updates": 20, "sparse_updates": 20, "training_flops": 5e9, "achieved_sparsity": 0}
    rows = [("L1", 0.8, 0), ("L1", 0.9, 0), ("RST", 0.8, 1), ("RST", 0.9, 3)]
    chosen = {cell(m, sparsity=s, max_penalty=c): {**common, "test": 90.0} for m, s, c in rows}
    compared = {cell("RST", sparsity=0.8, max_penalty=10): {**common, "test": 90.0}}
    for results, labels in ((chosen, ["L1", "RST"]), (chosen | compared, ["L1", *["RST (linear, λ≤{})"] * 3])):
        Report(results, "LeNet on digits").draw(tmp_path / "picture.png")
        handles, names = figures[-1].axes[0].get_legend_handles_labels()
        assert [re.sub(r"\d+", "{}", name) if "λ" in name else name for name in names] == labels
        assert [handle[0].get_color() for handle in handles] == [COLORS[name.split(" ")[0]] for name in names]
    assert figures[0].axes[0].get_title(loc="left") == "LeNet on digits\nbudget: 40 updates of batch 16; one seed"


def test_a_run_that_diverged_is_reported(tmp_path):
    table = run_command(tmp_path, "--methods", "RST", "--max-penalties", "1000", "--data", "digits")
    [row] = rows_of(table)
    assert row["residual"] == "nan%"
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_a_single_seed_has_no_interval(tmp_path):
    table = run_command(tmp_path, "--methods", "scratch", "--seeds", "1")
    assert "±" not in rows_of(table)[0]["test accuracy, %"]


# ---------------------------------------------------------------------- engines and the command


def test_several_processes_and_several_ranks_do_what_one_process_does(tmp_path):
    methods = ("--methods", "LTH", "RST", "--seeds", "1")
    run_command(tmp_path / "one", *methods)
    run_command(tmp_path / "two", *methods, "--jobs", "2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "compare_tickets.py"), "--updates", "40", "--sparsity", "0.8", "--rates", "0.1"]
    command += [*methods, "--out", str(tmp_path / "ranks")]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two, ranks = (Records(tmp_path / name / "records.jsonl").results for name in ("one", "two", "ranks"))
    assert one.keys() == two.keys()
    assert all(result["test"] == two[cell]["test"] for cell, result in one.items())
    assert len(ranks) == len(one)
    for run, result in ranks.items():
        alone = one[Cell(**{**run.__dict__, "ranks": 1})]
        assert run.ranks == 2
        # Sums are made in another order; a prediction or two of 450 may turn.
        assert result["test"] == pytest.approx(alone["test"], abs=1.0)


KILLED = """
import multiprocessing, time
from comparison.engines import in_processes
from test_compare_tickets import CPU, cell

if __name__ == "__main__":
    endless = cell("dense", updates=10**9)
    for _ in in_processes(1, [cell("dense"), endless], None, CPU, int):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


def test_no_process_outlives_a_comparison_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    paths = os.pathsep.join([str(EXAMPLES), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py")], stdout=subprocess.PIPE, env=environment
    ) as run:
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert workers
        run.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker goes on with its endless run"
        time.sleep(0.1)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # whoever has adopted it may not have asked for its exit status yet
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "char-transformer"], "reads text"),
        (["--data", "text", "--model", "char-transformer"], "needs a text file"),
        (["--data", "fashion-mnist", "--data-dir", "nowhere"], "apt-get install dataset-fashion-mnist"),
        (["--sparsity", "90"], "between 0 and 1"),
        (["--updates", "40", "--cycles", "5"], "too few"),
        (["--updates", "100", "--delay", "0.95"], "too few"),
        (["--rate-from", "delay"], "needs a --delay"),
        (["--rate-from", "delay", "--delay", "0.5", "--anneal", "once"], "and --anneal each"),
        (["--pattern", "2:4", "--methods", "L1", "--magnitude", "global"], "is for --pattern unstructured"),
        (["--methods", "L1", "LTH", "--magnitude", "lamp"], "is not for LTH"),
        (["--methods", "magic"], "invalid choice"),
        (["--pattern", "2:4"], "not for scratch-ERK, LTH"),
        (["--pattern", "filter"], "not for scratch-ERK, LTH"),
        (["--pattern", "2:4", "--methods", "RST", "--sparsity", "0.9"], "means a sparsity of 0.5"),
        (["--engine", "ray"], "pip install '.[ray]'"),
        (["--engine", "ray", "--minutes", "5"], "leave out torchrun and --engine"),
        (["--weight-decay", "-1"], "less than 0"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        compare_tickets.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_option_has_its_own_help_text():
    texts = [action.help for action in make_parser("")._actions]
    assert all(texts)
    assert len(texts) == len(set(texts))


def test_images_are_scaled_by_the_training_part():
    train = (torch.full((8, 1, 2, 2), 10, dtype=torch.uint8), torch.arange(8) % 2)
    train[0][:, :, 0] = 20
    data = Images(train, train, validation=2)
    x, _ = next(data.evaluation_batches("test"))
    assert x.mean() == pytest.approx(0, abs=1e-6)
    assert (data.mean.item(), data.example_shape, data.classes) == (15.0, (1, 2, 2), 2)

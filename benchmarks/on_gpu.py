"""Everything that is claimed of CUDA, checked and measured on one GPU in at most nine minutes.

Each part runs in its own process: one that fails, hangs or leaves the device in a bad state costs its own rows alone.
The table is written to ``benchmarks/results/on_gpu.md`` when all parts ran on a GPU, and after each of them, so that an
interruption loses little. ``--device cpu --small`` tries the script itself where there is no GPU.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import enforce
import host_cost
import inference
import kept as kept_weights
import masks as mask_drawing
import networks
import penalty
import torch
import train_step
from measuring import arguments, machine, ratios, seconds, spread, table
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors import kernels
from torch_dual_ticket.masks.seeded import SeededMask

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "on_gpu.md"
sys.path.append(str(ROOT / "tests"))

from models import finalize_quietly  # noqa: E402
from reference import ExplicitLoop  # noqa: E402
from simulated_cuda import training  # noqa: E402

LIMIT, LIMIT_OF_PART = 520, 150  # seconds
STOCK = "torch.nn.utils.prune"
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
CAPTURABLE = functools.partial(ADAMW, capturable=True)
INEXACT = 1e-3  # capturable optimizers compute their bias corrections in float32
HALF = 5e-2  # of the largest weight, after ten updates in half precision


class Row(NamedTuple):
    what: str
    value: str
    aim: str = ""
    verdict: str = ""  # "ok", "missed", "FAILED" or "skipped"; "" where nothing is aimed at


class SkippedError(Exception):
    """Why something cannot be done here."""


Measure = Callable[[], "list[Row]"]
Part = Iterator[tuple[str, Measure]]  # what is measured, and how


def main() -> int:
    small = "tiny sizes, and without what takes long: to try the script"
    options = arguments(__doc__, device="cuda", parts=tuple(PARTS), small=small)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("this torch sees no CUDA device; --device cpu --small tries the script without one")
    is_kept = options.device.startswith("cuda") and not options.small and options.parts == list(PARTS)
    rows, taken, started = [], [], time.monotonic()
    for name in options.parts:
        begun = time.monotonic()
        limit = max(0.0, min(LIMIT_OF_PART, started + LIMIT - begun))
        rows += [[name, *row] for row in rows_of(name, options, limit)]
        taken.append(f"{name} {time.monotonic() - begun:.0f}")
        print(f"{name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        text = table(["part", "what", "value", "aim", ""], rows)
        text += f"\n\n{machine(options)}. Seconds that the parts took: {', '.join(taken)}."
        if is_kept:
            RESULTS.write_text(f"# On a GPU\n\n```console\n$ python benchmarks/on_gpu.py\n```\n\n{text}\n", "utf-8")
    print(text)
    return int(any("FAILED" in row for row in rows))


def rows_of(name, options, limit):
    """The rows of a part, which runs in a process that is killed when its time is over."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(name, options, theirs))
    process.start()
    theirs.close()
    deadline, rows = time.monotonic() + limit, []
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            rows.append(ours.recv())
        rows.append(Row("the rest", f"no time was left after {limit:.0f} s", verdict="skipped"))
    except EOFError:
        process.join()
        if process.exitcode:
            rows.append(Row("the rest", f"the process ended with exit code {process.exitcode}", verdict="FAILED"))
    process.kill()
    process.join()
    return rows


def _send_rows(name, options, connection):
    torch.set_num_threads(options.threads)
    for row in made_here(name, options):
        connection.send(row)


def made_here(name, options):
    """The rows of a part: what goes wrong in one of its measurements is a row too."""
    for what, measure in PARTS[name](options):
        try:
            with warnings.catch_warnings():  # nothing is squeezed out in so few updates
                warnings.filterwarnings("ignore", message="with lr=|the masked weights")
                found = measure()
        except SkippedError as reason:
            found = [Row("", str(reason), verdict="skipped")]
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())
            found = [Row("", message[:300], verdict="FAILED")]
        for row in found:
            yield row._replace(what=", ".join(filter(None, (what, row.what))))
        gc.collect()


def needs_cuda(options):
    if not options.device.startswith("cuda"):
        raise SkippedError("needs CUDA")


def takes_long(options):
    if options.small:
        raise SkippedError("left out by --small")


# ---------------------------------------------------------------------- what must be equal


def network() -> nn.Module:
    """Layers of less and of more than the weights up to which masks have the weight's dtype."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 2 * kernels.SMALL // 256), nn.Tanh(), nn.Linear(2 * kernels.SMALL // 256, 5)),
    )


def difference(mine: nn.Module, theirs: nn.Module) -> float:
    """Of all parameters and buffers, relative to the largest value of each tensor."""
    worst = [torch.zeros((), dtype=torch.float64)]
    for name, value in theirs.state_dict().items():
        expected, found = value.double().cpu(), mine.state_dict()[name].double().cpu()
        worst.append((found - expected).abs().max() / expected.abs().max())
    return float(torch.stack(worst).max())  # NaN, if one is


def within(value: float, limit: float) -> list[Row]:
    return [Row("", f"differs by {value:.1e}", f"≤ {limit:g}", "ok" if value <= limit else "FAILED")]


def golden_masks(options) -> Part:
    """As they are on every device, and in every release."""
    cases = json.loads((ROOT / "tests" / "masks" / "golden.json").read_text(encoding="utf-8"))

    def golden():
        wrong = [case for case in cases if sha256(case, options.device) != case["sha256"]]
        return [Row("", f"{len(cases) - len(wrong)} of {len(cases)} equal", "all", "FAILED" if wrong else "ok")]

    def large(pattern, side):
        spec = SeededMask(0, "weight", (side, side), side * side // 2, pattern)
        differ = int((spec.draw(device=options.device).cpu() != spec.draw()).sum())
        return [Row("", f"{differ} weights differ from the CPU's", "0", "FAILED" if differ else "ok")]

    yield "golden masks", golden
    side = 64 if options.small else 5000
    for pattern in ("unstructured", "2:4"):
        yield f"{side} × {side}, {pattern}", functools.partial(large, pattern, side)


def sha256(case, device):
    fields = {key: case[key] for key in ("seed", "name", "shape", "pruned", "pattern", "transposed")}
    mask = SeededMask(**fields).draw(offset=case["offset"], size=case["size"], device=device)
    bits = "".join("1" if kept else "0" for kept in reversed(mask.flatten().tolist()))
    return hashlib.sha256(int(bits, 2).to_bytes(-(-len(bits) // 8), "little")).hexdigest()


def of_parameters(make_optimizer, **options):
    return lambda model: make_optimizer(model.parameters(), **options)


def capturable(model: nn.Module) -> torch.optim.Optimizer:
    return ADAMW(model.parameters(), capturable=model[0].weight.is_cuda)


LIVES = {  # optimizer, tolerance, and what is unusual about the training
    "SGD": (of_parameters(SGD), 1e-9, {}),
    "SGD one by one": (of_parameters(SGD, foreach=False), 1e-9, {}),
    "SGD fused": (of_parameters(SGD, fused=True), 1e-9, {}),
    "AdamW foreach": (of_parameters(ADAMW, foreach=True), 1e-9, {}),
    "AdamW fused": (of_parameters(ADAMW, fused=True), 1e-9, {}),
    "AdamW capturable": (capturable, INEXACT, {}),
    "channels_last": (
        of_parameters(SGD),
        1e-9,
        {"build": lambda: network().double().to(memory_format=torch.channels_last)},
    ),
    "2:4": (of_parameters(SGD), 1e-9, {"pattern": "2:4", "sparsity": None, "exclude": ["0"]}),
    "two cycles": (of_parameters(SGD), 1e-9, {"cycles": 2}),
    "masks not stored": (of_parameters(SGD), 1e-9, {"store_masks": False}),
    "autocast bfloat16": (of_parameters(SGD), HALF, {"build": network, "autocast": torch.bfloat16}),
    "GradScaler float16": (
        of_parameters(SGD),
        HALF,
        {"build": network, "autocast": torch.float16, "is_scaled": True, "infinite_at": (2, 9)},
    ),
    "GradScaler float16, fused": (  # Adam would make large steps of the rounding of small gradients
        of_parameters(SGD, fused=True),
        HALF,
        {"build": network, "autocast": torch.float16, "is_scaled": True},
    ),
}
COMPILED = {"torch.compile": {}, "torch.compile, reduce-overhead": {"mode": "reduce-overhead"}}


def life(device, make_optimizer, tolerance, settings, **on_device):
    """Transformation, finalize() and finetuning there, beside the same on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    settings = {"build": lambda: network().double(), **settings}
    expected, _ = training.train("cpu", make_optimizer, **settings)
    model, rst = training.train(device, make_optimizer, **settings, **on_device)
    training.assert_holds_zeros(model, rst)
    return within(difference(model, expected), tolerance)


def lives(options) -> Part:
    for name, settings in LIVES.items():
        yield name, functools.partial(life, options.device, *settings)


def compiled_lives(options) -> Part:
    def compiled(modes):
        takes_long(options)
        return life(options.device, of_parameters(SGD), 1e-9, {}, place=lambda model: model.compile(**modes))

    for name, modes in COMPILED.items():
        yield name, functools.partial(compiled, modes)


def captured(options, make_optimizer, make_other, tolerance):
    """CUDA graphs of an update in either phase, whose replays have a growing λ, beside the explicit loop on the CPU."""
    needs_cuda(options)
    steps, warm_up = 8, 3
    inputs = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(2 * steps)]
    torch.manual_seed(0)
    other = network().double()
    model = copy.deepcopy(other).to(options.device)
    rst = RSTScheduler(model, 0.75, steps=steps, max_penalty=5, seed=3)
    explicit = ExplicitLoop(other, {name: kept.cpu() for name, kept in rst.masks.items()}, steps=steps, max_penalty=5)
    optimizer, its_optimizer = make_optimizer(model.parameters()), make_other(other.parameters())
    batch = torch.empty_like(inputs[0], device=options.device)

    def update():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    def updates(inputs, function):
        for x in inputs:
            batch.copy_(x)
            function()
            rst.step()

    for phase in (inputs[:steps], inputs[steps:]):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            updates(phase[:warm_up], update)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update()
        updates(phase[warm_up:], graph.replay)
        for x in phase:
            its_optimizer.zero_grad()
            other(x).square().mean().backward()
            explicit.before_update()
            its_optimizer.step()
            explicit.after_update()
        if not explicit.finalized:
            assert rst.done, f"{rst!r} after {steps} updates"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="a CUDA graph of the update was captured before")
                finalize_quietly(rst)
            explicit.finalize()
    training.assert_holds_zeros(model, rst)
    return within(difference(model, other), tolerance)


def graphs(options) -> Part:
    yield "SGD", functools.partial(captured, options, SGD, SGD, 1e-9)
    yield "AdamW capturable", functools.partial(captured, options, CAPTURABLE, ADAMW, INEXACT)


def waits(options, make_optimizer, is_scaled):
    """torch raises where the host waits for the device."""
    needs_cuda(options)
    model = training.new_network(options.device, network)
    rst = RSTScheduler(model, 0.75, steps=100, seed=3)
    optimizer = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0) if is_scaled else None
    x = torch.randn(4, 3, 8, 8, device=options.device)

    def updates(count):
        for _ in range(count):
            training.update(model, optimizer, lambda: (model(x) - 1).square().mean(), scaler)
            rst.step()

    def without_waiting():
        torch.cuda.set_sync_debug_mode("error")
        try:
            updates(5)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    updates(1)
    without_waiting()
    finalize_quietly(rst)
    without_waiting()
    return [Row("", "waits for nothing in either phase", "no wait", "ok")]


def host_waits(options) -> Part:
    sgd, adamw = functools.partial(SGD, fused=True), functools.partial(ADAMW, fused=True)
    yield "SGD foreach", functools.partial(waits, options, functools.partial(SGD, foreach=True), False)
    yield "SGD fused", functools.partial(waits, options, sgd, False)
    yield "AdamW fused", functools.partial(waits, options, adamw, False)
    yield "AdamW capturable", functools.partial(waits, options, CAPTURABLE, False)
    # With other optimizers torch's own GradScaler waits.
    yield "SGD fused, GradScaler", functools.partial(waits, options, sgd, True)
    yield "AdamW fused, GradScaler", functools.partial(waits, options, adamw, True)


# ---------------------------------------------------------------------- what it costs


def in_turns(candidates, base, options, least=2e-3):
    """Ratios to the base, in turns of so many calls that one of the base takes this long: the device need not wait."""
    for candidate in candidates.values():
        candidate()
    once = min(seconds(candidates[base], options.device) for _ in range(3))
    times = 1 if options.small else math.ceil(least / once)

    def turn(candidate):
        for _ in range(times):
            candidate()

    turns = {name: functools.partial(turn, candidate) for name, candidate in candidates.items()}
    return ratios(turns, base, options.rounds, options.device)


def ratio_rows(found, aims, base):
    """A row for each candidate but the base, whose median must not exceed its aim."""
    rows = []
    for name, ratio in found.items():
        if name != base:
            aim = aims.get(name)
            verdict = "" if aim is None else "ok" if ratio[0] <= aim else "missed"
            rows.append(Row(name, spread(ratio), "" if aim is None else f"≤ {aim:g}", verdict))
    return rows


def update_kernels(options) -> Part:
    """The penalty, and keeping zeros: time relative to one addition of the weights to the gradients."""
    sizes = {"5K": 5_000} if options.small else {"25M": 25_000_000, "200M": 200_000_000}

    def penalized(size, dtype):
        found = penalty.ways(size, options.device, all_of_them=size < 100_000_000, dtype=dtype)
        if not options.small:
            found["compiled"] = compiled_penalty(size, options.device, dtype)
        aim = {"this library": 1.15} if dtype is torch.float32 else {}
        return ratio_rows(in_turns(found, penalty.BASE, options), aim, penalty.BASE)

    def bandwidth(size):
        add = penalty.ways(size, options.device, all_of_them=False)[penalty.BASE]
        add()
        rate = 12 * size / min(seconds(add, options.device) for _ in range(10))
        return [Row("", f"{rate / 1e9:.0f} GB/s")]

    def held(size):
        found = enforce.ways(size, options.device, stock=size < 100_000_000)
        return ratio_rows(in_turns(found, enforce.BASE, options), {}, enforce.BASE)

    for label, size in sizes.items():
        yield f"{penalty.BASE}, {label}", functools.partial(bandwidth, size)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            yield f"penalty, {label} {name}", functools.partial(penalized, size, dtype)
        yield f"keeping zeros, {label}", functools.partial(held, size)
    name = "ResNet-20" if options.small else "ResNet-50"
    yield f"penalty, {name}", functools.partial(of_a_network, name, options)


def compiled_penalty(size, device, dtype):
    """What a kernel made for this alone would take: torch's compiler makes it."""
    weight, grad = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    pruned = (torch.rand(size, device=device) < 0.9).to(torch.uint8)
    add = torch.compile(lambda grad, weight, pruned: grad.addcmul_(weight, pruned, value=penalty.PENALTY))
    return lambda: add(grad, weight, pruned)


def of_a_network(name, options):
    """All layers in one call, as an update does it, beside one addition for all layers."""
    build, _ = networks.NETWORKS[name]
    weights = [weight.detach().to(options.device) for weight in build().parameters() if weight.dim() > 1]
    grads = [torch.randn_like(weight) for weight in weights]
    pruned = [torch.rand_like(weight) < 0.9 for weight in weights]
    pruned = [mask.to(torch.uint8 if mask.numel() > kernels.SMALL else torch.float32) for mask in pruned]
    base, pairs = "one addition for all", list(zip(grads, weights, strict=True))
    candidates = {
        base: lambda: torch._foreach_add_(grads, weights, alpha=penalty.PENALTY),
        "one addition for each": lambda: [g.add_(w, alpha=penalty.PENALTY) for g, w in pairs],
        "this library": lambda: kernels.add_scaled_all_(grads, weights, pruned, penalty.PENALTY),
    }
    return ratio_rows(in_turns(candidates, base, options), {}, base)


def drawing(options) -> Part:
    """How many times as fast as torch's random_unstructured a mask is drawn."""

    def times_as_fast(size):
        found = in_turns(mask_drawing.ways(size, options.device), "this library", options)
        middle, low, high = found[STOCK]
        verdict = "ok" if middle >= 20 else "missed"
        rows = [Row(f"speed of {STOCK}", f"{middle:.1f} times ({low:.1f}–{high:.1f})", "≥ 20", verdict)]
        others = {name: ratio for name, ratio in found.items() if name != STOCK}
        return rows + ratio_rows(others, {}, "this library")

    sizes = {"5K": 5_000} if options.small else {"1M": 1_000_000, "25M": 25_000_000}
    for label, size in sizes.items():
        yield f"{label} weights", functools.partial(times_as_fast, size)


STEPS = [  # network, batch, optimizer, and what the two phases may take
    ("ResNet-50, 224²", 32, "SGD", (1.03, 1.05)),
    ("ResNet-50, 224²", 256, "SGD", ()),
    ("Transformer-12, 768", 32, "AdamW", ()),
]
SMALL_STEPS = [("ResNet-20", 2, "SGD", (1.03, 1.05))]


def steps(options) -> Part:
    """Whole steps in bfloat16, time relative to dense."""

    def step(name, batch, optimizer, aims):
        case = (name, batch, optimizer, False, options.device, torch.bfloat16)
        torch.backends.cudnn.benchmark = True
        candidates = {way: train_step.make_step(way, *case) for way in train_step.WAYS}
        found = in_turns(candidates, "dense", options, least=0.05)
        stock = found[STOCK][0]
        aimed = dict(zip(("transformation", "finetuning"), aims, strict=False))
        rows = []
        for row in ratio_rows(found, aimed, "dense"):
            if row.what in aimed:
                verdict = row.verdict if found[row.what][0] < stock else "missed"
                row = row._replace(aim=f"{row.aim}, below {STOCK}", verdict=verdict)
            rows.append(row)
        return rows

    for case in SMALL_STEPS if options.small else STEPS:
        yield ", ".join(map(str, case[:3])), functools.partial(step, *case)


def memory(options) -> Part:
    """The peak of two steps, above that of the dense ones."""

    def peaks(name, batch, optimizer):
        needs_cuda(options)
        found = {}
        for way in train_step.WAYS + train_step.SEED_ALONE:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            peak = train_step.memory_of(way, name, batch, optimizer, False, options, torch.bfloat16)
            found[way] = peak - before
        dense = found.pop("dense")
        return [Row(way, f"{(peak - dense) / 2**20:+.0f} MB") for way, peak in found.items()]

    for *case, _ in SMALL_STEPS if options.small else STEPS[::2]:
        yield ", ".join(map(str, case)), functools.partial(peaks, *case)


def host(options) -> Part:
    """What a step costs the host where kernels take no time."""
    names = ["161 layers of 4 weights"] if options.small else list(host_cost.NETWORKS)

    def cost(name, optimizer):
        build, _, masked = host_cost.NETWORKS[name]
        masks = dict(RSTScheduler(build(), seed=0, **masked).masks)
        ways = {way: host_cost.make_step(way, name, optimizer, masks, options.device) for way in host_cost.WAYS}
        rows = host_cost.compare(host_cost.measure(ways, options.rounds), len(masks))
        return [
            Row(way, f"{ratio} of dense, {micro} µs per layer" + f", {share} of {STOCK}" * bool(share))
            for way, ratio, micro, *_, share in rows
        ]

    for name in names:
        for optimizer in list(host_cost.OPTIMIZERS)[: 1 if options.small else 2]:
            yield f"{name}, {optimizer}", functools.partial(cost, name, optimizer)


def two_to_four(options) -> Part:
    """Linear layers of 2:4 tickets as semi-structured weights, float16."""

    def layer(inputs, outputs):
        needs_cuda(options)
        dense, fast = inference.two_to_four(inputs, outputs, options.device)
        x = torch.randn(64, inputs, dtype=torch.half, device=options.device)
        with torch.inference_mode():
            expected, found = dense(x).double(), fast(x).double()
        rows = within(float((found - expected).abs().max() / expected.abs().max()), 1e-2)
        for batch in (64, 1024, 8192):
            x = torch.randn(batch, inputs, dtype=torch.half, device=options.device)
            ratio = ratios(inference.alike({"dense": dense, "2:4": fast}, x), "dense", options.rounds, options.device)
            rows.append(Row(f"{batch} rows", f"{spread(ratio['2:4'])} of dense"))
        return rows

    for inputs, outputs in ((1024, 1024), (1024, 4096), (4096, 4096), (8192, 8192)):
        yield f"{inputs} -> {outputs}", functools.partial(layer, inputs, outputs)


# ---------------------------------------------------------------------- training of the kept weights alone


def kept(options) -> Part:
    """AdamW's memory and time, and the gradients that two ranks on one GPU send."""
    name, (build, shape) = next(iter(kept_weights.NETWORKS.items()))
    if options.small:
        name, build, shape = "a layer", lambda: nn.Linear(48, 10), (2, 48)

    def compare():
        rows = kept_weights.compare(build, shape, 0.9, options)
        what = "lives through a step", "step of dense, fused", "part of fused", "part of foreach"
        return [Row(way, "; ".join(map(" ".join, zip(found, what, strict=True)))) for way, *found in rows]

    def send():
        needs_cuda(options)
        share = kept_weights.on_two_ranks(0.9, options.device)
        return [Row("", share, "≤ 0.11", "ok" if float(share.split("(")[1].split(")")[0]) <= 0.11 else "FAILED")]

    yield f"{name}, 90 % masked, AdamW", compare
    yield "sent by DDP, two ranks on one GPU", send


PARTS = {  # what is short and must hold comes first
    "masks": golden_masks,
    "lives": lives,
    "waits": host_waits,
    "graphs": graphs,
    "update": update_kernels,
    "drawing": drawing,
    "steps": steps,
    "2:4": two_to_four,
    "memory": memory,
    "host": host,
    "compiled": compiled_lives,
    "kept": kept,
}

if __name__ == "__main__":
    sys.exit(main())

"""DTensor parameters: tensor parallelism alone and under FSDP2, and replicas whose gradients are partial sums."""

import gc
import warnings
from types import FunctionType, ModuleType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from halves import STEPS, InOneProcess, assert_replicated, assert_zero, full_loss, half_loss, live_alike, whole_state
from models import batch, finalize_quietly, make
from ranks import everywhere, needs_fsdp2, on_four_ranks, on_two_ranks
from torch import nn

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._engine import optimizer_hooks
from torch_dual_ticket._tensors.dtensor import local_offset
from torch_dual_ticket.masks.seeded import SeededMask

# torch 2.6 multiplies DTensors by a clipping factor in float32.
TOLERANCE = 1e-12 if torch.__version__ >= "2.7" else 1e-6


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)
    )


def even_mlp() -> nn.Module:
    """The sizes that FSDP2 takes over tensor parallelism in every release of torch."""
    return nn.Sequential(
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)
    )


def parallelize(model: nn.Module, mesh: object) -> nn.Module:
    """Layers split by rows and by columns, in sizes that divide by two and in sizes that do not."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(),
        "4": ColwiseParallel(output_layouts=Replicate()),
        "6": RowwiseParallel(input_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> object:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def local_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.to_local().shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("set_to_none", [True, False], ids=["new_gradients", "zeroed_gradients"])
@pytest.mark.parametrize("parallelized", ["before", "after"])
@on_two_ranks
def test_agrees_with_one_process(parallelized, set_to_none):
    model = make(mlp)
    if parallelized == "before":
        parallelize(model, mesh(2))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    if parallelized == "after":
        parallelize(model, mesh(2))
    rank = dist.get_rank()
    shapes = local_shapes(model)
    assert [shapes[f"{layer}.weight"] for layer in (0, 2, 4, 6)] == [(4, 12), (6, 4), (5 - rank, 6), (5, 5 - rank)]
    live_alike(
        model, rst, InOneProcess(make(mlp), rst.masks, loss=full_loss), set_to_none=set_to_none, tolerance=TOLERANCE
    )


@on_two_ranks
def test_masks_are_drawn_for_the_shards_alone_and_once_in_each_phase():
    model = parallelize(make(mlp), mesh(2))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(mlp), rst.masks, loss=full_loss)
    with mock.patch.object(SeededMask, "draw", autospec=True, side_effect=SeededMask.draw) as draw:
        with mock.patch("halves.assert_zero"):  # which looks at the whole masks
            live_alike(model, rst, reference, tolerance=TOLERANCE)
        rst.residual()
        asked = [(call.args[0].name, call.kwargs["size"]) for call in draw.call_args_list]
    shapes = local_shapes(model)
    assert sorted(asked) == sorted((name, shapes[name]) for name in rst.masks)


@on_two_ranks
def test_shards_that_get_other_memory_are_masked_at_the_next_forward():
    """Through ``.data``, which no version tells of."""
    model = parallelize(make(mlp), mesh(2))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    full_loss(model, 0, 0).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    finalize_quietly(rst)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().data = torch.ones_like(parameter.to_local())
        full_loss(model, 0, 0)
    assert_zero(model, rst.masks)


@on_two_ranks
def test_report_and_residual_are_those_of_one_process():
    model = parallelize(make(mlp), mesh(2))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(mlp), rst.masks, loss=full_loss)
    live_alike(model, rst, reference, updates=range(5), tolerance=TOLERANCE)
    assert rst.residual() == pytest.approx(reference.residual(), rel=TOLERANCE)
    report = finalize_quietly(rst)
    assert report.total.residual == pytest.approx(reference.residual(), rel=TOLERANCE)
    assert everywhere(report)[0] == everywhere(report)[1]
    with pytest.raises(ValueError, match=r"0\.weight.*DTensor"):
        rst.to_prune()


def replicated_loss(model: nn.Module, index: int, half: int) -> torch.Tensor:
    """The mean over a batch that is sharded over the ranks, or over one half of it in one process."""
    from torch.distributed.tensor import Shard, distribute_tensor

    x, y = batch(index, (12,))
    target = nn.functional.one_hot(y, 5).to(x.dtype)
    devices = getattr(model[0].weight, "device_mesh", None)
    if devices is None:
        return (model(x.chunk(2)[half]) - target.chunk(2)[half]).square().mean()
    x, target = (distribute_tensor(tensor, devices, [Shard(0)]) for tensor in (x, target))
    return (model(x) - target).square().mean().full_tensor()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 takes a wrong norm of partial sums, and clips by it")
@on_two_ranks
def test_replicas_whose_gradients_are_partial_sums():
    from torch.distributed.tensor import distribute_module

    model = make(mlp)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    distribute_module(model, mesh(2))
    replicated_loss(model, 0, 0).backward()
    assert model[0].weight.grad.placements != model[0].weight.placements
    live_alike(model, rst, InOneProcess(make(mlp), rst.masks, loss=replicated_loss), tolerance=TOLERANCE)
    assert_replicated(model)


def data_parallel_loss(model: nn.Module, index: int, half: int) -> torch.Tensor:
    """Two ranks share the work on a half where the model is parallelized."""
    return half_loss(model, index, half // 2 if hasattr(model, "reshard") else half)


@on_two_ranks
def test_a_gradient_that_is_sharded_otherwise_than_its_weight():
    from torch.distributed.tensor import Shard

    model = parallelize(make(mlp), mesh(2))
    rst = RSTScheduler(model, sparsity=0.6, steps=1)
    weight, kept = model[0].weight, rst.masks["0.weight"]
    full_loss(model, 0, 0).backward()
    gradient = weight.grad.full_tensor()
    weight.grad = weight.grad.redistribute(placements=[Shard(1)])
    rst.apply_penalty()
    assert torch.allclose(weight.grad.full_tensor(), gradient + weight.full_tensor().detach() * ~kept, rtol=1e-12)
    rst.step()
    finalize_quietly(rst)
    weight.grad = torch.ones_like(weight).redistribute(placements=[Shard(1)])
    rst.apply_penalty()
    assert torch.equal(weight.grad.full_tensor(), kept.to(gradient.dtype))


@needs_fsdp2
@on_four_ranks
def test_under_fsdp2():
    """The parameter of a forward is another DTensor then, and not the one whose masked weights are held."""
    from torch.distributed.fsdp import fully_shard

    devices = mesh(2, 2, names=("data", "tensor"))
    model = parallelize(make(even_mlp), devices["tensor"])
    for layer in (*model[::2], model):
        fully_shard(layer, mesh=devices["data"])
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(even_mlp), rst.masks, loss=data_parallel_loss)
    shapes = local_shapes(model)
    with (
        warnings.catch_warnings(),
        mock.patch.object(SeededMask, "draw", autospec=True, side_effect=SeededMask.draw) as draw,
        mock.patch("halves.assert_zero"),  # which looks at the whole masks
    ):
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        live_alike(model, rst, reference)
        asked = [(call.args[0].name, call.kwargs["size"]) for call in draw.call_args_list]
    assert sorted(asked) == sorted((name, shapes[name]) for name in rst.masks)
    found = whole_state(model)
    assert all(torch.equal(found[name] != 0, kept) for name, kept in rst.masks.items())


@needs_fsdp2
@on_four_ranks
def test_shards_of_shards_begin_where_they_are_said_to():
    """FSDP2 over tensor parallelism, for rows that divide by four, by two, by neither, and for a single one."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    devices = mesh(2, 2, names=("data", "tensor"))
    for rows in (8, 6, 7, 3, 1):
        numbers = torch.arange(6.0 * rows).view(rows, 6)
        for dim in (0, 1):
            layer = nn.Linear(6, rows, bias=False)
            parts = [*numbers.chunk(2, dim), numbers.narrow(dim, 0, 0)]
            part = parts[devices["tensor"].get_local_rank()].clone()
            layer.weight = nn.Parameter(
                DTensor.from_local(part, devices["tensor"], [Shard(dim)], shape=numbers.shape, stride=(6, 1))
            )
            fully_shard(layer, mesh=devices["data"])
            mine = layer.weight.to_local().detach()
            expected = numbers
            for d, offset in enumerate(local_offset(layer.weight)):
                expected = expected.narrow(d, offset, mine.shape[d])
            assert torch.equal(mine, expected), f"rows {rows}, dim {dim}: not {mine} but {expected}"


def sharded_things_of_ours() -> set[str]:
    """How objects of the package reach a mesh, a process group or a shard other than through the model."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    stack = [(thing, type(thing).__qualname__) for thing in gc.get_objects() if is_ours(type(thing))]
    found, seen = set(), set()
    while stack:
        thing, path = stack.pop()
        if isinstance(thing, (DTensor, DeviceMesh, dist.ProcessGroup)):
            found.add(f"{path} -> {type(thing).__name__}")
        elif id(thing) not in seen and not isinstance(thing, (nn.Module, torch.optim.Optimizer, type, FunctionType)):
            seen.add(id(thing))
            into = [thing for thing in gc.get_referents(thing) if not isinstance(thing, ModuleType)]
            stack += [(other, path if isinstance(other, dict) else f"{path}.{type(other).__name__}") for other in into]
    return found


def is_ours(kind: type) -> bool:
    return str(kind.__module__).startswith("torch_dual_ticket")


@pytest.mark.parametrize("finalized", [False, True])
@on_two_ranks
def test_at_the_end_of_the_process_nothing_refers_to_a_mesh_or_a_shard(finalized):
    """What is torn down then must not outlive the process group."""
    model = parallelize(make(mlp), mesh(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rst = RSTScheduler(model, sparsity=0.6, steps=20, seed=3)
    for update in range(4):
        if update == 2 and finalized:
            finalize_quietly(rst)
        optimizer.zero_grad()
        full_loss(model, update, 0).backward()
        optimizer.step()
        rst.step()
    assert sharded_things_of_ours()  # in training: so it is seen where something is
    optimizer_hooks._drop_tensors()
    assert sharded_things_of_ours() == set()
    assert rst.residual() < 1.0  # nothing is broken by that
    optimizer.step()
    if finalized:
        assert_zero(model, rst.masks)

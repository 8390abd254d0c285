"""FSDP2 (``fully_shard``): every rank penalizes and masks its own shards, and nothing is gathered for it."""

import functools
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from halves import (
    CLIP,
    FINALIZE_AT,
    STEPS,
    UPDATES,
    InOneProcess,
    assert_agrees,
    assert_zero,
    half_loss,
    live_alike,
    sgd,
    shard,
    uneven_mlp,
    whole_state,
)
from models import finalize_quietly, make
from ranks import everywhere, needs_fsdp2, on_two_ranks
from torch import nn
from torch.distributed.tensor import Shard

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket._tensors.dtensor import sum_over_shards
from torch_dual_ticket.masks.seeded import SeededMask

pytestmark = needs_fsdp2


class Around(nn.Module):
    """A root above the model that the scheduler is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def evaluate(model: nn.Module) -> torch.Tensor:
    """A forward without gradients, after which FSDP2 leaves the root's parameters whole."""
    with torch.no_grad():
        return half_loss(model, 0, dist.get_rank())


def assert_gathered(parameter: torch.Tensor) -> None:
    assert not hasattr(parameter, "placements")


# ---------------------------------------------------------------------- whole lives


@pytest.mark.parametrize("nesting", ["nested", "root"])
@pytest.mark.parametrize("sharded", ["before", "after"])
@on_two_ranks
def test_agrees_with_one_process(sharded, nesting):
    """Also with rows that do not divide by two, and a layer of one row, of which rank 1 has an empty shard."""
    model = make(uneven_mlp)
    if sharded == "before":
        shard(model, nesting)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    if sharded == "after":
        shard(model, nesting)
    assert [int(everywhere(model[4].weight.to_local().shape[0])[rank]) for rank in (0, 1)] == [1, 0]
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks))


@pytest.mark.parametrize("root", ["given", "above"])
@pytest.mark.parametrize("nesting", ["nested", "root"])
@on_two_ranks
def test_evaluation_in_the_middle_of_everything(nesting, root):
    """Before and after each backward, before and after finalize(): a change to a whole parameter would be lost."""
    inner = make(uneven_mlp)
    model = inner if root == "given" else Around(inner)
    rst = RSTScheduler(inner, sparsity=0.6, steps=STEPS)
    if nesting == "nested":
        shard(inner)
    if root == "above" or nesting == "root":
        shard(model, "root")
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks), disturb=lambda: evaluate(model))


@pytest.mark.parametrize("reshard", [False, True], ids=["stays_unsharded", "reshards"])
@on_two_ranks
def test_gradient_accumulation_without_sync(reshard):
    model = shard(make(uneven_mlp), reshard_after_forward=reshard)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks), micro_batches=3)


@on_two_ranks
def test_gradients_that_are_zeroed_in_place():
    model = shard(make(uneven_mlp))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks), set_to_none=False)


@on_two_ranks
def test_cpu_offload():
    from torch.distributed.fsdp import CPUOffloadPolicy

    model = shard(make(uneven_mlp), offload_policy=CPUOffloadPolicy(pin_memory=False))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks))


@pytest.mark.parametrize("mesh_shape", [(2, 1), (1, 2)], ids=["replicated", "sharded"])
@on_two_ranks
def test_hybrid_sharding(mesh_shape):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    model = shard(make(uneven_mlp), mesh=mesh)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks))
    shards = mesh_shape[1]
    assert sum_over_shards(torch.ones(()), model[0].weight) == shards  # replicas count once


def bf16_loss(model: nn.Module, index: int, half: int) -> torch.Tensor:
    """What FSDP2's mixed precision computes: the forward and backward of bf16 copies of the parameters."""
    if isinstance(model, nn.Module) and hasattr(model, "reshard"):
        return half_loss(model, index, half)
    copies = {name: parameter.to(torch.bfloat16) for name, parameter in model.named_parameters()}
    return half_loss(lambda x: torch.func.functional_call(model, copies, x.to(torch.bfloat16)), index, half)


@on_two_ranks
def test_bf16_mixed_precision():
    """The penalty and the zeros are those of the float64 weights; reduced in float64, the sums are exact too."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float64)
    model = shard(make(uneven_mlp), mp_policy=policy)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks, loss=bf16_loss))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@on_two_ranks
def test_an_infinity_on_one_rank_is_skipped_on_all(fused):
    model = shard(make(uneven_mlp))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    # Of the fused ones Adam is the one that knows DTensors.
    kind = functools.partial(torch.optim.Adam, lr=0.01, fused=True) if fused else sgd
    reference = InOneProcess(make(uneven_mlp), rst.masks, make_optimizer=kind)
    optimizer = kind(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for update in range(UPDATES):
        if update == FINALIZE_AT + 3:
            assert rst.done
            finalize_quietly(rst)
            reference.ticket.finalize()
        optimizer.zero_grad()
        scaler.scale(half_loss(model, update, dist.get_rank())).backward()
        is_skipped = update % 5 == 2
        if is_skipped and dist.get_rank() == 1:
            model[0].weight.grad.to_local()[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        if not is_skipped:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        progress = rst.progress
        scaler.step(optimizer)
        scaler.update()
        rst.step()
        if is_skipped:
            assert rst.progress == progress
        else:
            reference.update([update])
    assert_agrees(model, reference)
    assert_zero(model, rst.masks)


@on_two_ranks
def test_two_optimizers_on_one_sharded_model():
    model = shard(make(uneven_mlp))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(uneven_mlp), rst.masks)
    parameters = list(model.parameters())
    first, second = sgd(parameters[:3]), sgd(parameters[3:])
    both = mock.Mock(param_groups=first.param_groups + second.param_groups)
    both.zero_grad.side_effect = lambda **_: (first.zero_grad(), second.zero_grad())
    both.step.side_effect = lambda: (first.step(), second.step())
    live_alike(model, rst, reference, both)


@on_two_ranks
def test_a_model_that_is_built_on_the_meta_device():
    from torch.distributed.tensor import distribute_tensor

    with torch.device("meta"):
        model = make(uneven_mlp)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    shard(model)
    model.to_empty(device="cpu")
    start = make(uneven_mlp).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(start[name], parameter.device_mesh, parameter.placements))
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks))


@on_two_ranks
def test_sharded_after_finalize():
    model = make(uneven_mlp)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(uneven_mlp), rst.masks)
    rst.load_state_dict(rst.state_dict() | {"phase": "finetune", "ticks": STEPS})
    reference.ticket.finalize()
    live_alike(shard(model), rst, reference, updates=range(FINALIZE_AT + 1, UPDATES))


# ---------------------------------------------------------------------- what each rank does


@pytest.mark.parametrize("nesting", ["nested", "root"])
@on_two_ranks
def test_masks_are_drawn_for_the_shards_alone_and_once_in_each_phase(nesting):
    model = shard(make(uneven_mlp), nesting)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(uneven_mlp), rst.masks)
    with mock.patch.object(SeededMask, "draw", autospec=True, side_effect=SeededMask.draw) as draw:
        with mock.patch("halves.assert_zero"):  # which looks at the whole masks
            live_alike(model, rst, reference)
        evaluate(model)
        rst.residual()
        asked = [(call.args[0].name, call.kwargs["size"]) for call in draw.call_args_list]
    assert_zero(model, rst.masks)
    shards = {name: tuple(parameter.to_local().shape) for name, parameter in model.named_parameters()}
    assert sorted(asked) == sorted((name, shards[name]) for name in rst.masks)


@on_two_ranks
def test_report_and_residual_are_those_of_one_process():
    model = shard(make(uneven_mlp))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(uneven_mlp), rst.masks)
    live_alike(model, rst, reference, updates=range(5))
    assert rst.residual() == pytest.approx(reference.residual(), rel=1e-12)
    report = finalize_quietly(rst)
    assert report.total.residual == pytest.approx(reference.residual(), rel=1e-12)
    assert report.total.pruned == sum(int((~kept).sum()) for kept in rst.masks.values())
    assert everywhere(report)[0] == everywhere(report)[1]
    assert all(tuple(kept.shape) == tuple(model.get_parameter(name).shape) for name, kept in rst.masks.items())


@on_two_ranks
def test_zeros_are_in_what_is_saved_right_after_finalize():
    """Also when the root's parameters were whole in that moment, and the root is not known to the scheduler."""
    inner = make(uneven_mlp)
    model = shard(Around(inner), "root")
    rst = RSTScheduler(inner, sparsity=0.6, steps=STEPS)
    optimizer = sgd(model.parameters())
    half_loss(model, 0, dist.get_rank()).backward()
    optimizer.step()
    evaluate(model)
    assert_gathered(inner[0].weight)
    finalize_quietly(rst)
    assert_zero(model, rst.masks)


@pytest.mark.parametrize("evaluated", [False, True])
@on_two_ranks
def test_zeros_are_in_what_is_saved_whatever_has_written_to_the_shards(evaluated):
    model = shard(make(uneven_mlp), "nested")
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    half_loss(model, 0, dist.get_rank()).backward()
    sgd(model.parameters()).step()
    finalize_quietly(rst)
    for parameter in model.parameters():
        parameter.data.to_local().fill_(1.0)
    if evaluated:
        evaluate(model)
    saved = {name: value.full_tensor() for name, value in model.state_dict().items()}
    for name, kept in rst.masks.items():
        assert torch.equal(saved[name] != 0, kept)


@on_two_ranks
def test_another_model_is_left_as_it_is():
    """It may be in the middle of its forward."""
    model, other = shard(make(uneven_mlp), "root"), shard(make(uneven_mlp), "root")
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    half_loss(model, 0, dist.get_rank()).backward()
    sgd(model.parameters()).step()
    evaluate(model)
    evaluate(other)
    finalize_quietly(rst)
    assert_gathered(other[0].weight)


@pytest.mark.parametrize("through", ["parameters", "shards"])
@on_two_ranks
def test_weights_that_somebody_overwrites_are_masked_in_the_next_forward(through):
    """As in a model without shards: the whole parameter of the forward and the shard behind it."""
    model = shard(make(uneven_mlp))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(uneven_mlp), rst.masks)
    live_alike(model, rst, reference, updates=range(5))
    finalize_quietly(rst)
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter if through == "parameters" else parameter.to_local()).fill_(0.5)
        for parameter in reference.model.parameters():
            parameter.fill_(0.5)
    reference.ticket.finalize()
    assert torch.allclose(evaluate(model), half_loss(reference.model, 0, dist.get_rank()), rtol=1e-12)
    assert_agrees(model, reference)
    assert_zero(model, rst.masks)


def sharded(device: str, mesh: mock.Mock) -> SimpleNamespace:
    """What tells how a parameter is sharded, without the devices for it."""
    return SimpleNamespace(placements=(Shard(0),), device=torch.device(device), device_mesh=mesh)


def test_shards_that_are_offloaded_are_summed_up_where_the_mesh_computes():
    gpus = mock.Mock(device_type="cuda")
    value = mock.Mock()
    with mock.patch("torch.distributed.all_reduce") as reduce:
        sum_over_shards(value, sharded("cpu", gpus))
    assert value.to.call_args == mock.call("cuda")
    reduce.assert_called_once_with(value.to("cuda"), group=gpus.get_group(0))


@pytest.mark.parametrize("evaluated", [False, True])
@on_two_ranks
def test_stock_layout_is_refused(evaluated):
    model = shard(make(uneven_mlp), "root")
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    half_loss(model, 0, dist.get_rank()).backward()
    sgd(model.parameters()).step()
    if evaluated:
        evaluate(model)
    before = whole_state(model)
    if evaluated:
        evaluate(model)
    with pytest.raises(ValueError, match=r"0\.weight.*DTensor"):
        rst.finalize(layout="prune")
    assert rst.phase == "transform"
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole_state(model).items())
    finalize_quietly(rst)
    if evaluated:
        evaluate(model)
    with pytest.raises(ValueError, match=r"0\.weight.*DTensor"):
        rst.to_prune()
    assert_zero(model, rst.masks)


@on_two_ranks
def test_apply_masks_to_a_sharded_copy():
    model = shard(make(uneven_mlp))
    other = shard(make(uneven_mlp), "root")
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    evaluate(other)
    assert_gathered(other[0].weight)
    rst.apply_masks(other)
    assert_zero(other, rst.masks)


@on_two_ranks
def test_apply_penalty():
    """For an update without an optimizer, on each rank's shards; also when the root's parameters are whole."""
    model = shard(make(uneven_mlp), "root")
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    reference = InOneProcess(make(uneven_mlp), rst.masks, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    shards = list(model.parameters())

    def update() -> None:
        rst.apply_penalty()
        with torch.no_grad():
            for parameter in shards:
                parameter.to_local().add_(parameter.grad.to_local(), alpha=-0.1)

    manual = mock.Mock(param_groups=[{"params": shards}])
    manual.zero_grad.side_effect = lambda **_: [setattr(parameter, "grad", None) for parameter in shards]
    manual.step.side_effect = update
    live_alike(model, rst, reference, manual, disturb=lambda: evaluate(model))


@on_two_ranks
def test_lbfgs_compares_losses_with_the_penalty_of_all_shards():
    """Both ranks look at one batch: then the losses of a line search are those of one process."""

    def even_mlp():  # torch's LBFGS flattens the gradients, and refuses shards of different sizes
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))

    model, alone = shard(make(even_mlp)), make(even_mlp)
    for one in (model, alone):
        rst = RSTScheduler(one, sparsity=0.6, steps=4, max_penalty=0.5, seed=0)
        optimizer = torch.optim.LBFGS(one.parameters(), line_search_fn="strong_wolfe")

        def evaluated(one=one, optimizer=optimizer):
            optimizer.zero_grad()
            loss = half_loss(one, 0, 0)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(evaluated)
            rst.step()
    for name, value in whole_state(model).items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-9, atol=1e-9)


@on_two_ranks
def test_shards_that_are_changed_without_a_trace():
    """Through ``.data``, where ``apply_penalty()`` has told of updates that no optimizer makes."""
    model = shard(make(uneven_mlp))
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS)
    half_loss(model, 0, dist.get_rank()).backward()
    rst.apply_penalty()
    finalize_quietly(rst)
    for parameter in model.parameters():
        parameter.to_local().data.fill_(0.5)
    evaluate(model)
    assert_zero(model, rst.masks)


@on_two_ranks
def test_the_given_optimizer_is_found_after_an_evaluation():
    model = shard(make(uneven_mlp), "root")
    optimizer = sgd(model.parameters())
    evaluate(model)
    assert_gathered(model[0].weight)
    rst = RSTScheduler(model, sparsity=0.6, steps=STEPS, optimizer=optimizer)
    live_alike(model, rst, InOneProcess(make(uneven_mlp), rst.masks), optimizer)


@pytest.mark.parametrize("flat", [False, True], ids=["original", "flat"])
@on_two_ranks
def test_fsdp1_is_refused(flat):
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = make(uneven_mlp)
    rst = RSTScheduler(inner, sparsity=0.6, steps=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=not flat)
        for given in (model, inner):  # Lightning gives the module inside to its callbacks
            with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*fully_shard"):
                RSTScheduler(given)
        half_loss(model, 0, dist.get_rank()).backward()
    optimizer = sgd(model.parameters())
    with pytest.raises(RuntimeError, match="FSDP1"):
        rst.step() if flat else optimizer.step()

"""DeepSpeed on one process, where it is installed: plain, and with optimizer states in shards (ZeRO 1 and 2)."""

import pytest
import torch
import torch.distributed as dist
from models import finalize_quietly
from plain_loop import assert_holds_zeros, loss_of
from torch import nn

from torch_dual_ticket import RSTScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")  # it keeps the first process group that it meets
def library():
    library = pytest.importorskip("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield library
        dist.destroy_process_group()


def trained(library, stage, max_penalty, around_update):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    config = {"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = library.initialize(model=model, optimizer=optimizer, config=config)
    rst = RSTScheduler(engine, 0.8, steps=10, max_penalty=max_penalty, seed=3)
    for index in range(30):
        if index == 15:
            residual = rst.residual()
            finalize_quietly(rst)
        engine.backward(loss_of(engine(X)))
        around_update(model, rst)
        engine.step()
        rst.step()
    loss_of(engine(X))
    assert_holds_zeros(model, rst)
    return residual


def test_an_engine_without_zero(library):
    """Its optimizer is one of torch on the model's own parameters."""
    assert trained(library, 0, 10.0, lambda *_: None) < trained(library, 0, 0.0, lambda *_: None)


@pytest.mark.parametrize("stage", [1, 2])
def test_states_in_shards(library, stage):
    """Gradients are in DeepSpeed's own buffers: what the error of ``apply_penalty()`` says puts the penalty there."""

    def apply_penalty(model, rst):
        with pytest.raises(RuntimeError, match=r"ZeRO 1 and 2 set p\.grad = safe_get_full_grad"):
            rst.apply_penalty()
        for p in model.parameters():
            p.grad = library.utils.safe_get_full_grad(p).to(p.dtype)
        rst.apply_penalty()
        for p in model.parameters():
            grad, p.grad = p.grad, None
            library.utils.safe_set_full_grad(p, grad)

    assert trained(library, stage, 10.0, apply_penalty) < trained(library, stage, 0.0, apply_penalty)


@pytest.mark.parametrize("stage", [1, 2])
def test_states_in_shards_are_noticed(library, stage):
    with (
        pytest.warns(UserWarning, match="changed, but no update applied the penalty: .*master weights"),
        pytest.raises(RuntimeError, match="no update ever applied the penalty"),
    ):
        trained(library, stage, 1.0, lambda *_: None)

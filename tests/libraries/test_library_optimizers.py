"""Optimizers of schedulefree, pytorch_optimizer and torch_optimizer, where they are installed."""

import pytest
import torch
from lives import assert_same_life, training_with, updates
from models import INPUT_SHAPES, finalize_quietly, loss_of, make, mlp
from plain_loop import assert_holds_zeros

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]
POPULAR = {
    "pytorch_optimizer": (
        "AdaBelief ADOPT AdaBound AdamP Adan AdaPNM AdEMAMix CAME DAdaptAdam DiffGrad GaLore Grams Lamb LARS"
        " Lion LaProp MADGRAD MARS NovoGrad Prodigy QHAdam Ranger ScalableShampoo SCION SGDP Shampoo SOAP StableAdamW"
        " StableSPAM Tiger Yogi"
    ),
    "torch_optimizer": (
        "AdaBelief AdaBound AdaMod AdamP AggMo DiffGrad Lamb MADGRAD NovoGrad PID QHAdam Ranger SGDP Shampoo Yogi"
    ),
    "schedulefree": "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree",
}


@pytest.mark.filterwarnings("ignore:This overload of add")  # by torch, of torch_optimizer's calls
@pytest.mark.parametrize(("library", "name"), [(key, name) for key, names in POPULAR.items() for name in names.split()])
def test_an_optimizer_agrees_with_the_explicit_loop(library, name):
    kind = getattr(pytest.importorskip(library), name)

    def make_optimizer(model):
        torch.manual_seed(0)  # some draw numbers
        optimizer = kind(model.parameters(), lr=1e-2)
        if library == "schedulefree":
            optimizer.train()
        return optimizer

    assert_same_life(training_with(make_optimizer))


def test_muon_of_pytorch_optimizer():
    library = pytest.importorskip("pytorch_optimizer")

    def make_optimizer(model):
        matrices, others = (
            [p for p in model.parameters() if (p.dim() == 2) is is_matrix] for is_matrix in (True, False)
        )
        return library.Muon([{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}], lr=1e-2)

    assert_same_life(training_with(make_optimizer))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_second_derivatives(name):
    """Their estimate of the curvature needs the graph of the gradients."""
    kind = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def train(model, side):
        torch.manual_seed(0)
        optimizer = kind(model.parameters(), lr=1e-2)
        for index in updates(side):
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward(create_graph=True)
            side.before_update()
            optimizer.step()
            side.after_update()

    assert_same_life(train)


@pytest.mark.parametrize("name", ["SAM", "LookSAM"])
def test_sharpness_aware(name):
    """The penalty is that of the weights that are updated, and not of their neighbor."""
    kind = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def train(model, side):
        optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: side.before_update())
        for index in updates(side):

            def closure(index=index):
                loss = loss_of(model, index, SHAPE)
                loss.backward()
                side.after_backward()
                return loss

            optimizer.zero_grad()
            closure()
            optimizer.step(closure)
            side.after_update()

    assert_same_life(train)


def test_lookahead_of_pytorch_optimizer():
    """Slow weights from before ``finalize()`` come back after a step, until the next forward."""
    kind = pytest.importorskip("pytorch_optimizer").Lookahead

    def train(model, side):
        training_with(lambda model: kind(torch.optim.SGD(model.parameters(), lr=0.05)))(model, side)
        loss_of(model, 0, SHAPE)

    assert_same_life(train)


def test_lookahead_of_torch_optimizer():
    """It writes slow weights through ``.data``: they are masked when the mode changes, and in a saved state."""
    kind = pytest.importorskip("torch_optimizer").Lookahead
    model = make(mlp)
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.05), k=1)
    rst = RSTScheduler(model, 0.8, steps=5, seed=3)
    for index in range(12):
        if index == 6:
            finalize_quietly(rst)
        optimizer.zero_grad()
        loss_of(model, index, SHAPE).backward()
        optimizer.step()
        rst.step()
    assert rst.residual() > 0
    model.eval()
    loss_of(model, 0, SHAPE)
    assert_holds_zeros(model, rst)


@pytest.mark.filterwarnings("ignore:.*was given weights with")  # rightly, where the average had no penalty
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree", "ScheduleFreeWrapper"])
def test_schedulefree_evaluates_and_saves_zeros(name):
    """``optimizer.eval()`` moves the weights towards a state that has no zeros."""
    kind = getattr(pytest.importorskip("schedulefree"), name)
    residuals = []
    for max_penalty in (0.0, 10.0):
        model = make(mlp)
        is_wrapper = name == "ScheduleFreeWrapper"
        inner = torch.optim.SGD(model.parameters(), lr=0.05) if is_wrapper else model.parameters()
        optimizer = kind(inner, momentum=0.9) if is_wrapper else kind(inner, lr=0.05)
        rst = RSTScheduler(model, 0.8, steps=15, max_penalty=max_penalty, seed=3)
        for index in range(60):
            model.train()
            optimizer.train()
            optimizer.zero_grad()
            loss_of(model, index, SHAPE).backward()
            optimizer.step()
            rst.step()
            if index == 29:
                residuals.append(rst.residual())
                finalize_quietly(rst)
            elif index > 29:
                model.eval()
                optimizer.eval()
                assert_holds_zeros_in(model.state_dict(), rst)
                loss_of(model, 0, SHAPE)
                assert_holds_zeros(model, rst)
    assert residuals[1] < residuals[0]


def assert_holds_zeros_in(state, rst):
    for name, kept in rst.masks.items():
        assert torch.equal(state[name] != 0, kept), name


@pytest.mark.parametrize("name", ["LOMO", "AdaLOMO"])
def test_updates_within_the_backward_pass_are_noticed(name):
    """No step of an optimizer, and no moment for ``apply_penalty()``."""
    kind = getattr(pytest.importorskip("pytorch_optimizer"), name)
    model = make(mlp)
    optimizer = kind(model, lr=0.05)
    rst = RSTScheduler(model, 0.8, steps=5, seed=3)

    def train():
        for index in range(3):
            optimizer.fused_backward(loss_of(model, index, SHAPE), lr=0.05)
            rst.step()

    with pytest.warns(UserWarning, match="^0.weight, 2.weight, 4.weight changed, but no update applied the penalty"):
        train()
    with pytest.raises(RuntimeError, match="no update ever applied the penalty"):
        rst.finalize()

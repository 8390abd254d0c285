"""Loops that other libraries write or wrap, where they are installed, beside the explicit one."""

import pytest
import torch
from models import INPUT_SHAPES, assert_same, batch, finalize_quietly, mlp, twins
from plain_loop import assert_holds_zeros
from reference import ExplicitLoop
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from torch_dual_ticket import RSTScheduler

LOSS = nn.CrossEntropyLoss()
EPOCHS = 6


def dataset():
    x, y = zip(*(batch(index, INPUT_SHAPES[mlp]) for index in range(8)), strict=True)
    return TensorDataset(torch.cat(x), torch.cat(y))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Explicit(ExplicitLoop):
    """Called by hooks, as the library is, since the loop is not ours to change."""

    def __init__(self, model, masks, **schedule):
        super().__init__(model, masks, **schedule)
        self.handles = [
            register_optimizer_step_pre_hook(lambda *_: self.before_update()),
            register_optimizer_step_post_hook(lambda *_: self.after_update()),
            *(parameter.register_post_accumulate_grad_hook(self.after_backward) for parameter, _ in self.targets),
        ]

    def after_backward(self, _):
        if self.finalized:
            self.before_update()

    def step(self): ...


def assert_same_life(train):
    """``train(model, begin, end_of_epoch)`` trains for 6 epochs; ``begin(model)`` gives the scheduler."""
    schedule = {"steps": 15, "max_penalty": 10.0}

    def end_of_epoch(rst, epochs):
        epochs.append(rst)
        if len(epochs) == EPOCHS // 2:
            rst.finalize() if isinstance(rst, Explicit) else finalize_quietly(rst)

    def run(model, begin):
        epochs = []
        rst = train(model, begin, lambda rst: end_of_epoch(rst, epochs))
        assert len(epochs) == EPOCHS
        return rst

    model, other = twins(mlp)
    rst = run(model, lambda wrapped: RSTScheduler(wrapped, 0.8, seed=3, **schedule))
    assert list(rst.masks) == ["0.weight", "2.weight", "4.weight"]
    assert_holds_zeros(model, rst)
    explicit = Explicit(other, rst.masks, **schedule)
    try:
        run(other, lambda _: explicit)
    finally:
        for handle in explicit.handles:
            handle.remove()
    assert_same(model, other)


def test_accelerate():
    """``prepare``, ``accumulate``, and clipping where gradients are complete."""
    library = pytest.importorskip("accelerate")

    def train(model, begin, end_of_epoch):
        accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(dataset(), batch_size=4))
        rst = begin(wrapped)
        for _ in range(EPOCHS):
            for x, y in loader:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(LOSS(wrapped(x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                rst.step()
            end_of_epoch(rst)
        return rst

    assert_same_life(train)


def test_ignite():
    library = pytest.importorskip("ignite.engine")

    def train(model, begin, end_of_epoch):
        optimizer = sgd(model)
        rst = begin(model)
        trainer = library.create_supervised_trainer(model, optimizer, LOSS)
        trainer.add_event_handler(library.Events.ITERATION_COMPLETED, lambda _: rst.step())
        trainer.add_event_handler(library.Events.EPOCH_COMPLETED, lambda _: end_of_epoch(rst))
        trainer.run(DataLoader(dataset(), batch_size=8), max_epochs=EPOCHS)
        return rst

    assert_same_life(train)


def test_skorch():
    """``on_batch_end`` comes after evaluations too, which are no updates and do not count."""
    library = pytest.importorskip("skorch")
    numpy = pytest.importorskip("numpy")

    class Ticket(library.callbacks.Callback):
        def __init__(self, begin, end_of_epoch):
            self.begin, self.end_of_epoch = begin, end_of_epoch

        def on_train_begin(self, net, **_):
            self.rst = self.begin(net.module_)

        def on_grad_computed(self, net, **_):
            if isinstance(self.rst, Explicit):  # skorch computes gradients in a closure, after the hook has run
                self.rst.before_update()

        def on_batch_end(self, net, **_):
            self.rst.step()

        def on_epoch_end(self, net, **_):
            self.end_of_epoch(self.rst)

    def train(model, begin, end_of_epoch):
        x, y = (numpy.array(values.tolist()) for values in dataset().tensors)
        ticket = Ticket(begin, end_of_epoch)
        net = library.NeuralNetClassifier(
            model,
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.SGD,
            optimizer__momentum=0.9,
            lr=0.05,
            batch_size=8,
            max_epochs=EPOCHS,
            callbacks=[("ticket", ticket)],
            verbose=0,
        )
        net.fit(x, y)
        assert net.module_ is model
        return dict(net.callbacks_)["ticket"].rst

    assert_same_life(train)


@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Optimal order", "ignore:Full backward hook")
def test_opacus():
    """Differential privacy: the penalty is added after clipping and noise, and does not look at data."""
    library = pytest.importorskip("opacus")

    def train(model, begin, end_of_epoch):
        torch.manual_seed(0)
        loader = DataLoader(dataset(), batch_size=8)
        private, optimizer, loader = library.PrivacyEngine().make_private(
            module=model, optimizer=sgd(model), data_loader=loader, noise_multiplier=0.5, max_grad_norm=1.0
        )
        rst = begin(private)
        for _ in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                LOSS(private(x), y).backward()
                optimizer.step()
                rst.step()
            end_of_epoch(rst)
        return rst

    assert_same_life(train)

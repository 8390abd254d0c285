"""Loops that other libraries write or wrap, where they are installed: one life with each, and one without penalty."""

import pytest
import torch
from models import INPUT_SHAPES, batch, finalize_quietly, make, mlp
from plain_loop import assert_holds_zeros
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_dual_ticket import RSTScheduler

SHAPE = INPUT_SHAPES[mlp]
LOSS = nn.CrossEntropyLoss()


def dataset(dtype=torch.float32):
    x, y = zip(*(batch(index, SHAPE, dtype=dtype) for index in range(8)), strict=True)
    return TensorDataset(torch.cat(x), torch.cat(y))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def assert_a_life(train):
    """``train(model, begin, end_of_epoch)`` trains for 6 epochs; the scheduler is ``begin(model)``."""
    residuals = []
    for max_penalty in (0.0, 10.0):
        model = make(mlp, dtype=torch.float32)
        epochs = []

        def begin(wrapped, max_penalty=max_penalty):
            return RSTScheduler(wrapped, 0.8, steps=15, max_penalty=max_penalty, seed=3)

        def end_of_epoch(rst, epochs=epochs):
            epochs.append(rst.residual())
            if len(epochs) == 3:
                finalize_quietly(rst)

        rst = train(model, begin, end_of_epoch)
        assert list(rst.masks) == ["0.weight", "2.weight", "4.weight"]
        assert rst.phase == "finetune"
        assert len(epochs) == 6
        assert_holds_zeros(model, rst)
        residuals.append(epochs[2])
    assert residuals[1] < residuals[0]


def test_accelerate():
    """``prepare``, ``accumulate``, and clipping where gradients are complete."""
    library = pytest.importorskip("accelerate")

    def train(model, begin, end_of_epoch):
        accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(dataset(), batch_size=4))
        rst = begin(wrapped)
        for _ in range(6):
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

    assert_a_life(train)


def test_ignite():
    library = pytest.importorskip("ignite.engine")

    def train(model, begin, end_of_epoch):
        optimizer = sgd(model)
        rst = begin(model)
        trainer = library.create_supervised_trainer(model, optimizer, LOSS)
        trainer.add_event_handler(library.Events.ITERATION_COMPLETED, lambda _: rst.step())
        trainer.add_event_handler(library.Events.EPOCH_COMPLETED, lambda _: end_of_epoch(rst))
        trainer.run(DataLoader(dataset(), batch_size=8), max_epochs=6)
        return rst

    assert_a_life(train)


def test_skorch():
    """``on_batch_end`` comes after evaluations too, which are no updates and do not count."""
    library = pytest.importorskip("skorch")
    numpy = pytest.importorskip("numpy")

    class Ticket(library.callbacks.Callback):
        def __init__(self, begin, end_of_epoch):
            self.begin, self.end_of_epoch = begin, end_of_epoch

        def on_train_begin(self, net, **_):
            self.rst = self.begin(net.module_)

        def on_batch_end(self, net, **_):
            self.rst.step()

        def on_epoch_end(self, net, **_):
            self.end_of_epoch(self.rst)

    def train(model, begin, end_of_epoch):
        x, y = (numpy.array(values.tolist(), dtype=kind) for values, kind in zip(dataset().tensors, ("f4", "i8")))
        ticket = Ticket(begin, end_of_epoch)
        net = library.NeuralNetClassifier(
            model, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, optimizer__momentum=0.9, lr=0.05,
            batch_size=8, max_epochs=6, callbacks=[("ticket", ticket)], verbose=0,
        )
        net.fit(x, y)
        assert net.module_ is model
        return dict(net.callbacks_)["ticket"].rst

    assert_a_life(train)


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
        for _ in range(6):
            for x, y in loader:
                optimizer.zero_grad()
                LOSS(private(x), y).backward()
                optimizer.step()
                rst.step()
            end_of_epoch(rst)
        return rst

    assert_a_life(train)

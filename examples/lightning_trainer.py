"""A Lightning Trainer with the callback: the module knows nothing of it.

pip install lightning
python examples/lightning_trainer.py

It ends with: 80.0% sparse, 92.5% of the test images right
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_dual_ticket.callbacks.lightning import RSTCallback

EPOCHS = 50


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch, index):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def test_step(self, batch, index):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


lightning.seed_everything(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train = DataLoader(TensorDataset(x[:1408], y[:1408]), batch_size=64, shuffle=True)
test = DataLoader(TensorDataset(x[1408:], y[1408:]), batch_size=389)

module = Digits()
# λ rises for 20 epochs and stays at its ceiling for 5; then the masked weights are set to zero.
ticket = RSTCallback(sparsity=0.8, finalize_at=0.5, hold=5 * len(train), max_penalty=3.0, exclude=["net.4"])
checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(save_last=True)  # with the ticket's state: fit(ckpt_path=...)
trainer = lightning.Trainer(max_epochs=EPOCHS, callbacks=[ticket, checkpoints], log_every_n_steps=10)
trainer.fit(module, train)
trainer.test(module, test)

print(ticket.report)
accuracy = trainer.callback_metrics["accuracy"].item()
print(f"{ticket.scheduler.sparsity:.1%} sparse, {accuracy:.1%} of the test images right")

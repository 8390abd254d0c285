"""A whole training: validation, the best sparse checkpoint, a restarted learning rate, and resuming.

python examples/train.py run            # keeps run.pt after each epoch, and run-best.pt; stop it with Ctrl-C ...
python examples/train.py run            # ... and it goes on, to the same last bit

It ends with: best of the sparse epochs: 96.2% on validation data; 80.0% sparse, 91.3% of the test images right
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from torch_dual_ticket import RSTScheduler

EPOCHS, SPARSE_FROM, BATCH = 60, 30, 64
checkpoint, best_checkpoint = Path(f"{sys.argv[1]}.pt"), Path(f"{sys.argv[1]}-best.pt")

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train, validation, test = slice(0, 1200), slice(1200, 1408), slice(1408, None)
per_epoch = -(-1200 // BATCH)


def start_training(epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch, eta_min=0.01)


@torch.no_grad()
def accuracy(part):
    return (model(x[part]).argmax(1) == y[part]).float().mean().item()


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
optimizer, rate = start_training(SPARSE_FROM)
rst = RSTScheduler(model, 0.8, steps=24 * per_epoch, hold=6 * per_epoch, max_penalty=5.0, exclude=["4"])

first, best = 0, 0.0
if checkpoint.exists():
    saved = torch.load(checkpoint)
    first, best = saved.pop("epoch"), saved.pop("best")
    for name, state in saved.items():  # rst: the seed, how far λ is, and fingerprints of the masks, not the masks
        {"model": model, "optimizer": optimizer, "rate": rate, "rst": rst}[name].load_state_dict(state)
    print(f"resumed: {rst}")

for epoch in range(first, EPOCHS):
    for batch in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[train][batch]), y[train][batch]).backward()
        optimizer.step()
        rate.step()
        rst.step()
    if rst.done and rst.phase == "transform":
        print(rst.finalize())
        optimizer, rate = start_training(EPOCHS - SPARSE_FROM)  # momentum and rate begin anew for the sparse network
    if rst.phase == "finetune" and accuracy(validation) > best:  # a dense network would be better, and is not wanted
        best = accuracy(validation)
        torch.save(model.state_dict(), best_checkpoint)
    parts = {"model": model, "optimizer": optimizer, "rate": rate, "rst": rst}
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**states, "epoch": epoch + 1, "best": best}, checkpoint)

model.load_state_dict(torch.load(best_checkpoint))
print(f"best of the sparse epochs: {best:.1%} on validation data; ", end="")
print(f"{rst.sparsity:.1%} sparse, {accuracy(test):.1%} of the test images right")

"""Save in the middle of the transformation, and go on in a new process as if nothing had happened.

python examples/resume.py checkpoint.pt     # stops halfway and saves
python examples/resume.py checkpoint.pt     # finds the file, and goes on to the end
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from torch_dual_ticket import RSTScheduler

EPOCHS, STOP_AFTER, BATCH = 60, 15, 64
checkpoint = Path(sys.argv[1])

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
per_epoch = 1408 // BATCH

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
rst = RSTScheduler(model, 0.8, steps=24 * per_epoch, hold=6 * per_epoch, max_penalty=3.0, exclude=["4"])

first = 0
if checkpoint.exists():
    saved = torch.load(checkpoint)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    rst.load_state_dict(saved["rst"])  # the seed, how far λ is, and fingerprints of the masks: a few hundred bytes
    first = saved["epoch"]
    print(f"resumed: {rst}")

for epoch in range(first, EPOCHS):
    if epoch == STOP_AFTER and first == 0:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rst": rst.state_dict()}
        unfinished = checkpoint.with_suffix(".unfinished")
        torch.save({**states, "epoch": epoch}, unfinished)
        unfinished.replace(checkpoint)  # so that a process killed while it saves leaves the old one whole
        print(f"saved: {rst}")
        break
    for batch in torch.randperm(1408, generator=torch.Generator().manual_seed(epoch)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        rst.step()
        if rst.done:
            rst.finalize()  # the first time; after that it does nothing
else:
    accuracy = (model(x[1408:]).argmax(1) == y[1408:]).float().mean().item()
    print(f"{rst.sparsity:.1%} sparse, {accuracy:.1%} of the test images right")

"""The plain loop with mixed precision, gradient accumulation and clipping. The lines marked with # <- are the ticket's.

python examples/amp_accumulation_clipping.py

It ends with: 80.0% sparse, 92.0% of the test images right
"""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_dual_ticket import RSTScheduler  # <-

EPOCHS, BATCH, ACCUMULATE = 60, 32, 2

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16
torch.manual_seed(0)

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
loader = DataLoader(TensorDataset(x[:1408], y[:1408]), batch_size=BATCH, shuffle=True)
updates = EPOCHS * math.ceil(len(loader) / ACCUMULATE)

model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

# Half of the updates transform, of which the last fifth has λ at its ceiling. The last layer is left dense.
schedule = {"steps": updates * 4 // 10, "hold": updates // 10, "max_penalty": 3.0}  # <-
rst = RSTScheduler(model, 0.8, **schedule, exclude=["4"])  # <-

for _ in range(EPOCHS):
    for i, (images, labels) in enumerate(loader, start=1):
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device)) / ACCUMULATE
        scaler.scale(loss).backward()
        if i % ACCUMULATE == 0 or i == len(loader):
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)  # the penalty comes in here: after unscaling and clipping, once per update
            scaler.update()
            optimizer.zero_grad()
            rst.step()  # <- a step that was skipped for infinities does not count
            if rst.done and rst.phase == "transform":  # <-
                print(rst.finalize())  # <- from here zeros stay zeros

with torch.no_grad():
    accuracy = (model(x[1408:].to(device)).argmax(1).cpu() == y[1408:]).float().mean().item()
print(f"{rst.sparsity:.1%} sparse, {accuracy:.1%} of the test images right")

"""2:4 from training to fast inference: two of every four weights, the pattern that NVIDIA GPUs (Ampere and later) skip.

On a GPU the finished layers become torch's semi-structured tensors, and both are timed. On a CPU, where torch has no
fast kernel for them, it trains the same ticket and checks the pattern: there masks make nothing faster.

    python examples/two_to_four.py

It ends with: 91.8% of the test images right
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils import benchmark

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.deploy import to_semi_structured

EPOCHS, BATCH, WIDTH = 20, 64, 256

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32, device=device), torch.tensor(digits.target, device=device)

model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
model = model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
# No sparsity is given: the pattern says 50 %. The last layer is left dense.
rst = RSTScheduler(model, pattern="2:4", steps=170, hold=50, max_penalty=2.0, exclude=["4"])

for _ in range(EPOCHS):
    for batch in torch.randperm(1408).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        rst.step()
        if rst.done:
            rst.finalize()

for name, mask in rst.masks.items():
    in_fours = model.get_parameter(name).detach().unflatten(1, (-1, 4))
    assert bool(((in_fours != 0).sum(-1) <= 2).all()), name
    print(f"{name}: at most 2 of every 4 weights are not zero, {mask.float().mean():.0%} are kept")

accuracy = (model(x[1408:]).argmax(1) == y[1408:]).float().mean().item()
print(f"{accuracy:.1%} of the test images right")

if device == "cuda":
    model = model.half().eval()
    images = torch.rand(4096, 64, dtype=torch.half, device=device)
    fast = to_semi_structured(model)
    with torch.inference_mode():
        dense_output, sparse_output = model(images), fast(images)
        dense_time, sparse_time = (
            benchmark.Timer("run(images)", globals={"run": run, "images": images}).blocked_autorange().median
            for run in (model, fast)
        )
    error = float((dense_output - sparse_output).abs().max())
    print(f"dense {dense_time * 1e6:.0f} µs, 2:4 {sparse_time * 1e6:.0f} µs; outputs differ by {error:.1e} at most")
else:
    print("no CUDA device: to_semi_structured(), which makes this fast, needs one")

"""From training to a smaller and faster model: whole filters are masked, and shrink() leaves them out.

    pip install torch-pruning
    python examples/shrink_digits.py            # one network
    python examples/shrink_digits.py --seeds 5  # dense 94.7 ± 0.5 %, with half of the filters 94.8 ± 0.7 %

It ends with: 95.4% of the test images right; shrink(): 0.28 of the parameters, 0.30 of the time, the same outputs
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from scipy.stats import t
from sklearn.datasets import load_digits
from torch import nn
from torch.utils import benchmark

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.deploy import shrink

EPOCHS, BATCH = 20, 64

torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)


def train(seed, sparsity):
    """Half of the filters of two layers go. The first stays dense as in the paper, the last gives the classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    updates = EPOCHS * -(-1408 // BATCH)
    settings = {"steps": updates * 4 // 10, "hold": updates // 10, "max_penalty": 3.0}
    rst = RSTScheduler(model, sparsity, pattern="filter", exclude=["0", "8"], **settings) if sparsity else None
    for _ in range(EPOCHS):
        for batch in torch.randperm(1408).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            if rst:
                rst.step()
                if rst.done:
                    rst.finalize()
    return model.eval()


def accuracy(model):
    with torch.inference_mode():
        return (model(x[1408:]).argmax(1) == y[1408:]).float().mean().item()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, default=1, help="networks to train; from two on, dense ones beside them")
seeds = range(parser.parse_args().seeds)

model, *_ = models = [train(seed, 0.5) for seed in seeds]
small = shrink(model, x[:64])  # a plain model for inference; `model` stays as it is, to be saved or trained further
with torch.inference_mode():
    assert torch.allclose(small(x), model(x), atol=1e-3)
    times = [
        benchmark.Timer("run(x)", globals={"run": run, "x": x[:64]}).blocked_autorange(min_run_time=0.5).median
        for run in (model, small)
    ]
sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, small)]
print(small)
if len(seeds) > 1:
    groups = {"dense": [train(seed, 0) for seed in seeds], "half of the filters": models}
    for name, group in groups.items():
        right = [100 * accuracy(each) for each in group]
        half = t.ppf(0.975, len(right) - 1) * statistics.stdev(right) / len(right) ** 0.5  # of the 95 % interval
        print(f"{name}: {statistics.fmean(right):.1f} ± {half:.1f} % of the test images right")
print(f"{accuracy(small):.1%} of the test images right; ", end="")
print(f"shrink(): {sizes[1] / sizes[0]:.2f} of the parameters, {times[1] / times[0]:.2f} of the time, the same outputs")

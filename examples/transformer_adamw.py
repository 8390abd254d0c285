"""A transformer with AdamW, warm-up and cosine decay, made 80 % sparse.

It learns to say which of the symbols A, B, C and D is the most frequent in a sequence of 16.

    python examples/transformer_adamw.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from torch_dual_ticket import RSTScheduler

UPDATES, BATCH, LENGTH, WIDTH = 300, 64, 16, 32


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, symbols):
        return self.head(self.encoder(self.embedding(symbols)).mean(1))


def make_batch(size):
    symbols = torch.randint(4, (size, LENGTH))
    return symbols, F.one_hot(symbols, 4).sum(1).argmax(1)


torch.manual_seed(0)
model = Transformer()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES - 20)
schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, decay], milestones=[20])

# All linear layers but the head, and the projections in attention, which are not a module but a parameter of one.
targets = (nn.Linear, (nn.MultiheadAttention, "in_proj_weight"))
rst = RSTScheduler(model, 0.8, steps=150, hold=30, max_penalty=2.0, targets=targets, exclude=["head"])

for update in range(1, UPDATES + 1):
    symbols, answers = make_batch(BATCH)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(symbols), answers)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    rst.step()
    if rst.done and rst.phase == "transform":
        print(rst.finalize())
    if update % 100 == 0:
        print(f"update {update}: loss {loss.item():.3f}, {rst}")

rst.remove()  # a plain model, zeros in place: the fast path of nn.TransformerEncoderLayer is free again
with torch.no_grad():
    symbols, answers = make_batch(1000)
    accuracy = (model.eval()(symbols).argmax(1) == answers).float().mean().item()
print(f"{accuracy:.1%} of 1,000 new sequences right")

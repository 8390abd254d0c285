"""A transformer whose optimizer sees, and whose ranks exchange, the 10 % of its weights that stay, and nothing else.

It learns to say which of the symbols A, B, C and D is the most frequent in a sequence of 16.

    torchrun --standalone --nproc-per-node=2 examples/kept_transformer.py
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.kept import KeptParameters, kept_allreduce_hook

UPDATES, BATCH, LENGTH, WIDTH = 300, 32, 16, 64


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, symbols):
        return self.head(self.encoder(self.embedding(symbols)).mean(1))


def make_batch(size, device):
    symbols = torch.randint(4, (size, LENGTH), device=device)
    return symbols, F.one_hot(symbols, 4).sum(1).argmax(1)


def state_of(optimizer):
    return sum(value.numel() for state in optimizer.state.values() for value in state.values())


def main():
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights on all ranks, and other sequences
    network = Transformer().to(device)
    model = DistributedDataParallel(network)
    torch.manual_seed(1 + dist.get_rank())
    targets = (nn.Linear, (nn.MultiheadAttention, "in_proj_weight"))
    # Not on `model`, which keeps what is registered below: nothing could free it if that led back to it.
    rst = RSTScheduler(network, 0.9, steps=120, hold=40, max_penalty=3.0, targets=targets, exclude=["head"])
    model.register_comm_hook(rst, kept_allreduce_hook)  # all gradients until finalize(), then the kept ones
    parameters, optimizer = list(model.parameters()), torch.optim.AdamW(model.parameters(), lr=2e-3)

    for _ in range(UPDATES):
        symbols, answers = make_batch(BATCH, device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(symbols), answers)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rst.step()
        if rst.done and rst.phase == "transform":
            report, dense = rst.finalize(), optimizer
            kept = KeptParameters(rst)
            parameters, optimizer = list(kept.parameters()), torch.optim.AdamW(kept.parameters(), lr=2e-3)
            kept.move_state(dense, optimizer)
            if dist.get_rank() == 0:
                print(report)
                print(f"the optimizer's state shrinks from {state_of(dense):,} to {state_of(optimizer):,} numbers")
            del dense

    with torch.no_grad():
        symbols, answers = make_batch(1000 // dist.get_world_size(), device)
        right = (network.eval()(symbols).argmax(1) == answers).sum()
    dist.all_reduce(right)  # the last meeting of the ranks: one that ends while another needs its connection can crash
    if dist.get_rank() == 0:
        print(f"{rst.sparsity:.1%} sparse, {right.item() / 1000:.1%} of 1,000 new sequences right")


main()
dist.destroy_process_group()  # nothing has it any more: its threads end now, and not while Python shuts down

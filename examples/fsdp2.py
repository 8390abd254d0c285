"""FSDP2 (fully_shard): each rank draws only its part of each mask, and holds only its part of the zeros.

torchrun --standalone --nproc-per-node=2 examples/fsdp2.py

It ends with: 80.0% sparse, 92.8% of the test images right
"""

import os
import time

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_dual_ticket import RSTScheduler
from torch_dual_ticket.export import load_ticket, save_ticket

EPOCHS, BATCH = 60, 64


def network():
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def main():
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (int(os.environ["WORLD_SIZE"]),))
    rank, ranks = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)

    torch.manual_seed(0)
    model = network().to(mesh.device_type)
    for layer in (model[0], model[2]):  # each on its own; the root takes the rest
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # after fully_shard, as FSDP2 asks

    per_epoch = 1408 // (BATCH * ranks)
    schedule = {"steps": 24 * per_epoch, "hold": 6 * per_epoch, "max_penalty": 3.0}
    rst = RSTScheduler(model, 0.8, **schedule, exclude=["4"])

    for epoch in range(EPOCHS):
        order = torch.randperm(1408, generator=torch.Generator().manual_seed(epoch))[rank::ranks]
        for batch in order.split(BATCH)[:per_epoch]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch].to(mesh.device_type)), y[batch].to(mesh.device_type)).backward()
            optimizer.step()
            rst.step()
            if rst.done and rst.phase == "transform":
                report = rst.finalize()  # on all ranks
                if rank == 0:
                    print(report)

    save_ticket(rst, "fsdp2.safetensors")  # on all ranks: the kept weights come together, and rank 0 writes
    dist.barrier()  # now the file is there
    plain = network()
    load_ticket("fsdp2.safetensors", plain)
    mine = slice(1408 + rank, None, ranks)  # each rank tests a part
    right = (plain(x[mine]).argmax(1) == y[mine]).sum().to(mesh.device_type)
    dist.all_reduce(right)  # the last meeting of the ranks: one that ends while another needs its connection can crash
    if rank == 0:
        print(f"{rst.sparsity:.1%} sparse, {right.item() / len(y[1408:]):.1%} of the test images right")


main()
dist.destroy_process_group()
time.sleep(1)  # FSDP2 keeps threads of the group: what they still have to release must not meet the end of Python

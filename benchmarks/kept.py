"""Training the kept weights alone, beside the same optimizer on all weights with the same masks held: memory and time.

What lives through a step: weights, gradients, the optimizer's state, masks, indices, and the vectors of kept weights.
Activations and what an operation needs for a moment are not counted; with the kept weights alone that is one whole
gradient at a time. The whole step is relative to dense AdamW (fused) with the masks held. The optimizer's part is what
takes a gradient to new weights: for the kept weights with gathering and writing back, for all weights the bare
optimizer's step, without masks. The bytes are those that one of two ranks gives to all_reduce in a step, and
the time on a link is computed from them.
"""

from __future__ import annotations

import tempfile

import networks
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep
import torch.nn.functional as F
from measuring import arguments, as_if_alone, machine, ratios, spread, table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_dual_ticket.baselines import random_ticket
from torch_dual_ticket.kept import KeptParameters, kept_allreduce_hook

SPARSITIES = [0.5, 0.75, 0.9, 0.98]
TARGETS = (nn.Linear, nn.Conv2d, (nn.MultiheadAttention, "in_proj_weight"))
NETWORKS = {  # how it is built, the shape of a batch
    "ResNet-50": (networks.NETWORKS["ResNet-50"][0], (8, 3, 32, 32)),
    "Transformer-12, 25M": (lambda: networks.Transformer(416, 4, 1664), (8, 32, 416)),
}
LARGE = {"Transformer-12, 200M": (lambda: networks.Transformer(1184, 4, 4736), (8, 32, 1184))}
LINK = 1e9  # bits per second; each of two ranks sends what it gives to all_reduce once
WAYS = ["dense, fused", "dense, foreach", "kept, fused", "kept, foreach"]


def main() -> None:
    options = arguments(__doc__, rounds=5, large="a transformer of 200M weights, too")
    rows = [
        [f"{name}, {sparsity:.0%} masked", *row]
        for name, (build, shape) in {**NETWORKS, **(LARGE if options.large else {})}.items()
        for sparsity in SPARSITIES
        for row in compare(build, shape, sparsity, options)
    ]
    print(table(["model", "AdamW", "lives through a step", "whole step", "part, to fused", "part, to foreach"], rows))
    print("\nSent in a step of ResNet-50: " + "; ".join(map(on_two_ranks, SPARSITIES)) + ".")
    print(f"\n{machine(options)}; float32; all linear and convolutional layers and attention's projections have masks")


def compare(build, shape, sparsity, options):
    """Of each way what lives, and the times of the whole step and of the optimizer's part."""
    bare = {way: bare_update(build, way, options.device) for way in WAYS if way.startswith("dense")}
    trainings = {way: Training(build, shape, way, sparsity, options.device) for way in WAYS}
    steps = {way: as_if_alone(training.step, training.held) for way, training in trainings.items()}
    updates = {way: as_if_alone(trainings[way].update, trainings[way].held) for way in WAYS if way not in bare}
    updates |= {way: as_if_alone(update, None) for way, update in bare.items()}
    step = ratios(steps, WAYS[0], options.rounds, options.device)
    parts = [ratios(updates, way, 2 * options.rounds, options.device) for way in bare]
    lives = {way: training.bytes() for way, training in trainings.items()}
    for way in WAYS:
        share = f"{lives[way] / 2**20:,.0f} MB ({lives[way] / lives[WAYS[0]]:.2f})"
        yield way, share, spread(step[way]), *(spread(part[way]) for part in parts)


class Training:
    def __init__(self, build, shape, way, sparsity, device):
        torch.manual_seed(0)
        self.model = build().to(device)
        self.held = random_ticket(self.model, sparsity, seed=0, targets=TARGETS)
        self.kept = KeptParameters(self.held) if way.startswith("kept") else None
        parameters = (self.kept or self.model).parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, **{way.split(", ")[1]: True})
        self.x, self.y = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)
        self.gradients = None

    def step(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def update(self):
        """From gradients that are there to new weights."""
        if self.gradients is None:
            self.gradients = [torch.randn_like(parameter) for parameter in self.model.parameters()]
        self.optimizer.zero_grad()
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()  # which gathers what no hook has seen

    def bytes(self):
        """Of all memory that is in use before, in and after the optimizer's step."""
        self.gradients = None
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        parameters = [*(self.kept or self.model).parameters()]  # the gradients of the others have no memory
        tensors = [*self.model.parameters(), *parameters, *(parameter.grad for parameter in parameters)]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        tensors += [one.cache._cached.tensor for one in self.held._ticket.parameters if one.cache._cached is not None]
        if self.kept is not None:
            tensors += [weight.index for weight in self.kept._values.weights.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


def bare_update(build, way, device):
    """The step of an optimizer on weights of these shapes, with gradients, and nothing else."""
    parameters = [nn.Parameter(parameter.detach()) for parameter in build().to(device).parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-4, **{way.split(", ")[1]: True}).step


def on_two_ranks(sparsity, device="cpu"):
    """What a step sends of all gradients; both ranks use the same device."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(send, (f"{folder}/store", f"{folder}/sent", sparsity, device), 2)
        dense, kept = torch.load(f"{folder}/sent")
    seconds = " in place of ".join(f"{8 * sent / LINK:.2f}" for sent in (kept, dense))
    return (
        f"{kept / 2**20:.1f} of {dense / 2**20:.1f} MB ({kept / dense:.3f}) at {sparsity:.0%}, {seconds} s at 1 Gbit/s"
    )


def send(rank, store, result, sparsity, device):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    build, shape = NETWORKS["ResNet-50"]
    torch.manual_seed(0)
    network = build().to(device)
    model = DistributedDataParallel(network)
    held = random_ticket(network, sparsity, seed=0, targets=TARGETS)
    model.register_comm_hook(held, kept_allreduce_hook)
    sent, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    model(torch.randn(2, *shape[1:], device=device)).sum().backward()
    if rank == 0:
        torch.save((sum(parameter.nbytes for parameter in model.parameters()), sum(sent)), result)
    dist.barrier()  # a rank that ends while another still needs its connection can crash
    del model  # which keeps the group, and its threads, alive
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

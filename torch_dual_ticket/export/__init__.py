"""Tickets as files: only the weights that were kept, and the seed (or the mask's bits) for where they belong.

================================  ====================================================================================
``save_ticket(rst, path)``        write a finalized model
``load_ticket(path, model)``      read it into a model of the same architecture, in place, all or nothing
``read_ticket(path)``             read it as an ordinary, dense ``state_dict``
================================  ====================================================================================

>>> import torch
>>> from torch import nn
>>> from torch_dual_ticket import RSTScheduler
>>> def build():
...     return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
>>> model = build()
>>> rst = RSTScheduler(model, sparsity=0.9, steps=1)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
>>> for _ in range(10):
...     optimizer.zero_grad()
...     model(torch.randn(8, 64)).square().mean().backward()
...     optimizer.step()
...     rst.step()
>>> report = rst.finalize()
>>> path = f"{getfixture('tmp_path')}/ticket.safetensors"
>>> save_ticket(rst, path)

To finetune the loaded weights, let a scheduler keep the zeros again. Build it with the same arguments; without a seed
it takes the ticket's.

>>> model = build()
>>> state = load_ticket(path, model)
>>> rst = RSTScheduler(model, sparsity=0.9, steps=1)
>>> rst.load_state_dict(state)
>>> rst.phase, f"{rst.sparsity:.1%}"
('finetune', '90.0%')

The way back from a dense ``state_dict`` is ``model.load_state_dict(dense)``, ``rst.load_state_dict(state)``, and
:func:`save_ticket`.

>>> dense = read_ticket(path)
>>> dense["0.weight"].shape, int((dense["0.weight"] != 0).sum())
(torch.Size([128, 64]), 819)

The format is safetensors, from the extra ``files`` of this package (``pip install numpy safetensors``). Nothing is
pickled, and a checksum finds every changed bit.
"""

from .ticket_file import load_ticket, read_ticket, save_ticket

__all__ = ["load_ticket", "read_ticket", "save_ticket"]

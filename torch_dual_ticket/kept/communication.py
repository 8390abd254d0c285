"""Ranks exchange the gradients of the kept weights alone."""

# Without postponed annotations: DistributedDataParallel looks at those of the hook.
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._engine.ticket import Ticket
from .._rst.ranks import agree_on_masks
from .index import kept_index, scatter_

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
else:
    GradBucket = getattr(dist, "GradBucket", Any)  # which a torch without distributed lacks

_compared: weakref.WeakKeyDictionary[Ticket, Any] = weakref.WeakKeyDictionary()  # masks known to be those of all ranks


def kept_allreduce_hook(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients over all ranks, and send only what the masks keep.

    Register it on ``DistributedDataParallel`` at any time: during the transformation all gradients are sent, from
    ``finalize()`` on those of the kept weights, of the weights without a mask, and of biases. The weights are those
    that training without the hook gives. Buckets may be views, rebuilt, or compressed by torch's own wrappers of hooks;
    the process group is the default one.

    Args:
        state: the :class:`torch_dual_ticket.RSTScheduler`, or what :mod:`torch_dual_ticket.baselines` returned; it may
            change its masks. Build it on the model inside ``DistributedDataParallel``, which keeps what is registered:
            Python cannot free a state that leads back to it.
        bucket: given by ``DistributedDataParallel``.

    Raises:
        RuntimeError: the ranks' masks differ; found before the first message that depends on them.

    Example:
        >>> import os, tempfile
        >>> from torch import nn
        >>> from torch_dual_ticket.baselines import random_ticket
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = dist.FileStore(os.path.join(folder, "store"), 1)
        ...     dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        ...     ddp = nn.parallel.DistributedDataParallel(nn.Linear(8, 4))
        ...     ddp.register_comm_hook(random_ticket(ddp.module, 0.75), kept_allreduce_hook)
        ...     ddp(torch.randn(2, 8)).sum().backward()
        ...     dist.destroy_process_group()
        >>> int(ddp.module.weight.grad.count_nonzero())
        8
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    ticket: Ticket = state._ticket
    if not ticket.holds or ticket.is_released:
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]
    masks = ticket.stage.masks
    owners = {id(tensor): one for one, tensor in ticket.managed()}
    if _compared.get(ticket) is not masks:
        agree_on_masks(state._masks(), state._model)
        _compared[ticket] = masks
    buffer, places = bucket.buffer(), list[tuple[Tensor, Tensor | None]]()
    parts = torch.split(buffer, [parameter.numel() for parameter in bucket.parameters()])
    for parameter, part in zip(bucket.parameters(), parts, strict=True):
        one = owners.get(id(parameter))
        places.append((part, None if one is None else kept_index(one, masks[one.name], parameter)))
    message = torch.cat([part if index is None else part.index_select(0, index) for part, index in places])
    message.div_(dist.get_world_size())

    def unpack(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        received = torch.split(future.value()[0], [len(part if index is None else index) for part, index in places])
        for (part, index), values in zip(places, received, strict=True):
            if index is None:
                part.copy_(values)
            else:
                scatter_(part.zero_(), index, values)
        return buffer

    work = dist.all_reduce(message, async_op=True)
    assert work is not None
    averaged: torch.futures.Future[Tensor] = work.get_future().then(unpack)
    return averaged

"""What an optimizer is built on in place of ``model.parameters()``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .._engine.ticket import Ticket
from .._model.names import first_names, unwrapped_parameters
from .values import KeptValues, check_whole, values_of


class KeptParameters:
    """The kept weights of a model whose masks are in force, for an optimizer that is to see nothing else.

    Build it after ``finalize()``, and the optimizer on its :meth:`parameters`: gradients and state are then those of
    the kept weights. The model stays as it is. Each gradient is gathered as backward() brings it, and the whole one
    freed; with ``torch.distributed`` at the end of backward(), when the ranks' gradients have been averaged. After each
    step the weights are written back to the model. What something else changes in the model (a state that is loaded) is
    noticed by the version of the tensor, and gathered anew before the next step.

    The updates are those of the same optimizer on the whole model, for optimizers that treat every weight by itself,
    like SGD or AdamW, or look at norms alone, like LBFGS or LAMB. Clip over :meth:`parameters`, or the model's.

    Args:
        held: the finalized :class:`torch_dual_ticket.RSTScheduler`, or what ``hold()`` or ``random_ticket()`` returned.

    Raises:
        TypeError: ``held`` is neither.
        RuntimeError: its masks are not in force yet or no more, it has a KeptParameters already, or a weight is sharded
            (FSDP2, tensor parallelism) or has gaps in memory. In a step: the optimizer looks at the shape of a weight,
            or has the model's own parameters, or the masks have changed.

    Example:
        >>> import torch
        >>> from torch_dual_ticket.baselines import random_ticket
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> kept = KeptParameters(random_ticket(model, 0.75))
        >>> [(name, tuple(parameter.shape)) for name, parameter in kept.named_parameters()]
        [('0.weight', (32,)), ('0.bias', (16,)), ('2.weight', (16,)), ('2.bias', (4,))]
        >>> optimizer = torch.optim.AdamW(kept.parameters(), lr=1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(5, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> int(model[0].weight.count_nonzero())
        32
    """

    def __init__(self, held: Any) -> None:
        ticket = getattr(held, "_ticket", None)
        if not isinstance(ticket, Ticket) or (model := ticket.model()) is None:
            raise TypeError(
                "KeptParameters takes an RSTScheduler, or what baselines.hold() or random_ticket() returned; got"
                f" {type(held).__name__}"
            )
        if not ticket.holds or ticket.is_released:
            what = "was removed" if ticket.is_released else "is in the transformation, which needs all weights"
            raise RuntimeError(f"this {type(held).__name__} {what}: call KeptParameters after finalize()")
        if values_of(ticket) is not None:
            raise RuntimeError(
                f"this {type(held).__name__} has a KeptParameters already, which takes the gradients. Use that one, or"
                " call remove() on it first."
            )
        for managed, parameter in ticket.managed():
            check_whole(managed.name, parameter)
        self._model = model
        self._values = KeptValues(ticket)
        try:
            self._values.start()
        except BaseException:  # nobody has this object yet, and another one would be refused
            self._values.stop()
            raise

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters in the order of ``model.named_parameters()``, without the levels that wrappers add.

        One vector of the kept weights for each weight with a mask, in an order that depends on the mask alone; the
        model's own parameters for the others.
        """
        parameters = dict(unwrapped_parameters(self._model))
        for name in first_names(self._model).values():
            weight = self._values.weights.get(name)
            yield name, parameters[name] if weight is None else weight.values

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of :meth:`named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    def move_state(self, source: Optimizer, target: Optimizer) -> None:
        """Give one optimizer the state of another, to switch between all weights and the kept ones within a training.

        One of them has the model's parameters, the other those of this object, either way round. Options, like the
        learning rate, stay the target's. At masked weights a state becomes zero.

        Args:
            source: whose state it is; it stays as it is.
            target: an optimizer of the same class.

        Raises:
            ValueError: the classes differ, or a parameter of ``target`` has no counterpart in ``source``; nothing is
                changed.

        Example:
            >>> import torch
            >>> from torch_dual_ticket.baselines import random_ticket
            >>> model = nn.Linear(8, 4, bias=False)
            >>> dense = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            >>> held = random_ticket(model, 0.75)
            >>> model(torch.ones(1, 8)).sum().backward()
            >>> dense.step()
            >>> kept = KeptParameters(held)
            >>> optimizer = torch.optim.SGD(kept.parameters(), lr=0.1, momentum=0.9)
            >>> kept.move_state(dense, optimizer)
            >>> optimizer.state_dict()["state"]
            {0: {'momentum_buffer': tensor([1., 1., 1., 1., 1., 1., 1., 1.])}}
        """
        if type(source) is not type(target):
            raise ValueError(f"the state of {type(source).__name__} does not fit {type(target).__name__}")
        counterparts: dict[int, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}
        for weight, parameter in self._values.sources():
            counterparts[id(parameter)] = weight.values, weight.spread
            counterparts[id(weight.values)] = parameter, weight.pick
        sources = {id(parameter) for group in source.param_groups for parameter in group["params"]}
        state = target.state_dict()
        state["state"] = {}
        for group, packed in zip(target.param_groups, state["param_groups"], strict=True):
            for parameter, key in zip(group["params"], packed["params"], strict=True):
                same = (parameter, Tensor.clone) if id(parameter) in sources else None
                found = same or counterparts.get(id(parameter))
                if found is None or id(found[0]) not in sources:
                    raise ValueError(
                        f"the source has no counterpart of a parameter of shape {tuple(parameter.shape)} of the target:"
                        " build one optimizer on model.parameters(), the other on kept.parameters()"
                    )
                other, move = found
                state["state"][key] = {
                    name: move(value) if isinstance(value, Tensor) and value.shape == other.shape else deepcopy(value)
                    for name, value in source.state.get(other, {}).items()
                }
        target.load_state_dict(state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "KeptParameters cannot be copied or saved: its vectors belong to one model and one optimizer. Save"
            " the states of model, scheduler and optimizer, and build a new one on them."
        )

    def remove(self) -> None:
        """The model has its gradients again, and an optimizer on its own parameters may go on; zeros stay held."""
        self._values.stop()

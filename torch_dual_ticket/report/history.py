"""λ, the residual and the norms over the training: recorded without waiting for a GPU, read afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .._rst.managed import ManagedMasks
from .._rst.residual import LayerReport, Measurement, Report, take_measurement
from .._rst.schedule import check_integer
from ..scheduler import RSTScheduler

_VERSION = 1
_POINTS = 200  # records of a transformation, if the user does not say how often


class Writer(Protocol):
    """What :meth:`History.log_to` needs of a writer; ``torch.utils.tensorboard.SummaryWriter`` has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


@dataclass(frozen=True)
class Record:
    """The state of a ticket at one update.

    Attributes:
        step: updates so far: scheduler steps; when the schedule is over, each call of :meth:`History.record` adds one.
        phase: ``"transform"`` or ``"finetune"``.
        penalty: λ of the next update.
        report: per layer and in total: pruned, size, residual and norms.
    """

    step: int
    phase: str
    penalty: float
    report: Report

    @property
    def residual(self) -> float:
        """‖masked weights‖ / ‖all target weights‖"""
        return self.report.total.residual

    @property
    def sparsity(self) -> float:
        """The fraction of targets that is zero: 0 in the transformation, whose masks are not applied yet."""
        return self.report.total.sparsity if self.phase == "finetune" else 0.0


class History:
    """A record of λ, the residual and the norms of every layer, to plot or to log.

    Call :meth:`record` once per update, after ``rst.step()``; most calls only count. A call that records reads every
    target weight once, as ``rst.residual()`` does, but leaves the numbers on their device until :attr:`records`,
    :meth:`log_to` or :meth:`state_dict` need them: so the loop does not wait for a GPU. The norms just before
    ``finalize()`` are recorded in any case.

    With sharded parameters (FSDP2, DTensor) recording is collective: call it on every rank. Under DDP one rank will do.

    Args:
        rst: what is recorded: a scheduler, or masks of :mod:`torch_dual_ticket.baselines`. It is not kept alive.
        every: record when :attr:`Record.step` reaches a multiple of this; and at the first call, and the first after
            ``finalize()``. None: about 200 times over the transformation; of held masks at each call.

    Raises:
        TypeError, ValueError: ``rst`` is neither, or ``every`` not a positive integer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_dual_ticket import RSTScheduler
        >>> model = nn.Sequential(nn.Linear(20, 500), nn.Tanh(), nn.Linear(500, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rst = RSTScheduler(model, sparsity=0.9, exclude=["2"], steps=300, hold=200, max_penalty=5)
        >>> history = History(rst, every=200)
        >>> for _ in range(600):
        ...     x = torch.randn(32, 20)
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(x), x[:, :1].sin()).backward()
        ...     optimizer.step()
        ...     rst.step()
        ...     if rst.done:
        ...         report = rst.finalize()
        ...     history.record()
        >>> for record in history.records:
        ...     print(record.step, record.phase, f"λ={record.penalty:.2f}, sparsity {record.sparsity:.0%}")
        1 transform λ=0.03, sparsity 0%
        200 transform λ=3.35, sparsity 0%
        400 transform λ=5.00, sparsity 0%
        500 transform λ=5.00, sparsity 0%
        500 finetune λ=0.00, sparsity 90%
        600 finetune λ=0.00, sparsity 90%
    """

    def __init__(self, rst: ManagedMasks, *, every: int | None = None) -> None:
        if not isinstance(rst, ManagedMasks):
            raise TypeError(
                f"History() takes an RSTScheduler, or what baselines.hold() returned; got {type(rst).__name__}"
            )
        updates = rst._timeline.total if isinstance(rst, RSTScheduler) else 0
        self.every = max(1, updates // _POINTS) if every is None else check_integer("every", every, 1)
        self._rst = weakref.ref(rst)  # a strong one would keep a dropped model in memory
        self._records: list[Record] = []
        self._unread: list[tuple[int, str, float, Measurement | Report]] = []
        self._last: tuple[str, int] | None = None  # phase and step // every of the last record
        self._step = 0  # of the last call
        self._logged = 0  # records

    def record(self) -> None:
        """Call it once per update, after ``rst.step()`` and, at its time, ``rst.finalize()``; or less often.

        Raises:
            RuntimeError: the scheduler was dropped.
        """
        rst = self._rst()
        if rst is None:
            raise RuntimeError(
                "record() has nothing to measure: the RSTScheduler of this history does not exist any more"
            )
        phase, steps = rst.phase, rst._steps
        is_over = phase == "finetune" or (isinstance(rst, RSTScheduler) and rst.done)
        self._step = max(steps, self._step + 1) if is_over else steps
        at = phase, self._step // self.every
        if at == self._last:
            return
        measurement = take_measurement(rst._ticket)
        if not measurement.counts:  # after remove()
            return
        if self._last is not None and (self._last[0], phase) == ("transform", "finetune") and rst._report.layers:
            assert isinstance(rst, RSTScheduler)
            self._unread.append((self._step, "transform", rst._timeline.penalty(steps), rst._report))
        self._unread.append((self._step, phase, rst.penalty, measurement))
        self._last = at

    def __repr__(self) -> str:
        return f"History({len(self._records) + len(self._unread)} records, up to step {self._step:,})"

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, oldest first. Waits for the device once for each that was not read yet."""
        self._records += [
            Record(step, phase, penalty, measured if isinstance(measured, Report) else measured.read())
            for step, phase, penalty, measured in self._unread
        ]
        self._unread.clear()
        return tuple(self._records)

    def log_to(self, writer: Writer) -> None:
        """Write what was recorded since the last call to TensorBoard: call it now and then, such as once an epoch.

        The tags are ``rst/penalty``, ``rst/residual``, ``rst/sparsity``, ``rst/masked_norm``, ``rst/kept_norm`` and,
        for each layer, ``rst_residual/NAME``; the step is :attr:`Record.step`.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything else with its ``add_scalar``.

        Raises:
            TypeError: ``writer`` has no ``add_scalar``.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"log_to() takes something with add_scalar(tag, value, step), such as a"
                f" torch.utils.tensorboard.SummaryWriter; got {type(writer).__name__}"
            )
        for record in self.records[self._logged :]:
            total = record.report.total
            scalars = {
                "rst/penalty": record.penalty,
                "rst/residual": total.residual,
                "rst/sparsity": record.sparsity,
                "rst/masked_norm": total.masked_norm,
                "rst/kept_norm": total.kept_norm,
                **{f"rst_residual/{layer.name}": layer.residual for layer in record.report.layers},
            }
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, record.step)
            self._logged += 1

    def state_dict(self) -> dict[str, Any]:
        """All records, in lists and numbers; save it in the checkpoint, beside the scheduler's."""
        return {
            "version": _VERSION,
            "tick": self._step,  # the key of the first release
            "logged": self._logged,
            "records": [
                [record.step, record.phase, record.penalty, record.report.as_rows()] for record in self.records
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved history, in place of what was recorded here.

        Raises:
            ValueError: not a state of this class; nothing is changed then.
        """
        try:
            if state["version"] != _VERSION:
                raise ValueError(f"its version is {state['version']!r}, and this release reads version {_VERSION}")
            records = [
                Record(int(step), str(phase), float(penalty), Report.of([LayerReport(*layer) for layer in layers]))
                for step, phase, penalty, layers in state["records"]
            ]
            step, logged = int(state["tick"]), int(state["logged"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"not a state_dict() of a History: {error!r}") from error
        self._records, self._unread = records, []
        self._last = (records[-1].phase, records[-1].step // self.every) if records else None
        self._step, self._logged = step, logged

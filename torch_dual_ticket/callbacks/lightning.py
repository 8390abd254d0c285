"""Random tickets in a Lightning ``Trainer``."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from .budget import TrainerTicket

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    def _lightning_callback() -> type:
        """Lightning has two names, with different classes: derive from that of the one that is imported, or of both."""
        names = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
        if not names:
            if not (find_spec("lightning") or find_spec("pytorch_lightning")):
                raise ImportError("torch_dual_ticket.callbacks.lightning needs Lightning: pip install lightning")
            names = ["lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"]
        return type("Callback", tuple(import_module(f"{name}.callbacks").Callback for name in names), {})

    Callback = _lightning_callback()


class RSTCallback(TrainerTicket, Callback):
    """Transform a random ticket in the first part of a training, then mask it and finetune.

    Give it to the ``Trainer`` of ``lightning`` or ``pytorch_lightning``; where both are installed, import the one you
    use first. λ rises with each batch that ends in an update, so gradient accumulation, manual optimization and skipped
    steps of mixed precision need nothing. Checkpoints hold the state of the schedule: resume with ``ckpt_path``.

    λ is logged as ``rst/penalty`` (and shown in the progress bar), and at the end of each epoch ``rst/residual`` and
    ``rst/sparsity``. A "best" checkpoint can be from before the masked weights were set to zero. To load it, monitor
    something that is only logged when ``scheduler.phase`` is "finetune". Averages of Lightning's own callbacks
    (``WeightAveraging``, ``EMAWeightAveraging``, ``StochasticWeightAveraging``) are masked with the module.

    Args:
        sparsity: as for :class:`~torch_dual_ticket.RSTScheduler`.
        finalize_at: the fraction of the trainer's updates at which the masked weights are set to zero, and over which λ
            rises. None: 0.5, or when the schedule is over if ``steps`` is given. Manual optimization that does not
            update in every batch needs ``steps``.
        settings: the other arguments of :class:`~torch_dual_ticket.RSTScheduler`: ``exclude``, ``pattern``, ``seed``, …

    Attributes:
        scheduler: the :class:`~torch_dual_ticket.RSTScheduler` on the module; None before the training starts.
        report: what :meth:`~torch_dual_ticket.RSTScheduler.finalize` returned, also before a restart; None before it.

    Raises:
        TypeError, ValueError: arguments that cannot be used; those that depend on the model, when the training starts.

    Example:
        >>> from torch_dual_ticket.callbacks.lightning import RSTCallback
        >>> ticket = RSTCallback(sparsity=0.9, finalize_at=0.5, exclude=["*head"])
        >>> # Trainer(max_epochs=20, callbacks=[ticket]).fit(module, loader)
    """

    _loaded: dict[str, Any] | None = None  # a state that was loaded before the scheduler was built
    _awaits_state = True  # False while another module is tested
    _trains = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called in every stage, before the state of a checkpoint is loaded."""
        if stage == "fit" and self._model is not pl_module:
            self.scheduler = self._model = None
        self._loaded = None
        self._awaits_state = stage == "fit" or self._model is pl_module
        self._trains = stage == "fit"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module, trainer.estimated_stepping_batches)
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self.load_state_dict(state)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: Any) -> None:
        rst = self._started()
        self.log("rst/penalty", rst.penalty, prog_bar=True)
        rst.step()
        if rst.done and rst.phase == "transform":
            report = rst.finalize()
            for callback in trainer.callbacks:  # averages of Lightning's that were begun before: from now on of zeros
                average = getattr(callback, "_average_model", None)
                if isinstance(average, nn.Module):
                    rst.apply_masks(average)
            if trainer.progress_bar_callback is not None:
                trainer.progress_bar_callback.print(f"{rst} masked {report.total.residual:.2%} of the norm")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rst = self._started()
        self.log_dict({"rst/residual": rst.residual(), "rst/sparsity": self._sparsity()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_if_unfinished()

    def state_dict(self) -> dict[str, Any]:
        return self._loaded or {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scheduler is not None and self._awaits_state:
            was = self.scheduler.phase
            self.scheduler.load_state_dict(state_dict)
            if not self._trains and self.scheduler.phase == "transform" != was:
                warnings.warn(
                    "this checkpoint is from before the masked weights were set to zero: the module is dense again. For"
                    ' a "best" checkpoint that is sparse, monitor something that is only logged when scheduler.phase of'
                    ' the callback is "finetune".',
                    stacklevel=2,
                )
        elif self._awaits_state:
            self._loaded = state_dict

"""Random tickets in the ``Trainer`` of Hugging Face Transformers."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from typing import Any

from torch import nn

from .._rst.residual import MAX_RESIDUAL
from .budget import TrainerTicket

if find_spec("transformers") is None:
    raise ImportError("torch_dual_ticket.callbacks.transformers needs Transformers: pip install 'transformers[torch]'")

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class RSTCallback(TrainerTicket, TrainerCallback, ExportableState):
    """Transform a random ticket in the first part of a training, then mask it and finetune.

    Give it to the ``Trainer``. λ rises with each update, so gradient accumulation and skipped steps of mixed precision
    need nothing. ``trainer_state.json`` in each checkpoint holds the state of the schedule: resume with
    ``resume_from_checkpoint``.

    ``rst/penalty``, ``rst/residual`` and ``rst/sparsity`` are logged with each training loss: in the progress bar and
    in ``trainer.state.log_history``. To reach TensorBoard and others, the callback must come before theirs: use
    ``trainer.callback_handler.callbacks.insert(0, ticket)`` in place of ``callbacks=[ticket]``.

    With ``load_best_model_at_end`` the best weights can be from before the masked weights were set to zero; they are
    masked then, but not finetuned. If you use it, start to evaluate after that (``eval_delay``).

    Args:
        sparsity: as for :class:`~torch_dual_ticket.RSTScheduler`.
        finalize_at: the fraction of the trainer's updates at which the masked weights are set to zero, and over which λ
            rises. None: 0.5, or when the schedule is over if ``steps`` is given.
        settings: the other arguments of :class:`~torch_dual_ticket.RSTScheduler`: ``exclude``, ``pattern``, ``seed``, …

    Attributes:
        scheduler: the :class:`~torch_dual_ticket.RSTScheduler` on the model; None before the training starts.
        report: what :meth:`~torch_dual_ticket.RSTScheduler.finalize` returned, also before a restart; None before it.

    Raises:
        TypeError, ValueError: arguments that cannot be used; those that depend on the model, when the training starts.

    Example:
        >>> from torch_dual_ticket.callbacks.transformers import RSTCallback
        >>> ticket = RSTCallback(sparsity=0.9, finalize_at=0.5, exclude=["*embeddings*", "classifier"])
        >>> # Trainer(model, arguments, train_dataset=data, callbacks=[ticket]).train()
    """

    _last_penalty = 0.0  # of the last update

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **unused: Any
    ) -> None:
        self._start(model, state.max_steps)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):
            raise ValueError(
                "a Trainer keeps the state of one RSTCallback: give one, with a mapping from name patterns as sparsity"
            )
        saved = saved["attributes"]["saved_scheduler"]
        if state.global_step > 0 and saved is not None:  # resumed from a checkpoint
            self._started().load_state_dict(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        rst = self._started()
        self._last_penalty = rst.penalty
        rst.step()
        if rst.done and rst.phase == "transform":
            rst.finalize()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **unused: Any,
    ) -> None:
        if "loss" in logs:  # not at an evaluation, or at the end
            rst = self._started()
            values = {
                "rst/penalty": self._last_penalty,
                "rst/residual": rst.residual(),
                "rst/sparsity": self._sparsity(),
            }
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **unused: Any
    ) -> None:
        rst = self._started()
        self._warn_if_unfinished()
        if rst.phase == "finetune":  # load_best_model_at_end may just have loaded earlier weights
            if (residual := rst.residual()) > MAX_RESIDUAL:
                warnings.warn(
                    "the best model was loaded, which is from before the masked weights were set to zero: they held"
                    f" {residual:.1%} of the norm, and are cut, not finetuned. Begin to evaluate later (eval_delay).",
                    stacklevel=2,
                )
            rst.apply_masks(model)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``."""
        arguments = {**self._settings, "finalize_at": self._finalize_at}
        return {
            "args": {name: value for name, value in arguments.items() if _is_json(value)},
            "attributes": {"saved_scheduler": None if self.scheduler is None else self.scheduler.state_dict()},
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        lost = [name for name, value in self._settings.items() if not _is_json(value)]
        if lost and args.restore_callback_states_from_checkpoint:
            raise ValueError(
                f"restore_callback_states_from_checkpoint=True would rebuild this RSTCallback without its"
                f" {', '.join(lost)}, which JSON cannot hold. Leave it off: the ticket resumes without it."
            )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True

"""The life of a random ticket: drawn, transformed under a growing penalty, masked, and held while it is finetuned."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._engine import layer_hook
from ._engine.layer_hook import manage
from ._engine.ticket import Phase, Stage, Ticket
from ._model.targets import DEFAULT_TARGETS, check_model, find_targets
from ._rst import mask_view, validation
from ._rst.advice import Advice, lever
from ._rst.loop_warnings import MissingPenalty, Unfinished, patience
from ._rst.ranks import agree_on_seed, check_not_joined, world_size
from ._rst.residual import LayerReport, Report, measure, warn_of_outstanding, warn_of_residual, warn_of_unpenalized
from ._rst.schedule import check_integer, make_timeline
from ._rst.sparse_start import SparseStart
from .masks.explicit import ExplicitMask
from .masks.plan import make_plan
from .masks.seeded import SeededMask
from .prune import check_stock_layout, to_stock_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ._model.targets import TargetType


class RSTScheduler:
    """Random Sparse Network Transformation (Bai et al., ICLR 2022, section 3.2) inside your own training loop.

    A random mask is drawn for each layer from a seed. While the dense network trains, ``λ·w`` is added to the gradients
    of the weights that will be masked, with λ growing, through the step of whatever ``torch.optim.Optimizer`` holds
    them. :meth:`finalize` sets them to zero and keeps them there while the same loop finetunes. Construct it before or
    after wrapping the model (DDP, FSDP2, ``torch.compile``) and creating the optimizer.

    Args:
        model: the module to prune. Its weights, names and structure stay as they are.
        sparsity: fraction of weights removed from each layer, in [0, 1). A mapping goes from :mod:`fnmatch` patterns of
            module names to sparsities: the first match wins, what is not matched stays dense. None: 0.9, or what
            ``pattern`` implies.
        steps: calls of :meth:`step` over which λ rises (in each cycle). None: 10,000, or as ``updates`` says.
        hold: calls after that with λ at its ceiling (in each cycle). None: 0, or as ``updates`` says.
        max_penalty: the ceiling of λ.
        schedule: "linear", "quadratic", "cubic", or a function from progress (0…1) to the fraction of the ceiling.
        cycles: more than 1 for iterative RST: nested masks that reach ``1 - (1 - sparsity)**(c/cycles)`` in cycle c.
        distribution: "uniform", or "erk" (Erdős–Rényi-Kernel).
        pattern: "unstructured", "n:m" (n of every m inputs stay), "block:RxC", "filter" (outputs), "channel" (inputs).
        targets: module types whose ``weight`` is pruned, or pairs of type and names: ``(nn.LSTM, "weight_*")``.
        exclude: fnmatch patterns of module names that stay dense, with all below them.
        seed: of the masks; None draws one from torch's global generator, the same on all ranks.
        optimizer: the only one whose updates apply the penalty. None: any that holds a target.
        updates: in place of ``steps`` and ``hold``, the updates of the whole training: the transformation takes a
            quarter of them (all cycles together), with a fifth of that as ``hold``.
        store_masks: False computes the masks from the seed at each use: slow, but saves a byte of memory per weight.

    Raises:
        TypeError, ValueError, RuntimeError: input that cannot be used, or ranks that disagree; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rst = RSTScheduler(model, sparsity=0.75, steps=50, hold=50, max_penalty=5, seed=0)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     rst.step()
        ...     if rst.done:
        ...         report = rst.finalize()
        >>> print(rst.phase, rst.sparsity, int((model[0].weight == 0).sum()))
        finetune 0.75 96
    """

    @validation.explains_arguments
    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        steps: int | None = None,
        hold: int | None = None,
        max_penalty: float = 1.0,
        schedule: str | Callable[[float], float] = "linear",
        cycles: int = 1,
        distribution: str = "uniform",
        pattern: str = "unstructured",
        targets: Sequence[TargetType] = DEFAULT_TARGETS,
        exclude: Sequence[str] = (),
        seed: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        updates: int | None = None,
        store_masks: bool = True,
    ) -> None:
        check_model(model)
        self._timeline = make_timeline(steps, hold, updates, cycles, max_penalty, schedule)
        given_seed = None if seed is None else check_integer("seed", seed)
        found = find_targets(model, targets, exclude)
        cycles = self._timeline.cycles
        plan = make_plan(found, sparsity, distribution=distribution, pattern=pattern, cycles=cycles, stacklevel=4)
        found = [target for target in found if target.name in plan.shapes]
        validation.check_unmanaged(found)
        validation.check_optimizer(optimizer, found)
        with validation.generator_unchanged_on_error():
            agreed = agree_on_seed(given_seed, plan, model, self._timeline)
            validation.check_directions(found, plan.masks(agreed))
        self._plan, self._model, self._advice = plan, model, Advice(self._timeline)
        self._seed_is_given, self._ranks = given_seed is not None, world_size()
        masks, penalty = plan.masks(agreed, cycle=0), self._timeline.penalty(0)
        self._missing_penalty, self._sparse_start = MissingPenalty(), SparseStart()
        self._ticket = Ticket(
            model,
            masks,
            scheduler=self,
            optimizer=optimizer,
            stores_masks=store_masks,
            patience=patience(self._timeline.total),
            before_first=self._sparse_start.count,
        )
        manage(self._ticket, found)
        self._unfinished = Unfinished(self, self._ticket, self._timeline.total)
        self._ticket.stage = Stage(Phase.TRANSFORM, masks, penalty)  # from here on it is penalized, and not before

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stage": self._ticket.stage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stage = state.pop("stage")
        self.__dict__.update(state)
        self._ticket.serve(self, self._model)
        self._ticket.stage = stage

    # -- the schedule --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of the schedule: call it once per update, before or after ``optimizer.step()``; λ grows.

        It advances only if an update applied the penalty since the last call, so a step that ``GradScaler`` skipped
        does not count. After :meth:`finalize` it does nothing. It warns where no update applies the penalty and, after
        a tenth of the schedule, where the penalty will not do what it is for. ``RuntimeError`` where a target is out of
        reach (weight_norm has replaced it, say), or a CUDA graph is being captured.
        """
        ticket, timeline = self._ticket, self._timeline
        if ticket.holds:
            return
        if not ticket.all_penalized():
            validation.check_reachable(ticket, stacklevel=3)
        if not ticket.parameters:
            return
        if not (self._steps or self._seed_is_given):
            check_not_joined(self._ranks)
        steps = min(self._steps + ticket.counts(is_last=self._steps == timeline.total - 1), timeline.total)
        self._advice.look(ticket, self._steps, steps)
        penalty = timeline.penalty(steps)  # a schedule may raise
        changed = ticket.begin_step()
        stays = timeline.cycle(steps) == self._cycle
        masks = ticket.stage.masks if stays else self._plan.masks(self.seed, timeline.cycle(steps))
        ticket.transform(masks, penalty, steps)
        self._missing_penalty.look(ticket, changed)
        self._sparse_start.speak(ticket)
        self._advice.speak()

    @property
    def seed(self) -> int:
        """The masks' seed: the one given, or the one that was drawn."""
        masks: Mapping[str, Any] = self._ticket.stage.masks
        seed: int = next(iter(masks.values())).seed
        return seed

    @property
    def _steps(self) -> int:
        """Scheduler steps that counted."""
        return self._ticket.stage.steps

    @property
    def _cycle(self) -> int:
        return self._timeline.cycle(self._steps)

    @property
    def penalty(self) -> float:
        """λ of the next update; 0 after :meth:`finalize`."""
        return self._ticket.stage.penalty

    @property
    def progress(self) -> float:
        """How much of the schedule is over: 0…1."""
        return self._steps / self._timeline.total

    @property
    def done(self) -> bool:
        """Whether the schedule is over: time for :meth:`finalize`."""
        return self._steps >= self._timeline.total

    @property
    def phase(self) -> str:
        """``"transform"`` until :meth:`finalize`, then ``"finetune"``."""
        return self._ticket.stage.phase.value

    def apply_penalty(self) -> None:
        """Add λ·w to ``.grad``, between ``backward()`` and an update that is not a ``torch.optim.Optimizer``'s.

        The gradient must be final: accumulated, unscaled and clipped. It silences the optimizer hook until the next
        :meth:`step`. Go on calling it after :meth:`finalize`: there it restores zeros that such an update has moved.

        Raises:
            RuntimeError: no target has a gradient.
        """
        with torch.no_grad():
            if not self._ticket.apply_penalty() and self._ticket.parameters:
                raise RuntimeError(
                    "apply_penalty() found no gradient on any target; call it after loss.backward(). DeepSpeed keeps"
                    " gradients elsewhere: with ZeRO 1 and 2 set p.grad = safe_get_full_grad(p).to(p.dtype), of"
                    " deepspeed.utils, before the call; after it grad, p.grad = p.grad, None and safe_set_full_grad(p,"
                    " grad)."
                )

    # -- the end of the transformation ---------------------------------------------------------------------------------

    def finalize(self, layout: str = "plain") -> Report:
        """Set the masked weights to zero and keep them at exactly zero from now on. A second call changes nothing.

        An average of the weights that was begun before is another model: ``rst.apply_masks(average)`` masks it.

        Args:
            layout: "plain" leaves structure, names and parameters as they are; "prune" goes on to :meth:`to_prune`.

        Returns:
            What was pruned and what norm it still had, per layer and in total. Collective where weights are sharded.

        Raises:
            RuntimeError: no update ever applied the penalty, the scheduler was removed, or a target is out of reach.
            ValueError: an unknown layout, or a model that the layout "prune" cannot carry.

        Warns:
            UserWarning: the masked weights still held more than 1 % of the norm, no update has penalized some of them,
                or cycles are outstanding.
        """
        if layout not in ("plain", "prune"):
            raise ValueError(f"unknown layout {layout!r:.60}; allowed are 'plain' and 'prune'")
        ticket = self._ticket
        if not ticket.holds:
            validation.check_trained(ticket, self._steps)
            ticket.reshard()
            if layout == "prune":
                check_stock_layout(ticket)
            warn_of_outstanding(self._cycle + 1, self._timeline.cycles)
            masks = self._plan.masks(self.seed)
            report = measure(ticket, masks)
            report_on_others = warn_of_unpenalized(ticket, report)
            warn_of_residual(report_on_others, self._steps, self._timeline, partial(lever, ticket))
            ticket.hold_zeros(masks, self._steps, report)
        if layout == "prune":
            self.to_prune()
        return self._report

    @property
    def _report(self) -> Report:
        return self._ticket.stage.report or Report.of(())

    def to_prune(self) -> None:
        """Turn the finalized model into the layout of ``torch.nn.utils.prune``, for stock functions to stack on.

        ``weight_orig``, ``weight_mask`` and torch's own hook take over from this library, in the same order.

        Raises:
            RuntimeError: before :meth:`finalize`.
            ValueError: what this layout cannot carry: DTensor, tied, parametrized, not called (attention's out_proj).
        """
        if not self._ticket.holds:
            raise RuntimeError("to_prune() needs the final masks: call finalize() first")
        self._ticket.reshard()
        to_stock_layout(self._ticket)

    def remove(self) -> None:
        """Take every hook off and leave a plain model: zeros stay where they are, but nothing holds them."""
        self._ticket.release()

    # -- what there is to see ------------------------------------------------------------------------------------------

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor of the full shape, True = kept; of the current cycle. Drawn when asked for."""
        return mask_view.MaskView(self._masks(), self._ticket)

    @property
    def sparsity(self) -> float:
        """The achieved fraction of masked weights over all targets; of the current cycle."""
        return mask_view.sparsity_of(self._masks())

    def _masks(self) -> dict[str, SeededMask]:
        return mask_view.still_managed(self._ticket)

    def residual(self) -> float:
        """‖masked weights‖ / ‖all target weights‖ now. Reads every weight; collective where they are sharded."""
        return measure(self._ticket).total.residual

    def apply_masks(self, model: nn.Module) -> None:
        """Set the masked weights of another model of the same structure to zero, such as an EMA copy begun before.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: a target's name or shape is not found in ``model``; nothing is changed then.
        """
        mask_view.apply_masks(model, self._masks())

    def __repr__(self) -> str:
        cycles = self._timeline.cycles
        cycle = f", cycle {self._cycle + 1} of {cycles}" if cycles > 1 else ""
        schedule = f"{self.progress:.0%} of {self._timeline.total:,} steps, λ={self.penalty:.4g}"
        layers = f"{len(self._masks())} layers at {self.sparsity:.2%} sparsity"
        if not self._ticket.holds:
            layers = f"masks for {layers}, not applied yet"
        return f"RSTScheduler({self.phase}{cycle}: {schedule}, {layers}, seed={self.seed})"

    # -- restarts ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Scheduler steps (under ``ticks``), phase, seed, a fingerprint of each mask, the report of ``finalize()``.

        Never masks or weights. It may wait for the device.
        """
        return {
            "version": validation.STATE_VERSION,
            "ticks": self._steps,
            "update_pending": self._ticket.updates.settle(wait=True),
            "phase": self.phase,
            "seed": self.seed,
            "masks": self._fingerprints(self.seed),
            "report": self._report.as_rows(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved scheduler was. Load the model's and the optimizer's state too, before or after.

        A scheduler built with ``seed=None`` and not used yet adopts the seed of the state.

        Raises:
            ValueError: not a state of this class, or the masks differ; names the first layer that does.
            RuntimeError: a finalized state, but this scheduler holds no layer.
        """
        ticket, timeline = self._ticket, self._timeline
        steps, pending, phase, seed, report = validation.check_state(state, ticket)
        # An update without a scheduler step is no use yet: torch.distributed.checkpoint makes one before it loads.
        mine = self.seed if self._seed_is_given or self._steps or ticket.holds else seed
        validation.check_same_masks(self._fingerprints(mine), state["masks"], (mine, seed))
        steps = min(steps, timeline.total)
        penalty = timeline.penalty(steps)  # a schedule may raise
        if phase == "finetune":
            ticket.reshard()
            ticket.hold_zeros(self._plan.masks(seed), steps, report)
        else:
            ticket.transform(self._plan.masks(seed, timeline.cycle(steps)), penalty, steps)
        ticket.resume(pending=pending)

    def _fingerprints(self, seed: int) -> dict[str, str]:
        masks = self._plan.masks(seed).items()
        return {name: mask.fingerprint for name, mask in masks if name not in self._ticket.detached}


def release(model: nn.Module) -> None:
    """Take off whatever manages weights of the model, and leave a plain one: zeros stay, but nothing holds them.

    For a scheduler or held masks that no name reaches any more: after an interrupted notebook cell, or in a copy of a
    finalized model. Where there is a name, its ``remove()`` does the same. A model that nothing manages is left alone.

    Args:
        model: the whole model, or a part of it; a parameter that is also used elsewhere is released there too.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> rst = RSTScheduler(model, sparsity=0.5)
        >>> release(model)
        >>> rst = RSTScheduler(model, sparsity=0.75)  # without release() an error: it is managed already
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"release() takes a torch.nn.Module, got {type(model).__name__}: give the model itself")
    layer_hook.release(model)


# So that torch.load(..., weights_only=True) takes a whole model as it does without a scheduler.
torch.serialization.add_safe_globals(
    [layer_hook.LayerHook, layer_hook.NoOpHook, Ticket, Stage, Phase, Report, LayerReport, SeededMask, ExplicitMask]
)

"""The life of a ticket: drawn or given, transformed under a growing penalty, masked, and held while it is finetuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._engine import layer_hook
from ._engine.layer_hook import manage
from ._engine.stage import Phase, Stage
from ._engine.ticket import Ticket
from ._model.coverage import warn_of_coverage
from ._model.masked import find_masked
from ._model.targets import DEFAULT_TARGETS, TargetType, check_model, find_targets
from ._rst import validation
from ._rst.advice import Advice
from ._rst.cut_warnings import warn_of_constant_outputs, warn_of_emptied
from ._rst.loop_warnings import DenseState, MissingPenalty, MissingStep, Unfinished, warn_of_lost_layers
from ._rst.managed import ManagedMasks
from ._rst.ranks import agree_on_masks, agree_on_seed, check_not_joined, world_size
from ._rst.residual import LayerReport, Report, measure, warn_of_outstanding, warn_of_residual, warn_of_unpenalized
from ._rst.schedule import check_integer, make_timeline
from ._rst.sparse_start import SparseStart
from .masks.explicit import ExplicitMask
from .masks.mask import Mask
from .masks.plan import Plan, make_plan
from .masks.seeded import SeededMask
from .prune import check_stock_layout


class RSTScheduler(ManagedMasks):
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
        targets: module types whose ``weight`` is pruned, or pairs of type and names: ``(nn.LSTM, "weight_*")``. For a
            type that is not torch's, a third part says which dimension of the weight holds the inputs, for patterns
            that need it: ``(Experts, ["up", "down"], 2)``. By default all linear and convolutional layers, but for
            weights that an embedding shares.
        exclude: fnmatch patterns of module names that stay dense, with all below them.
        seed: of the masks; None draws one from torch's global generator, the same on all ranks.
        optimizer: the only one whose updates apply the penalty. None: any that holds a target.
        masks: parameter name -> mask that you chose, of the parameter's shape, True (or 1) = kept: transform this
            ticket and not a random one. Parameters without a mask stay dense. It takes the place of ``sparsity``,
            ``pattern``, ``distribution``, ``seed``, ``targets`` and ``exclude``, and there is one cycle. Give every
            rank the full masks, and the same ones; after a restart the last ones.
        updates: in place of ``steps`` and ``hold``, the updates of the whole training: the transformation takes a
            quarter of them (all cycles together), with a fifth of that as ``hold``.
        store_masks: False computes the masks from the seed at each use: slow, but saves a byte of memory per weight.

    Raises:
        TypeError, ValueError, RuntimeError: input that cannot be used, or ranks that disagree; nothing is changed.

    Warns:
        UserWarning: the default targets are less than half of the weights of two or more dimensions (embeddings and
            what ``exclude`` matches not counted), or a mask cuts off a layer or outputs of the model.

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
        masks: Mapping[str, Tensor] | None = None,
        updates: int | None = None,
        store_masks: bool = True,
    ) -> None:
        check_model(model)
        self._timeline = make_timeline(steps, hold, updates, cycles, max_penalty, schedule)
        given_seed = None if seed is None else check_integer("seed", seed)
        plan: Plan | None = None
        final: Mapping[str, Mask]
        if masks is None:
            found = find_targets(model, targets, exclude)
            cycles = self._timeline.cycles
            plan = make_plan(found, sparsity, distribution=distribution, pattern=pattern, cycles=cycles, stacklevel=4)
            if targets is DEFAULT_TARGETS:
                warn_of_coverage(model, found, exclude)
            found = [target for target in found if target.name in plan.shapes]
        else:
            others = {
                "sparsity": sparsity is not None,
                "pattern": pattern != "unstructured",
                "distribution": distribution != "uniform",
                "seed": seed is not None,
                "cycles": self._timeline.cycles > 1,
                "targets": targets is not DEFAULT_TARGETS,
                "exclude": bool(exclude),
            }
            validation.check_alone("masks", others)
            found, final = find_masked(model, masks)
        validation.check_unmanaged(found)
        validation.check_optimizer(optimizer, found)
        with validation.generator_unchanged_on_error():
            if plan is None:
                agree_on_masks(final, model, self._timeline)
                first = final
            else:
                agreed = agree_on_seed(given_seed, plan, model, self._timeline)
                first, final = plan.masks(agreed, cycle=0), plan.masks(agreed)
            validation.check_directions(found, final)
        if plan is None:
            warn_of_emptied(final, stacklevel=4)
        warn_of_constant_outputs(model, found, final, stacklevel=4)
        self._plan, self._model, self._advice = plan, model, Advice(self._timeline)
        self._seed_is_given, self._ranks = plan is None or given_seed is not None, world_size()
        penalty = self._timeline.penalty(0)
        self._missing_penalty, self._sparse_start = MissingPenalty(), SparseStart()
        self._ticket = Ticket(
            model,
            first,
            scheduler=self,
            optimizer=optimizer,
            stores_masks=store_masks,
            before_first=self._sparse_start.count,
            after_each=MissingStep(self._timeline.total).look,
            before_restoring=DenseState().look,
        )
        manage(self._ticket, found)
        self._unfinished = Unfinished(self, self._ticket, self._timeline.total)
        self._ticket.stage = Stage(Phase.TRANSFORM, first, penalty)  # from here on it is penalized, and not before

    # -- the schedule --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of the schedule: call it once per update, before or after ``optimizer.step()``; λ grows.

        It advances only if an update applied the penalty since the last call, so a step that ``GradScaler`` skipped
        does not count. After :meth:`finalize` it does nothing. It warns where no update applies the penalty and, after
        a tenth of the schedule, where the penalty will not do what it is for. ``RuntimeError`` where a target is out of
        reach (weight_norm has replaced it, say), a CUDA graph is being captured, or the scheduler is a copy that was
        made during the transformation.
        """
        ticket, timeline = self._ticket, self._timeline
        if ticket.holds:
            if ticket.has_lost_layers():
                warn_of_lost_layers(ticket.detach_lost(), stacklevel=3)
            self._step_in_force()
            return
        unpenalized = ticket.unpenalized()
        if unpenalized:
            validation.check_reachable(ticket, stacklevel=3)
        if not ticket.parameters:
            if not (ticket.is_released or ticket.detached.issuperset(ticket.stage.masks)):  # it is a copy
                validation.check_manages(ticket)
            return
        if not (self._steps or self._seed_is_given):
            check_not_joined(self._ranks)
        steps = min(self._steps + ticket.counts(is_last=self._steps == timeline.total - 1), timeline.total)
        self._advice.look(ticket, self._steps, steps)
        penalty, masks = timeline.penalty(steps), self._masks_after(steps)  # a schedule may raise
        ticket.updates.begin_step()
        ticket.transform(masks, penalty, steps)
        self._missing_penalty.look(ticket, unpenalized)
        self._sparse_start.speak()
        self._advice.speak()
        self._unfinished.look()

    def _step_in_force(self) -> None:
        """A step while the masks are in force: nothing is left to do."""

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Penalize by other masks, from the next update on: call it as often as you like during the transformation.

        So a mask can be chosen gradually (see :class:`torch_dual_ticket.baselines.GradualPruning`): nothing is set to
        zero before :meth:`finalize`. Collective where a default process group exists.

        Args:
            masks: as the constructor's, for exactly the same parameters; a layer may have one that keeps everything.

        Raises:
            TypeError, ValueError: masks that cannot be used; nothing is changed then.
            RuntimeError: the masks are drawn from a seed, or :meth:`finalize` was called; or ranks disagree.
        """
        if self._plan is not None:
            raise RuntimeError(
                "the masks of this scheduler are drawn from a seed: build it with masks=… to give it others"
            )
        if self._ticket.holds:
            raise RuntimeError(
                "set_masks() comes before finalize(). To change masks that are in force, call remove(), and set_masks()"
                " on what baselines.hold(model, masks) returns."
            )
        self._ticket.transform(self._checked(masks), self.penalty, self._steps)

    def _masks_after(self, steps: int) -> Mapping[str, Mask]:
        """The masks that apply after so many scheduler steps."""
        cycle = self._timeline.cycle(steps)
        return self._ticket.stage.masks if cycle == self._cycle else self._planned(self.seed, cycle)

    def _planned(self, seed: int | None, cycle: int = -1) -> Mapping[str, Mask]:
        """The masks of a cycle, by default the last; explicit ones are those that apply now."""
        if self._plan is None or seed is None:
            return self._ticket.stage.masks
        return self._plan.masks(seed, cycle)

    @property
    def seed(self) -> int | None:
        """The masks' seed: the one given, or the one that was drawn; None if the masks were given."""
        masks: Mapping[str, Any] = self._ticket.stage.masks
        return None if self._plan is None else next(iter(masks.values())).seed

    @property
    def _cycle(self) -> int:
        return self._timeline.cycle(self._steps)

    @property
    def progress(self) -> float:
        """How much of the schedule is over: 0…1."""
        return self._steps / self._timeline.total

    @property
    def done(self) -> bool:
        """Whether the schedule is over: time for :meth:`finalize`."""
        return self._steps >= self._timeline.total

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
        if ticket.stage.report is None:
            validation.check_trained(ticket, self._steps)
            ticket.reshard()
            if layout == "prune":
                check_stock_layout(ticket)
            warn_of_outstanding(self._cycle + 1, self._timeline.cycles)
            masks = self._final_masks()
            report = measure(ticket, masks)
            report_on_others = warn_of_unpenalized(ticket, report)
            warn_of_residual(report_on_others, self._steps, self._timeline, ticket)
            ticket.hold_zeros(masks, self._steps, report)
        if layout == "prune":
            self.to_prune()
        return self._report

    def _final_masks(self) -> Mapping[str, Mask]:
        return self._planned(self.seed)

    # -- what there is to see ------------------------------------------------------------------------------------------

    def residual(self) -> float:
        """‖masked weights‖ / ‖all target weights‖ now. Reads every weight; collective where they are sharded."""
        return measure(self._ticket).total.residual

    def __repr__(self) -> str:
        cycles = self._timeline.cycles
        cycle = f", cycle {self._cycle + 1} of {cycles}" if cycles > 1 else ""
        schedule = f"{self.progress:.0%} of {self._timeline.total:,} steps, λ={self.penalty:.4g}"
        layers = self._layers if self._ticket.holds else f"masks for {self._layers}, not applied yet"
        masks = "explicit masks" if self.seed is None else f"seed={self.seed}"
        return f"{type(self).__name__}({self.phase}{cycle}: {schedule}, {layers}, {masks})"

    # -- restarts ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Scheduler steps (under ``ticks``), phase, seed, a fingerprint of each mask, the report of ``finalize()``.

        Never masks or weights. It may wait for the device.
        """
        self._unfinished.saved_at = self._steps
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
        is_fixed = self._seed_is_given or self._steps or ticket.holds or seed is None
        mine = self.seed if is_fixed else seed
        validation.check_same_masks(self._fingerprints(mine), state["masks"], (mine, seed))
        steps = min(steps, timeline.total)
        masks = self._planned(seed) if phase == "finetune" else self._planned(seed, timeline.cycle(steps))
        self._resume(masks, steps, phase, report, pending=pending)

    def _resume(
        self, masks: Mapping[str, Mask], steps: int, phase: str, report: Report | None, *, pending: bool
    ) -> None:
        penalty = self._timeline.penalty(steps)  # a schedule may raise
        if phase == "finetune":
            self._ticket.reshard()
            self._ticket.hold_zeros(masks, steps, report)
        else:
            self._ticket.transform(masks, penalty, steps)
        self._ticket.resume(pending=pending)
        self._missing_penalty = MissingPenalty()
        self._unfinished.saved_at = steps

    def _fingerprints(self, seed: int | None) -> dict[str, str]:
        masks = self._planned(seed).items()
        return {name: mask.fingerprint for name, mask in masks if name not in self._ticket.detached}


def release(model: nn.Module) -> None:
    """Take off whatever manages weights of the model, and leave a plain one: zeros stay, but nothing holds them.

    For a scheduler or held masks that no name reaches any more: after an interrupted notebook cell, or in a copy of a
    finalized model. Where there is a name, its ``remove()`` does the same. A model that nothing manages is left alone.

    Args:
        model: the whole model, or a part of it: a scheduler that has weights there leaves all of its layers, in other
            parts too. To detach one layer alone, call ``torch.nn.utils.prune.remove(layer, "weight")``.

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

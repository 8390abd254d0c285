"""A cell of the comparison: everything that decides the outcome of one training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One run. Equal cells give equal results on one machine, so a finished one is never run again."""

    data: str
    model: str
    method: str
    seed: int
    updates: int  # in total: the same for every method
    batch: int
    dense_rate: float  # learning rate of the stretches that look for a ticket, the best one for the dense network
    rate: float  # learning rate of the last stretch: of the ticket itself
    sparsity: float = 0.0
    search: float = 0.0  # part of the updates that is spent before the ticket is trained
    cycles: int = 1  # of iterative RST, and rounds of the iterative lottery ticket
    magnitude: str = ""  # how weights are compared: "uniform" (within each layer), "global", or by other scores
    growth: str = ""  # of a mask that grows: "cubic-0.6" over 60 % of the updates; "": as the method usually does
    schedule: str = ""  # of RST's penalty
    max_penalty: float = 0.0
    hold: float = 0.0  # part of a cycle in which the penalty stays at its ceiling
    delay: float = 0.0  # part of the search that is plain training, before the penalty or GMP's pruning begins
    rate_from: str = "mask"  # where `rate` begins: at the "mask", or after the "delay", to choose how the mask is made
    anneal: str = "each"  # whether the learning rate falls in "each" stretch of training, or "once" over all
    pattern: str = "unstructured"  # of the mask, or "n:m", or "filter"
    optimizer: str = ""  # "" is the one of the model's recipe
    optimizer_state: str = ""  # "new" or "kept" where a stretch begins; "": new where its learning rate starts again
    decay: str = "cosine"  # how the learning rate falls in a stretch: "cosine" after a warm-up, or in "steps"
    weight_decay: float | None = None  # None is the optimizer's in the comparison
    recalibrate: int = 0  # training batches that BatchNorm's statistics are measured anew on, just after the mask
    contents: str = ""  # a checksum of data that not everybody has the same of
    pixels: int = 0  # height and width that images are averaged to; 0 leaves them as they are
    autocast: str = "off"
    compile: bool = False
    ranks: int = 1  # of DistributedDataParallel
    tuning: bool = False  # a run that only helps to choose a learning rate; it does not see the test set

    @property
    def variant(self) -> str:
        """What tells rows of one method apart where several penalties are compared."""
        return f"{self.schedule}, λ≤{self.max_penalty:g}" if self.schedule else ""

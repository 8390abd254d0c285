"""What is said of masks that cut the network: a layer that nothing goes through, outputs that become constant."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from .._model.layout import input_dim_of
from .._model.targets import Target
from .._model.weights import weights_of
from ..masks.mask import Mask
from ..masks.seeded import SeededMask


def warn_of_emptied(masks: Mapping[str, Mask], *, stacklevel: int = 3) -> None:
    """Warn, on behalf of whoever puts explicit masks in force, of layers that lose all; the plan warns of others."""
    emptied = [name for name, mask in masks.items() if 0 < math.prod(mask.shape) == mask.pruned_weights]
    if emptied:
        others = f" and of {len(emptied) - 1} more" if emptied[1:] else ""
        warnings.warn(
            f"the mask keeps no weight of {emptied[0]}{others}: nothing will go through it. Give no mask for it, which"
            " leaves it dense (as where a layer begins with zeros), or one that keeps some of its weights.",
            stacklevel=stacklevel,
        )


def warn_of_constant_outputs(
    model: nn.Module, targets: Sequence[Target], masks: Mapping[str, Mask], *, stacklevel: int = 3
) -> None:
    """Warn, on behalf of a constructor, where whole filters are masked of what seems to be the last layer.

    That is the one that the model registers last, if no layer has as many inputs as it has outputs: where one has, the
    model may be a backbone, or have registered its head first.
    """
    weights = list(weights_of(model))
    last = next((target for target in targets if weights and target.parameter is weights[-1].parameter), None)
    mask = None if last is None else masks[last.name]
    if last is None or not isinstance(mask, SeededMask) or mask.pattern != "filter" or not mask.pruned:
        return
    inputs = [(one.parameter.shape, input_dim_of(one.layer)) for one in weights[:-1]]
    if not any(dim is not None and shape[dim] == mask.units for shape, dim in inputs):
        warnings.warn(
            f"pattern='filter' masks {mask.pruned} of the {mask.units} outputs of {last.layer_name or 'the model'}: if"
            " these are the outputs of the whole model, they will be constant. Leave the layer dense with"
            f" exclude=[{last.layer_name!r}].",
            stacklevel=stacklevel,
        )

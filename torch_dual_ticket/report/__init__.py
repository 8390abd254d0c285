"""Tables and plots of a ticket, and its history.

=============================  ======================================================================================
``print(summary(model))``      the layers as a table: shape, pattern, sparsity, kept, residual, λ
``history = History(rst)``     records λ, residual and norms at each ``history.record()``, without waiting for a GPU
``plot(history)``              a matplotlib figure of that
``plot_sparsity(model)``       a matplotlib figure of the layers
``history.log_to(writer)``     the history to TensorBoard, or to another writer with ``add_scalar``
=============================  ======================================================================================

``rst.finalize()`` returns a :class:`Report`. Plots need matplotlib, and tables look better with rich: both are in the
extra ``report`` of this package (``pip install matplotlib rich``).
"""

from .._rst.residual import LayerReport, Report
from .history import History, Record
from .plots import plot, plot_sparsity
from .summary import LayerSummary, Summary, summary

__all__ = [
    "History",
    "LayerReport",
    "LayerSummary",
    "Record",
    "Report",
    "Summary",
    "plot",
    "plot_sparsity",
    "summary",
]

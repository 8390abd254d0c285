"""Random tickets for PyTorch: train a sparse network chosen before the first batch."""

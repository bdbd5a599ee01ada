"""Figures are read from compiled kernels here, on machines without a GPU."""

"""What is read from compiled kernels, on machines without a GPU."""

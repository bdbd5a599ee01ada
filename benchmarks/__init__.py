"""Speed and memory of the kernels are measured here beside their peers: ``python -m benchmarks SUITE``."""

"""Reads and writes models on disk and on the hub: files, names of tensors, quantized weights."""
